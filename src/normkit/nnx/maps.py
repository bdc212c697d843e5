"""The linear maps of Flax NNX, and their kernels in the order in which the rules about models have them."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.nnx.nn import dtypes
from jax import lax

__all__ = ["LinearMap", "Mapper", "call_of", "mapper"]

Mapper = Callable[[int, str | None], "LinearMap | None"]

# What a layer computes with, where nobody gave it another function.
_FUNCTIONS: Mapping[str, Any] = {
    "conv_general_dilated": lax.conv_general_dilated,
    "dot_general": lax.dot_general,
    "dot_general_cls": None,
    "einsum_op": jnp.einsum,
    "promote_dtype": dtypes.promote_dtype,
}
_INSIDE = ("VALID", "CIRCULAR", "REFLECT")  # paddings that add no zeros: the latter two repeat values of the input


@dataclass(frozen=True)
class LinearMap:
    """How a layer applies its kernel.

    Attributes:
        op: the map by its plain name, see `normkit.surgery.graph.LINEAR`.
        options: that matter for changing it.
        order: of the kernel's axes: outputs, inputs (of a group), window; transposed convolutions: inputs, outputs.
        merged: how many axes make the first and the second of these.
        inputs: number of the last axes of the input that are taken together.
        outputs: lengths of the last axes of the output; so the bias has them.
    """

    op: str
    options: Mapping[str, Any]
    order: tuple[int, ...]
    merged: tuple[int, int]
    inputs: int
    outputs: tuple[int, ...]

    def turned(self, kernel: np.ndarray) -> np.ndarray:
        """A kernel in the order of the rules, (outputs, inputs, *window), transposed (inputs, outputs, *window)."""
        moved = np.transpose(kernel, self.order)
        first, second = self.merged
        both = math.prod(moved.shape[:first]), math.prod(moved.shape[first : first + second])
        return moved.reshape(*both, *moved.shape[first + second :])

    def turned_back(self, kernel: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """The inverse of :meth:`turned`, for a kernel of this shape."""
        moved = kernel.reshape([shape[axis] for axis in self.order])
        return np.transpose(moved, np.argsort(self.order))


def call_of(kind: type) -> Any:
    """The function that a call of such a layer runs, None where there is none."""
    return next((vars(k)["__call__"] for k in kind.__mro__ if "__call__" in vars(k)), None)


def mapper(layer: Any) -> Mapper | None:
    """What tells, for the number of axes of an input and what nnx.Einsum is called with, how a layer maps it.

    None for a layer that is no linear map, or one of a kind of its own.
    """
    reader = _READERS.get(call_of(type(layer)))
    if reader is None or any(getattr(layer, name, None) not in (None, plain) for name, plain in _FUNCTIONS.items()):
        return None
    if getattr(layer, "mask", None) is not None:  # the kernel alone does not say what is computed
        return None
    return functools.partial(reader, layer)


def _linear(layer: Any, ndim: int, _: str | None) -> LinearMap:  # noqa: ARG001
    return LinearMap("linear", {}, (1, 0), (1, 1), 1, (layer.out_features,))


def _general(layer: Any, ndim: int, _: str | None) -> LinearMap | None:
    inputs = len(layer.in_features)
    if layer.batch_axis or [axis % ndim for axis in layer.axis] != list(range(ndim - inputs, ndim)):
        return None
    outputs = len(layer.out_features)
    order = (*range(inputs, inputs + outputs), *range(inputs))
    return LinearMap("linear", {}, order, (outputs, inputs), inputs, tuple(layer.out_features))


def _einsum(layer: Any, ndim: int, letters: str | None) -> LinearMap | None:
    """Where the last axes of the input are summed over, and new ones stand at the end of the result."""
    given, _, result = (letters or layer.einsum_str or "").replace(" ", "").partition("->")
    given, _, own = given.partition(",")
    summed = "".join(letter for letter in given if letter in own and letter not in result)
    made = "".join(letter for letter in result if letter not in given)
    plain = (own + given + result).isalpha() and all(len(set(part)) == len(part) for part in (own, given, result))
    if not plain or not (summed and made) or len(given) != ndim or set(own) != set(summed + made):
        return None
    if not given.endswith(summed) or result != given.removesuffix(summed) + made:
        return None
    order = tuple(own.index(letter) for letter in made + summed)
    outputs = tuple(layer.kernel_shape[axis] for axis in order[: len(made)])
    if layer.bias is not None and tuple(layer.bias.shape) != outputs:
        return None
    return LinearMap("linear", {}, order, (len(made), len(summed)), len(summed), outputs)


def _convolution(layer: Any, ndim: int, _: str | None) -> LinearMap:  # noqa: ARG001
    n = len(layer.kernel_size)
    padding, holes = _padding(layer.padding), np.any(np.not_equal(layer.input_dilation or 1, 1))
    # Between the values of a dilated input there are zeros, as beyond its ends.
    options = {"axis": -1, "groups": layer.feature_group_count, "padding": 1 if holes else padding}
    return LinearMap(f"conv{n}d", options, (n + 1, n, *range(n)), (1, 1), 1, (layer.out_features,))


def _transposed(layer: Any, ndim: int, _: str | None) -> LinearMap:  # noqa: ARG001
    n = len(layer.kernel_size)
    both = (n + 1, n) if layer.transpose_kernel else (n, n + 1)
    return LinearMap(f"conv_transpose{n}d", {"axis": -1}, (*both, *range(n)), (1, 1), 1, (layer.out_features,))


def _padding(given: Any) -> Any:
    """As the rules have it: `valid`, `same`, or numbers, 0 for none."""
    if not isinstance(given, str):
        return given
    name = given.upper()
    return "valid" if name in _INSIDE else "same" if name.startswith("SAME") else 1


_READERS: Mapping[Any, Any] = {
    call_of(nnx.Linear): _linear,
    call_of(nnx.LinearGeneral): _general,
    call_of(nnx.Einsum): _einsum,
    call_of(nnx.Conv): _convolution,
    call_of(nnx.ConvTranspose): _transposed,
}
