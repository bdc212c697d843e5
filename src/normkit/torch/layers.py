"""The normalizers as layers. Those that `torch.nn` has subclass it and can take its place anywhere.

Same constructor arguments in the same order, same defaults, same parameters, buffers and `state_dict`, same `repr`, and
on the same weights the same numbers. What is added is keyword only:

- `bessel=False` keeps the biased variance, so that training and evaluation agree on one full batch;
- `nonfinite="update"` lets a batch with NaN or infinity into the running statistics, as PyTorch does. The default
  "skip" leaves mean, variance and count of the layer as they were; the output may still be non-finite, so that a
  gradient scaler sees it;
- `forward(x, mask=None, sample_weight=None)` where statistics are taken over samples or positions, see
  :mod:`normkit.torch.functional`.

Running statistics stay float32 or wider whatever the parameters become. A layer contains no mathematics: each calls one
function of :mod:`normkit.torch.functional`.
"""

from __future__ import annotations

import numbers
import warnings
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from normkit.core.algebra import groups_for
from normkit.core.constraints import Integer, check
from normkit.core.schedule import RenormSchedule
from normkit.core.spec import ARGUMENTS
from normkit.errors import NormTypeError, NormValueError, message, nearest
from normkit.torch import functional
from normkit.torch._buffers import WideBuffers, watched

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "BatchRenorm1d",
    "BatchRenorm2d",
    "BatchRenorm3d",
    "GhostBatchNorm1d",
    "GhostBatchNorm2d",
    "GhostBatchNorm3d",
    "GroupNorm",
    "InstanceNorm1d",
    "InstanceNorm2d",
    "InstanceNorm3d",
    "LayerNorm",
    "LayerNorm2d",
    "NormAct",
    "RMSNorm",
    "RMSNorm2d",
]

Device = torch.device | str | int | None
KEPT_WHOLE = "torch.nn (kept whole by torch.fx)"


def _checked(layer: nn.Module, **arguments: Any) -> None:
    check(type(layer).__name__, ARGUMENTS, arguments)


def _check_dims(layer: Any, input: Tensor) -> None:
    """Refuse inputs with another number of axes than the layer's name says."""
    if not isinstance(input, torch.fx.Proxy) and input.dim() not in layer._dims:
        axes = " or ".join(f"{n}D" for n in layer._dims)
        must = f"{type(layer).__name__}: the input must be {axes}"
        raise NormValueError(message(must, f"{input.dim()}D, shape {tuple(input.shape)}"))


