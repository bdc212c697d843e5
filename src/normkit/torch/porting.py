"""PyTorch's side of porting norm layers: from a layer to its values, and back."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from normkit.core.record import NormRecord
from normkit.errors import NormValueError, message
from normkit.torch import factory, layers

__all__ = ["NAMES", "is_norm", "make", "read", "walk", "write"]

_NORMS = (
    nn.modules.batchnorm._BatchNorm,
    nn.modules.instancenorm._InstanceNorm,
    layers._BatchRenorm,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.RMSNorm,
)
NAMES = {"gamma": "weight", "beta": "bias", "mean": "running_mean", "var": "running_var", "std": "running_std"}


def is_norm(layer: Any) -> bool:
    """Whether `read` knows this layer."""
    return isinstance(layer, _NORMS)


def walk(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every norm layer that can be read, with its path, once."""
    for path, module in model.named_modules():
        if read(module) is not None:
            yield path, module


def read(layer: Any) -> NormRecord | None:
    """The values of a layer, None where it is no norm that we know."""
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
            spatial=_spatial(layer),
            **_arrays(layer),
        )
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
            **_arrays(layer),
        )
    return None


def make(record: NormRecord, axis: int) -> nn.Module:
    """A layer with these values, in evaluation mode or training mode alike; channels on `axis`."""
    kind, shape = record.kind, record.shape
    if kind in ("layer", "rms"):
        made = _over_features(record, axis)
    elif kind == "group" and axis == 1:
        assert record.groups is not None
        made = layers.GroupNorm(record.groups, shape[0], eps=record.eps, affine=record.gamma is not None)
    elif kind == "group":
        must = "group norm in PyTorch must have its channels on axis 1"
        raise NormValueError(message(must, f"axis {axis}", "axis=1"))
    else:
        made = _over_samples(record, axis)
    write(made, record)
    return made


def write(layer: Any, record: NormRecord) -> None:
    """Write parameters and kept statistics into a layer that has them. Raises NormValueError where they do not fit."""
    found: dict[str, Any] = {"gamma": record.gamma, "beta": record.beta, **record.kept}
    if getattr(layer, "running_std", None) is not None:
        found["std"] = record.deviation()
    elif getattr(layer, "running_var", None) is not None:
        found["var"] = record.variance()
    with torch.no_grad():
        for name, attribute in NAMES.items():
            target, value = getattr(layer, attribute, None), found.get(name)
            if target is None:
                if name in ("gamma", "beta") and value is not None:
                    must = f"the layer that is written to must have a {attribute}, {record.words} has one"
                    raise NormValueError(message(must))
                continue
            if value is None:
                value = np.full(target.shape, 0.0 if name in ("beta", "mean") else 1.0)
                if name == "gamma" and getattr(layer, "gain", "w") == "1+w":
                    value = np.zeros(target.shape)
            if tuple(target.shape) != np.shape(value):
                got = f"{tuple(target.shape)} and {np.shape(value)}"
                raise NormValueError(message(f"{attribute} must have the same shape on both sides", got))
            target.copy_(torch.as_tensor(np.asarray(value)))
        if record.count is not None and getattr(layer, "num_batches_tracked", None) is not None:
            layer.num_batches_tracked.fill_(record.count)


def _over_samples(record: NormRecord, axis: int) -> nn.Module:
    anywhere = record.spatial not in (1, 2, 3) or axis != 1
    names = {"batch": "BatchNorm", "ghost": "GhostBatchNorm", "renorm": "BatchRenorm", "instance": "InstanceNorm"}
    name = names[record.kind]
    kind = factory.ANYWHERE[name] if anywhere else getattr(layers, f"{name}{record.spatial}d")
    options: dict[str, Any] = {"eps": record.eps, "affine": record.gamma is not None or record.beta is not None}
    if record.rate is not None or record.kind != "instance":
        options["momentum"] = record.rate
    if record.kind != "renorm":
        options |= {"track_running_stats": bool(record.kept), "bessel": record.bessel}
    if record.kind == "ghost":
        options["virtual_batch_size"] = record.virtual_batch_size
    made: nn.Module = kind(record.shape[0], **options)
    if isinstance(made, factory.Anywhere):
        made.axis = axis
    return made


def _over_features(record: NormRecord, axis: int) -> nn.Module:
    options: dict[str, Any] = {"eps": record.eps, "elementwise_affine": record.gamma is not None}
    if axis == 1:
        if len(record.shape) > 1:
            must = "a norm over several axes must have them last"
            raise NormValueError(message(must, f"axis {axis} and {record.words}", "axis=-1"))
        return (layers.LayerNorm2d if record.kind == "layer" else layers.RMSNorm2d)(record.shape[0], **options)
    if record.kind == "layer":
        return layers.LayerNorm(record.shape, bias=record.beta is not None, **options)
    return layers.RMSNorm(record.shape, gain=record.gain, **options)


def _spatial(layer: nn.Module) -> int | None:
    # 1d takes (N, C) and (N, C, L).
    return {"2d": 2, "3d": 3}.get(type(layer).__name__[-2:])


def _arrays(layer: nn.Module) -> dict[str, Any]:
    def array(name: str) -> np.ndarray | None:
        value = getattr(layer, NAMES[name], None)
        return None if value is None else value.detach().double().cpu().numpy().copy()

    count = getattr(layer, "num_batches_tracked", None)
    kept = {name: array(name) for name in ("mean", "var", "std")}
    return {
        "gamma": array("gamma"),
        "beta": array("beta"),
        "kept": {name: value for name, value in kept.items() if value is not None},
        "count": None if count is None else int(count),
    }
