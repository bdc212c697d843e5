"""Normalizers with a formula of their own: filter response norm, EvoNorm, dynamic tanh, global response norm.

The first two are activations as well: their papers put them where norm *and* activation stood, so nothing belongs
behind them. Names of parameters are those of timm (of dynamic tanh, those of its authors), so that checkpoints load.
Everything is computed in float32 or wider; `mask` and `sample_weight` are as in :mod:`normkit.torch.functional`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from normkit.core.algebra import groups_for
from normkit.core.catalog import DYNAMIC_TANH, EVONORM_B0, EVONORM_S0, FRN, GLOBAL_RESPONSE
from normkit.core.spec import NormSpec
from normkit.errors import NormValueError, message
from normkit.torch import functional
from normkit.torch._buffers import WideBuffers
from normkit.torch.layers import Device, _check_channels, _checked, _Layer, _shape_of

__all__ = ["DynamicTanh", "EvoNormB0", "EvoNormS0", "FilterResponseNorm", "GlobalResponseNorm"]

# Where channels have one position the paper's code learns eps, from this first value.
_FIRST_LEARNED_EPS = 1e-4


class _FurtherNorm(_Layer):
    """Parameters of one shape, each with its first value, which is that of the catalog."""

    spec: NormSpec
    weight: nn.Parameter
    bias: nn.Parameter

    def _parameters_of(self, shape: Sequence[int], device: Device, dtype: torch.dtype | None, *others: str) -> None:
        for name in ("weight", "bias", *others):
            size = (1,) if name == "alpha" else tuple(shape)
            self.register_parameter(name, nn.Parameter(torch.empty(size, device=device, dtype=dtype)))

    def reset_parameters(self) -> None:
        """Return every parameter to its first value."""
        first = {"weight": self.spec.first_gain, "bias": 0.0, **dict(self.spec.others)}
        for name, parameter in self._parameters.items():
            if parameter is not None and name in first:
                nn.init.constant_(parameter, first[name])


class FilterResponseNorm(_FurtherNorm):
    """Filter response normalization with its thresholded linear unit (arXiv:1911.09737).

    y = max(x / sqrt(mean(x^2) + eps) * weight + bias, tau), with the mean over the positions of each channel of each
    sample. Norm and activation in one: no further activation belongs behind it. The mean is not subtracted.

    Shapes: input (N, C, *S), output the same; weight, bias, tau (C,). Training and evaluation are the same and nothing
    is kept. First values: weight 1, bias 0, tau 0. The paper warms its learning rate up; its eps is 1e-6, where timm
    has 1e-5.

    Args:
        num_features: channels C.
        eps: added to the mean square.
        device, dtype: of the parameters.
        learn_eps: add |learned_eps| as well, a trained number for the layer, first 1e-4. The paper does so where
            channels have a single position, whose normalized value is otherwise its sign. `eps` stays below it, so that
            a channel of zeros is not divided by zero.

    Raises:
        NormValueError: for an input without positions, unless `learn_eps`; for inputs that do not fit.

    >>> x = torch.tensor([[[3.0, -1.0, 1.0, -5.0]]])  # the mean square is 9
    >>> FilterResponseNorm(1)(x).detach().round(decimals=2)
    tensor([[[1.0000, 0.0000, 0.3300, 0.0000]]])
    """

    spec = FRN
    tau: nn.Parameter
    learned_eps: nn.Parameter | None

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-6,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        learn_eps: bool = False,
    ) -> None:
        _checked(self, num_features=num_features, eps=eps, learn_eps=learn_eps)
        super().__init__()
        self.num_features = num_features
        self.eps = eps
        self._parameters_of((num_features,), device, dtype, "tau")
        learned = nn.Parameter(torch.empty((), device=device, dtype=dtype)) if learn_eps else None
        self.register_parameter("learned_eps", learned)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Return every parameter to its first value."""
        super().reset_parameters()
        if self.learned_eps is not None:
            nn.init.constant_(self.learned_eps, _FIRST_LEARNED_EPS)

    def forward(self, input: Tensor, mask: Tensor | None = None, sample_weight: Tensor | None = None) -> Tensor:
        """Normalize; see the class."""
        return self._run(input, mask=mask, sample_weight=sample_weight)

    def _run(self, input: Tensor, **options: Any) -> Tensor:
        _check_channels(self, input, self.num_features)
        if self.learned_eps is None and not isinstance(input, torch.fx.Proxy) and input.dim() < 3:
            must = f"{type(self).__name__}: the input must have positions to take statistics over"
            raise NormValueError(message(must, f"shape {tuple(input.shape)}", "learn_eps=True, as in the paper"))
        learned = self.learned_eps
        return functional.filter_response_norm(
            input, self.weight, self.bias, self.tau, self.eps, learned_eps=learned, **options
        )

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps}{'' if self.learned_eps is None else ', learn_eps=True'}"


