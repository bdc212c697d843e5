"""What goes into the batch norms of a PyTorch model, for `normkit.recalibrate`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from normkit.torch import layers as ours
from normkit.torch.probe import as_tensors, untouched

__all__ = ["keep", "recalibrated", "watching"]


def recalibrated(model: nn.Module) -> Iterator[nn.Module]:
    """Batch norms and batch renorms with running statistics that are not in evaluation mode inside a training model."""
    for module in model.modules():
        batch = isinstance(module, nn.modules.batchnorm._BatchNorm | ours._BatchRenorm)
        frozen = model.training and not module.training
        if batch and getattr(module, "running_mean", None) is not None and not frozen:
            yield module


@contextlib.contextmanager
def watching(
    model: nn.Module, layers: Sequence[nn.Module], seen: Callable[[int, float, np.ndarray, np.ndarray], None]
) -> Iterator[Callable[[Any], Any]]:
    """See `normkit.surgery.protocol.Recording`."""

    def hook(number: int) -> Callable[..., None]:
        def watch(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            x: Tensor = arguments[0].detach()
            axis = getattr(module, "axis", 1)
            axes = [at for at in range(x.dim()) if at != axis % x.dim()]
            wide = x.double()
            mean = wide.mean(axes, keepdim=True)
            var = (wide - mean).square().mean(axes)
            seen(number, x.numel() / x.shape[axis], mean.flatten().cpu().numpy(), var.cpu().numpy())

        return watch

    with untouched(model):
        handles = [layer.register_forward_pre_hook(hook(number)) for number, layer in enumerate(layers)]
        try:
            model.eval()
            for layer in layers:
                layer.training = True
            yield lambda x: model(as_tensors(x, model))
        finally:
            for handle in handles:
                handle.remove()


def keep(layer: Any, mean: np.ndarray, var: np.ndarray, unbiased: Callable[[np.ndarray], np.ndarray]) -> None:
    """See `normkit.surgery.protocol.Recording`."""
    with torch.no_grad():
        layer.running_mean.copy_(torch.from_numpy(mean))
        if hasattr(layer, "running_std"):
            layer.running_std.copy_(torch.from_numpy(np.sqrt(var + layer.eps)))
        else:
            layer.running_var.copy_(torch.from_numpy(unbiased(var) if getattr(layer, "bessel", True) else var))
