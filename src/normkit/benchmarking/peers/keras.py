"""The peer in Keras on TensorFlow: a layer and its activation, forward and gradients, in one tf.function."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import tensorflow as tf

from normkit.benchmarking.cases import Case
from normkit.benchmarking.peers import Runner
from normkit.benchmarking.values import Given

__all__ = ["in_graph"]


class _InGraph:
    def __init__(self, case: Case, given: Given) -> None:
        self.case, axis = case, -1 if case.layout == "channels_last" or len(case.shape) == 2 else 1
        self.last = axis == -1 and len(case.shape) > 2
        policy = "float32" if case.dtype == "float32" else "mixed_bfloat16"  # parameters are float32
        options = {"axis": axis, "epsilon": case.spec.eps, "dtype": policy}
        layers = keras.layers
        self.norm = {
            "batch": lambda: layers.BatchNormalization(**options),
            "instance": lambda: layers.GroupNormalization(groups=-1, **options),
            "group": lambda: layers.GroupNormalization(groups=case.groups, **options),
            "layer": lambda: layers.LayerNormalization(**options),
            "rms": lambda: layers.RMSNormalization(**options),
        }[case.norm]()
        self.activation = keras.activations.get(case.activation)
        x, dy = (self._placed(values) for values in (given.x, given.dy))
        self.norm.build(x.shape)
        parameters = [values for values in (given.gamma, given.beta) if values is not None]
        kept = [given.mean, given.var] if case.spec.tracked else []
        self.norm.set_weights([np.asarray(values, dtype=np.float32) for values in (*parameters, *kept)])
        self.arguments = (x, dy)
        self.function = tf.function(self._trained if case.training else self._evaluated)

    def step(self) -> Any:
        return self.function(*self.arguments)

    def outputs(self, result: Any) -> dict[str, np.ndarray]:
        found = dict(zip(("y", "dx", "dgamma", "dbeta"), result, strict=False))
        arrays = {name: tf.cast(value, tf.float32).numpy() for name, value in found.items()}
        return {n: np.moveaxis(v, -1, 1) if self.last and n in ("y", "dx") else v for n, v in arrays.items()}

    def _trained(self, x: Any, dy: Any) -> Any:
        options = {"training": True} if self.case.norm == "batch" else {}
        trained = [variable.value for variable in self.norm.trainable_variables]
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = self.activation(self.norm(x, **options))
        return (y, *tape.gradient(y, [x, *trained], output_gradients=dy))

    def _evaluated(self, x: Any, _: Any) -> Any:
        return (self.activation(self.norm(x, training=False)),)

    def _placed(self, values: np.ndarray) -> Any:
        return tf.cast(tf.constant(np.moveaxis(values, 1, -1) if self.last else np.asarray(values)), self.case.dtype)


def in_graph(case: Case, given: Given) -> Runner:
    """One tf.function."""
    return _InGraph(case, given)
