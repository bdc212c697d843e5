"""PyTorch tensors through the compiled kernels: one call forward, one backward, activation and residual sum included.

Saved for the backward pass are the input (which the layer before keeps anyway), the residual if an activation follows,
gamma and beta, and three numbers a statistic. The input of the activation is computed again.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from normkit.core import formula
from normkit.core.formula import Moments
from normkit.core.plan import NormPlan
from normkit.core.spec import NormSpec
from normkit.kernels import registry
from normkit.kernels.native import (
    ACTIVATIONS,
    TYPES,
    Geometry,
    Layout,
    available,
    evaluation,
    geometry,
    instruction_set,
    missing,
)
from normkit.torch._layout import CHANNELS_LAST, layout_of

__all__ = ["Normalized", "covers", "evaluate", "keep", "normalize", "threads"]

_native = available()
_DTYPES = {torch.float32: TYPES["float32"], torch.bfloat16: TYPES["bfloat16"]}
_SET = instruction_set()
_ALONE = 1 << 16  # values below which a second thread costs more than it saves
_HUGE = 32 << 20  # bytes; glibc maps what is larger anew for every allocation, whatever its threshold has grown to


class Normalized(NamedTuple):
    """What a kernel gave: the output, and variance, mean and rest of the mean of every statistic."""

    y: Tensor
    statistics: Tensor
    found: Geometry

    def moments(self) -> list[Moments]:
        """The same as for the formula."""
        var, mean, rest = self.statistics.unbind()
        found = self.found
        return [Moments((mean + rest).reshape(found.kept), var.reshape(found.kept), found.values, found.values)]


def normalize(
    spec: NormSpec,
    p: NormPlan,
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
    activation: str | None,
    residual: Tensor | None,
) -> Normalized | None:
    """Return act(norm(x) + residual) in the type of x and the statistics, or None where no kernel covers the case.

    The caller has made sure that nothing but eager autograd is watching.
    """
    layout = layout_of(x)
    if not registry.tried("native", spec.name, x.dtype, layout, x.shape):
        return None
    found = covers(spec, p, x, gamma, beta, residual)
    if isinstance(found, str):
        registry.refused("native", found)
        return None
    if gamma is not None and spec.gain == "1+w":
        gamma = gamma.float() + 1.0  # not in half precision, which has no room for both
    y, statistics = _Normalize.apply(x, residual, gamma, beta, spec, p, found, eps, activation)
    return Normalized(y, statistics, found)


def keep(spec: NormSpec, done: Normalized, kept: dict[str, Tensor], rate: float | None, *, skip: bool) -> bool | None:
    """Write the statistics of a batch into the running ones, as `_buffers.keep` does with more words.

    Returns whether they were finite (only then, or without `skip`, something is written); None where the case is not
    covered: groups to be merged, other types, averages over all batches.
    """
    values = done.found.values
    covered = (
        rate is not None
        and [t.name for t in spec.tracked] == ["mean", "var"]
        and values > 1
        and all(
            type(t) is Tensor
            and t.dtype == torch.float32
            and t.device.type == "cpu"
            and t.is_contiguous()
            and t.numel() == done.found.statistics
            for t in kept.values()
        )
    )
    if not covered:
        return None
    var, mean, rest = _places(done.statistics)
    unbiased = values / (values - 1) if spec.tracked[1].bessel else 1.0
    buffers = kept["mean"], kept["var"]
    finite: bool = _native.keep(
        done.found.statistics, mean, rest, var, *(t.data_ptr() for t in buffers), rate, unbiased, skip
    )
    torch.autograd.graph.increment_version(buffers)  # the kernel wrote behind autograd's back
    return finite


def evaluate(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
    activation: str | None,
    residual: Tensor | None,
) -> Tensor | None:
    """Return act((x - mean) / sqrt(var + eps) * gamma + beta + residual), or None where no kernel covers the case."""
    layout = layout_of(x)
    if not registry.tried("native", "batch_norm", x.dtype, layout, x.shape):
        return None
    numbers = _covers_given(layout, x, mean, var, gamma, beta, residual)
    if isinstance(numbers, str):
        registry.refused("native", numbers)
        return None
    result: Tensor = _Evaluate.apply(x, residual, gamma, beta, mean, var, numbers, eps, activation)
    return result


class _Normalize(torch.autograd.Function):
    """Statistics of the input."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        gamma: Tensor | None,
        beta: Tensor | None,
        spec: NormSpec,
        p: NormPlan,
        found: Geometry,
        eps: float,
        activation: str | None,
    ) -> tuple[Tensor | None, ...]:
        statistics = torch.empty((3 if spec.center else 1, found.statistics), dtype=torch.float32)
        y = _forward(found.numbers, x, residual, gamma, beta, _places(statistics), eps, spec.center, False, activation)
        ctx.save_for_backward(x, residual if activation is not None else None, gamma, beta, statistics)
        ctx.normalizer = spec, p, found, eps, activation, residual is not None
        ctx.mark_non_differentiable(statistics)
        ctx.set_materialize_grads(False)
        return y, statistics

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if dy is None:
            return (None,) * 9
        x, residual, gamma, beta, statistics = ctx.saved_tensors
        spec, p, found, eps, activation, summed = ctx.normalizer
        needs = ctx.needs_input_grad[:4]
        if torch.is_grad_enabled():

            def again(x: Tensor, gamma: Tensor | None, beta: Tensor | None) -> Tensor:
                plain = replace(spec, gain="w")  # gamma is whole here
                return formula.normalize(torch, plain, p, x, gamma, beta, eps=eps)[0]

            return (*_twice(again, dy, x, residual, gamma, beta, activation, summed, needs), *(None,) * 5)
        places, center = _places(statistics), spec.center
        gradients = _backward(
            found.numbers, dy, x, residual, gamma, beta, places, eps, center, False, activation, summed, needs
        )
        return (*gradients, None, None, None, None, None)


