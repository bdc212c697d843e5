"""What norms with moving statistics are given in a Keras model, and what they keep."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
from keras import ops

from normkit.core.algebra import Pooled, pooled
from normkit.core.record import TrackedLayer
from normkit.errors import NormValueError, message
from normkit.keras.probe import as_arrays, by_path, check_built, untouched

if TYPE_CHECKING:
    from normkit.surgery.protocol import Decide

__all__ = [
    "array",
    "as_kept",
    "called_after",
    "gathered",
    "given",
    "keep",
    "kept",
    "moments",
    "real",
    "tracked",
    "watching",
]

_STATISTICS = ("moving_mean", "moving_variance")
_OF_RENORM = ("renorm_mean", "renorm_stddev", "moving_stddev")


def tracked(model: Any) -> Iterator[TrackedLayer]:
    """Built batch norms that are trainable: one that is not runs by its statistics and keeps them."""
    for path, layer in by_path(model):
        if isinstance(layer, keras.layers.BatchNormalization) and layer.built and layer.trainable:
            bessel = getattr(layer, "bessel", False) and not layer.renorm
            yield TrackedLayer(path, layer, layer.epsilon, bessel)


@contextlib.contextmanager
def watching(model: Any, layers: Sequence[TrackedLayer], decide: Decide) -> Iterator[Callable[[Any], Any]]:
    """See `normkit.surgery.protocol.Recording`."""

    def before(number: int, named: Mapping[str, Any]) -> dict[str, Any]:
        own = layers[number]
        found = decide(number, lambda: _measured(own, named))
        keep(own.layer, as_kept(own.layer, found.mean, found.var))
        return {}

    check_built(model)
    with untouched(model), called_after([own.layer for own in layers], before):
        # Called directly and not through predict: that would compile the watching in.
        yield lambda x: model(given(model, x), training=False)


@contextlib.contextmanager
def called_after(
    layers: Sequence[Any], before: Callable[[int, Mapping[str, Any]], Mapping[str, Any]]
) -> Iterator[None]:
    """Inside, `before(number of the layer, arguments by name)` runs ahead of every call; what it returns is added."""

    def watched(number: int, layer: Any) -> Callable[..., Any]:
        call = layer.call
        signature = inspect.signature(call)

        def run(*args: Any, **kwargs: Any) -> Any:
            more = before(number, signature.bind(*args, **kwargs).arguments)
            return call(*args, **{**kwargs, **more})

        return run

    with contextlib.ExitStack() as stack:
        for number, layer in enumerate(layers):
            object.__setattr__(layer, "call", watched(number, layer))
            stack.callback(object.__delattr__, layer, "call")
        yield


def kept(layer: Any) -> Mapping[str, np.ndarray]:
    """See `normkit.surgery.protocol.Recording`."""
    names = _STATISTICS + (_OF_RENORM if layer.renorm else ())
    return {name: ops.convert_to_numpy(getattr(layer, name).value).copy() for name in names}


def moments(layer: Any) -> tuple[np.ndarray, np.ndarray]:
    """See `normkit.surgery.protocol.Recording`."""
    mean, var = (_wide(getattr(layer, name).value) for name in _STATISTICS)
    return mean, var


def as_kept(layer: Any, mean: np.ndarray, var: np.ndarray) -> Mapping[str, np.ndarray]:
    """See `normkit.surgery.protocol.Recording`."""
    values = dict(zip(_STATISTICS, (mean, var), strict=True))
    if layer.renorm:
        std = np.sqrt(var + layer.epsilon)
        values |= dict(zip(_OF_RENORM, (mean, std, std), strict=True))
    return values


def keep(layer: Any, values: Mapping[str, np.ndarray]) -> None:
    """See `normkit.surgery.protocol.Recording`."""
    for name, value in values.items():
        getattr(layer, name).assign(value)


def given(model: Any, x: Any) -> Any:
    """See `normkit.surgery.protocol.Recording`."""
    types = {keras.backend.standardize_dtype(variable.dtype) for variable in model.variables}
    return keras.tree.map_structure(
        lambda part: ops.convert_to_tensor(part) if hasattr(part, "shape") else part,
        as_arrays(x, "float64" if "float64" in types else None),
    )


def array(outputs: Any) -> np.ndarray:
    """See `normkit.surgery.protocol.Recording`."""
    return _wide(keras.tree.flatten(outputs)[0])


def gathered(value: Any) -> list[Any]:
    """See `normkit.surgery.protocol.Recording`. One process alone: replicas of a strategy see the same model."""
    return [value]


def real(named: Mapping[str, Any], ndim: int) -> np.ndarray | None:
    """The mask that a norm is called with, shaped as its input without channels, or broadcastable to that."""
    mask = named.get("mask")
    if mask is None:
        return None
    mask = ops.convert_to_numpy(mask).astype(bool)
    return mask.reshape(mask.shape + (1,) * (ndim - 1 - mask.ndim))


def _measured(tracked: TrackedLayer, named: Mapping[str, Any]) -> Pooled:
    """The moments of what a layer is called with."""
    if named.get("sample_weight") is not None:
        must = f"{tracked.path} must be called without `sample_weight`"
        raise NormValueError(message(must, hint="set trainable=False to leave it out"))
    x = _wide(next(iter(named.values())))
    return pooled(x, tracked.layer.axis, real(named, x.ndim))


def _wide(x: Any) -> np.ndarray:
    narrow = keras.backend.standardize_dtype(x.dtype) in ("float16", "bfloat16")
    return np.asarray(ops.convert_to_numpy(ops.cast(x, "float32") if narrow else x), dtype=np.float64)
