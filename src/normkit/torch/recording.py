"""What norms with running statistics are given in a PyTorch model, and what they keep."""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from normkit.core.algebra import Pooled, unbiased
from normkit.core.record import TrackedLayer
from normkit.errors import NormTypeError, NormValueError, message
from normkit.torch import layers as ours
from normkit.torch.further import EvoNormB0
from normkit.torch.probe import as_tensors, check_sized, forward, untouched
from normkit.torch.sites import warn_of_unreached
from normkit.torch.states import is_frozen, keeps

if TYPE_CHECKING:
    from normkit.surgery.protocol import Decide

__all__ = ["array", "as_kept", "bare", "gathered", "given", "keep", "kept", "moments", "tracked", "watching"]

_KINDS = nn.modules.batchnorm._BatchNorm | nn.modules.instancenorm._InstanceNorm | ours._BatchRenorm | EvoNormB0
_KEPT = ("running_mean", "running_var", "running_std")


def tracked(model: nn.Module) -> Iterator[TrackedLayer]:
    """Batch norms, renorms, EvoNorm-B0 and instance norms with running statistics, but for frozen ones.

    Frozen is what `normkit.freeze` froze, and what is in evaluation mode inside a model in training mode. Raises
    NormValueError for lazy layers, and warns of running statistics that no norm layer has.
    """
    check_sized(model)
    warn_of_unreached("recalibrate and adapt reach", model, lambda module: isinstance(module, _KINDS))
    for path, module in bare(model).named_modules():
        used = keeps(module) and getattr(module, "track_running_stats", True)
        if isinstance(module, _KINDS) and used and not is_frozen(module) and (module.training or not model.training):
            instance = isinstance(module, nn.modules.instancenorm._InstanceNorm)
            bessel = getattr(module, "bessel", True) and not instance and not hasattr(module, "running_std")
            yield TrackedLayer(path, module, module.eps, bessel, pooled=not instance)


@contextlib.contextmanager
def watching(model: nn.Module, layers: Sequence[TrackedLayer], decide: Decide) -> Iterator[Callable[[Any], Any]]:
    """See `normkit.surgery.protocol.Recording`."""
    # Without what DistributedDataParallel adds: its forward waits for the other processes, whose batches may be fewer.
    model = bare(model)

    def hook(number: int, tracked: TrackedLayer) -> Callable[..., None]:
        def watch(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found = decide(number, lambda: _measured(tracked, args, kwargs))
            keep(layer, as_kept(layer, found.mean, found.var))

        return watch

    with contextlib.ExitStack() as stack:
        stack.enter_context(untouched(model))
        if "torch._dynamo" in sys.modules:  # compiled parts run as they were written
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        for number, tracked in enumerate(layers):
            handle = tracked.layer.register_forward_pre_hook(hook(number, tracked), with_kwargs=True)
            stack.callback(handle.remove)
        model.eval()
        yield lambda x: forward(model, given(model, x))


def kept(layer: Any) -> Mapping[str, np.ndarray]:
    """See `normkit.surgery.protocol.Recording`."""
    buffers = {name: getattr(layer, name, None) for name in _KEPT}
    return {name: b.detach().double().cpu().numpy().copy() for name, b in buffers.items() if b is not None}


def moments(layer: Any) -> tuple[np.ndarray | None, np.ndarray]:
    """See `normkit.surgery.protocol.Recording`."""
    found = kept(layer)
    std = found.get("running_std")
    return found.get("running_mean"), found["running_var"] if std is None else np.square(std) - layer.eps


def as_kept(layer: Any, mean: np.ndarray, var: np.ndarray) -> Mapping[str, np.ndarray]:
    """See `normkit.surgery.protocol.Recording`."""
    if hasattr(layer, "running_std"):
        return {"running_mean": mean, "running_std": np.sqrt(var + layer.eps)}
    both = {"running_mean": mean, "running_var": var}
    return {name: values for name, values in both.items() if getattr(layer, name, None) is not None}


def keep(layer: Any, values: Mapping[str, np.ndarray]) -> None:
    """See `normkit.surgery.protocol.Recording`."""
    with torch.no_grad():
        for name, value in values.items():
            getattr(layer, name).copy_(torch.from_numpy(value))


def given(model: nn.Module, x: Any) -> Any:
    """See `normkit.surgery.protocol.Recording`."""
    return as_tensors(x, model)


def array(outputs: Any) -> np.ndarray:
    """See `normkit.surgery.protocol.Recording`."""
    while not isinstance(outputs, Tensor):
        parts = list(outputs.values() if isinstance(outputs, Mapping) else outputs)
        outputs = parts[0]
    return outputs.detach().double().cpu().numpy()


def gathered(value: Any) -> list[Any]:
    """See `normkit.surgery.protocol.Recording`."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [value]
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def bare(model: nn.Module) -> nn.Module:
    """The model without DistributedDataParallel around it."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def _measured(tracked: TrackedLayer, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Pooled:
    """The moments of what a layer is called with."""
    layer = tracked.layer
    named = inspect.signature(layer.forward).bind(*args, **kwargs).arguments
    x = next(iter(named.values()))
    if not isinstance(x, Tensor):
        raise NormTypeError(message(f"{tracked.path} must be called on a tensor", type(x).__name__))
    mask = named.get("mask")
    if named.get("sample_weight") is not None or (mask is not None and not tracked.pooled):
        must = f"{tracked.path} must be called without `sample_weight`, and as instance norm without `mask`"
        raise NormValueError(message(must, hint="freeze it to leave it out"))
    x = x.detach()
    # Some devices have no float64.
    x = (x.cpu() if x.device.type == "mps" else x).double()
    if not tracked.pooled and x.dim() == _unbatched(layer):
        x = x.unsqueeze(0)
    rows = x.movedim(getattr(layer, "axis", 1), -1)
    if mask is not None:
        rows = rows[mask.expand(rows.shape[:-1])]
    rows = rows.flatten(0, -2) if tracked.pooled else rows.flatten(1, -2)
    if not rows.numel():
        raise NormValueError(message(f"{tracked.path} must be given at least one value per channel", "none"))
    mean = rows.mean(-2, keepdim=True)
    var = (rows - mean).square().mean(-2)
    mean = mean.squeeze(-2)
    if not tracked.pooled:
        var = unbiased(var, rows.shape[1]) if getattr(layer, "bessel", True) else var
        mean, var = mean.mean(0), var.mean(0)
    return Pooled(rows.shape[0], mean.cpu().numpy(), var.cpu().numpy())


def _unbatched(layer: Any) -> int:
    """Number of axes of a sample alone."""
    dims = getattr(layer, "_dims", None)
    return int(layer._get_no_batch_dim() if dims is None else dims[0])