class _Evaluate(torch.autograd.Function):
    """Statistics that are given, and constants of the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        gamma: Tensor | None,
        beta: Tensor | None,
        mean: Tensor,
        var: Tensor,
        numbers: tuple[int, ...],
        eps: float,
        activation: str | None,
    ) -> Tensor:
        if any(ctx.needs_input_grad):  # buffers may change before the backward pass
            mean, var = mean.clone(), var.clone()
            ctx.save_for_backward(x, residual if activation is not None else None, gamma, beta, mean, var)
            ctx.normalizer = numbers, eps, activation, residual is not None
        ctx.set_materialize_grads(False)
        places = var.data_ptr(), mean.data_ptr(), 0
        return _forward(numbers, x, residual, gamma, beta, places, eps, True, True, activation)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return (None,) * 9
        x, residual, gamma, beta, mean, var = ctx.saved_tensors
        numbers, eps, activation, summed = ctx.normalizer
        needs = ctx.needs_input_grad[:4]
        if torch.is_grad_enabled():
            shape = (1, -1, *(1,) * (x.dim() - 2))

            def again(x: Tensor, gamma: Tensor | None, beta: Tensor | None) -> Tensor:
                y = (x - mean.reshape(shape)) * torch.rsqrt(var + eps).reshape(shape)
                y = y if gamma is None else y * gamma.reshape(shape)
                return y if beta is None else y + beta.reshape(shape)

            return (*_twice(again, dy, x, residual, gamma, beta, activation, summed, needs), *(None,) * 5)
        places = var.data_ptr(), mean.data_ptr(), 0
        gradients = _backward(numbers, dy, x, residual, gamma, beta, places, eps, True, True, activation, summed, needs)
        return (*gradients, None, None, None, None, None)


def _forward(
    numbers: tuple[int, ...],
    x: Tensor,
    residual: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    places: tuple[int, int, int],
    eps: float,
    center: bool,
    given: bool,
    activation: str | None,
) -> Tensor:
    y = _empty_like(x)
    gamma, beta = _single(gamma), _single(beta)
    residual = None if residual is None else _like(residual, x)
    addresses = map(_address, (x, residual, gamma, beta, y))
    kind, act = _DTYPES[x.dtype], ACTIVATIONS[activation]
    _native.forward(_SET, numbers, *addresses, *places, eps, center, given, kind, act, threads(x))
    return y


def _backward(
    numbers: tuple[int, ...],
    dy: Tensor,
    x: Tensor,
    residual: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    places: tuple[int, int, int],
    eps: float,
    center: bool,
    given: bool,
    activation: str | None,
    summed: bool,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    dy = _like(dy, x)
    residual = None if residual is None else _like(residual, x)
    own_gamma, own_beta = _single(gamma), _single(beta)
    dx = _empty_like(x) if needs[0] else None
    # Without an activation the gradient goes through the sum as it is.
    through = summed and needs[1] and activation is not None
    dresidual = _empty_like(x) if through else None
    dgamma = torch.empty(gamma.shape, dtype=torch.float32) if gamma is not None and needs[2] else None
    dbeta = torch.empty(beta.shape, dtype=torch.float32) if beta is not None and needs[3] else None
    tensors = (dy, x, residual, own_gamma, own_beta, dx, dresidual, dgamma, dbeta)
    kind, act = _DTYPES[x.dtype], ACTIVATIONS[activation]
    _native.backward(_SET, numbers, *map(_address, tensors), *places, eps, center, given, kind, act, threads(x))
    if summed and needs[1] and not through:
        dresidual = dy
    narrow = [None if g is None or t is None else g.to(t.dtype) for g, t in ((dgamma, gamma), (dbeta, beta))]
    return dx, dresidual, *narrow


def _twice(
    again: Any,
    dy: Tensor,
    x: Tensor,
    residual: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    activation: str | None,
    summed: bool,
    needs: tuple[bool, ...],
) -> list[Tensor | None]:
    """The gradients by plain operations, which can be differentiated again."""
    from normkit.torch.functional import ACTIVATIONS as FUNCTIONS

    own = [None if t is None else t.view_as(t) for t in (x, residual, gamma, beta)]
    wide = [None if t is None else t.float() for t in own]
    y = again(wide[0], wide[2], wide[3])
    if wide[1] is not None:
        y = y + wide[1]
    if activation is not None:
        y = FUNCTIONS[activation](y)
    wanted = [t for t, need in zip(own, needs, strict=True) if need and t is not None]
    found = iter(torch.autograd.grad(y, wanted, dy.float(), create_graph=True))
    gradients = [next(found) if need and t is not None else None for t, need in zip(own, needs, strict=True)]
    if summed and needs[1] and residual is None:
        gradients[1] = dy
    return gradients


def covers(
    spec: NormSpec, p: NormPlan, x: Tensor, gamma: Tensor | None, beta: Tensor | None, residual: Tensor | None = None
) -> Geometry | str:
    """The geometry of a case, or why no compiled kernel covers it."""
    layout = layout_of(x)
    reason = _unfit(layout, x, residual, gamma, beta)
    if reason or layout is None:
        return reason
    found = geometry(spec.name, p, tuple(x.shape), layout)
    return missing() if _native is None and not isinstance(found, str) else found


def _covers_given(
    layout: Layout | None,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
) -> tuple[int, ...] | str:
    """The same, where the statistics are given."""
    reason = _unfit(layout, x, residual, gamma, beta)
    if reason or layout is None:
        return reason
    if not x.numel():
        return "an empty input"
    if any(t.dtype != torch.float32 or not t.is_contiguous() or t.device.type != "cpu" for t in (mean, var)):
        return "running statistics that are not contiguous float32"
    return missing() if _native is None else evaluation(tuple(x.shape), layout)


def _unfit(layout: Layout | None, x: Tensor, residual: Tensor | None, *affine: Tensor | None) -> str:
    """Why no kernel can take such tensors; empty if one can."""
    if x.device.type != "cpu":
        return f"an input on {x.device.type}"
    if x.dtype not in _DTYPES:
        return f"an input of {str(x.dtype)[6:]}"
    if layout is None:
        return "an input that is neither contiguous nor channels_last"
    if residual is not None and (residual.dtype != x.dtype or residual.device != x.device):
        return "a residual of another type or device"
    if any(t is not None and (t.device.type != "cpu" or t.dtype not in _DTYPES) for t in affine):
        return "gamma or beta of a type that is neither float32 nor bfloat16"
    return ""


def _empty_like(x: Tensor) -> Tensor:
    y = torch.empty_like(x)
    if x.nbytes > _HUGE:
        _native.want_huge_pages(y.data_ptr(), x.nbytes)
    return y


def _like(t: Tensor, x: Tensor) -> Tensor:
    """In the type and order of the input."""
    t = t.to(x.dtype)
    if t.stride() == x.stride():
        return t
    return t.contiguous() if x.is_contiguous() else t.contiguous(memory_format=CHANNELS_LAST[x.dim()])


def _single(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.detach().float().contiguous()


def _places(statistics: Tensor) -> tuple[int, int, int]:
    """Addresses of variance, mean and the rest of the mean; 0 where nothing is centred."""
    first, step = statistics.data_ptr(), statistics.stride(0) * statistics.element_size()
    return (first, first + step, first + 2 * step) if len(statistics) == 3 else (first, 0, 0)


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def threads(x: Tensor) -> int:
    """How many threads a kernel uses on such a tensor."""
    return 1 if x.numel() < _ALONE else torch.get_num_threads()
