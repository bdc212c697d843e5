"""What goes into the batch norms of a Keras model, for `normkit.recalibrate`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

__all__ = ["keep", "recalibrated", "watching"]


def recalibrated(model: Any) -> Iterator[Any]:
    """Built batch norms that are trainable: one that is not runs by its statistics and keeps them."""
    seen = set()
    for layer in model._flatten_layers(include_self=True, recursive=True):
        batch = isinstance(layer, keras.layers.BatchNormalization) and layer.built and layer.trainable
        if batch and id(layer) not in seen:
            seen.add(id(layer))
            yield layer


@contextlib.contextmanager
def watching(
    model: Any, layers: Sequence[Any], seen: Callable[[int, float, np.ndarray, np.ndarray], None]
) -> Iterator[Callable[[Any], Any]]:
    """See `normkit.surgery.protocol.Recording`."""
    before = [[(v, ops.convert_to_numpy(v.value)) for v in layer.non_trainable_variables] for layer in layers]
    calls = [layer.call for layer in layers]

    def watched(number: int, layer: Any, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(inputs: Any, *arguments: Any, **named: Any) -> Any:
            x = np.asarray(ops.convert_to_numpy(ops.cast(inputs, "float32")), dtype=np.float64)
            axis = layer.axis % x.ndim
            axes = tuple(at for at in range(x.ndim) if at != axis)
            mean = x.mean(axes)
            var = np.square(x - x.mean(axes, keepdims=True)).mean(axes)
            seen(number, x.size / x.shape[axis], mean, var)
            return call(inputs, *arguments, **{**named, "training": True})

        return run

    for number, (layer, call) in enumerate(zip(layers, calls, strict=True)):
        object.__setattr__(layer, "call", watched(number, layer, call))
    try:
        # Called directly and not through predict: that would compile the watching in.
        yield lambda x: model(x, training=False)
    finally:
        for layer, variables in zip(layers, before, strict=True):
            object.__delattr__(layer, "call")
            for variable, value in variables:
                variable.assign(value)


def keep(layer: Any, mean: np.ndarray, var: np.ndarray, unbiased: Callable[[np.ndarray], np.ndarray]) -> None:
    """See `normkit.surgery.protocol.Recording`."""
    layer.moving_mean.assign(mean)
    layer.moving_variance.assign(unbiased(var) if getattr(layer, "bessel", False) else var)
    if layer.renorm:
        layer.renorm_mean.assign(mean)
        for name in ("renorm_stddev", "moving_stddev"):
            getattr(layer, name).assign(np.sqrt(var + layer.epsilon))
