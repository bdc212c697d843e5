"""The normalizers as functions: PyTorch's own argument order first, ours keyword only behind it.

All compute y = act(normalized * gamma + beta + residual). Statistics accumulate in float32 or wider and the output has
the type of the input. `mask` is boolean, True = real data, broadcastable to the input without its channel axis: other
positions stay out of the statistics, their output is 0 and they get no gradient. `sample_weight` (real, >= 0, of shape
(N,) or like `mask`) weighs positions in the statistics; only its proportions count, so the variance's Bessel factor
uses n = sum(w)^2 / sum(w^2). Errors are NormValueError and NormTypeError, which are ValueError and TypeError.
"""

from __future__ import annotations

import numbers
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from normkit.core import activated, catalog, formula, plan
from normkit.core.axes import Sizes
from normkit.core.constraints import check
from normkit.core.plan import NormPlan
from normkit.core.spec import ARGUMENTS, NormSpec
from normkit.errors import NormRuntimeError, NormTypeError, NormValueError, message, nearest
from normkit.torch import _compiled as compiled
from normkit.torch import _halves as halves
from normkit.torch._buffers import keep, recomputing, watched
from normkit.torch._execute import accumulator, evaluate, needs_plain, normalize
from normkit.torch._processes import highest, normalize_together

__all__ = [
    "ACTIVATIONS",
    "add_layer_norm",
    "add_rms_norm",
    "batch_norm",
    "batch_renorm",
    "dynamic_tanh",
    "evonorm_b0",
    "evonorm_s0",
    "filter_response_norm",
    "ghost_batch_norm",
    "global_response_norm",
    "group_norm",
    "instance_norm",
    "layer_norm",
    "layer_norm_2d",
    "rms_norm",
    "rms_norm_2d",
]

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "relu6": F.relu6,
    "leaky_relu": F.leaky_relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "hardswish": F.hardswish,
}


def _biased(spec: NormSpec) -> NormSpec:
    return replace(spec, tracked=tuple(replace(t, bessel=False) for t in spec.tracked))


_BIASED = {s.name: _biased(s) for s in (catalog.BATCH, catalog.GHOST, catalog.INSTANCE_TRACKED, catalog.EVONORM_B0)}
_SMALLEST = torch.finfo(torch.float32).eps  # PyTorch's, for what accumulates in float32
_GAINS = {(s.name, gain): replace(s, gain=gain) for s in (catalog.RMS, catalog.RMS_2D) for gain in ("w", "1+w")}


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    *,
    num_batches_tracked: Tensor | None = None,
    bessel: bool = True,
    nonfinite: str = "skip",
    mask: Tensor | None = None,
    sample_weight: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
    process_group: Any = None,
) -> Tensor:
    """Batch normalization over all axes but the second (arXiv:1502.03167).

    In training, and wherever there are no running statistics, by the mean and biased variance of the batch; then
    `running_* += momentum * (batch - running_*)` in place, with the unbiased variance unless `bessel=False`.
    `momentum=None` averages all batches equally and needs `num_batches_tracked`. In evaluation by the running
    statistics. With a `process_group` of torch.distributed the batch is that of all its processes together, each of
    which has to call this.

    Shapes: input (N, C, *S); running_mean, running_var, weight, bias (C,).

    Raises:
        NormValueError: for one value per channel in training, and for shapes that do not fit.
    """
    return _tracked(
        _spec(catalog.BATCH, bessel),
        input,
        _kept(running_mean, var=running_var),
        num_batches_tracked,
        weight,
        bias,
        training=training,
        momentum=momentum,
        eps=eps,
        nonfinite=nonfinite,
        mask=mask,
        sample_weight=sample_weight,
        activation=activation,
        residual=residual,
        process_group=process_group,
    )


