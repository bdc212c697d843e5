"""Subjects of Keras layers, on whatever backend is active.

Imported by those who test Keras layers, never by :mod:`normkit.testing`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import keras
import numpy as np
from keras import ops

from normkit.testing.subject import Call, Outcome, Shape, Subject

__all__ = ["call_layer", "layer_subject", "run_layer", "tracking"]

Array = np.ndarray
Build = Callable[[Call, Shape, str], keras.layers.Layer]

# What Keras calls the parameters and the kept statistics; batch renormalization keeps them twice.
_NAMES = {
    "gamma": ("gamma", "scale"),
    "beta": ("beta",),
    "mean": ("moving_mean", "renorm_mean"),
    "var": ("moving_variance",),
    "std": ("moving_stddev", "renorm_stddev"),
}


def layer_subject(name: str, build: Build, *, last: bool = False, graph: bool = False, **known: Any) -> Subject:
    """Return a subject of a layer.

    Args:
        name: for test ids.
        build: (call, input shape, dtype) -> a fresh layer for what the call says of eps, rate, bessel, nonfinite and
            schedule.
        last: the layer has its channels on the last axis. The suite has them on axis 1, and they are moved.
        graph: run the call in a TensorFlow graph that knows of the input nothing but its channels.
        known: the other attributes of a Subject.
    """
    subject = Subject(name=name, run=_not_yet, **known)
    return replace(subject, run=lambda call: run_layer(build, subject.dtype, call, last=last, graph=graph))


def _not_yet(call: Call) -> Outcome:
    raise NotImplementedError


def tracking(call: Call, **more: Any) -> dict[str, Any]:
    """Return the arguments of batch normalization that a call chooses."""
    chosen = {"epsilon": call.eps, "momentum": None if call.rate is None else 1.0 - call.rate, **more}
    for name in ("bessel", "nonfinite"):
        if getattr(call, name) is not None:
            chosen[name] = getattr(call, name)
    return chosen


def run_layer(build: Build, dtype: str, call: Call, *, last: bool = False, graph: bool = False) -> Outcome:
    """Build the layer, load the call's state, run its history and itself, and read everything back."""

    def moved(values: Array | None, source: int, target: int) -> Any:
        return None if values is None else np.moveaxis(values, source, target) if last else values

    made_for = call.x.shape if call.made_for is None else call.made_for
    made_for = np.moveaxis(np.empty(made_for), 1, -1).shape if last else made_for
    layer = build(call, made_for, dtype)
    layer.build((None, *made_for[1:]))
    _load(layer, call)
    for batch in call.history:
        layer(_tensor(moved(batch, 1, -1), dtype), training=True)
    x = _tensor(moved(call.x, 1, -1), dtype)
    dy = None if call.dy is None else _tensor(moved(call.dy, 1, -1), dtype)
    options: dict[str, Any] = {"training": call.training} if layer._call_has_training_arg else {}
    if call.mask is not None:
        options["mask"] = ops.convert_to_tensor(call.mask, "bool")
    if call.weight is not None:
        options["sample_weight"] = _tensor(call.weight, dtype)
    run = _tensorflow_graph if graph else _RUN[keras.backend.backend()]
    y, gradients = run(layer, x, dy, options)
    if keras.backend.standardize_dtype(y.dtype) != dtype:
        raise AssertionError(f"the output of an input in {dtype} must have its type; got {y.dtype}")
    dx = moved(gradients.get("x"), -1, 1)
    outcome = Outcome(moved(_array(y), -1, 1), dx, gradients.get("gamma"), gradients.get("beta"))
    given: dict[str, Any] = {"x": call.x, "mask": call.mask, "sample_weight": call.weight}
    arguments = {"x": moved(_array(x), -1, 1), **{n: _array(v) for n, v in options.items() if n != "training"}}
    changed = tuple(n for n, value in arguments.items() if not np.array_equal(value, given[n], equal_nan=True))
    kept = {name: _array(getattr(layer, _NAMES[name][0])) for name in call.kept or ("mean", "var", "std")
            if hasattr(layer, _NAMES[name][0])}  # fmt: skip
    count = getattr(layer, "count", None)
    return replace(outcome, kept=kept, count=None if count is None else int(_array(count)), changed=changed)


def call_layer(
    layer: Any, x: Array, dy: Array | None = None, *, dtype: str = "float32", **options: Any
) -> tuple[Array, dict[str, Array]]:
    """Call a layer on an array; return its output and, with `dy`, the gradients of x and all weights by name.

    `training`, `mask` (an array) and `sample_weight` go to the layer.
    """
    if options.get("mask") is not None:
        options["mask"] = ops.convert_to_tensor(options["mask"], "bool")
    if options.get("sample_weight") is not None:
        options["sample_weight"] = _tensor(options["sample_weight"], dtype)
    slope = None if dy is None else _tensor(dy, dtype)
    if not layer.built:
        layer.build(x.shape)
    run = _jax_compiled if keras.backend.backend() == "jax" else _RUN[keras.backend.backend()]
    y, found = run(layer, _tensor(x, dtype), slope, options)
    return _array(y), found


def _load(layer: Any, call: Call) -> None:
    for name, value in {"gamma": call.gamma, "beta": call.beta, **(call.kept or {})}.items():
        for known in _NAMES[name]:
            variable = getattr(layer, known, None)
            if value is not None and variable is not None and not isinstance(variable, bool):
                variable.assign(_tensor(value, variable.dtype))
    if "std" in (call.kept or {}):
        layer.moving_variance.assign(ops.relu(ops.square(layer.moving_stddev) - layer.epsilon))
    if getattr(layer, "count", None) is not None:
        layer.count.assign(call.count)


