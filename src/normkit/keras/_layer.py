"""What the layers share: their arguments, their axes, the types in which they compute."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import keras
from keras import backend, ops

from normkit.core import spec
from normkit.core.algebra import groups_for
from normkit.core.constraints import Constraint, Flag, Integer, Optional, Real, check
from normkit.errors import NormValueError, message
from normkit.keras._arrays import wide
from normkit.keras._execute import weighted

__all__ = [
    "ARGUMENTS",
    "axis_of",
    "cast_like",
    "channel_axis",
    "check_debiased",
    "check_groups",
    "checked",
    "register",
    "sample_axis_apart",
    "weighted_input",
    "widened",
]

register = keras.saving.register_keras_serializable(package="normkit")
ARGUMENTS: Mapping[str, Constraint] = {
    **spec.ARGUMENTS,
    "epsilon": Real(0.0),
    "center": Flag(),
    "scale": Flag(),
    "renorm": Flag(),
    "synchronized": Flag(),
    "debiased": Flag(),
    "renorm_momentum": Real(0.0, 1.0),
    "virtual_batch_size": Optional(Integer(2)),
    "learn_epsilon": Flag(),
    "groups": Integer(1),
    "alpha": Real(),
    "max_steps": Integer(1),
    "units": Integer(1),
}


def checked(layer: Any, **arguments: Any) -> None:
    """Raise for the first argument that the layer does not allow."""
    check(type(layer).__name__, ARGUMENTS, arguments)


def check_debiased(layer: Any, momentum: float | None, debiased: bool) -> None:
    """Raise where there is no first value to take out."""
    if debiased and momentum in (None, 1):
        hint = "momentum=None averages all batches equally and has no first value to take out"
        must = f"{type(layer).__name__}: `debiased` must go with a momentum below 1"
        raise NormValueError(message(must, momentum, hint))


def axis_of(layer: Any, axis: Any, shape: Sequence[Any]) -> int:
    """Return an axis counted from the front. Raises where the input has no such axis or does not know its length."""
    owner, ndim = type(layer).__name__, len(shape)
    if not Integer(-ndim).allows(axis) or axis >= ndim:
        must = f"{owner}: `axis` must be a whole number from {-ndim} to {ndim - 1} for an input of shape {tuple(shape)}"
        raise NormValueError(message(must, repr(axis)))
    if shape[axis] is None:
        raise NormValueError(message(f"{owner}: axis {axis} of the input must have a known length", tuple(shape)))
    return int(axis) % ndim


def channel_axis(layer: Any, shape: Sequence[Any]) -> int:
    """Return the layer's axis counted from the front. Raises where the input has not samples and channels."""
    if len(shape) < 2:
        must = f"{type(layer).__name__}: the input must have two axes or more, of samples and of channels"
        raise NormValueError(message(must, f"shape {tuple(shape)}"))
    return axis_of(layer, layer.axis, shape)


def sample_axis_apart(layer: Any, shape: Sequence[Any]) -> int:
    """Return the axis of the channels. Raises where it is that of the samples, each of which is normalized alone."""
    axis = channel_axis(layer, shape)
    if axis == 0:
        must = f"{type(layer).__name__}: `axis` must not be 0, that of the samples"
        raise NormValueError(message(must, f"axis={layer.axis} for an input of shape {tuple(shape)}"))
    return axis


def check_groups(layer: Any, channels: int) -> None:
    """Raise where the layer's groups do not divide the channels."""
    if channels % layer.groups:
        hint = f"use {groups_for(channels, layer.groups)} or normkit.groups_for({channels})"
        must = f"{type(layer).__name__}: the input's channels must be divisible by `groups`"
        raise NormValueError(message(must, f"{channels} and {layer.groups}", hint))


def widened(layer: Any, x: Any) -> Any:
    """Return the input in the type in which statistics accumulate, with the lengths that the layer knows.

    TensorFlow may trace a graph in which even the number of channels is unknown.
    """
    x = ops.cast(x, wide(backend.standardize_dtype(x.dtype)))
    known = {axis % len(x.shape): n for axis, n in (layer.input_spec.axes or {}).items()}
    if any(x.shape[axis] is None for axis in known):
        x.set_shape([known.get(axis, n) for axis, n in enumerate(x.shape)])
    return x


def cast_like(x: Any, variable: Any) -> Any:
    """Return a weight in the type of x, None where the layer has none."""
    return None if variable is None else ops.cast(variable, x.dtype)


def weighted_input(
    layer: Any, inputs: Any, mask: Any, sample_weight: Any, reduce: Any = None
) -> tuple[Any, Any, Any, int]:
    """Return (input in the wide type with masked positions 0, mask, weights, axis of the channels)."""
    if mask is None and sample_weight is not None:
        mask = getattr(inputs, "_keras_mask", None)  # Keras looks for it where there is one argument only
    x = widened(layer, inputs)
    axis = layer.axis % len(x.shape)
    return *weighted(x, mask, sample_weight, axis, reduce), axis
