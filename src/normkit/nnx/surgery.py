"""Changing a model of Flax NNX: layers put in the place of others, all or nothing, and what it gives afterwards."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from flax import nnx

from normkit.errors import NormTypeError, NormValueError, message
from normkit.nnx.graph import joined
from normkit.nnx.probe import as_arrays, forward

__all__ = ["OLD_OPTIMIZER", "all_or_nothing", "check_no_optimizer", "evaluated", "modules", "place"]

OLD_OPTIMIZER = "an nnx.Optimizer made before holds the state of another structure: make a new one"


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


def check_no_optimizer(optimizer: Any) -> None:
    """Raise NormValueError for an optimizer."""
    if optimizer is not None:
        must = "`optimizer` must be None for NNX, whose optimizers hold their state by the structure of the model"
        raise NormValueError(message(must, type(optimizer).__name__, "make a new nnx.Optimizer of the result"))


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
