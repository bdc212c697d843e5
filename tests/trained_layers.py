"""PyTorch's norm layers with random parameters and statistics, to be ported and compared."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from normkit import torch as ours

__all__ = ["LAYERS", "moved", "named", "trained"]

LAYERS = [
    (nn.BatchNorm1d(6, momentum=0.3), (8, 6)),
    (nn.BatchNorm2d(6, eps=1e-3, affine=False), (8, 6, 3, 3)),
    (nn.BatchNorm2d(6, momentum=None), (8, 6, 3, 3)),
    (ours.BatchNorm3d(6, bessel=False), (4, 6, 2, 2, 2)),
    (ours.GhostBatchNorm2d(6, virtual_batch_size=4), (8, 6, 3, 3)),
    (ours.BatchRenorm2d(6), (8, 6, 3, 3)),
    (nn.InstanceNorm2d(6, affine=True), (8, 6, 3, 3)),
    (nn.GroupNorm(3, 6), (8, 6, 3, 3)),
    (nn.LayerNorm(6), (8, 6)),
    (nn.RMSNorm(6), (8, 6)),
    (ours.RMSNorm(6, eps=None), (8, 6)),
]


def trained(layer: nn.Module, shape: tuple[int, ...]) -> nn.Module:
    """The layer in evaluation mode, after three steps on data far from its first statistics."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.uniform_(0.5, 1.5)
    for _ in range(3):
        layer(2 + 3 * torch.randn(shape))
    return layer.eval()


def moved(x: np.ndarray, layer: nn.Module) -> np.ndarray:
    """To channels last; layer and RMS norm have them there already."""
    return x if type(layer).__name__ in ("LayerNorm", "RMSNorm") else np.moveaxis(x, 1, -1)


def named(value: object) -> str:
    """For test ids."""
    return type(value).__name__ if isinstance(value, nn.Module) else ""
