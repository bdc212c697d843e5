"""The side of Flax NNX of porting norm layers: from a layer to its values, and back."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from flax import nnx

from normkit.core.record import NormRecord
from normkit.errors import NormValueError, message
from normkit.nnx import layers as ours

__all__ = ["is_norm", "make", "read", "walk", "write"]

_KINDS: dict[Any, str] = {
    ours.BatchRenorm: "renorm",
    ours.GhostBatchNorm: "ghost",
    nnx.BatchNorm: "batch",
    nnx.InstanceNorm: "instance",
    nnx.GroupNorm: "group",
    nnx.LayerNorm: "layer",
    nnx.RMSNorm: "rms",
}
_NAMES = {"gamma": "scale", "beta": "bias", "mean": "mean", "var": "var", "std": "std"}


def walk(model: Any) -> Iterator[tuple[str, Any]]:
    """Every norm layer that can be read, with its path, once."""
    for path, module in nnx.iter_modules(model):
        if read(module) is not None:
            yield ".".join(map(str, path)), module


def is_norm(layer: Any) -> bool:
    """Whether `read` knows this layer."""
    return isinstance(layer, tuple(_KINDS))


def read(layer: Any) -> NormRecord | None:
    """The values of a layer, None where it is no norm that we know."""
    kind = next((name for known, name in _KINDS.items() if isinstance(layer, known)), None)
    if kind is None:
        return None
    found = {name: _array(getattr(layer, attribute, None)) for name, attribute in _NAMES.items()}
    kept = {name: found[name] for name in ("mean", "var", "std") if found[name] is not None}
    momentum = getattr(layer, "momentum", None)
    count = getattr(layer, "count", None)
    axis = getattr(layer, "axis", -1)
    if axis not in (1, -1):
        raise NormValueError(message("a norm must have its channels on axis 1 or -1 to be ported", f"axis {axis}"))
    return NormRecord(
        kind=kind,
        shape=_shape(layer, found),
        axis=axis,
        eps=layer.epsilon,
        groups=layer.num_groups if kind == "group" else None,
        virtual_batch_size=layer.virtual_batch_size if kind == "ghost" else None,
        rate=None if momentum is None else 1 - momentum,
        bessel=getattr(layer, "bessel", False),
        gamma=found["gamma"],
        beta=found["beta"],
        kept=kept,
        count=None if count is None else int(count.get_value()),
    )


def make(record: NormRecord, axis: int) -> Any:
    """A layer with these values and channels on `axis`."""
    if record.gain == "1+w":
        raise NormValueError(message("a gain of 1 + w must be folded into w for NNX", record.words))
    samples = record.kind in ("batch", "ghost", "renorm")
    if axis != -1 and not samples:
        must = f"{record.words} must have its channels last in NNX"
        raise NormValueError(message(must, f"axis {axis}", "axis=-1"))
    if len(record.shape) > 1:
        raise NormValueError(message("a norm over several axes cannot be ported to NNX", record.words))
    options: dict[str, Any] = {"epsilon": record.eps, "use_scale": record.gamma is not None, "rngs": nnx.Rngs(0)}
    if record.kind != "rms":
        options["use_bias"] = record.beta is not None
    if samples:
        options |= {"axis": axis, "momentum": None if record.rate is None else 1 - record.rate}
    if record.kind in ("batch", "ghost"):
        options["bessel"] = record.bessel
    if record.kind == "ghost":
        options["virtual_batch_size"] = record.virtual_batch_size
    if record.kind == "group":
        options["num_groups"] = record.groups
    makers: dict[str, Any] = {
        "batch": ours.BatchNorm,
        "ghost": ours.GhostBatchNorm,
        "renorm": ours.BatchRenorm,
        "instance": ours.InstanceNorm,
        "group": ours.GroupNorm,
        "layer": ours.LayerNorm,
        "rms": ours.RMSNorm,
    }
    made = makers[record.kind](record.shape[0], **options)
    write(made, record)
    return made


def write(layer: Any, record: NormRecord) -> None:
    """Write parameters and kept statistics into a layer that has them. Raises NormValueError where they do not fit."""
    values = {
        "gamma": record.gamma,
        "beta": record.beta,
        "mean": record.kept.get("mean"),
        "var": record.variance(),
        "std": record.deviation(),
    }
    for name, attribute in _NAMES.items():
        target, value = getattr(layer, attribute, None), values[name]
        if target is None or not isinstance(target, nnx.Variable) or target.get_value() is None:
            if name in ("gamma", "beta") and value is not None:
                raise NormValueError(message(f"the layer must have a {attribute}, {record.words} has one"))
            continue
        if value is None:
            value = np.full(target.shape, 0.0 if name in ("beta", "mean") else 1.0)
        if tuple(target.shape) != np.shape(value):
            got = f"{tuple(target.shape)} and {np.shape(value)}"
            raise NormValueError(message(f"{attribute} must have the same shape on both sides", got))
        target.set_value(np.asarray(value).astype(target.dtype))
    count = getattr(layer, "count", None)
    if record.count is not None and count is not None:
        count.set_value(np.asarray(record.count, dtype=count.dtype))


def _shape(layer: Any, found: dict[str, Any]) -> tuple[int, ...]:
    known = next((array for array in found.values() if array is not None), None)
    return (layer.num_features,) if known is None else tuple(known.shape)


def _array(variable: Any) -> np.ndarray | None:
    if not isinstance(variable, nnx.Variable) or variable.get_value() is None:
        return None
    return np.asarray(variable.get_value(), dtype=np.float64)