class _Layer(nn.Module):
    """A layer that `torch.fx.symbolic_trace` keeps whole, as it does those of torch.nn.

    The default tracer keeps a module as one node if its `__module__` starts with "torch.nn", and looks at the instance.
    Traced through, `self.training` would be frozen: `.eval()` on the traced model would silently change nothing.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.__dict__["__module__"] = KEPT_WHOLE


class _Tracking(WideBuffers, _Layer):
    """What batch norm, ghost batch norm and instance norm add to their parents in torch.nn."""

    _dims: ClassVar[tuple[int, ...]]
    num_features: int
    eps: float
    momentum: float | None
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None
    track_running_stats: bool

    def _setup(
        self,
        arguments: dict[str, Any],
        device: Device,
        dtype: torch.dtype | None,
        bias: bool,
        bessel: bool,
        nonfinite: str,
    ) -> None:
        """Validate and construct: `arguments` are those of the parent in torch.nn, in its order."""
        _checked(self, **arguments, bias=bias, bessel=bessel, nonfinite=nonfinite)
        _Layer.__init__(self, *arguments.values(), device=device, dtype=dtype)
        if not bias:
            self.register_parameter("bias", None)
        self.bessel = bessel
        self.nonfinite = nonfinite
        self._widen()

    def _arguments(self) -> dict[str, Any]:
        """Arguments of the functional form. Tracking switched off later is off: stale statistics are not used."""
        kept = self.track_running_stats and self.running_mean is not None
        return {
            "running_mean": self.running_mean if kept else None,
            "running_var": self.running_var if kept else None,
            "weight": self.weight,
            "bias": self.bias,
            "momentum": self.momentum,
            "eps": self.eps,
            "num_batches_tracked": self.num_batches_tracked if kept else None,
            "bessel": self.bessel,
            "nonfinite": self.nonfinite,
        }

    def extra_repr(self) -> str:
        added = ("" if self.bessel else ", bessel=False") + ("" if self.nonfinite == "skip" else ", nonfinite='update'")
        return super().extra_repr() + added


class _BatchNorm(_Tracking):
    """Batch normalization (arXiv:1502.03167) in front of its parent in torch.nn.

    y = (x - mean) / sqrt(var + eps) * weight + bias, per channel.

    Shapes: input (N, C) or (N, C, *S) as the name says, output the same; weight, bias, running_mean, running_var (C,),
    running statistics in float32 or wider.

    Training: mean and biased variance of the batch, over all axes but the channels'. Then
    `running_* = (1 - momentum) * running_* + momentum * batch`, with the unbiased variance. Evaluation: the running
    statistics; nothing is read from the batch. The paper instead averages the statistics of many batches once, after
    training; the running average is what practice settled on.

    First values: weight 1, bias 0, running_mean 0, running_var 1, num_batches_tracked 0.

    Args:
        num_features: channels C.
        eps: added to the variance.
        momentum: weight of a new batch (Keras' momentum is one minus it); None averages all batches equally.
        affine: with weight and bias.
        track_running_stats: without, evaluation uses the statistics of its batch.
        device, dtype: of the parameters.
        bias: without, there is a weight only.
        bessel: keep the unbiased variance n/(n-1) var.
        nonfinite: "skip" or "update", see the top of this module.

    Raises:
        NormValueError: in training with one value per channel; for inputs that do not fit.

    >>> layer = BatchNorm1d(2)
    >>> x = torch.tensor([[1.0, 200.0], [2.0, 220.0], [3.0, 180.0], [6.0, 200.0]])
    >>> layer(x).detach().round(decimals=2) + 0.0
    tensor([[-1.0700,  0.0000],
            [-0.5300,  1.4100],
            [ 0.0000, -1.4100],
            [ 1.6000,  0.0000]])
    >>> layer.running_mean, layer.eval()(x[:1]).detach()  # after one step evaluation is far off
    (tensor([ 0.3000, 20.0000]), tensor([[ 0.5988, 34.2831]]))
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        bessel: bool = True,
        nonfinite: str = "skip",
    ) -> None:
        arguments = {
            "num_features": num_features,
            "eps": eps,
            "momentum": momentum,
            "affine": affine,
            "track_running_stats": track_running_stats,
        }
        self._setup(arguments, device, dtype, bias, bessel, nonfinite)

    def forward(self, input: Tensor, mask: Tensor | None = None, sample_weight: Tensor | None = None) -> Tensor:
        """Normalize; see the class."""
        return self._run(input, mask=mask, sample_weight=sample_weight)

    def _run(self, input: Tensor, **options: Any) -> Tensor:
        _check_dims(self, input)
        return functional.batch_norm(input, **self._arguments(), training=self.training, **options)


class BatchNorm1d(_BatchNorm, nn.BatchNorm1d):
    __doc__ = _BatchNorm.__doc__
    _dims = (2, 3)


class BatchNorm2d(_BatchNorm, nn.BatchNorm2d):
    __doc__ = _BatchNorm.__doc__
    _dims = (4,)


class BatchNorm3d(_BatchNorm, nn.BatchNorm3d):
    __doc__ = _BatchNorm.__doc__
    _dims = (5,)