def _named(layer: Any) -> dict[str, Any]:
    """Return the trainable weights by our names, where we have one."""
    names = {known: name for name, given in _NAMES.items() for known in given}
    return {names.get(weight.name, weight.name): weight for weight in layer.trainable_variables}


def _tensorflow(layer: Any, x: Any, dy: Any, options: dict[str, Any]) -> tuple[Any, dict[str, Array]]:
    y, found = _recorded(layer, x, dy, options)
    return y, {name: _array(g) for name, g in found.items()}


def _tensorflow_graph(layer: Any, x: Any, dy: Any, options: dict[str, Any]) -> tuple[Any, dict[str, Array]]:
    import tensorflow as tf

    training = {name: value for name, value in options.items() if name == "training"}
    given = {name: value for name, value in {"x": x, "dy": dy, **options}.items() if tf.is_tensor(value)}
    channels = {axis % len(x.shape) for axis in layer.input_spec.axes}

    def unknown(name: str, t: Any) -> Any:
        known = channels if name in ("x", "dy") else ()
        return tf.TensorSpec([n if axis in known else None for axis, n in enumerate(t.shape)], t.dtype)

    def step(tensors: dict[str, Any]) -> Any:
        more = {name: t for name, t in tensors.items() if name not in ("x", "dy")}
        return _recorded(layer, tensors["x"], tensors.get("dy"), {**training, **more})

    signature = [{name: unknown(name, t) for name, t in given.items()}]
    y, found = tf.function(step, input_signature=signature)(given)
    return y, {name: _array(g) for name, g in found.items()}


def _recorded(layer: Any, x: Any, dy: Any, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    import tensorflow as tf

    with tf.GradientTape() as tape:
        tape.watch(x)
        y = layer(x, **options)
    if dy is None:
        return y, {}
    wanted = {"x": x, **{name: weight.value for name, weight in _named(layer).items()}}
    return y, tape.gradient(y, wanted, output_gradients=dy, unconnected_gradients=tf.UnconnectedGradients.ZERO)


def _torch(layer: Any, x: Any, dy: Any, options: dict[str, Any]) -> tuple[Any, dict[str, Array]]:
    import torch

    x.requires_grad_(dy is not None)
    y = layer(x, **options)
    if dy is None:
        return y, {}
    wanted = {"x": x, **{name: weight.value for name, weight in _named(layer).items()}}
    found = torch.autograd.grad(y, list(wanted.values()), dy)
    return y, {name: _array(g) for name, g in zip(wanted, found, strict=True)}


def _jax(layer: Any, x: Any, dy: Any, options: dict[str, Any]) -> tuple[Any, dict[str, Array]]:
    """Run one call operation by operation: each is compiled once for a shape, and layers share what is compiled."""
    return _stateless(layer, x, dy, options, _step(layer, options.get("training")))


def _jax_compiled(layer: Any, x: Any, dy: Any, options: dict[str, Any]) -> tuple[Any, dict[str, Array]]:
    """Run one of many calls of the same layer, compiled as a whole."""
    import jax

    compiled = _COMPILED.setdefault(layer, {})
    key = options.get("training"), layer.trainable
    if key not in compiled:
        compiled[key] = jax.jit(_step(layer, options.get("training")))
    return _stateless(layer, x, dy, options, compiled[key])


_COMPILED: WeakKeyDictionary[Any, dict[Any, Any]] = WeakKeyDictionary()


def _step(layer: Any, training: bool | None) -> Callable[..., Any]:
    """Return a pure function of the layer's state, like `stateless_call`, which skips what `__call__` checks."""
    import jax

    weights, kept = layer.trainable_variables, layer.non_trainable_variables
    mode = {} if training is None else {"training": training}

    def step(values: Any, before: Any, x: Any, dy: Any, tensors: dict[str, Any]) -> Any:
        def forward(values: Any, x: Any) -> Any:
            mapping = list(zip([*weights, *kept], [*values, *before], strict=True))
            with keras.StatelessScope(state_mapping=mapping) as scope:
                y = layer(x, **mode, **tensors)
            return y, [scope.get_current_value(weight) for weight in kept]

        if dy is None:
            return *forward(values, x), None
        y, back, after = jax.vjp(forward, values, x, has_aux=True)
        return y, after, back(dy)

    return step


def _stateless(
    layer: Any, x: Any, dy: Any, options: dict[str, Any], step: Callable[..., Any]
) -> tuple[Any, dict[str, Array]]:
    weights, kept = layer.trainable_variables, layer.non_trainable_variables
    tensors = {name: t for name, t in options.items() if name != "training"}
    y, after, gradients = step([w.value for w in weights], [w.value for w in kept], x, dy, tensors)
    for weight, value in zip(kept, after, strict=True):
        weight.assign(value)
    if gradients is None:
        return y, {}
    by_weight, dx = gradients
    return y, {"x": _array(dx), **{n: _array(g) for n, g in zip(_named(layer), by_weight, strict=True)}}


_RUN = {"tensorflow": _tensorflow, "torch": _torch, "jax": _jax}


def _tensor(values: Any, dtype: str) -> Any:
    """Return values of this type as a tensor; NumPy has no bfloat16, and JAX no float64."""
    return ops.cast(ops.convert_to_tensor(np.asarray(values, dtype=dtype if dtype == "float64" else "float32")), dtype)


def _array(t: Any) -> Array:
    return np.array(ops.convert_to_numpy(t), dtype=np.float64)
