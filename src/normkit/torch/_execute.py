"""Which code runs a plan on PyTorch tensors.

| situation | what runs |
|---|---|
| eager, and `_compiled.covers` has nothing against it | our compiled kernel, called before anything here |
| eager, and a row of `_KERNELS` covers it | PyTorch's kernel |
| eager, otherwise | `_Normalize`: the formula forward, the closed form backward; saves x, gamma and one value a
statistic |
| torch.compile, torch.func, forward AD, tensor subclasses, double backward | the formula in plain operations |
| torch.export | PyTorch's own functions where there is one, so that what is shipped needs no normkit |

All of them pass the same conformance suite. In eager mode `kernels.registry` may begin further down this table, and
`use_kernel` picks one row, the oracle of `core.reference` among them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from normkit.core import formula
from normkit.core.axes import Sizes
from normkit.core.formula import Correct, Moments
from normkit.core.plan import NormPlan, count, kept_shape, parts
from normkit.core.reference import reference
from normkit.core.spec import NormSpec
from normkit.errors import NormRuntimeError, message
from normkit.kernels import registry
from normkit.torch._buffers import watched
from normkit.torch._layout import CHANNELS_LAST, layout_of

__all__ = ["accumulator", "covers", "evaluate", "needs_plain", "normalize"]


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Return the type in which statistics of such inputs accumulate: float32 or wider."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def normalize(
    spec: NormSpec,
    p: NormPlan,
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
    *,
    weight: Tensor | None = None,
    correct: Correct | None = None,
) -> tuple[Tensor, list[Moments]]:
    """Normalize by the statistics of the input.

    The output may still be wider than the input. Kernels return moments only where the spec tracks something.
    """
    if weight is None and x.numel() > 0 and torch.compiler.is_exporting() and spec.name in _EXPORTED:
        return _EXPORTED[spec.name](p, x, _whole_gain(spec, gamma), beta, eps)
    plain = needs_plain(x, gamma, beta)
    if not plain:
        registry.refused("native", "arguments that only the formula takes (mask, sample_weight, renorm, cast)")
        if registry.chosen() == "reference":
            return _by_reference(spec, p, x, gamma, beta, eps, weight, correct)
    kernel = None if plain else _allowed(spec, p, x, gamma, beta, weight)
    if kernel is not None:
        if correct is None:
            return kernel(p, x, _whole_gain(spec, gamma), beta, eps)
        normalized, (m,) = kernel(p, x, None, None, eps)
        correction = correct(m.mean, torch.sqrt(m.var + eps))
        shape = kept_shape(p, tuple(x.shape))
        return formula.scaled(torch, spec, shape, normalized, 1.0, gamma, beta, correction), [m]
    wide = accumulator(x.dtype)
    views = parts(p, tuple(x.shape))
    if plain or correct is not None or len(views) > 1 or not _wants_grad(x, gamma, beta):
        wider = x.to(wide), _to(gamma, wide), _to(beta, wide)
        return formula.normalize(torch, spec, p, *wider, eps=eps, weight=weight, correct=correct)
    y, mean, var, total, effective = _Normalize.apply(x, gamma, beta, weight, spec, p, eps)
    if weight is None:
        total = effective = count(p, views[0][2])
    return y, [Moments(mean, var, total, effective, weighted=weight is not None)]


def evaluate(
    spec: NormSpec,
    p: NormPlan,
    x: Tensor,
    kept: dict[str, Tensor],
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
) -> Tensor:
    """Normalize by kept statistics. The output may be wider than the input."""
    if torch.compiler.is_exporting() and "var" in kept:
        return F.batch_norm(x, kept["mean"], kept["var"], gamma, beta, False, 0.0, eps)
    tensors = (*kept.values(), gamma, beta)
    plain = needs_plain(x, *tensors)
    if not plain:
        registry.refused("native", "arguments that only the formula takes (mask, running standard deviations)")
        if registry.chosen() == "reference":
            return _evaluate_by_reference(spec, p, x, kept, gamma, beta, eps)
    if not plain and _torch_evaluates(spec, x, kept, tensors):
        # PyTorch's kernel computes x * scale + shift; on the deviation that keeps its digits.
        mean = kept["mean"]
        deviation = x - mean.reshape(kept_shape(p, tuple(x.shape)))
        var = kept["var"].clone()  # it is saved for the backward pass, and the buffer may change before that
        return F.batch_norm(deviation, torch.zeros_like(mean), var, gamma, beta, False, 0.0, eps)
    wide = torch.float64 if kept["mean"].dtype == torch.float64 else accumulator(x.dtype)
    return formula.evaluate(torch, spec, p, x.to(wide), kept, _to(gamma, wide), _to(beta, wide), eps=eps)


def _torch_evaluates(spec: NormSpec, x: Tensor, kept: dict[str, Tensor], tensors: tuple[Tensor | None, ...]) -> bool:
    layout = layout_of(x)
    if not registry.tried("torch", spec.name, x.dtype, layout, x.shape):
        return False
    if "var" in kept and layout is not None and _kernel_types(x, *tensors):
        return True
    registry.refused("torch", "an input or statistics of another type, layout or device than its kernel takes")
    return False


def _by_reference(
    spec: NormSpec,
    p: NormPlan,
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
    weight: Tensor | None,
    correct: Correct | None,
) -> tuple[Tensor, list[Moments]]:
    """Outputs by the oracle. What is kept of the statistics is the formula's, in float64."""
    if correct is not None:
        registry.refused("reference", "a correction by running statistics (renorm), which needs its clips")
    wide = x.detach().double()
    _, moments = formula.normalize(torch, spec, p, wide, None, None, eps=eps, weight=weight)
    weights = None if weight is None else _array(weight.expand(x.shape))
    return _oracle(spec, p, x, gamma, beta, eps, weight=weights), moments