class _GhostBatchNorm(_BatchNorm):
    """Ghost batch normalization (arXiv:1705.08741): batch norm over groups of `virtual_batch_size` samples in training.

    The noise of small batches at the speed of large ones. Consecutive samples form a group; those left over form one
    short group, and a single left over value joins the group before it. All groups enter the running statistics as one
    update (means weighted by size, variances pooled), where the paper makes one update per group. Evaluation,
    parameters, buffers and `state_dict` are those of batch norm.

    Shapes: input (N, C) or (N, C, *S) as the name says, output the same; everything else (C,).

    Args:
        num_features: channels C.
        eps, momentum, affine, track_running_stats, device, dtype: as batch norm.
        virtual_batch_size: samples in a group, at least 2.
        bias, bessel, nonfinite: as batch norm.

    Raises:
        NormValueError: as batch norm.

    >>> layer = GhostBatchNorm1d(1, virtual_batch_size=2)
    >>> layer(torch.tensor([[1.0], [3.0], [100.0], [300.0]])).detach().flatten().round(decimals=2)
    tensor([-1.,  1., -1.,  1.])
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        virtual_batch_size: int = 32,
        bias: bool = True,
        bessel: bool = True,
        nonfinite: str = "skip",
    ) -> None:
        _checked(self, virtual_batch_size=virtual_batch_size)
        super().__init__(
            num_features,
            eps,
            momentum,
            affine,
            track_running_stats,
            device,
            dtype,
            bias=bias,
            bessel=bessel,
            nonfinite=nonfinite,
        )
        self.virtual_batch_size = virtual_batch_size

    def forward(self, input: Tensor, mask: Tensor | None = None, sample_weight: Tensor | None = None) -> Tensor:
        """Normalize; see the class."""
        return self._run(input, mask=mask, sample_weight=sample_weight)

    def _run(self, input: Tensor, **options: Any) -> Tensor:
        _check_dims(self, input)
        return functional.ghost_batch_norm(
            input,
            **self._arguments(),
            training=self.training,
            virtual_batch_size=self.virtual_batch_size,
            **options,
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, virtual_batch_size={self.virtual_batch_size}"


class GhostBatchNorm1d(_GhostBatchNorm, nn.BatchNorm1d):
    __doc__ = _GhostBatchNorm.__doc__
    _dims = (2, 3)


class GhostBatchNorm2d(_GhostBatchNorm, nn.BatchNorm2d):
    __doc__ = _GhostBatchNorm.__doc__
    _dims = (4,)


class GhostBatchNorm3d(_GhostBatchNorm, nn.BatchNorm3d):
    __doc__ = _GhostBatchNorm.__doc__
    _dims = (5,)


class _BatchRenorm(WideBuffers, _Layer):
    """Batch renormalization (arXiv:1702.03275): batch norm whose training output agrees with evaluation, within clips.

    Training: y = ((x - mean) / std * r + d) * weight + bias with std = sqrt(var + eps),
    r = clip(std / running_std, 1/r_max, r_max), d = clip((mean - running_mean) / running_std, -d_max, d_max); r and d
    are constants of the backward pass. Evaluation: y = (x - running_mean) / running_std * weight + bias.

    Shapes: input (N, C) or (N, C, *S) as the name says, output the same; weight, bias, running_mean, running_std (C,).
    The running standard deviation, not the variance, is averaged, with eps inside and without Bessel's factor, as in
    the paper: training and evaluation use the same number, so its bias cancels.

    First values: weight 1, bias 0, running_mean 0, running_std 1, num_batches_tracked 0. The clips follow `schedule` by
    num_batches_tracked. The default is the paper's, made for some 130 000 steps; for a run of T steps use
    `RenormSchedule.for_steps(T)`, and a momentum with 3 / momentum steps before the clips open.

    Args:
        num_features: channels C.
        eps: added to the variance of the batch.
        momentum: weight of a new batch; None averages all batches equally.
        affine: with weight and bias.
        device, dtype: of the parameters.
        schedule: r_max and d_max as a function of the step.
        nonfinite: "skip" or "update", see the top of this module.

    Raises:
        NormValueError: in training with one value per channel; for inputs that do not fit.

    >>> from normkit.core.schedule import RenormSchedule
    >>> layer = BatchRenorm2d(64, momentum=0.05, schedule=RenormSchedule.for_steps(1000))
    >>> layer(torch.randn(4, 64, 8, 8)).shape
    torch.Size([4, 64, 8, 8])
    """

    _dims: ClassVar[tuple[int, ...]]
    weight: nn.Parameter
    bias: nn.Parameter
    running_mean: Tensor
    running_std: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.01,
        affine: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        schedule: RenormSchedule | None = None,
        nonfinite: str = "skip",
    ) -> None:
        _checked(self, num_features=num_features, eps=eps, momentum=momentum, affine=affine, nonfinite=nonfinite)
        if schedule is not None and not isinstance(schedule, RenormSchedule):
            must = f"{type(self).__name__}: `schedule` must be a normkit RenormSchedule"
            raise NormTypeError(message(must, repr(schedule), "RenormSchedule.for_steps(total_steps)"))
        super().__init__()
        self.num_features = num_features
        self.eps = eps
        self.momentum = momentum
        self.affine = affine
        self.schedule = RenormSchedule() if schedule is None else schedule
        self.nonfinite = nonfinite
        for name in ("weight", "bias"):
            value = nn.Parameter(torch.empty(num_features, device=device, dtype=dtype)) if affine else None
            self.register_parameter(name, value)
        for name in ("running_mean", "running_std"):
            self.register_buffer(name, torch.empty(num_features, device=device, dtype=dtype))
        self.register_buffer("num_batches_tracked", torch.zeros((), dtype=torch.long, device=device))
        self._widen()
        self.reset_parameters()

    def reset_running_stats(self) -> None:
        """Return mean, standard deviation and count to their first values."""
        self.running_mean.zero_()
        self.running_std.fill_(1.0)
        self.num_batches_tracked.zero_()

    def reset_parameters(self) -> None:
        """Return everything to its first value."""
        self.reset_running_stats()
        if self.affine:
            nn.init.ones_(self.weight)
            nn.init.zeros_(self.bias)

    def clips(self) -> tuple[Any, Any]:
        """Return (r_max, d_max) for the next batch."""
        number = self.num_batches_tracked
        if watched() or type(number) is not Tensor or number.device.type != "cpu":
            return self.schedule.at(torch, number.to(self.running_std.dtype))
        r_max, d_max = self.schedule.at(np, number.item())  # plain numbers cost nothing to clip by
        return float(r_max), float(d_max)

    def forward(self, input: Tensor, mask: Tensor | None = None, sample_weight: Tensor | None = None) -> Tensor:
        """Normalize; see the class."""
        return self._run(input, mask=mask, sample_weight=sample_weight)

    def _run(self, input: Tensor, **options: Any) -> Tensor:
        _check_dims(self, input)
        r_max, d_max = self.clips()
        return functional.batch_renorm(
            input,
            self.running_mean,
            self.running_std,
            self.weight,
            self.bias,
            self.training,
            self.momentum,
            self.eps,
            r_max=r_max,
            d_max=d_max,
            num_batches_tracked=self.num_batches_tracked,
            nonfinite=self.nonfinite,
            **options,
        )

    def extra_repr(self) -> str:
        text = f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, affine={self.affine}, {self.schedule}"
        return text if self.nonfinite == "skip" else f"{text}, nonfinite='update'"


class BatchRenorm1d(_BatchRenorm):
    __doc__ = _BatchRenorm.__doc__
    _dims = (2, 3)


class BatchRenorm2d(_BatchRenorm):
    __doc__ = _BatchRenorm.__doc__
    _dims = (4,)


class BatchRenorm3d(_BatchRenorm):
    __doc__ = _BatchRenorm.__doc__
    _dims = (5,)


class _InstanceNorm(_Tracking):
    """Instance normalization (arXiv:1607.08022): each channel of each sample over its own positions.

    y = (x - mean) / sqrt(var + eps) * weight + bias, with the biased variance.

    Shapes: input (N, C, *S) or (C, *S) as the name says, output the same; weight, bias, running statistics (C,).

    Training and evaluation are the same, unless `track_running_stats`: then training also averages the statistics of
    the instances into the running ones, and evaluation uses those. Parameters are off by default, as in PyTorch.
    `momentum=None` averages all batches equally (PyTorch takes it for 0 and never updates) and then counts them in
    num_batches_tracked, which PyTorch's instance norm leaves at 0.

    First values: weight 1, bias 0, running_mean 0, running_var 1.

    Args:
        num_features, eps, momentum, affine, track_running_stats, device, dtype, bias, bessel, nonfinite: as batch norm.

    Raises:
        NormValueError: for maps of one position, which have no variance; for inputs that do not fit.

    >>> images = torch.rand(2, 3, 8, 8)
    >>> darker = 0.2 * images + 0.1  # another contrast and brightness: the same output
    >>> torch.allclose(InstanceNorm2d(3, eps=1e-9)(images), InstanceNorm2d(3, eps=1e-9)(darker), atol=1e-4)
    True
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = False,
        track_running_stats: bool = False,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        bessel: bool = True,
        nonfinite: str = "skip",
    ) -> None:
        arguments = {
            "num_features": num_features,
            "eps": eps,
            "momentum": momentum,
            "affine": affine,
            "track_running_stats": track_running_stats,
        }
        self._setup(arguments, device, dtype, bias, bessel, nonfinite)

    def forward(self, input: Tensor, mask: Tensor | None = None, sample_weight: Tensor | None = None) -> Tensor:
        """Normalize; see the class."""
        return self._run(input, mask=mask, sample_weight=sample_weight)

    def _run(self, input: Tensor, **options: Any) -> Tensor:
        _check_dims(self, input)
        _warn_of_channels(self, input)
        arguments: dict[str, Any] = self._arguments()
        if self.momentum is not None:
            arguments["num_batches_tracked"] = None
        arguments["use_input_stats"] = self.training or arguments["running_mean"] is None
        if isinstance(input, torch.fx.Proxy) or input.dim() > self._dims[0]:
            return functional.instance_norm(input, **arguments, **options)
        if options.get("sample_weight") is not None:
            raise NormValueError(
                message("`sample_weight` needs an input with a batch axis", f"shape {tuple(input.shape)}")
            )
        batched: dict[str, Any] = {k: v.unsqueeze(0) if isinstance(v, Tensor) else v for k, v in options.items()}
        return functional.instance_norm(input.unsqueeze(0), **arguments, **batched).squeeze(0)


