"""Subjects of Flax NNX: modules with Flax' names, in jitted calls.

Imported by those who test NNX layers, never by :mod:`normkit.testing`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from normkit.testing.subject import Call, Outcome, Shape, Subject

__all__ = ["DTYPES", "layer_subject", "run_layer"]

Array = np.ndarray

DTYPES = {"float64": jnp.float64, "float32": jnp.float32, "float16": jnp.float16, "bfloat16": jnp.bfloat16}
_NAMES = {"gamma": "scale", "beta": "bias", "mean": "mean", "var": "var", "std": "std"}


def layer_subject(
    name: str, build: Callable[[Call, Shape], nnx.Module], *, channels_last: bool = True, **known: Any
) -> Subject:
    """Return a subject of a module.

    Args:
        name: for test ids.
        build: (call, input shape) -> a fresh module for what the call says of eps, rate, bessel, nonfinite and
            schedule.
        channels_last: whether axis 1 of a call, its channels, is the module's last one.
        known: the other attributes of a Subject.
    """
    subject = Subject(name=name, run=_not_yet, **known)
    return replace(subject, run=lambda call: run_layer(build, subject.dtype, call, channels_last))


def _not_yet(call: Call) -> Outcome:
    raise NotImplementedError


def run_layer(build: Callable[[Call, Shape], nnx.Module], dtype: str, call: Call, channels_last: bool) -> Outcome:
    """Build the module, load the call's state, run its history and itself, and read everything back."""
    kind = DTYPES[dtype]

    def placed(values: Array) -> Any:
        return jnp.asarray(np.moveaxis(values, 1, -1) if channels_last else values, kind)

    layer: Any = build(call, call.x.shape if call.made_for is None else call.made_for)
    named = {"gamma": call.gamma, "beta": call.beta, **(call.kept or {})}
    for name, value in named.items():
        variable = getattr(layer, _NAMES[name], None)
        if value is not None and variable is not None:
            variable[...] = jnp.asarray(value, variable.dtype)
    if getattr(layer, "count", None) is not None:
        layer.count[...] = jnp.asarray(call.count, jnp.int32)
    layer.train()
    for batch in call.history:
        *_, stats = _step(*nnx.split(layer, nnx.Param, ...), placed(batch), placed(np.zeros_like(batch)), {})
        nnx.update(layer, stats)
    layer.train() if call.training else layer.eval()
    options: dict[str, Any] = {}
    if call.mask is not None:
        options["mask"] = jnp.asarray(call.mask)
    if call.weight is not None:
        options["sample_weight"] = jnp.asarray(call.weight, jnp.promote_types(kind, jnp.float32))
    dy = placed(np.zeros_like(call.x) if call.dy is None else call.dy)
    y, (params, dx), stats = _step(*nnx.split(layer, nnx.Param, ...), placed(call.x), dy, options)
    if y.dtype != kind:
        raise AssertionError(f"the output of an input in {kind} must have its type; got {y.dtype}")

    def back(values: Any) -> Array:
        wide = np.asarray(values, dtype=np.float64)
        return np.moveaxis(wide, -1, 1) if channels_last else wide

    arrays = {name: np.asarray(state[name][...], np.float64) for state in (params, stats) for name in state}
    count = arrays.pop("count", None)
    dgamma, dbeta = arrays.pop("scale", None), arrays.pop("bias", None)
    outcome = Outcome(back(y), back(dx), dgamma, dbeta, arrays, None if count is None else int(count))
    return outcome if call.dy is not None else replace(outcome, dx=None, dgamma=None, dbeta=None)


# LLVM's own optimization, after XLA's, is a fifth of the time.
@functools.partial(jax.jit, static_argnums=0, compiler_options={"xla_backend_optimization_level": 0})
def _step(graph: Any, params: Any, rest: Any, x: Any, dy: Any, options: dict[str, Any]) -> Any:
    """Return (output, gradients by parameters and input, statistics).

    One program for calls with and without a backward pass: compiling is what these tests spend their time on.
    """

    def forward(params: Any, x: Any) -> Any:
        layer = nnx.merge(graph, params, rest, copy=True)
        return layer(x, **options), nnx.state(layer, nnx.BatchStat)

    y, pull, stats = jax.vjp(forward, params, x, has_aux=True)
    return y, pull(dy), stats