class EvoNormB0(WideBuffers, _FurtherNorm):
    """EvoNorm-B0 (arXiv:2004.02967), which stands for batch norm and activation together.

    y = x / max(sqrt(var_batch + eps), v * x + sqrt(var_instance + eps)) * weight + bias, with the biased variances of a
    channel over the batch and its positions, and over the positions of the sample. No mean is subtracted.

    Shapes: input (N, C, *S) with at least one axis of positions, output the same; weight, bias, v, running_var (C,),
    the last in float32 or wider. First values: weight, v and running_var 1, bias 0.

    Training: the variance of the batch; then `running_var += momentum * (unbiased variance - running_var)`.
    Evaluation: the running variance, and the instance's own.

    Args:
        num_features: channels C.
        apply_act: without, all that is left is x * weight + bias, as in timm.
        momentum: weight of a new batch; None averages all batches equally, and counts them in num_batches_tracked.
        eps: added to the variances; timm has 1e-3.
        device, dtype: of the parameters.
        bessel, nonfinite: as of :class:`normkit.torch.BatchNorm2d`.

    Raises:
        NormValueError: for an input without positions, whose instances have no variance; in training with one value
            per channel; for inputs that do not fit.

    >>> layer = EvoNormB0(1, momentum=0.5, bessel=False)
    >>> x = torch.tensor([[[1.0, -1.0]], [[3.0, -3.0]]])  # variances 5, and 1 and 9 of the samples
    >>> layer(x).detach().flatten().round(decimals=2), layer.running_var
    (tensor([ 0.4500, -0.4500,  0.5000, -1.3400]), tensor([3.]))
    """

    spec = EVONORM_B0
    v: nn.Parameter | None
    running_var: Tensor
    num_batches_tracked: Tensor | None

    def __init__(
        self,
        num_features: int,
        apply_act: bool = True,
        momentum: float | None = 0.1,
        eps: float = 1e-5,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        bessel: bool = True,
        nonfinite: str = "skip",
    ) -> None:
        _checked(self, num_features=num_features, apply_act=apply_act, momentum=momentum, eps=eps)
        _checked(self, bessel=bessel, nonfinite=nonfinite)
        super().__init__()
        self.num_features = num_features
        self.momentum = momentum
        self.eps = eps
        self.bessel = bessel
        self.nonfinite = nonfinite
        self._parameters_of((num_features,), device, dtype, *(["v"] if apply_act else []))
        if not apply_act:
            self.register_parameter("v", None)
        self.register_buffer("running_var", torch.ones(num_features, device=device, dtype=dtype))
        count = torch.zeros((), dtype=torch.long, device=device) if momentum is None else None
        self.register_buffer("num_batches_tracked", count)
        self._widen()
        self.reset_parameters()

    def reset_running_stats(self) -> None:
        """Return the running variance and the count to their first values."""
        self.running_var.fill_(1.0)
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.zero_()

    def reset_parameters(self) -> None:
        """Return everything to its first value."""
        self.reset_running_stats()
        super().reset_parameters()

    def forward(self, input: Tensor, mask: Tensor | None = None, sample_weight: Tensor | None = None) -> Tensor:
        """Normalize; see the class."""
        return self._run(input, mask=mask, sample_weight=sample_weight)

    def _run(self, input: Tensor, **options: Any) -> Tensor:
        _check_channels(self, input, self.num_features)
        return functional.evonorm_b0(
            input,
            self.running_var,
            self.weight,
            self.bias,
            self.v,
            self.training,
            self.momentum,
            self.eps,
            num_batches_tracked=self.num_batches_tracked,
            bessel=self.bessel,
            nonfinite=self.nonfinite,
            **options,
        )

    def extra_repr(self) -> str:
        text = f"{self.num_features}, momentum={self.momentum}, eps={self.eps}"
        text += "" if self.v is not None else ", apply_act=False"
        text += "" if self.bessel else ", bessel=False"
        return text + ("" if self.nonfinite == "skip" else ", nonfinite='update'")