class InstanceNorm1d(_InstanceNorm, nn.InstanceNorm1d):
    __doc__ = _InstanceNorm.__doc__
    _dims = (2, 3)


class InstanceNorm2d(_InstanceNorm, nn.InstanceNorm2d):
    __doc__ = _InstanceNorm.__doc__
    _dims = (3, 4)


class InstanceNorm3d(_InstanceNorm, nn.InstanceNorm3d):
    __doc__ = _InstanceNorm.__doc__
    _dims = (4, 5)


class LayerNorm(_Layer, nn.LayerNorm):
    """Layer normalization (arXiv:1607.06450) over the last axes of each sample.

    y = (x - mean) / sqrt(var + eps) * weight + bias, with the biased variance over `normalized_shape`.

    Shapes: input (*, *normalized_shape), output the same; weight, bias normalized_shape. Training and evaluation are
    the same and nothing is kept. Over images (N, C, H, W) this normalizes the *last* axes; over channels use
    :class:`LayerNorm2d`. First values: weight 1, bias 0.

    Args:
        normalized_shape: length of the last axis, or lengths of the last axes.
        eps: added to the variance.
        elementwise_affine: with weight and bias.
        bias: without, there is a weight only.
        device, dtype: of the parameters.

    Raises:
        NormValueError: where the input's last axes are not `normalized_shape`.

    >>> LayerNorm(4)(torch.tensor([1.0, 2.0, 3.0, 6.0])).detach().round(decimals=2) + 0.0
    tensor([-1.0700, -0.5300,  0.0000,  1.6000])
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        _checked(self, eps=eps, elementwise_affine=elementwise_affine, bias=bias)
        super().__init__(_shape_of(self, normalized_shape), eps, elementwise_affine, bias, device, dtype)

    def forward(self, input: Tensor) -> Tensor:
        """Normalize; see the class."""
        return self._run(input)

    def _run(self, input: Tensor, **options: Any) -> Tensor:
        return functional.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps, **options)


class LayerNorm2d(LayerNorm):
    """Layer normalization over the channels of each position of an image, as in ConvNeXt (arXiv:2201.03545).

    Shapes: input (N, C, *S), output the same; weight, bias (C,). First values: weight 1, bias 0.

    Args:
        num_channels: channels C.
        eps: added to the variance.
        elementwise_affine: with weight and bias.
        bias: without, there is a weight only.
        device, dtype: of the parameters.

    Raises:
        NormValueError: for inputs without the channels in the second axis.

    >>> y = LayerNorm2d(16)(torch.randn(2, 16, 4, 4))
    >>> y.mean(dim=1).abs().max() < 1e-5
    tensor(True)
    """

    def __init__(
        self,
        num_channels: int,
        eps: float = 1e-6,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        _checked(self, num_channels=num_channels)
        super().__init__(num_channels, eps, elementwise_affine, bias, device, dtype)

    def forward(self, input: Tensor) -> Tensor:
        """Normalize; see the class."""
        return self._run(input)

    def _run(self, input: Tensor, **options: Any) -> Tensor:
        _check_channels(self, input, self.normalized_shape[0])
        return functional.layer_norm_2d(input, self.weight, self.bias, self.eps, **options)


class GroupNorm(_Layer, nn.GroupNorm):
    """Group normalization (arXiv:1803.08494): groups of channels of each sample over their channels and positions.

    y = (x - mean) / sqrt(var + eps) * weight + bias, with the biased variance. One group is layer norm over (C, *S),
    one channel per group is instance norm.

    Shapes: input (N, C, *S), output the same; weight, bias (C,). Training and evaluation are the same, nothing is kept
    and no sample sees another. A group of one value normalizes to 0. First values: weight 1, bias 0.

    Args:
        num_groups: groups; must divide the channels (`normkit.groups_for` finds a number that does).
        num_channels: channels C.
        eps: added to the variance.
        affine: with weight and bias.
        device, dtype: of the parameters.
        bias: without, there is a weight only.

    Raises:
        NormValueError: where groups do not divide channels; for inputs that do not fit.

    >>> import normkit
    >>> GroupNorm(normkit.groups_for(72), 72)
    GroupNorm(24, 72, eps=1e-05, affine=True, bias=True)
    """

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
    ) -> None:
        _checked(self, num_groups=num_groups, num_channels=num_channels, eps=eps, affine=affine, bias=bias)
        if num_channels % num_groups:
            hint = f"use {groups_for(num_channels, num_groups)} or normkit.groups_for({num_channels})"
            got = f"{num_channels} and {num_groups}"
            raise NormValueError(message("`num_channels` must be divisible by `num_groups`", got, hint))
        super().__init__(num_groups, num_channels, eps, affine, device, dtype)
        if not bias:
            self.register_parameter("bias", None)

    def forward(self, input: Tensor, mask: Tensor | None = None, sample_weight: Tensor | None = None) -> Tensor:
        """Normalize; see the class."""
        return self._run(input, mask=mask, sample_weight=sample_weight)

    def _run(self, input: Tensor, **options: Any) -> Tensor:
        _check_channels(self, input, self.num_channels)
        return functional.group_norm(input, self.num_groups, self.weight, self.bias, self.eps, **options)


class RMSNorm(_Layer, nn.RMSNorm):
    """Root mean square normalization (arXiv:1910.07467) over the last axes: no mean, no bias.

    y = x / sqrt(mean(x^2) + eps) * weight, or * (1 + weight) with `gain="1+w"`.

    Shapes: input (*, *normalized_shape), output the same; weight normalized_shape. Training and evaluation are the
    same.
    First values: weight 1, or 0 with `gain="1+w"`. The paper adds eps outside the root; like nearly all later code we
    add it inside.

    Args:
        normalized_shape: length of the last axis, or lengths of the last axes.
        eps: added to the mean square; None is the machine epsilon of float32 (float64 for such inputs), as in PyTorch.
        elementwise_affine: with weight.
        device, dtype: of the weight.
        gain: "w", or "1+w" as in Gemma.
        cast: where half precision is rounded: "gemma" after the gain (as torch.nn.RMSNorm), "llama" before it, "none"
            multiplies in the input's type. The mean square accumulates in float32 in all of them.

    Raises:
        NormValueError: where the input's last axes are not `normalized_shape`.

    >>> RMSNorm(2, eps=1e-6)(torch.tensor([3.0, 4.0])).detach()  # 3 and 4 over the root of 12.5
    tensor([0.8485, 1.1314])
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float | None = None,
        elementwise_affine: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        gain: str = "w",
        cast: str = "gemma",
    ) -> None:
        _checked(
            self, elementwise_affine=elementwise_affine, gain=gain, cast=cast, **({} if eps is None else {"eps": eps})
        )
        self.__dict__["gain"] = gain  # reset_parameters, which the parent's constructor calls, needs it
        super().__init__(_shape_of(self, normalized_shape), eps, elementwise_affine, device, dtype)
        self.gain = gain
        self.cast = cast

    def reset_parameters(self) -> None:
        """Return the weight to its first value: 1, or 0 where 1 is added."""
        if self.elementwise_affine:
            nn.init.constant_(self.weight, 0.0 if self.gain == "1+w" else 1.0)

    def forward(self, input: Tensor) -> Tensor:
        """Normalize; see the class."""
        return self._run(input)

    def _run(self, input: Tensor, **options: Any) -> Tensor:
        return functional.rms_norm(
            input, self.normalized_shape, self.weight, self.eps, gain=self.gain, cast=self.cast, **options
        )

    def extra_repr(self) -> str:
        gain = "" if self.gain == "w" else ", gain='1+w'"
        return super().extra_repr() + gain + ("" if self.cast == "gemma" else f", cast={self.cast!r}")


