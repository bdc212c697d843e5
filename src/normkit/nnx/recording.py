"""What norms with running statistics are given in a model of Flax NNX, and what they keep."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from flax import nnx

from normkit.core.algebra import Pooled, pooled
from normkit.core.record import TrackedLayer
from normkit.errors import NormValueError, message
from normkit.nnx import layers as ours
from normkit.nnx.probe import as_arrays, calls_replaced, forward
from normkit.nnx.states import is_frozen

if TYPE_CHECKING:
    from normkit.surgery.protocol import Decide

__all__ = ["array", "as_kept", "gathered", "given", "keep", "kept", "moments", "tracked", "watching"]

_KEPT = ("mean", "var", "std")


def tracked(model: Any) -> Iterator[TrackedLayer]:
    """Batch norms and renorms that are not frozen."""
    for path, module in nnx.iter_modules(model):
        if isinstance(module, nnx.BatchNorm | ours.BatchRenorm) and not is_frozen(module):
            bessel = getattr(module, "bessel", False)
            yield TrackedLayer(".".join(map(str, path)), module, module.epsilon, bessel)


@contextlib.contextmanager
def watching(model: Any, layers: Sequence[TrackedLayer], decide: Decide) -> Iterator[Callable[[Any], Any]]:
    """See `normkit.surgery.protocol.Recording`. It is a copy of the model that runs."""
    copy = nnx.clone(model)
    copy.eval()
    twins = {
        id(module): twin for (_, module), (_, twin) in zip(nnx.iter_modules(model), nnx.iter_modules(copy), strict=True)
    }
    numbers = {id(twins[id(tracked.layer)]): number for number, tracked in enumerate(layers)}
    running: set[int] = set()

    def watched(call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def run(self: Any, x: Any, use_running_average: bool | None = None, **named: Any) -> Any:
            number = numbers.get(id(self))
            if number is None or number in running:  # the latter calls its parent's
                return call(self, x, use_running_average, **named)
            running.add(number)
            try:
                found = decide(number, lambda: _measured(layers[number], x, **named))
                keep(self, as_kept(self, found.mean, found.var))
                return call(self, x, True, **named)
            finally:
                running.remove(number)

        return run

    with calls_replaced({type(tracked.layer) for tracked in layers}, watched):
        yield lambda x: forward(copy, given(copy, x))


def kept(layer: Any) -> Mapping[str, np.ndarray]:
    """See `normkit.surgery.protocol.Recording`."""
    return {name: np.asarray(getattr(layer, name).get_value()) for name in _KEPT if hasattr(layer, name)}


def moments(layer: Any) -> tuple[np.ndarray, np.ndarray]:
    """See `normkit.surgery.protocol.Recording`."""
    found = {name: value.astype(np.float64) for name, value in kept(layer).items()}
    return found["mean"], found["var"] if "var" in found else np.square(found["std"]) - layer.epsilon


def as_kept(layer: Any, mean: np.ndarray, var: np.ndarray) -> Mapping[str, np.ndarray]:
    """See `normkit.surgery.protocol.Recording`."""
    return {"mean": mean, "std": np.sqrt(var + layer.epsilon)} if hasattr(layer, "std") else {"mean": mean, "var": var}


def keep(layer: Any, values: Mapping[str, np.ndarray]) -> None:
    """See `normkit.surgery.protocol.Recording`."""
    for name, value in values.items():
        variable = getattr(layer, name)
        variable.set_value(jax.numpy.asarray(value, variable.dtype))


def given(model: Any, x: Any) -> Any:
    """See `normkit.surgery.protocol.Recording`."""
    return as_arrays(x, model)


def array(outputs: Any) -> np.ndarray:
    """See `normkit.surgery.protocol.Recording`."""
    return np.asarray(jax.tree.leaves(outputs)[0]).astype(np.float64)


def gathered(value: Any) -> list[Any]:
    """See `normkit.surgery.protocol.Recording`. One process alone."""
    return [value]


def _measured(tracked: TrackedLayer, x: Any, mask: Any = None, sample_weight: Any = None) -> Pooled:
    """The moments of what a layer is called with."""
    axis = tracked.layer.axis
    if sample_weight is not None or not isinstance(axis, int):
        must = f"{tracked.path} must have its features on one axis, and be called without `sample_weight`"
        raise NormValueError(message(must, hint="freeze it to leave it out"))
    x = np.asarray(x)
    if mask is not None and np.ndim(mask) == x.ndim:
        mask = np.moveaxis(np.asarray(mask), axis, -1)
        if mask.shape[-1] > 1:
            raise NormValueError(message(f"{tracked.path} must have a mask of positions", f"shape {mask.shape}"))
        mask = mask[..., 0]
    return pooled(x, axis, mask)
