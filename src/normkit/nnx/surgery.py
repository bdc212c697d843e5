"""Changing a model of Flax NNX: layers put in the place of others, all or nothing, and what it gives afterwards."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from flax import nnx

from normkit.core.algebra import largest_change
from normkit.errors import NormTypeError, NormValueError, message
from normkit.nnx.graph import joined
from normkit.nnx.probe import as_arrays, forward

__all__ = ["Subject", "all_or_nothing", "evaluated", "modules", "place"]


class Subject:
    """What holds of every change of a model of Flax NNX: see `normkit.surgery.protocol.Subject`."""

    without_optimizer = "an nnx.Optimizer made before holds the state of another structure: make a new one"

    def __init__(self, model: nnx.Module, example: Any) -> None:
        self._model, self._example = model, example
        # What the model itself says against the example is heard here.
        self._before = None if example is None else evaluated(model, example)

    def check(self, inplace: bool, optimizer: Any) -> None:  # noqa: ARG002  # NNX can do that
        """Raise for what NNX cannot do."""
        if optimizer is not None:
            must = "`optimizer` must be None for NNX, whose optimizers hold their state by the structure of the model"
            raise NormValueError(message(must, type(optimizer).__name__, "make a new nnx.Optimizer of the result"))

    def changed(self, change: Callable[[nnx.Module], None], inplace: bool) -> tuple[Any, float | None]:
        """The model or a copy, changed, all or nothing, and the relative change of the outputs on the example."""
        result = self._model if inplace else nnx.clone(self._model)
        with all_or_nothing(result):
            change(result)
            after = None if self._before is None else evaluated(result, self._example)
        return result, None if self._before is None or after is None else largest_change(self._before, after)


def modules(model: nnx.Module) -> dict[str, Any]:
    """Every module, once, by its first path."""
    return {joined(*path): module for path, module in nnx.iter_modules(model)}


def evaluated(model: nnx.Module, example: Any) -> list[np.ndarray]:
    """The arrays that a model gives on an example in evaluation mode. It is a copy that runs.

    Raises NormTypeError where it gives none, or does not take such inputs, and whatever the model raises.
    """
    copy = nnx.clone(model)
    copy.eval()
    output = forward(copy, as_arrays(example, copy))
    arrays = [np.asarray(leaf) for leaf in jax.tree.leaves(output) if hasattr(leaf, "dtype")]
    if not arrays:
        must = "`model` must return arrays, also within mappings and sequences, to be compared"
        raise NormTypeError(message(must, type(output).__name__))
    return [array.astype(np.float64) for array in arrays]


def place(model: nnx.Module, old: Any, new: Any) -> None:
    """Put a module in the place of another, wherever that is held: attributes, lists and mappings in them."""

    def swapped(part: Any) -> Any:
        return new if part is old else part

    for _, owner in list(nnx.iter_modules(model)):
        for name, value in list(vars(owner).items()):
            if value is old:
                setattr(owner, name, new)
            elif isinstance(value, list | tuple | dict):
                leaves = jax.tree.leaves(value, is_leaf=_single)
                if any(leaf is old for leaf in leaves):
                    setattr(owner, name, nnx.data(jax.tree.map(swapped, value, is_leaf=_single)))


@contextlib.contextmanager
def all_or_nothing(model: nnx.Module) -> Iterator[None]:
    """Inside, changes of the model that are taken back where anything fails, Ctrl-C included."""
    attributes = [(module, dict(vars(module))) for _, module in nnx.iter_modules(model)]
    nodes = (node for _, node in nnx.iter_graph(model) if isinstance(node, nnx.Variable))
    values = [(variable, variable.get_value()) for variable in nodes]
    try:
        yield
    except BaseException:
        for module, before in attributes:
            vars(module).clear()
            vars(module).update(before)
        for variable, value in values:
            variable.set_value(value)
        raise


def _single(part: Any) -> bool:
    return isinstance(part, nnx.Module | nnx.Variable)
