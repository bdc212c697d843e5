"""The side of Flax NNX of porting norm layers: from a layer to its values, and back."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from flax import nnx

from normkit.core.record import NormRecord
from normkit.errors import NormValueError, message
from normkit.nnx import layers as ours

__all__ = ["NAMES", "assign", "is_norm", "make", "read", "targets", "walk"]

_AXES = ("axis", "reduction_axes", "feature_axes")
_MOVING = ("axis", "momentum", "nonfinite", "use_bias")
_BATCH = (*_MOVING, "bessel", "debiased")
# The class that is read, the one that is made, and its own arguments. Those that derive from another come first.
_KINDS: dict[str, tuple[Any, Any, tuple[str, ...]]] = {
    "renorm": (ours.BatchRenorm, ours.BatchRenorm, (*_MOVING, "schedule")),
    "ghost": (ours.GhostBatchNorm, ours.GhostBatchNorm, (*_BATCH, "virtual_batch_size")),
    "batch": (nnx.BatchNorm, ours.BatchNorm, _BATCH),
    "instance": (nnx.InstanceNorm, ours.InstanceNorm, ("feature_axes", "use_bias")),
    "group": (nnx.GroupNorm, ours.GroupNorm, ("num_groups", "use_bias")),
    "layer": (nnx.LayerNorm, ours.LayerNorm, ("reduction_axes", "feature_axes", "use_bias")),
    "rms": (nnx.RMSNorm, ours.RMSNorm, ("reduction_axes", "feature_axes")),
}
NAMES = {"gamma": "scale", "beta": "bias", "mean": "mean", "var": "var", "std": "std"}


def walk(model: Any) -> Iterator[tuple[str, Any]]:
    """See `normkit.surgery.protocol.Porting`."""
    for path, module in nnx.iter_modules(model):
        if is_norm(module):
            yield ".".join(map(str, path)), module


def is_norm(layer: Any) -> bool:
    """Whether `read` knows this layer."""
    return isinstance(layer, tuple(known for known, *_ in _KINDS.values()))


def read(layer: Any) -> NormRecord | None:
    """See `normkit.surgery.protocol.Porting`."""
    kind = next((name for name, (known, *_) in _KINDS.items() if isinstance(layer, known)), None)
    if kind is None:
        return None
    found = {name: _array(getattr(layer, attribute, None)) for name, attribute in NAMES.items()}
    kept = {name: found[name] for name in ("mean", "var", "std") if found[name] is not None}
    momentum = getattr(layer, "momentum", None)
    count = getattr(layer, "count", None)
    return NormRecord(
        kind=kind,
        shape=(layer.num_groups * layer.group_size if kind == "group" else layer.num_features,),
        axis=_axis(layer, kind),
        eps=layer.epsilon,
        groups=layer.num_groups if kind == "group" else None,
        virtual_batch_size=layer.virtual_batch_size if kind == "ghost" else None,
        rate=None if momentum is None else 1 - momentum,
        bessel=getattr(layer, "bessel", False),
        debiased=getattr(layer, "debiased", False),
        nonfinite=getattr(layer, "nonfinite", "skip"),
        clips=layer.schedule if kind == "renorm" else None,
        gamma=found["gamma"],
        beta=found["beta"],
        kept=kept,
        count=None if count is None else int(count.get_value()),
    )


def make(record: NormRecord, axis: int) -> Any:
    """See `normkit.surgery.protocol.Porting`."""
    if axis != -1 and record.kind == "group":
        must = f"{record.words} must have its channels last in NNX"
        raise NormValueError(message(must, f"axis {axis}", "axis=-1"))
    if len(record.shape) > 1:
        raise NormValueError(message("a norm over several axes cannot be ported to NNX", record.words))
    options = {
        **dict.fromkeys(_AXES, axis),
        "use_bias": record.beta is not None,
        "num_groups": record.groups,
        "momentum": None if record.rate is None else 1 - record.rate,
        "bessel": record.bessel,
        "debiased": record.debiased,
        "nonfinite": record.nonfinite,
        "virtual_batch_size": record.virtual_batch_size,
        "schedule": record.schedule() if record.kind == "renorm" else None,
    }
    _, maker, arguments = _KINDS[record.kind]
    own = {name: options[name] for name in arguments}
    return maker(*record.shape, epsilon=record.eps, use_scale=record.gamma is not None, rngs=nnx.Rngs(0), **own)


def targets(layer: Any) -> Iterator[tuple[str, Any]]:
    """See `normkit.surgery.protocol.Porting`."""
    for role, attribute in (*NAMES.items(), ("count", "count")):
        target = getattr(layer, attribute, None)
        if isinstance(target, nnx.Variable) and target.get_value() is not None:
            yield role, target


def assign(target: Any, value: np.ndarray) -> None:
    """See `normkit.surgery.protocol.Porting`."""
    target.set_value(value.astype(target.dtype))


def _axis(layer: Any, kind: str) -> int:
    """Of the channels, where the layer normalizes what a record of this kind says, whatever axes the input has."""
    if kind == "group":
        if layer.reduction_axes is not None:
            must = "group norm must normalize over all axes but the first to be ported"
            raise NormValueError(message(must, f"reduction_axes={layer.reduction_axes}"))
        return getattr(layer, "axis", -1)
    given = {name: getattr(layer, name) for name in _AXES if name in _KINDS[kind][2]}
    for axis in (1, -1):
        if all(value in (axis, (axis,), [axis]) for value in given.values()):
            return axis
    must = "a norm must have its channels on axis 1 or -1, and layer and RMS norm normalize over these, to be ported"
    raise NormValueError(message(must, ", ".join(f"{name}={value}" for name, value in given.items())))


def _array(variable: Any) -> np.ndarray | None:
    if not isinstance(variable, nnx.Variable) or variable.get_value() is None:
        return None
    return np.asarray(variable.get_value(), dtype=np.float64)