def ghost_batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    *,
    virtual_batch_size: int,
    num_batches_tracked: Tensor | None = None,
    bessel: bool = True,
    nonfinite: str = "skip",
    mask: Tensor | None = None,
    sample_weight: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Batch normalization in groups of `virtual_batch_size` consecutive samples (arXiv:1705.08741).

    Samples left over form one short group (a single value joins the group before it). The statistics of all groups
    enter
    the running ones as one update: means weighted by size, variances pooled, sum(n var) / sum(n - 1). The paper makes
    one update per group instead. Evaluation is that of :func:`batch_norm`.

    Shapes: as :func:`batch_norm`.
    """
    return _tracked(
        _spec(catalog.GHOST, bessel),
        input,
        _kept(running_mean, var=running_var),
        num_batches_tracked,
        weight,
        bias,
        sizes=_virtual(virtual_batch_size),
        training=training,
        momentum=momentum,
        eps=eps,
        nonfinite=nonfinite,
        mask=mask,
        sample_weight=sample_weight,
        activation=activation,
        residual=residual,
    )


def batch_renorm(
    input: Tensor,
    running_mean: Tensor,
    running_std: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | None = 0.01,
    eps: float = 1e-5,
    *,
    r_max: float | Tensor = 3.0,
    d_max: float | Tensor = 5.0,
    num_batches_tracked: Tensor | None = None,
    nonfinite: str = "skip",
    mask: Tensor | None = None,
    sample_weight: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Batch renormalization (arXiv:1702.03275): the batch statistics, corrected towards the running ones.

    In training normalized = (x - mean) / std * r + d with std = sqrt(var + eps), r = clip(std / running_std, 1/r_max,
    r_max) and d = clip((mean - running_mean) / running_std, -d_max, d_max), which are constants of the backward pass.
    Within the clips that is what evaluation, (x - running_mean) / running_std, computes. The running statistics used
    are those before this batch; the standard deviation itself is averaged, without Bessel's factor, as in the paper.

    Shapes: input (N, C, *S); running_mean, running_std, weight, bias (C,).
    """
    return _tracked(
        catalog.RENORM,
        input,
        _kept(running_mean, std=running_std),
        num_batches_tracked,
        weight,
        bias,
        clips=(r_max, d_max),
        training=training,
        momentum=momentum,
        eps=eps,
        nonfinite=nonfinite,
        mask=mask,
        sample_weight=sample_weight,
        activation=activation,
        residual=residual,
    )


def instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    *,
    num_batches_tracked: Tensor | None = None,
    bessel: bool = True,
    nonfinite: str = "skip",
    mask: Tensor | None = None,
    sample_weight: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Instance normalization: each channel of each sample over its positions (arXiv:1607.08022).

    Where running statistics are given they follow the average over the instances, as in PyTorch;
    `use_input_stats=False` normalizes by them.

    Shapes: input (N, C, *S); the rest (C,).

    Raises:
        NormValueError: for maps of a single position, which have no variance.
    """
    return _tracked(
        _spec(catalog.INSTANCE_TRACKED, bessel),
        input,
        _kept(running_mean, var=running_var),
        num_batches_tracked,
        weight,
        bias,
        untracked=catalog.INSTANCE,
        training=use_input_stats,
        momentum=momentum,
        eps=eps,
        nonfinite=nonfinite,
        mask=mask,
        sample_weight=sample_weight,
        activation=activation,
        residual=residual,
    )


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Layer normalization over the last axes, those of `normalized_shape` (arXiv:1607.06450).

    Shapes: input (*, *normalized_shape); weight and bias normalized_shape. A single value normalizes to 0, so its
    output is the bias.
    """
    return _untracked(catalog.LAYER, _trailing(normalized_shape), input, weight, bias, eps, activation, residual)