def _evaluate_by_reference(
    spec: NormSpec,
    p: NormPlan,
    x: Tensor,
    kept: dict[str, Tensor],
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
) -> Tensor:
    arrays = {name: _array(t) for name, t in kept.items()}
    return _oracle(spec, p, x, gamma, beta, eps, kept=arrays, training=False)


def _oracle(
    spec: NormSpec, p: NormPlan, x: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float, **how: Any
) -> Tensor:
    if _wants_grad(x, gamma, beta):
        must = 'use_kernel("reference") computes outputs only, and no gradient may be asked for'
        raise NormRuntimeError(message(must, hint='torch.no_grad(), or use_kernel("formula")'))
    first, second = (None if t is None else _array(t) for t in (gamma, beta))
    y = reference(spec, _array(x), first, second, sizes=_sizes(spec, p), eps=eps, **how).y
    return torch.from_numpy(np.asarray(y)).reshape(x.shape).to(x.device)


def _sizes(spec: NormSpec, p: NormPlan) -> Sizes:
    """The static sizes that the plan was compiled with, by name."""
    names = next((token for token in spec.axes if len(token) == 2), None)
    if names is not None:
        outer, inner = next(split for split in p.view if len(split) == 2)
        return ((names[0], outer),) if inner == -1 else ((names[1], inner),)
    lengths = tuple(length for _, length in p.fixed)
    return ((spec.axes[-1][0], lengths),) if lengths else ()


def _array(t: Tensor) -> Any:
    return t.detach().double().cpu().numpy()


