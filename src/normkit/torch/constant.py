"""Batch norm with nothing to train: parameters and statistics are buffers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from normkit.core.constraints import check
from normkit.core.spec import ARGUMENTS
from normkit.torch import functional
from normkit.torch._buffers import WideBuffers
from normkit.torch.layers import Device, _check_dims, _Layer

__all__ = ["FrozenBatchNorm2d"]


class FrozenBatchNorm2d(WideBuffers, _Layer):
    """Batch norm of images with everything fixed, as detection models take it from a pretrained backbone.

    y = (x - running_mean) / sqrt(running_var + eps) * weight + bias, per channel, in training as in evaluation, with
    gradients for the input alone.

    Shapes: input (N, C, H, W), output the same; weight, bias, running_mean, running_var (C,), buffers in float32 or
    wider. First values: weight 1, bias 0, running_mean 0, running_var 1. The `state_dict` is that of
    torchvision.ops.FrozenBatchNorm2d; that of a batch norm loads too, its `num_batches_tracked` is left out.
    `normkit.freeze` instead keeps the layers that a model has, and can be undone.

    Args:
        num_features: channels C.
        eps: added to the variance.
        device, dtype: of the buffers.

    Raises:
        NormValueError: for inputs that do not fit.

    >>> import torch
    >>> layer = FrozenBatchNorm2d(4)
    >>> layer(torch.ones(2, 4, 3, 3)).shape, list(layer.parameters())
    (torch.Size([2, 4, 3, 3]), [])
    """

    _dims = (4,)
    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(
        self, num_features: int, eps: float = 1e-5, device: Device = None, dtype: torch.dtype | None = None
    ) -> None:
        check(type(self).__name__, ARGUMENTS, {"num_features": num_features, "eps": eps})
        super().__init__()
        self.num_features = num_features
        self.eps = eps
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((num_features,), value, device=device, dtype=dtype))
        self._widen()

    def forward(self, input: Tensor) -> Tensor:
        """Normalize; see the class."""
        _check_dims(self, input)
        return functional.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)

    def extra_repr(self) -> str:
        """What torch prints of a layer."""
        return f"{self.num_features}, eps={self.eps}"

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        state_dict.pop(f"{prefix}num_batches_tracked", None)
        super()._load_from_state_dict(state_dict, prefix, *args)
