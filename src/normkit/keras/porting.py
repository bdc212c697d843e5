"""Keras' side of porting norm layers: from a layer to its values, and back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import keras
import numpy as np

from normkit.core.record import NormRecord
from normkit.core.schedule import RenormSchedule
from normkit.errors import NormValueError, message
from normkit.keras import further
from normkit.keras import layers as ours

__all__ = ["ALONE", "assign", "is_norm", "make", "read", "targets", "walk"]

_COMMON = ("axis", "epsilon", "scale", "center")
_MOVING = ("momentum", "bessel", "debiased", "nonfinite", "virtual_batch_size")
_RENORM = ("renorm", "renorm_schedule", "renorm_clipping", "renorm_momentum")
# The class that is read, the one that is made, and its arguments. Instance norm is a group norm, so it comes first.
_KINDS: dict[str, tuple[Any, Any, tuple[str, ...]]] = {
    "batch": (keras.layers.BatchNormalization, ours.BatchNormalization, (*_COMMON, *_MOVING, *_RENORM)),
    "instance": (ours.InstanceNormalization, ours.InstanceNormalization, _COMMON),
    "group": (keras.layers.GroupNormalization, ours.GroupNormalization, (*_COMMON, "groups")),
    "layer": (keras.layers.LayerNormalization, ours.LayerNormalization, _COMMON),
    "rms": (keras.layers.RMSNormalization, ours.RMSNormalization, ("axis", "epsilon")),
}
ALONE = tuple(getattr(further, name) for name in further.__all__)
_KEPT = {"mean": "moving_mean", "var": "moving_variance"}
_ROLES = (
    *_KEPT.items(),
    ("beta", "beta"),
    ("mean", "renorm_mean"),
    ("std", "renorm_stddev"),
    ("std", "moving_stddev"),
    ("count", "count"),
)


def walk(model: Any) -> Iterator[tuple[str, Any]]:
    """See `normkit.surgery.protocol.Porting`."""
    seen = set()
    for layer in model._flatten_layers(include_self=True, recursive=True):
        if id(layer) not in seen and (is_norm(layer) or isinstance(layer, ALONE)):
            seen.add(id(layer))
            yield layer.path, layer


def is_norm(layer: Any) -> bool:
    """Whether `read` knows this layer, built or not."""
    return isinstance(layer, tuple(known for known, *_ in _KINDS.values()))


def read(layer: Any) -> NormRecord | None:
    """See `normkit.surgery.protocol.Porting`."""
    if isinstance(layer, ALONE):
        must = f"{layer.name} must have a counterpart in other frameworks to be ported"
        raise NormValueError(message(must, f"{type(layer).__name__}, which has none"))
    kind = next((name for name, (known, *_) in _KINDS.items() if isinstance(layer, known)), None)
    if kind is None:
        return None
    if not layer.built:
        raise NormValueError(message(f"{layer.name} must be built", hint="call it, or the model, on an input once"))
    if getattr(layer, "rms_scaling", False):
        must = f"{layer.name} must not have `rms_scaling`, which divides by the deviation from a mean that stays"
        raise NormValueError(message(must, hint="use RMSNormalization"))
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
    """See `normkit.surgery.protocol.Porting`."""
    several = len(record.shape) > 1
    fixed = record.clips is not None and not isinstance(record.clips, RenormSchedule)
    momentum = None if record.rate is None else 1 - record.rate
    options = {
        "axis": list(range(-len(record.shape), 0)) if several else axis,
        "epsilon": record.eps,
        "scale": record.gamma is not None,
        "center": record.beta is not None,
        "groups": record.groups,
        "momentum": momentum,
        "bessel": record.bessel,
        "debiased": record.debiased,
        "nonfinite": record.nonfinite,
        "virtual_batch_size": record.virtual_batch_size,
        "renorm": record.kind == "renorm",
        "renorm_schedule": None if fixed else record.clips,
        "renorm_clipping": record.clips if fixed else None,
        "renorm_momentum": 0.99 if momentum is None else momentum,
    }
    _, maker, arguments = _KINDS["batch" if record.kind in ("ghost", "renorm") else record.kind]
    made = maker(**{name: options[name] for name in arguments})
    spatial = record.spatial if record.spatial is not None else 1 if record.kind == "instance" else 0
    inner = (None,) * spatial
    made.build((None, *inner, *record.shape) if axis == -1 or several else (None, *record.shape, *inner))
    if record.spatial is None and made.input_spec is not None:
        made.input_spec = keras.layers.InputSpec(min_ndim=2, axes=made.input_spec.axes)
    return made


def targets(layer: Any) -> Iterator[tuple[str, Any]]:
    """See `normkit.surgery.protocol.Porting`."""
    gamma = "scale" if isinstance(layer, keras.layers.RMSNormalization) else "gamma"
    for role, attribute in (("gamma", gamma), *_ROLES):
        target = getattr(layer, attribute, None)
        if target is not None:
            yield role, target


def assign(target: Any, value: np.ndarray) -> None:
    """See `normkit.surgery.protocol.Porting`."""
    target.assign(value)


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
        debiased=getattr(layer, "debiased", False),
        nonfinite=getattr(layer, "nonfinite", "skip"),
        clips=_clips(layer) if layer.renorm else None,
        kept=kept,
        count=None if count is None else int(keras.ops.convert_to_numpy(count.value)),
        spatial=_spatial(layer),
        **arrays,
    )


def _clips(layer: Any) -> Any:
    schedule = getattr(layer, "renorm_schedule", None)
    return dict(layer.renorm_clipping or {}) if schedule is None else schedule


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