class _Normalize(torch.autograd.Function):
    """The formula over one part, with its closed-form backward: it saves x, gamma and two values a statistic."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gamma: Tensor | None,
        beta: Tensor | None,
        weight: Tensor | None,
        spec: NormSpec,
        p: NormPlan,
        eps: float,
    ) -> tuple[Tensor | None, ...]:
        wide = accumulator(x.dtype)
        wider = x.to(wide), _to(gamma, wide), _to(beta, wide)
        y, (m,) = formula.normalize(torch, spec, p, *wider, eps=eps, weight=weight)
        totals = (None, None) if weight is None else (m.total, m.effective)
        # Statistics are saved as tensors of their own, never the buffers: several forwards before one backward are
        # safe.
        ctx.save_for_backward(x, gamma, beta, weight, m.mean, m.var)
        ctx.normalizer = spec, p, eps
        ctx.mark_non_differentiable(*(t for t in (m.mean, m.var, *totals) if t is not None))
        ctx.set_materialize_grads(False)
        return (y, m.mean, m.var, *totals)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if dy is None:
            return (None,) * 7
        x, gamma, beta, weight, mean, var = ctx.saved_tensors
        spec, p, eps = ctx.normalizer
        wide = accumulator(x.dtype)
        if torch.is_grad_enabled():
            # Tensors of their own: x may be made of gamma (a layer used twice), whose gradient here is not through x.
            x, gamma, beta = (None if t is None else t.view_as(t) for t in (x, gamma, beta))
        wider: tuple[Any, ...] = x.to(wide), _to(gamma, wide), _to(beta, wide)
        needs = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():  # double backward: the closed form takes mean and var for constants
            y = formula.normalize(torch, spec, p, *wider, eps=eps, weight=weight)[0]
            wanted = [t for t, need in zip((x, gamma, beta), needs, strict=True) if need]
            found = iter(torch.autograd.grad(y, wanted, dy.to(wide), create_graph=True))
            return (*(next(found) if need else None for need in needs), None, None, None, None)
        saved = [Moments(mean, var, None, None)]
        wide_x, wide_gamma, wide_beta = wider
        g = formula.backward(torch, spec, p, dy.to(wide), wide_x, wide_gamma, wide_beta, saved, eps=eps, weight=weight)
        narrowed = (a.to(t.dtype) if need else None for a, t, need in zip(g, (x, gamma, beta), needs, strict=True))
        return (*narrowed, None, None, None, None)


Kernel = Callable[[NormPlan, Tensor, Tensor | None, Tensor | None, float], tuple[Tensor, list[Moments]]]


def _batch_norm(p: NormPlan, x: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float) -> Any:
    # With momentum 1 the "running" statistics are those of this batch, and may be thrown away.
    mean, var = x.new_zeros(x.shape[1]), x.new_ones(x.shape[1])
    y, _, _ = torch.native_batch_norm(x, gamma, beta, mean, var, True, 1.0, eps)
    shape, n = kept_shape(p, tuple(x.shape)), x.numel() // x.shape[1]
    return y, [Moments(mean.reshape(shape), (var * ((n - 1) / n)).reshape(shape), n, n)]


def _instance_norm(p: NormPlan, x: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float) -> Any:
    return F.instance_norm(x, None, None, gamma, beta, True, 0.0, eps), []


def _layer_norm(p: NormPlan, x: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float) -> Any:
    return F.layer_norm(x, x.shape[p.reduce[0] :], gamma, beta, eps), []


def _over_channels(kernel: Callable[..., Tensor]) -> Kernel:
    """Return a kernel over rows as one over channels: PyTorch normalizes the last axis, so the channels go there."""

    def run(p: NormPlan, x: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float) -> Any:
        affine = (gamma, beta) if kernel is F.layer_norm else (gamma,)
        y = kernel(x.movedim(1, -1), (x.shape[1],), *affine, eps).movedim(-1, 1)
        return (y.contiguous() if x.is_contiguous() else y), []

    return run


def _group_norm(p: NormPlan, x: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float) -> Any:
    return F.group_norm(x, p.view[1][0], gamma, beta, eps), []


def _rms_norm(p: NormPlan, x: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float) -> Any:
    return F.rms_norm(x, x.shape[p.reduce[0] :], gamma, eps), []


def _contiguous_group_norm(p: NormPlan, x: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float) -> Any:
    y, _ = _group_norm(p, x.contiguous(), gamma, beta, eps)
    return y.contiguous(memory_format=CHANNELS_LAST[x.dim()]), []


# PyTorch's own CPU kernels that meet the tolerance, by normalizer and layout. Its group norm in channels_last does not:
# it computes E[x^2] - E[x]^2 (error 1e3 at mean/std 1e4), so the tensor is copied for the other kernel. Renorm corrects
# what batch norm gives; ghost batches have none. Devices and types not listed have not been measured and take the
# formula.
_KERNELS: dict[tuple[str, str], Kernel] = {
    ("batch_norm", "contiguous"): _batch_norm,
    ("instance_norm", "contiguous"): _instance_norm,
    ("instance_norm", "channels_last"): _instance_norm,
    ("layer_norm", "contiguous"): _layer_norm,
    ("layer_norm", "channels_last"): _layer_norm,
    ("group_norm", "contiguous"): _group_norm,
    ("group_norm", "channels_last"): _contiguous_group_norm,
    ("rms_norm", "contiguous"): _rms_norm,
    ("rms_norm", "channels_last"): _rms_norm,
    ("batch_renorm", "contiguous"): _batch_norm,
    ("layer_norm_2d", "contiguous"): _over_channels(F.layer_norm),
    ("layer_norm_2d", "channels_last"): _over_channels(F.layer_norm),
    ("rms_norm_2d", "contiguous"): _over_channels(F.rms_norm),
    ("rms_norm_2d", "channels_last"): _over_channels(F.rms_norm),
}
# Batch norm of (N, C) adds the rows one by one in float32, and so it does in channels_last, which has no row above for
# that: with 1e5 values at mean/std 1e4 its variance came out 57 times too large. A few rows are harmless.
_FEW_ROWS = 64
_KERNEL_DTYPES = (torch.float32, torch.float64)

# PyTorch's own functions where a program is exported: the operations that other runtimes know.
_EXPORTED: dict[str, Kernel] = {
    "layer_norm": _layer_norm,
    "group_norm": _group_norm,
    "rms_norm": _rms_norm,
}


def _whole_gain(spec: NormSpec, gamma: Tensor | None) -> Tensor | None:
    return gamma + 1.0 if gamma is not None and spec.gain == "1+w" else gamma


def _allowed(
    spec: NormSpec, p: NormPlan, x: Tensor, gamma: Tensor | None, beta: Tensor | None, weight: Tensor | None
) -> Kernel | None:
    """PyTorch's kernel for this case, if it covers it and may be used."""
    if not registry.tried("torch", spec.name, x.dtype, layout_of(x), x.shape):
        return None
    found = "a mask or sample weights" if weight is not None else covers(spec, p, x, gamma, beta)
    if isinstance(found, str):
        registry.refused("torch", found)
        return None
    return found


