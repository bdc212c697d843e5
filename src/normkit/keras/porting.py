"""Keras' side of porting norm layers: from a layer to its values, and back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import keras
import numpy as np

from normkit.core.record import NormRecord
from normkit.errors import NormValueError, message
from normkit.keras import layers as ours

__all__ = ["is_norm", "make", "read", "walk", "write"]

_KINDS = {
    keras.layers.BatchNormalization: "batch",
    ours.InstanceNormalization: "instance",
    keras.layers.GroupNormalization: "group",
    keras.layers.LayerNormalization: "layer",
    keras.layers.RMSNormalization: "rms",
}
_KEPT = {"mean": "moving_mean", "var": "moving_variance"}


def walk(model: Any) -> Iterator[tuple[str, Any]]:
    """Every norm layer that can be read, with its path, once and in the order of the model."""
    seen = set()
    for layer in model._flatten_layers(include_self=True, recursive=True):
        if id(layer) not in seen and layer.built and read(layer) is not None:
            seen.add(id(layer))
            yield layer.path, layer


def is_norm(layer: Any) -> bool:
    """Whether `read` knows this layer, built or not."""
    return isinstance(layer, tuple(_KINDS))


def read(layer: Any) -> NormRecord | None:
    """The values of a layer, None where it is no norm that we know. Raises NormValueError for one that is not built."""
    kind = next((name for known, name in _KINDS.items() if isinstance(layer, known)), None)
    if kind is None:
        return None
    if not layer.built:
        raise NormValueError(message(f"{layer.name} must be built", hint="call it, or the model, on an input once"))
    arrays: dict[str, Any] = {
        "gamma": _array(layer.scale if kind == "rms" else layer.gamma if layer.scale else None),
        "beta": _array(layer.beta if getattr(layer, "center", False) else None),
    }
    if kind == "batch":
        return _batch(layer, arrays)
    if kind in ("layer", "rms"):
        # Over trailing axes; whatever else a layer of Keras can do has no counterpart elsewhere.
        shape = tuple((arrays["gamma"] if arrays["gamma"] is not None else _spare(layer)).shape)
        axes = layer.axis if isinstance(layer.axis, Sequence) else (layer.axis,)
        first = tuple(axes) == (1,) and len(shape) == 1
        if not first and sorted(axes) not in (list(range(-len(axes), 0)), _trailing(layer, len(axes))):
            must = f"{layer.name} must normalize over its last axes, or over axis 1 alone, to be ported"
            raise NormValueError(message(must, f"axis {layer.axis}"))
        return NormRecord(kind, shape, 1 if first else -1, layer.epsilon, **arrays)
    channels = _channels(layer)
    groups = channels if layer.groups == -1 else layer.groups if kind == "group" else None
    return NormRecord(kind, (channels,), _axis(layer), layer.epsilon, groups=groups, spatial=_spatial(layer), **arrays)


def make(record: NormRecord, axis: int) -> Any:
    """A built layer with these values and channels on `axis`."""
    options: dict[str, Any] = {"axis": axis, "epsilon": record.eps}
    if record.gain == "1+w":
        raise NormValueError(message("a gain of 1 + w must be folded into w for Keras", record.words))
    if record.kind != "rms":
        options |= {"scale": record.gamma is not None, "center": record.beta is not None}
    if record.kind in ("layer", "rms") and len(record.shape) > 1:
        options["axis"] = list(range(-len(record.shape), 0))
    makers: dict[str, Any] = {
        "batch": ours.BatchNormalization,
        "ghost": ours.GhostBatchNormalization,
        "renorm": ours.BatchRenormalization,
        "instance": ours.InstanceNormalization,
        "group": ours.GroupNormalization,
        "layer": ours.LayerNormalization,
        "rms": ours.RMSNormalization,
    }
    if record.kind in ("batch", "ghost", "renorm"):
        options |= {"momentum": None if record.rate is None else 1 - record.rate, "bessel": record.bessel}
    if record.kind == "ghost":
        options["virtual_batch_size"] = record.virtual_batch_size
    if record.kind == "group":
        options["groups"] = record.groups
    made = makers[record.kind](**options)
    spatial = record.spatial if record.spatial is not None else 1 if record.kind == "instance" else 0
    inner = (None,) * spatial
    made.build((None, *inner, *record.shape) if axis == -1 or len(record.shape) > 1 else (None, *record.shape, *inner))
    if record.spatial is None and made.input_spec is not None:
        made.input_spec = keras.layers.InputSpec(min_ndim=2, axes=made.input_spec.axes)
    write(made, record)
    return made


def write(layer: Any, record: NormRecord) -> None:
    """Write parameters and kept statistics into a built layer. Raises NormValueError where they do not fit."""
    rms = isinstance(layer, keras.layers.RMSNormalization)
    targets: dict[str, Any] = {
        "gamma": layer.scale if rms else layer.gamma,
        "beta": getattr(layer, "beta", None),
        **{name: getattr(layer, attribute, None) for name, attribute in _KEPT.items()},
        "std": getattr(layer, "renorm_stddev", None),
        "renorm_mean": getattr(layer, "renorm_mean", None),
        "moving_stddev": getattr(layer, "moving_stddev", None),
        "count": getattr(layer, "count", None),
    }
    mean = record.kept.get("mean")
    values = {
        "gamma": record.gamma,
        "beta": record.beta,
        "mean": mean,
        "renorm_mean": mean,
        "var": record.variance(),
        "std": record.deviation(),
        "moving_stddev": record.deviation(),
        "count": record.count,
    }
    for name, target in targets.items():
        value = values[name]
        if target is None:
            if name in ("gamma", "beta") and value is not None:
                raise NormValueError(message(f"{layer.name} must have a {name}, {record.words} has one"))
            continue
        if value is None:
            value = np.full(tuple(target.shape), 0.0 if name in ("beta", "mean", "renorm_mean", "count") else 1.0)
        if tuple(target.shape) != np.shape(value):
            got = f"{tuple(target.shape)} and {np.shape(value)}"
            raise NormValueError(message(f"{name} must have the same shape on both sides", got))
        target.assign(np.asarray(value))


def _batch(layer: Any, arrays: dict[str, Any]) -> NormRecord:
    size = getattr(layer, "virtual_batch_size", None)
    kept = {name: _array(getattr(layer, attribute)) for name, attribute in _KEPT.items()}
    count = getattr(layer, "count", None)
    return NormRecord(
        kind="renorm" if layer.renorm else "batch" if size is None else "ghost",
        shape=(_channels(layer),),
        axis=_axis(layer),
        eps=layer.epsilon,
        virtual_batch_size=size,
        rate=None if layer.momentum is None else 1 - layer.momentum,
        bessel=getattr(layer, "bessel", False),
        kept=kept,
        count=None if count is None else int(keras.ops.convert_to_numpy(count.value)),
        spatial=_spatial(layer),
        **arrays,
    )


def _ndim(layer: Any) -> int | None:
    """Number of axes of the input, None where the layer takes any."""
    return layer.input_spec.ndim


def _spatial(layer: Any) -> int | None:
    ndim = _ndim(layer)
    return None if ndim is None else ndim - 2


def _axis(layer: Any) -> int:
    ndim = _ndim(layer)
    if layer.axis == -1 or layer.axis + 1 == ndim:
        return -1
    if layer.axis == 1 or layer.axis + (ndim or 0) == 1:
        return 1
    raise NormValueError(message(f"{layer.name} must have its channels on axis 1 or last", f"axis {layer.axis}"))


def _channels(layer: Any) -> int:
    return int(next(iter(layer.input_spec.axes.values())))


def _trailing(layer: Any, count: int) -> list[int]:
    ndim = len(layer._build_shapes_dict["input_shape"])
    return list(range(ndim - count, ndim))


def _spare(layer: Any) -> np.ndarray:
    """Something of the shape that gamma would have."""
    shape = layer._build_shapes_dict["input_shape"]
    axes = layer.axis if isinstance(layer.axis, Sequence) else (layer.axis,)
    return np.empty([shape[axis] for axis in axes])


def _array(variable: Any) -> np.ndarray | None:
    # Its value and not itself: NumPy warns of how a variable of Keras becomes an array.
    return None if variable is None else np.asarray(keras.ops.convert_to_numpy(variable.value), dtype=np.float64)