class EvoNormS0(_FurtherNorm):
    """EvoNorm-S0 (arXiv:2004.02967), which stands for group norm and activation together.

    y = x * sigmoid(v * x) / sqrt(var + eps) * weight + bias, with the biased variance of each group of channels of each
    sample over its channels and positions.

    Shapes: input (N, C, *S), output the same; weight, bias, v (C,). Training and evaluation are the same and nothing is
    kept. First values: weight and v 1, bias 0.

    Args:
        num_features: channels C.
        groups: must divide the channels (`normkit.groups_for` finds a number that does).
        apply_act: without, all that is left is x * weight + bias, as in timm.
        eps: added to the variance.
        device, dtype: of the parameters.

    Raises:
        NormValueError: where groups do not divide channels; for inputs that do not fit.

    >>> EvoNormS0(2, groups=1)(torch.tensor([[2.0, -2.0]])).detach().round(decimals=2)
    tensor([[ 0.8800, -0.1200]])
    """

    spec = EVONORM_S0
    v: nn.Parameter | None

    def __init__(
        self,
        num_features: int,
        groups: int = 32,
        apply_act: bool = True,
        eps: float = 1e-5,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        _checked(self, num_features=num_features, num_groups=groups, apply_act=apply_act, eps=eps)
        if num_features % groups:
            hint = f"use {groups_for(num_features, groups)} or normkit.groups_for({num_features})"
            must = f"{type(self).__name__}: `num_features` must be divisible by `groups`"
            raise NormValueError(message(must, f"{num_features} and {groups}", hint))
        super().__init__()
        self.num_features = num_features
        self.groups = groups
        self.eps = eps
        self._parameters_of((num_features,), device, dtype, *(["v"] if apply_act else []))
        if not apply_act:
            self.register_parameter("v", None)
        self.reset_parameters()

    def forward(self, input: Tensor, mask: Tensor | None = None, sample_weight: Tensor | None = None) -> Tensor:
        """Normalize; see the class."""
        return self._run(input, mask=mask, sample_weight=sample_weight)

    def _run(self, input: Tensor, **options: Any) -> Tensor:
        _check_channels(self, input, self.num_features)
        return functional.evonorm_s0(input, self.groups, self.weight, self.bias, self.v, self.eps, **options)

    def extra_repr(self) -> str:
        text = f"{self.num_features}, groups={self.groups}, eps={self.eps}"
        return text if self.v is not None else f"{text}, apply_act=False"


class DynamicTanh(_FurtherNorm):
    """Dynamic tanh (arXiv:2503.10622), in the place of layer norm and without statistics.

    y = weight * tanh(alpha * x) + bias.

    Shapes: input (*, *normalized_shape), or (N, C, *S) with `channels_last=False`, output the same; weight and bias
    normalized_shape, alpha (1,). Training and evaluation are the same and nothing is kept. First values: weight 1, bias
    0, alpha 0.5. The paper's language models start with a larger alpha in attention than elsewhere, and with smaller
    ones the wider they are.

    Args:
        normalized_shape: length of the last axis, or lengths of the last axes; the number of channels with
            `channels_last=False`.
        channels_last: whether the channels are the last axis, or the second.
        alpha_init_value: first value of alpha.
        device, dtype: of the parameters.

    Raises:
        NormValueError: for inputs that do not fit.

    >>> DynamicTanh(3)(torch.tensor([-9.0, 0.0, 1.0])).detach().round(decimals=2)
    tensor([-1.0000,  0.0000,  0.4600])
    """

    spec = DYNAMIC_TANH
    alpha: nn.Parameter

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        channels_last: bool = True,
        alpha_init_value: float = 0.5,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        _checked(self, channels_last=channels_last, alpha_init_value=alpha_init_value)
        super().__init__()
        self.normalized_shape = _shape_of(self, normalized_shape)
        if not channels_last and len(self.normalized_shape) > 1:
            must = (
                f"{type(self).__name__}: `normalized_shape` must be one number, that of the channels, in channels first"
            )
            raise NormValueError(message(must, self.normalized_shape))
        self.channels_last = channels_last
        self.alpha_init_value = alpha_init_value
        self._parameters_of(self.normalized_shape, device, dtype, "alpha")
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Return every parameter to its first value."""
        super().reset_parameters()
        nn.init.constant_(self.alpha, self.alpha_init_value)

    def forward(self, input: Tensor) -> Tensor:
        """Compute; see the class."""
        return self._run(input)

    def _run(self, input: Tensor) -> Tensor:
        if not self.channels_last:
            _check_channels(self, input, self.normalized_shape[0])
        return functional.dynamic_tanh(input, self.alpha, self.weight, self.bias, channels_last=self.channels_last)

    def extra_repr(self) -> str:
        return f"{self.normalized_shape}, channels_last={self.channels_last}, alpha_init_value={self.alpha_init_value}"


class GlobalResponseNorm(_FurtherNorm):
    """Global response normalization of ConvNeXt V2 (arXiv:2301.00808), behind the activation of its MLP.

    y = weight * (x * g / (mean(g) + eps)) + bias + x, with g = sqrt(sum(x^2)) over the positions of each channel of
    each sample, and its mean over the channels: channels compete, and the input is added. A channel of zeros has the
    response 0, with a slope of 0.

    Shapes: input (N, *S, C), or (N, C, *S) with `channels_last=False`, output the same; weight and bias (C,). Training
    and evaluation are the same and nothing is kept. First values: weight and bias 0, so that it begins as the identity.

    Args:
        dim: channels C.
        eps: added to the mean of the responses.
        channels_last: whether the channels are the last axis, or the second.
        device, dtype: of the parameters.

    Raises:
        NormValueError: for inputs that do not fit.

    >>> layer = GlobalResponseNorm(2)
    >>> nn.init.ones_(layer.weight)
    Parameter containing:
    tensor([1., 1.], requires_grad=True)
    >>> layer(torch.tensor([[[3.0, 0.0], [4.0, 1.0]]])).detach().round(decimals=2)  # responses 5 and 1, their mean 3
    tensor([[[ 8.0000,  0.0000],
             [10.6700,  1.3300]]])
    """

    spec = GLOBAL_RESPONSE

    def __init__(
        self,
        dim: int,
        eps: float = 1e-6,
        channels_last: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        _checked(self, num_features=dim, eps=eps, channels_last=channels_last)
        super().__init__()
        self.dim = dim
        self.eps = eps
        self.channels_last = channels_last
        self._parameters_of((dim,), device, dtype)
        self.reset_parameters()

    def forward(self, input: Tensor, mask: Tensor | None = None, sample_weight: Tensor | None = None) -> Tensor:
        """Normalize; see the class."""
        return self._run(input, mask=mask, sample_weight=sample_weight)

    def _run(self, input: Tensor, **options: Any) -> Tensor:
        if not self.channels_last:
            _check_channels(self, input, self.dim)
        return functional.global_response_norm(
            input, self.weight, self.bias, self.eps, channels_last=self.channels_last, **options
        )

    def extra_repr(self) -> str:
        return f"{self.dim}, eps={self.eps}, channels_last={self.channels_last}"
