"""The peer in JAX: the step as one jitted function, statistics in float32, written as the papers write it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from normkit.benchmarking.cases import Case
from normkit.benchmarking.peers import Runner
from normkit.benchmarking.values import Given

__all__ = ["jitted"]

_ACTIVATIONS = {None: lambda x: x, "relu": jax.nn.relu, "silu": jax.nn.silu}
_RATE = 0.1  # of the running statistics


class _Jitted:
    def __init__(self, case: Case, given: Given) -> None:
        self.case = case
        x, dy = (jnp.asarray(_arranged(case, values), dtype=case.dtype) for values in (given.x, given.dy))
        affine = [jnp.asarray(values) for values in (given.gamma, given.beta) if values is not None]
        kept = tuple(jnp.asarray(values) for values in (given.mean, given.var))
        self.arguments = (x, affine, kept, dy)
        self.function = jax.jit(self._trained if case.training else self._evaluated)

    def step(self) -> Any:
        return jax.block_until_ready(self.function(*self.arguments))

    def outputs(self, result: Any) -> dict[str, np.ndarray]:
        y, *gradients = [np.asarray(value, dtype=np.float32) for value in result[:4]]
        found = dict(zip(("dx", "dgamma", "dbeta"), gradients, strict=False)) if self.case.training else {}
        found["y"] = y
        last = self.case.layout == "channels_last"
        return {name: np.moveaxis(v, -1, 1) if last and name in ("y", "dx") else v for name, v in found.items()}

    def _trained(self, x: Any, affine: Any, kept: Any, dy: Any) -> Any:
        y, back, statistics = jax.vjp(self._forward, x, affine, has_aux=True)
        dx, daffine = back(dy)
        if self.case.spec.tracked:
            kept = tuple(old + _RATE * (new.ravel() - old) for old, new in zip(kept, statistics, strict=True))
        return (y, dx, *daffine, kept)

    def _evaluated(self, x: Any, affine: Any, kept: Any, _: Any) -> Any:
        mean, var = (values.reshape(self._affine_shape(x.ndim)) for values in kept)
        return (self._finished(x, affine, mean, var),)

    def _forward(self, x: Any, affine: Any) -> tuple[Any, Any]:
        wide = x.astype(jnp.float32)
        axis = self._channel_axis(x.ndim)
        shape = x.shape
        if self.case.norm == "group":
            size = self.case.channels // self.case.groups
            wide = wide.reshape(*shape[:axis], self.case.groups, size, *shape[axis + 1 :])
        over = {
            "batch": tuple(a for a in range(x.ndim) if a != axis),
            "group": tuple(a for a in range(1, wide.ndim) if a != axis),
            "instance": tuple(a for a in range(1, x.ndim) if a != axis),
        }.get(self.case.norm, (x.ndim - 1,))
        center = self.case.spec.center
        mean = jnp.mean(wide, over, keepdims=True) if center else jnp.zeros((), jnp.float32)
        var = jnp.mean(jnp.square(wide - mean), over, keepdims=True)
        normalized = ((wide - mean) * jax.lax.rsqrt(var + self.case.spec.eps)).reshape(shape)
        return self._scaled(normalized, affine, x.dtype), (mean, var)

    def _finished(self, x: Any, affine: Any, mean: Any, var: Any) -> Any:
        normalized = (x.astype(jnp.float32) - mean) * jax.lax.rsqrt(var + self.case.spec.eps)
        return self._scaled(normalized, affine, x.dtype)

    def _scaled(self, normalized: Any, affine: Any, dtype: Any) -> Any:
        gamma, *beta = (values.reshape(self._affine_shape(normalized.ndim)) for values in affine)
        y = normalized * gamma
        for shift in beta:
            y = y + shift
        return _ACTIVATIONS[self.case.activation](y).astype(dtype)

    def _channel_axis(self, ndim: int) -> int:
        return ndim - 1 if self.case.layout == "channels_last" else 1

    def _affine_shape(self, ndim: int) -> tuple[int, ...]:
        return tuple(-1 if axis == self._channel_axis(ndim) else 1 for axis in range(ndim))


def jitted(case: Case, given: Given) -> Runner:
    """One jitted function."""
    return _Jitted(case, given)


def _arranged(case: Case, values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(np.moveaxis(values, 1, -1)) if case.layout == "channels_last" else np.asarray(values)