class RMSNorm2d(RMSNorm):
    """:class:`RMSNorm` over the channels of each position of an image.

    Shapes: input (N, C, *S), output the same; weight (C,).

    Args:
        num_channels: channels C.
        eps, elementwise_affine, device, dtype, gain, cast: as :class:`RMSNorm`.

    Raises:
        NormValueError: for inputs without the channels in the second axis.

    >>> RMSNorm2d(16)(torch.randn(2, 16, 4, 4)).shape
    torch.Size([2, 16, 4, 4])
    """

    def __init__(
        self,
        num_channels: int,
        eps: float | None = 1e-6,
        elementwise_affine: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        gain: str = "w",
        cast: str = "gemma",
    ) -> None:
        _checked(self, num_channels=num_channels)
        super().__init__(num_channels, eps, elementwise_affine, device, dtype, gain=gain, cast=cast)

    def forward(self, input: Tensor) -> Tensor:
        """Normalize; see the class."""
        return self._run(input)

    def _run(self, input: Tensor, **options: Any) -> Tensor:
        _check_channels(self, input, self.normalized_shape[0])
        return functional.rms_norm_2d(input, self.weight, self.eps, gain=self.gain, cast=self.cast, **options)


class NormAct(nn.Module):
    """A norm layer and an activation: y = act(norm(x) + residual).

    The norm is the child `norm`, so tools that look for norm layers find it, and its parameters are named `norm.*`.
    With a child of ours that has no hooks, all of it is one function; otherwise, and in a `torch.fx` trace, the child
    is called and the activation follows.

    Shapes: as the norm; residual the shape of the input.

    Args:
        norm: any norm layer.
        activation: relu, relu6, leaky_relu, silu, gelu, gelu_tanh or hardswish.

    Raises:
        NormValueError: for an unknown activation, with the nearest names.

    >>> block = NormAct(BatchNorm2d(16), "silu")
    >>> x = torch.randn(2, 16, 4, 4)
    >>> block(x, residual=x).shape, isinstance(block.norm, nn.BatchNorm2d)
    (torch.Size([2, 16, 4, 4]), True)
    """

    def __init__(self, norm: nn.Module, activation: str = "relu") -> None:
        super().__init__()
        if not isinstance(norm, nn.Module):
            raise NormTypeError(message("NormAct: `norm` must be a layer", type(norm).__name__))
        if not isinstance(activation, str):
            raise NormTypeError(message("NormAct: `activation` must be a name", repr(activation)))
        if activation not in functional.ACTIVATIONS:
            known = functional.ACTIVATIONS
            raise NormValueError(
                message("NormAct: `activation` must be known", repr(activation), nearest(activation, known))
            )
        self.norm = norm
        self.activation = activation

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        mask: Tensor | None = None,
        sample_weight: Tensor | None = None,
    ) -> Tensor:
        """Normalize, add, activate. `mask` and `sample_weight` go to the norm, which must know them."""
        given = {"mask": mask, "sample_weight": sample_weight}
        options = {name: value for name, value in given.items() if value is not None}
        if _fusable(self.norm) and not isinstance(x, torch.fx.Proxy):
            run: Any = self.norm._run
            return run(x, residual=residual, activation=self.activation, **options)
        y = self.norm(x, **options)
        return functional.ACTIVATIONS[self.activation](y if residual is None else y + residual)

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}"