def covers(spec: NormSpec, p: NormPlan, x: Tensor, gamma: Tensor | None, beta: Tensor | None) -> Kernel | str:
    """PyTorch's kernel for this case, or why none is used."""
    if not x.numel():
        return "an empty input"
    if spec.name == "instance_norm" and spec.tracked:
        return "its statistics are kept, and PyTorch's kernel does not return them"
    if "batch" in spec.name and x.dim() == 2 and x.shape[0] > _FEW_ROWS:
        return f"more than {_FEW_ROWS} rows, which PyTorch's kernel adds up one by one"
    if spec.name == "group_norm" and x.numel() == x.shape[0] * p.view[1][0]:
        # F.group_norm makes these an error in a batch of one sample, and not in others.
        return "groups of one value"
    if not _kernel_types(x, gamma, beta):
        return "not all of one type, float32 or float64, on the CPU"
    return _KERNELS.get((spec.name, layout_of(x) or "other"), "no kernel of PyTorch's is exact here")


def _kernel_types(x: Tensor, *others: Tensor | None) -> bool:
    """Whether everything is of one type on a CPU, as PyTorch's kernels want it."""
    same = all(t is None or t.dtype == x.dtype for t in others)
    return same and x.device.type == "cpu" and x.dtype in _KERNEL_DTYPES


def needs_plain(*tensors: Tensor | None) -> bool:
    """Whether something other than eager autograd is watching: then only plain operations are understood."""
    if watched() or forward_ad._current_level >= 0:
        return True
    return any(t is not None and type(t) not in (Tensor, torch.nn.Parameter) for t in tensors)


def _wants_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _to(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if t is None else t.to(dtype)
