"""PyTorch's side of porting norm layers: from a layer to its values, and back."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from normkit.core.record import NormRecord
from normkit.errors import NormValueError, message
from normkit.torch import factory, layers
from normkit.torch.constant import FrozenBatchNorm2d
from normkit.torch.graph import computes_as_named

__all__ = ["NAMES", "assign", "is_norm", "make", "read", "targets", "walk"]

_NORMS = (
    nn.modules.batchnorm._BatchNorm,
    nn.modules.instancenorm._InstanceNorm,
    layers._BatchRenorm,
    FrozenBatchNorm2d,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.RMSNorm,
)
NAMES = {"gamma": "weight", "beta": "bias", "mean": "running_mean", "var": "running_var", "std": "running_std"}


def is_norm(layer: Any) -> bool:
    """Whether `read` knows this layer."""
    return isinstance(layer, _NORMS)


def walk(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """See `normkit.surgery.protocol.Porting`."""
    for path, module in model.named_modules():
        if is_norm(module):
            yield path, module


def read(layer: Any) -> NormRecord | None:
    """See `normkit.surgery.protocol.Porting`."""
    if is_norm(layer) and isinstance(layer, nn.modules.lazy.LazyModuleMixin):
        raise NormValueError(message(f"{type(layer).__name__} must be built", hint="call the model on an input once"))
    if is_norm(layer) and not computes_as_named(layer):
        must = f"{type(layer).__name__} must compute as the class of torch.nn that it derives from"
        raise NormValueError(message(must, "a forward of its own"))
    batch = isinstance(layer, nn.modules.batchnorm._BatchNorm)
    instance = isinstance(layer, nn.modules.instancenorm._InstanceNorm)
    renorm = isinstance(layer, layers._BatchRenorm)
    if batch or instance or renorm:
        ghost = isinstance(layer, layers._GhostBatchNorm)
        return NormRecord(
            kind="renorm" if renorm else "instance" if instance else "ghost" if ghost else "batch",
            shape=(layer.num_features,),
            axis=getattr(layer, "axis", 1),
            eps=layer.eps,
            virtual_batch_size=layer.virtual_batch_size if ghost else None,
            rate=layer.momentum,
            bessel=getattr(layer, "bessel", True),
            nonfinite=getattr(layer, "nonfinite", "skip"),
            clips=layer.schedule if renorm else None,
            spatial=_spatial(layer),
            **_arrays(layer),
        )
    if isinstance(layer, FrozenBatchNorm2d):
        return NormRecord("batch", (layer.num_features,), 1, layer.eps, spatial=2, frozen=True, **_arrays(layer))
    if isinstance(layer, nn.GroupNorm):
        return NormRecord("group", (layer.num_channels,), 1, layer.eps, groups=layer.num_groups, **_arrays(layer))
    if isinstance(layer, nn.LayerNorm | nn.RMSNorm):
        first = isinstance(layer, layers.LayerNorm2d | layers.RMSNorm2d)
        eps = layer.eps
        if eps is None:  # PyTorch's RMS norm then takes that of the type it computes in
            eps = torch.finfo(torch.float32).eps
        return NormRecord(
            kind="layer" if isinstance(layer, nn.LayerNorm) else "rms",
            shape=tuple(layer.normalized_shape),
            axis=1 if first else -1,
            eps=eps,
            gain=getattr(layer, "gain", "w"),
            cast=getattr(layer, "cast", "gemma"),
            **_arrays(layer),
        )
    return None


def make(record: NormRecord, axis: int) -> nn.Module:
    """See `normkit.surgery.protocol.Porting`."""
    if record.kind in ("layer", "rms"):
        return _over_features(record, axis)
    if record.kind != "group":
        return _over_samples(record, axis)
    if axis != 1:
        must = "group norm in PyTorch must have its channels on axis 1"
        raise NormValueError(message(must, f"axis {axis}", "axis=1"))
    assert record.groups is not None
    return layers.GroupNorm(record.groups, record.shape[0], eps=record.eps, **_affine(record))


def targets(layer: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """See `normkit.surgery.protocol.Porting`."""
    for role, attribute in (*NAMES.items(), ("count", "num_batches_tracked")):
        target = getattr(layer, attribute, None)
        if target is not None:
            yield role, target


def assign(target: Tensor, value: np.ndarray) -> None:
    """See `normkit.surgery.protocol.Porting`."""
    with torch.no_grad():
        target.copy_(torch.as_tensor(value))


def _over_samples(record: NormRecord, axis: int) -> nn.Module:
    if record.frozen:
        if record.spatial != 2 or axis != 1:
            got = "another number of axes" if record.spatial else "a layer that takes any number of axes"
            hint = "normkit.freeze; or an example, which tells the number"
            raise NormValueError(message("frozen batch norm must be given images (N, C, H, W)", got, hint))
        return FrozenBatchNorm2d(record.shape[0], record.eps)
    anywhere = record.spatial not in (1, 2, 3) or axis != 1
    names = {"batch": "BatchNorm", "ghost": "GhostBatchNorm", "renorm": "BatchRenorm", "instance": "InstanceNorm"}
    name = names[record.kind]
    kind = factory.ANYWHERE[name] if anywhere else getattr(layers, f"{name}{record.spatial}d")
    options: dict[str, Any] = {"eps": record.eps, "nonfinite": record.nonfinite, **_affine(record)}
    if record.kept or record.rate is not None:
        options["momentum"] = record.rate
    if record.kind == "renorm":
        del options["bias"]
        options["schedule"] = record.schedule()
    else:
        options |= {"track_running_stats": bool(record.kept), "bessel": record.bessel}
    if record.kind == "ghost":
        options["virtual_batch_size"] = record.virtual_batch_size
    made: nn.Module = kind(record.shape[0], **options)
    if isinstance(made, factory.Anywhere):
        made.axis = axis
    return made


def _over_features(record: NormRecord, axis: int) -> nn.Module:
    if axis == 1 and len(record.shape) > 1:
        must = "a norm over several axes must have them last"
        raise NormValueError(message(must, f"axis {axis} and {record.words}", "axis=-1"))
    affine = _affine(record)
    options: dict[str, Any] = {"eps": record.eps, "elementwise_affine": affine["affine"]}
    if record.kind == "layer":
        options["bias"] = affine["bias"]
    else:
        options |= {"gain": record.gain, "cast": record.cast}
    name = "LayerNorm" if record.kind == "layer" else "RMSNorm"
    if axis == 1:
        return getattr(layers, f"{name}2d")(record.shape[0], **options)
    return getattr(layers, name)(record.shape, **options)


def _affine(record: NormRecord) -> dict[str, Any]:
    # No layer has a bias alone; gamma is 1 then.
    return {"affine": record.gamma is not None or record.beta is not None, "bias": record.beta is not None}


def _spatial(layer: nn.Module) -> int | None:
    # 1d takes (N, C) and (N, C, L).
    kind = getattr(layer, "turned_from", None) or type(layer)  # of `normkit.sync`
    return {"2d": 2, "3d": 3}.get(kind.__name__[-2:])


def _arrays(layer: nn.Module) -> dict[str, Any]:
    def array(name: str) -> np.ndarray | None:
        value = getattr(layer, NAMES[name], None)
        return None if value is None else value.detach().double().cpu().numpy().copy()

    count = getattr(layer, "num_batches_tracked", None)
    # Tracking may be switched off later. Only PyTorch's own batch norm then still evaluates by what it has.
    heeds = isinstance(layer, nn.modules.instancenorm._InstanceNorm | layers._Tracking)
    stale = heeds and not layer.track_running_stats
    kept = {} if stale else {name: array(name) for name in ("mean", "var", "std")}
    return {
        "gamma": array("gamma"),
        "beta": array("beta"),
        "kept": {name: value for name, value in kept.items() if value is not None},
        "count": None if count is None else int(count),
    }