def _fusable(norm: nn.Module) -> bool:
    """Whether a call of this layer is nothing but our forward: no subclass, no hook, no parametrization."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    replaced = "forward" in norm.__dict__ or any(getattr(norm, name) for name in hooks)
    ours = type(norm) in _OURS or bool("_fuses" in vars(type(norm)) and norm._fuses)
    return ours and not replaced and not nn.modules.module._has_any_global_hook()


_OURS = frozenset(layer for name, layer in list(globals().items()) if name in __all__ and name != "NormAct")


def _shape_of(layer: nn.Module, normalized_shape: int | Sequence[int]) -> tuple[int, ...]:
    """Return `normalized_shape` as a tuple of whole numbers of at least 1."""
    single = isinstance(normalized_shape, numbers.Integral)
    shape = (normalized_shape,) if single else tuple(normalized_shape)  # type: ignore[arg-type]
    if not shape or not all(Integer(1).allows(n) for n in shape):
        must = f"{type(layer).__name__}: `normalized_shape` must be whole numbers of at least 1"
        raise NormValueError(message(must, repr(normalized_shape)))
    return tuple(int(n) for n in shape)  # type: ignore[arg-type]


def _warn_of_channels(layer: Any, input: Tensor) -> None:
    """Without parameters another number of channels changes nothing; like torch.nn, say that something is odd."""
    channels = (
        input.shape[input.dim() - layer._dims[0]] if not isinstance(input, torch.fx.Proxy) else layer.num_features
    )
    if layer.weight is None and channels != layer.num_features:
        got = f"{layer.num_features}, and an input with {channels}"
        warnings.warn(
            message(f"{type(layer).__name__}: `num_features` should be the input's channels", got), stacklevel=4
        )


def _check_channels(layer: nn.Module, input: Tensor, channels: int) -> None:
    if not isinstance(input, torch.fx.Proxy) and (input.dim() < 2 or input.shape[1] != channels):
        must = f"{type(layer).__name__}: the input must have {channels} channels in its second axis"
        raise NormValueError(message(must, f"shape {tuple(input.shape)}"))