def layer_norm_2d(
    input: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Layer normalization over the channels of each position of (N, C, *S), as in ConvNeXt (arXiv:2201.03545).

    Shapes: input (N, C, *S); weight and bias (C,).
    """
    return _untracked(catalog.LAYER_2D, (), input, weight, bias, eps, activation, residual)


def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    mask: Tensor | None = None,
    sample_weight: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Group normalization: groups of channels of each sample over their channels and positions (arXiv:1803.08494).

    Shapes: input (N, C, *S) with C divisible by `num_groups`; weight and bias (C,). A group of a single value
    normalizes to 0, whatever the batch size.
    """
    _check("group_norm", num_groups=num_groups)
    sizes = (("g", num_groups),)
    return _untracked(
        catalog.GROUP, sizes, input, weight, bias, eps, activation, residual, mask=mask, sample_weight=sample_weight
    )


def rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    gain: str = "w",
    cast: str = "gemma",
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Root mean square normalization, x / sqrt(mean(x^2) + eps) * gamma, over the last axes (arXiv:1910.07467).

    `gain="1+w"` multiplies by 1 + weight. `eps=None` is the machine epsilon of the accumulator, as in PyTorch. `cast`
    says
    where half precision is rounded: "gemma" after the gain (PyTorch's own way), "llama" before it, "none" applies the
    inverse root mean square in the input's type; the mean square itself always accumulates in float32.

    Shapes: input (*, *normalized_shape); weight normalized_shape.
    """
    sizes = _trailing(normalized_shape)
    return _rms(catalog.RMS, sizes, input, weight, eps, gain, cast, activation, residual)


def rms_norm_2d(
    input: Tensor,
    weight: Tensor | None = None,
    eps: float | None = 1e-6,
    *,
    gain: str = "w",
    cast: str = "gemma",
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """:func:`rms_norm` over the channels of each position. Shapes: input (N, C, *S); weight (C,)."""
    return _rms(catalog.RMS_2D, (), input, weight, eps, gain, cast, activation, residual)


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """Return (layer_norm(x + residual), x + residual): the step between two blocks of a pre-norm transformer.

    On CPUs in float32 and bfloat16 it is a single kernel, and so is the backward pass with the gradient of the sum.
    """
    found = _added(catalog.LAYER, normalized_shape, x, residual, weight, bias, eps)
    if found is not None:
        return found
    total = x + residual
    return layer_norm(total, normalized_shape, weight, bias, eps), total


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    gain: str = "w",
    cast: str = "gemma",
) -> tuple[Tensor, Tensor]:
    """Return (rms_norm(x + residual), x + residual), as :func:`add_layer_norm` does."""
    if (cast == "gemma" or x.dtype == accumulator(x.dtype)) and (catalog.RMS.name, gain) in _GAINS:
        spec, small = _GAINS[catalog.RMS.name, gain], _SMALLEST if eps is None else eps
        found = _added(spec, normalized_shape, x, residual, weight, None, small)
        if found is not None:
            return found
    total = x + residual
    return rms_norm(total, normalized_shape, weight, eps, gain=gain, cast=cast), total


def filter_response_norm(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    tau: Tensor,
    eps: float = 1e-6,
    *,
    learned_eps: Tensor | None = None,
    mask: Tensor | None = None,
    sample_weight: Tensor | None = None,
) -> Tensor:
    """Filter response normalization with its thresholded linear unit (arXiv:1911.09737): norm and activation in one.

    y = max(x / sqrt(mean(x^2) + eps + |learned_eps|) * gamma + beta, tau), the mean over the positions of each channel
    of each sample.

    Shapes: input (N, C, *S); weight, bias, tau (C,); learned_eps ().
    """
    spec = catalog.FRN
    p = _plan(spec, input, ())
    _check_affine(spec, p, input, weight, bias, None, tau=tau)
    x, real, w = _weighted(input, mask, sample_weight)
    wide = accumulator(input.dtype)
    if learned_eps is None:
        y, _ = normalize(spec, p, x, weight, bias, eps, weight=w)
    else:
        gamma, beta, more = (t.to(wide) for t in (weight, bias, learned_eps))
        y, _ = formula.normalize(torch, spec, p, x.to(wide), gamma, beta, eps=eps + more.abs(), weight=w)  # type: ignore[arg-type]
    return _finish(activated.thresholded(torch, p, y.to(wide), tau.to(wide)), input, real, None, None)


def evonorm_b0(
    input: Tensor,
    running_var: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    v: Tensor | None,
    training: bool = False,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    *,
    num_batches_tracked: Tensor | None = None,
    bessel: bool = True,
    nonfinite: str = "skip",
    mask: Tensor | None = None,
    sample_weight: Tensor | None = None,
) -> Tensor:
    """EvoNorm-B0 (arXiv:2004.02967): norm and activation in one.

    y = x / max(sqrt(var_batch + eps), v x + sqrt(var_instance + eps)) * gamma + beta. In training, and without
    `running_var`, var_batch is the biased variance of the batch, and `running_var` then follows it as in
    :func:`batch_norm`; in evaluation it is `running_var`. Without `v` all that is left is x * gamma + beta, as in timm.

    Shapes: input (N, C, *S); the rest (C,).

    Raises:
        NormValueError: for inputs without positions, whose instances have no variance; for one value per channel in
            training.
    """
    spec = _spec(catalog.EVONORM_B0, bessel)
    _check(spec.name, momentum=momentum, nonfinite=nonfinite)
    p = _plan(spec, input, ())
    kept = {} if running_var is None else {"var": running_var}
    _check_affine(spec, p, input, weight, bias, kept, v=v)
    if momentum is None and num_batches_tracked is None and kept and training:
        raise _uncounted(spec)
    x, real, w = _weighted(input, mask, sample_weight)
    wide = accumulator(input.dtype)
    x, gamma, beta = x.to(wide), weight.to(wide), bias.to(wide)
    if v is None:
        return _finish(_affine(p, x, gamma, beta), input, real, None, None)
    if input.dim() < 3:
        must = f"{spec.name}: the input must have positions, over which each instance has a variance"
        raise NormValueError(
            message(must, f"shape {tuple(input.shape)}", "use evonorm_s0, which has groups of channels")
        )
    learning = training or not kept
    if learning:
        _check_values(spec, p, input)
    y, moments = activated.evonorm_b0(
        torch,
        spec,
        p,
        _plan(catalog.INSTANCE, input, ()),
        x,
        v.to(wide),
        gamma,
        beta,
        eps=eps,
        weight=w,
        kept=None if learning else {"var": kept["var"].to(wide)},
    )
    if moments is not None and kept:
        keep(spec, p, kept, num_batches_tracked, [moments], momentum=momentum, eps=eps, nonfinite=nonfinite)
    return _finish(y, input, real, None, None)


def evonorm_s0(
    input: Tensor,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    v: Tensor | None,
    eps: float = 1e-5,
    *,
    mask: Tensor | None = None,
    sample_weight: Tensor | None = None,
) -> Tensor:
    """EvoNorm-S0 (arXiv:2004.02967): group norm and activation in one.

    y = x * sigmoid(v x) / sqrt(var_group + eps) * gamma + beta, with the biased variance of each group of channels of
    each sample. Without `v` all that is left is x * gamma + beta, as in timm.

    Shapes: input (N, C, *S) with C divisible by `num_groups`; weight, bias, v (C,).
    """
    spec = catalog.EVONORM_S0
    _check(spec.name, num_groups=num_groups)
    p = _plan(spec, input, (("g", num_groups),))
    _check_affine(spec, p, input, weight, bias, None, v=v)
    x, real, w = _weighted(input, mask, sample_weight)
    wide = accumulator(input.dtype)
    x, gamma, beta = x.to(wide), weight.to(wide), bias.to(wide)
    if v is None:
        y = _affine(p, x, gamma, beta)
    else:
        y = activated.evonorm_s0(torch, spec, p, x, v.to(wide), gamma, beta, eps=eps, weight=w)
    return _finish(y, input, real, None, None)


def dynamic_tanh(input: Tensor, alpha: Tensor, weight: Tensor, bias: Tensor, *, channels_last: bool = True) -> Tensor:
    """Dynamic tanh (arXiv:2503.10622), gamma * tanh(alpha x) + beta, in the place of layer norm.

    Shapes: input (*, *normalized_shape) for a weight and bias of normalized_shape, or (N, C, *S) with
    `channels_last=False` and a weight and bias (C,); alpha one number.
    """
    spec, sizes = (catalog.DYNAMIC_TANH, _trailing(weight.shape)) if channels_last else (catalog.DYNAMIC_TANH_2D, ())
    p = _plan(spec, input, sizes)
    _check_affine(spec, p, input, weight, bias, None)
    wide = accumulator(input.dtype)
    shape = plan.kept_shape(p, tuple(input.shape))
    gamma, beta = (t.to(wide).reshape(shape) for t in (weight, bias))
    y = activated.dynamic_tanh(torch, input.to(wide), alpha.to(wide), gamma, beta)
    return _finish(y, input, None, None, None)


def global_response_norm(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-6,
    *,
    channels_last: bool = True,
    mask: Tensor | None = None,
    sample_weight: Tensor | None = None,
) -> Tensor:
    """Global response normalization of ConvNeXt V2 (arXiv:2301.00808).

    y = gamma * (x * g / (mean(g) + eps)) + beta + x with g = sqrt(sum(x^2)) over the positions of each channel of each
    sample, and its mean over the channels. `sample_weight` weighs the squares.

    Shapes: input (N, *S, C), or (N, C, *S) with `channels_last=False`; weight and bias (C,).
    """
    spec = catalog.GLOBAL_RESPONSE
    if not isinstance(input, Tensor) or input.dim() < 2:
        got = f"shape {tuple(input.shape)}" if isinstance(input, Tensor) else type(input).__name__
        raise NormValueError(message(f"{spec.name}: the input must be a tensor of samples and channels", got))
    placed = input.movedim(-1, 1) if channels_last else input
    p = _plan(spec, placed, ())
    _check_affine(spec, p, placed, weight, bias, None)
    x, real, w = _weighted(placed, mask, sample_weight)
    wide = accumulator(input.dtype)
    gamma, beta = weight.to(wide), bias.to(wide)
    y = activated.global_response(torch, p, x.to(wide), gamma, beta, eps=eps, channel=1, weight=w)
    y = _finish(y, placed, real, None, None)
    return y.movedim(1, -1) if channels_last else y


# A symbolic trace keeps these calls as they are: what they check and choose depends on real tensors.
for _name in __all__[1:]:
    torch.fx.wrap(_name)


def _tracked(
    spec: NormSpec,
    input: Tensor,
    kept: dict[str, Tensor] | None,
    number: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    training: bool,
    momentum: float | None,
    eps: float,
    nonfinite: str,
    mask: Tensor | None,
    sample_weight: Tensor | None,
    activation: str | None,
    residual: Tensor | None,
    sizes: Sizes = (),
    clips: tuple[Any, Any] | None = None,
    untracked: NormSpec | None = None,
    process_group: Any = None,
) -> Tensor:
    """Run a normalizer whose statistics may be kept: by those of the input, or by the kept ones."""
    key = None
    if mask is None and sample_weight is None and process_group is None and clips is None:
        # True is equal to 1.0, which is allowed: so the type is asked for as well.
        question = id(spec), sizes, training, momentum, type(momentum), nonfinite, activation
        others = (number, *kept.values()) if kept is not None else (number,)
        key = compiled.signature(question, input, residual, weight, bias, *others)
        case = compiled.known(key)
        if case is not None:
            return _run(case, input, weight, bias, eps, residual, kept, number, momentum, nonfinite)
    _check(spec.name, momentum=momentum, nonfinite=nonfinite)
    if momentum is None and number is None and kept is not None and training:
        raise _uncounted(spec)
    p = _plan(spec, input, sizes)
    _check_affine(spec, p, input, weight, bias, kept)
    if kept is not None and not training:  # evaluation asks no other process
        x, real, _ = _weighted(input, mask, sample_weight)
        if real is None and "var" in kept and _eager(input, activation, residual, *kept.values(), weight, bias):
            case = compiled.decide(key, spec, p, input, weight, bias, activation, residual, kept, given=True)
            if case is not None:
                return _run(case, input, weight, bias, eps, residual, kept)
        y = evaluate(spec, p, x, kept, weight, bias, eps)
        return _finish(y, input, real, activation, residual)
    x, real, w = _weighted(input, mask, sample_weight, process_group)
    if process_group is None:  # of others the number of values is not known here
        _check_values(spec, p, input)
    chosen = spec if kept is not None or untracked is None else untracked
    correct = None
    if clips is not None and kept is not None:
        if recomputing() and not (float(clips[0]) == 1.0 and float(clips[1]) == 0.0):
            must = "batch_renorm: a backward pass must not run this forward again (activation checkpointing)"
            hint = "r and d come from running statistics that have moved since; keep this layer out of the checkpoint"
            raise NormRuntimeError(message(must, hint=hint))
        correct = formula.renorm(torch, kept, *clips, stop=Tensor.detach)
    eager = sample_weight is None and correct is None and _eager(input, activation, residual, weight, bias)
    if process_group is not None and eager and halves.takes(chosen, input, weight, bias, residual):
        fused: Any = {"activation": activation, "residual": residual}
        y, moments = halves.normalize(chosen, p, input, weight, bias, eps, real=real, group=process_group, **fused)
        activation = residual = real = None
    elif process_group is not None:
        wide = accumulator(x.dtype)
        gamma, beta = (None if t is None else t.to(wide) for t in (weight, bias))
        y, moments = normalize_together(chosen, p, x.to(wide), gamma, beta, eps, weight=w, group=process_group)
    else:
        if eager and w is None:
            case = compiled.decide(key, chosen, p, input, weight, bias, activation, residual, kept, number)
            if case is not None:
                return _run(case, input, weight, bias, eps, residual, kept, number, momentum, nonfinite)
        y, moments = normalize(chosen, p, x, weight, bias, eps, weight=w, correct=correct)
    if kept is not None:
        keep(spec, p, kept, number, moments, momentum=momentum, eps=eps, nonfinite=nonfinite)
    return _finish(y, input, real, activation, residual)


def _run(
    case: compiled.Case,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None,
    kept: dict[str, Tensor] | None = None,
    number: Tensor | None = None,
    momentum: float | None = None,
    nonfinite: str = "skip",
) -> Tensor:
    """Run the compiled kernel of a case whose arguments have been checked."""
    if case.found is None and kept is not None:
        return compiled.evaluate(case, input, kept["mean"], kept["var"], weight, bias, eps, residual)
    done = compiled.normalize(case, input, weight, bias, eps, residual)
    if kept is None:
        return done.y
    if case.writes and momentum is not None:
        if not recomputing():
            compiled.keep(case, done, kept, number, momentum, skip=nonfinite == "skip")
    else:
        moments = done.moments()
        keep(case.spec, case.plan, kept, number, moments, momentum=momentum, eps=eps, nonfinite=nonfinite)
    return done.y


def _added(
    spec: NormSpec,
    normalized_shape: Sequence[int],
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor] | None:
    """(norm(x + residual), x + residual) by the compiled kernel, None where it does not cover that."""
    sizes = _trailing(normalized_shape)
    key = compiled.signature((id(spec), sizes, "added"), x, residual, weight, bias)
    case = compiled.known(key)
    if case is None and x.shape == residual.shape and _eager(x, None, residual, weight, bias):
        p = _plan(spec, x, sizes)
        _check_affine(spec, p, x, weight, bias, None)
        case = compiled.decide(key, spec, p, x, weight, bias, None, residual)
    if case is None or not compiled.adds(case):
        return None
    return compiled.add_normalize(case, x, residual, weight, bias, eps)


def _untracked(
    spec: NormSpec,
    sizes: Sizes,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: str | None,
    residual: Tensor | None,
    mask: Tensor | None = None,
    sample_weight: Tensor | None = None,
) -> Tensor:
    key = None
    if mask is None and sample_weight is None:
        key = compiled.signature((id(spec), sizes, activation), input, residual, weight, bias)
        case = compiled.known(key)
        if case is not None:
            return _run(case, input, weight, bias, eps, residual)
    p = _plan(spec, input, sizes)
    _check_affine(spec, p, input, weight, bias, None)
    x, real, w = _weighted(input, mask, sample_weight)
    if w is None and _eager(input, activation, residual, weight, bias):
        case = compiled.decide(key, spec, p, input, weight, bias, activation, residual)
        if case is not None:
            return _run(case, input, weight, bias, eps, residual)
    y, _ = normalize(spec, p, x, weight, bias, eps, weight=w)
    return _finish(y, input, real, activation, residual)


def _rms(
    spec: NormSpec,
    sizes: Sizes,
    input: Tensor,
    weight: Tensor | None,
    eps: float | None,
    gain: str,
    cast: str,
    activation: str | None,
    residual: Tensor | None,
) -> Tensor:
    try:
        spec = _GAINS[spec.name, gain]
    except KeyError:
        raise NormValueError(message("`gain` must be 'w' or '1+w'", repr(gain))) from None
    if cast not in ("llama", "gemma", "none"):
        raise NormValueError(message("`cast` must be 'llama', 'gemma' or 'none'", repr(cast)))
    key = compiled.signature((id(spec), sizes, activation, cast), input, residual, weight)
    case = compiled.known(key)
    if case is not None:
        return _run(case, input, weight, None, _SMALLEST if eps is None else eps, residual)
    p = _plan(spec, input, sizes)
    _check_affine(spec, p, input, weight, None, None)
    small = torch.finfo(accumulator(input.dtype)).eps if eps is None else eps
    if cast == "gemma" or input.dtype == accumulator(input.dtype):
        if _eager(input, activation, residual, weight):
            case = compiled.decide(key, spec, p, input, weight, None, activation, residual)
            if case is not None:
                return _run(case, input, weight, None, small, residual)
        y, _ = normalize(spec, p, input, weight, None, small)
    elif cast == "llama":
        y, _ = normalize(spec, p, input, None, None, small)
        y = formula.gained(torch, spec, p, y.to(input.dtype), weight)
    else:
        rstd = formula.inverse_std(torch, spec, p, input.to(accumulator(input.dtype)), eps=small)
        y = formula.gained(torch, spec, p, input * rstd.to(input.dtype), weight)
    return _finish(y, input, None, activation, residual)


def _trailing(normalized_shape: Sequence[int] | int) -> Sizes:
    single = isinstance(normalized_shape, numbers.Integral)
    shape = (normalized_shape,) if single else tuple(normalized_shape)  # type: ignore[arg-type]
    if not shape:
        raise NormValueError(message("`normalized_shape` must have at least one axis", shape))
    return (("*c", tuple(int(n) for n in shape)),)  # type: ignore[arg-type]


def _check(owner: str, **arguments: Any) -> None:
    if not torch.compiler.is_compiling():  # what is compiled has passed here, or is a constant of the program
        check(owner, ARGUMENTS, arguments)


def _spec(spec: NormSpec, bessel: bool) -> NormSpec:
    if bessel is not True:  # the usual case is not looked at twice
        _check(spec.name, bessel=bessel)
        return _BIASED[spec.name]
    return spec


def _uncounted(spec: NormSpec) -> NormValueError:
    must = f"{spec.name}: `momentum=None` averages all batches and needs `num_batches_tracked`"
    return NormValueError(message(must, "None", "torch.zeros((), dtype=torch.long)"))


def _affine(p: NormPlan, x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    shape = plan.kept_shape(p, tuple(x.shape))
    return x * gamma.reshape(shape) + beta.reshape(shape)


def _virtual(size: int) -> Sizes:
    _check("ghost_batch_norm", virtual_batch_size=size)
    return (("n", size),)


def _kept(mean: Tensor | None, **spread: Tensor | None) -> dict[str, Tensor] | None:
    ((name, value),) = spread.items()
    if (mean is None) != (value is None):
        given = "running_mean" if value is None else f"running_{name}"
        raise NormValueError(message(f"running_mean and running_{name} must be given together", f"only {given}"))
    return None if mean is None or value is None else {"mean": mean, name: value}


def _plan(spec: NormSpec, input: Tensor, sizes: Sizes) -> NormPlan:
    if not isinstance(input, Tensor) or not input.is_floating_point():
        kind = str(input.dtype) if isinstance(input, Tensor) else type(input).__name__
        raise NormTypeError(message(f"{spec.name}: the input must be a floating point tensor", kind))
    compiling = torch.compiler.is_compiling()  # the cache of `plan` cannot be traced
    p = (plan.compile_plan if compiling else plan.plan)(spec, input.dim(), sizes)
    plan.check_lengths(spec, p, tuple(input.shape))
    return p


def _check_affine(
    spec: NormSpec,
    p: NormPlan,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    kept: Mapping[str, Tensor] | None,
    **others: Tensor | None,
) -> None:
    """Refuse parameters and statistics of another length than the input's channels."""
    expected = plan.product([input.shape[axis] for axis in p.whole])
    named = {"weight": weight, "bias": bias, **others}
    named |= {f"running_{name}": t for name, t in (kept or {}).items()}
    for name, t in named.items():
        if t is not None and t.numel() != expected:
            must = f"{spec.name}: `{name}` must have {expected} values for an input of shape {tuple(input.shape)}"
            axes = spec.x.replace("(m n)", "n").replace("(g k)", "c")
            raise NormValueError(message(must, t.numel(), f"the input's axes are `{axes}`, gamma's `{spec.affine}`"))


def _check_values(spec: NormSpec, p: NormPlan, input: Tensor) -> None:
    """Refuse statistics of a single value where values are samples or positions."""
    if spec.minimum < 2:
        return
    for _, _, view in plan.parts(p, tuple(input.shape)):
        n = plan.count(p, view)
        if n == 1:
            must = f"{spec.name}: training needs at least {spec.minimum} values per channel"
            ways = "drop_last=True in the DataLoader, a larger batch, .eval(), or a GroupNorm"
            if "n" not in spec.over_names:
                must = f"{spec.name}: a map needs at least {spec.minimum} positions"
                ways = "normalize before pooling to 1x1, or use a LayerNorm or GroupNorm"
            raise NormValueError(message(must, f"1 for an input of shape {tuple(input.shape)}", ways))


def _weighted(
    input: Tensor, mask: Tensor | None, sample_weight: Tensor | None, process_group: Any = None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return (input with masked positions 0, mask, weights), the latter two with a channel axis of length 1 or None."""
    if mask is None and sample_weight is None:
        return input, None, None
    for name, given in (("mask", mask), ("sample_weight", sample_weight)):
        if given is not None and not isinstance(given, Tensor):
            raise NormTypeError(message(f"`{name}` must be a tensor", type(given).__name__, "torch.as_tensor(...)"))
    target = (input.shape[0], *input.shape[2:])
    wide = accumulator(input.dtype)
    real = weight = None
    if sample_weight is not None:
        if sample_weight.dim() == 1 and sample_weight.shape[0] == input.shape[0]:
            sample_weight = sample_weight.reshape(-1, *(1 for _ in input.shape[2:]))
        weight = _placed("sample_weight", sample_weight, target, input).to(wide).detach()
        if not watched() and not bool(((weight >= 0) & weight.isfinite()).all()):
            raise NormValueError(message("`sample_weight` must be finite and >= 0", float(weight.min())))
    if weight is not None and (weight.numel() or process_group is not None):
        # Only proportions count; near 1 their squares neither vanish nor overflow.
        top = weight.max() if weight.numel() else weight.new_zeros(())
        top = top if process_group is None else highest(top, process_group)
        weight = weight / torch.where(top > 0, top, 1.0)
    if mask is not None:
        if mask.dtype != torch.bool:
            hint = "True marks real data: mask.bool(), or ~mask for a padding mask"
            raise NormTypeError(message("`mask` must be boolean", str(mask.dtype), hint))
        real = _placed("mask", mask, target, input)
        # Replaced, not multiplied: what stands in the padding may be NaN.
        input = torch.where(real, input, 0.0)
        weight = real.to(wide) if weight is None else torch.where(real, weight, 0.0)
    return input, real, weight


def _placed(name: str, t: Tensor, target: tuple[int, ...], input: Tensor) -> Tensor:
    """Return `t` in the shape of the input with a channel axis of length 1."""
    try:
        return t.expand(target).unsqueeze(1)
    except RuntimeError:
        must = f"`{name}` must broadcast to {target}, the input's shape {tuple(input.shape)} without its channel axis"
        raise NormValueError(message(must, f"shape {tuple(t.shape)}")) from None


def _eager(input: Tensor, activation: str | None, residual: Tensor | None, *others: Tensor | None) -> bool:
    """Whether a compiled kernel may be called: it sees plain tensors, and no tracer or transform sees it."""
    if (residual is not None and residual.shape != input.shape) or (activation not in (None, *ACTIVATIONS)):
        return False  # worded where it is done
    return not needs_plain(input, residual, *others)


def _finish(y: Tensor, input: Tensor, real: Tensor | None, activation: str | None, residual: Tensor | None) -> Tensor:
    if residual is not None:
        if residual.shape != input.shape:
            got = f"{tuple(residual.shape)} and {tuple(input.shape)}"
            raise NormValueError(message("`residual` must have the shape of the input", got))
        y = y + residual
        if real is not None:  # padding of the residual may be NaN, which an activation's slope would spread
            y = torch.where(real, y, 0.0)
    if activation is not None:
        if activation not in ACTIVATIONS:
            raise NormValueError(
                message("`activation` must be known", repr(activation), nearest(activation, ACTIVATIONS))
            )
        y = ACTIVATIONS[activation](y)
    if real is not None:
        y = torch.where(real, y, 0.0)
    return y if y.dtype == input.dtype else y.to(input.dtype)
