"""Keras' side of `normkit.fold`: the model looked into, and built anew with the folds."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np

from normkit.core.algebra import largest_change
from normkit.keras.graph import capture
from normkit.keras.probe import as_arrays
from normkit.keras.recording import array, given
from normkit.keras.surgery import Changes, Subject, check_runs, evaluated, policy, rebuilt, sites
from normkit.surgery.folding import Fold, changed, resembling, settled
from normkit.surgery.graph import Node

__all__ = ["opened"]

# Of the largest output, by the type that a trial runs in. A fold in float64 rounds at 1e-16, but a part that computes
# in float32 whatever its type, which Keras does not tell, passes that on as a spacing of float32, 6e-8, now and then.
# In float32, the widest type of JAX as it is set up: a hundred spacings.
_CLOSE = {"float64": 1e-6, "float32": 100 * 2.0**-23}


def opened(model: Any, example: Any) -> _Opened:
    """Look into a model. Raises NormTypeError and NormValueError where that is not possible."""
    check_runs(model, example)
    return _Opened(model, example)


class _Opened(Subject):
    """See `normkit.surgery.folding.Opened`."""

    def __init__(self, model: Any, example: Any) -> None:
        super().__init__(model, example)
        self._flow = capture(model, given(model, example))
        self.graph = self._flow.graph
        self.sites = tuple(sites(self._layers, self._flow.paths))

    def run(self, node: Node, values: Mapping[int, Any]) -> Any:
        return self._flow.run(node, values)

    def shape(self, state: str) -> tuple[int, ...]:
        return self._value(state).shape

    def bias_beside(self, weight: str) -> str | None:
        owner, _, name = weight.rpartition(".")
        return f"{owner}.bias" if name in ("kernel", "pointwise_kernel") else None

    def obstacle(self, norm: str, weight: str) -> str | None:  # noqa: ARG002  # Keras has no hooks on maps
        return self._flow.obstacles.get(norm)

    def settle(self, folds: Sequence[Fold]) -> dict[int, str]:
        return settled(folds, _Trial(self, self._example).difference) if folds else {}

    def finish(self, folds: Sequence[Fold], *, inplace: bool, optimizer: Any) -> tuple[Any, float]:
        self.check(inplace, optimizer)
        result = self.rebuilt(folds)
        return result, self.change(result)

    def rebuilt(self, folds: Sequence[Fold], dtype: str | None = None) -> Any:
        """A new model with these folds, in its own types or in one.

        Raises:
            NormTypeError: where a layer cannot be made from its config.
        """
        values = self._values(folds)
        leaves = {fold.site.path: fold.leaves for fold in folds if fold.leaves != "whole"}
        paths = self._flow.paths
        layers = {paths[number]: layer for number, layer in self._layers.items() if number in paths}
        configs: dict[str, dict[str, Any]] = {}
        for state, value in values.items():
            owner, _, name = state.rpartition(".")
            if name == "bias":
                configs[owner] = {"use_bias": value is not None}
        for path, left in leaves.items():
            if left == "bare" and hasattr(
                layers[path], "center"
            ):  # RMS norm has no such argument: its scale stays at 1
                configs[path] = {"center": False, "scale": False}
        instead = {
            path: keras.layers.Identity(name=layers[path].name, dtype=dtype or policy(layers[path]))
            for path, left in leaves.items()
            if left == "nothing"
        }
        changes = Changes(configs=configs, instead=instead, dtype=dtype, fresh=leaves)
        result, made = rebuilt(self._model, paths, changes)
        for state, value in values.items():
            owner, _, name = state.rpartition(".")
            if value is not None:
                getattr(made[owner], name).assign(value)
        return result

    def _values(self, folds: Sequence[Fold]) -> dict[str, np.ndarray | None]:
        """What the folds change: new values by path, None for a bias that goes."""
        values = changed(folds, lambda path: self._value(path) if path in self._flow.variables else None)
        return {path: None if found is None else self._as_kept(path, found) for path, found in values.items()}

    def _value(self, state: str) -> np.ndarray:
        """A kernel as the rules have it, (outputs, inputs of a group, *window), or another value as it is.

        Keras keeps (*window, inputs, outputs). A depthwise kernel (*window, inputs, multiplier) is one with as many
        groups as inputs.
        """
        value = array(self._flow.variables[state].value)
        if state in self._flow.depthwise:
            value = value.reshape(*value.shape[:-2], 1, -1)
        return np.moveaxis(value, (-1, -2), (0, 1)) if value.ndim > 1 else value

    def _as_kept(self, state: str, value: np.ndarray) -> np.ndarray:
        """Back to the layout of Keras."""
        if value.ndim == 1:
            return value
        return np.moveaxis(value, (0, 1), (-1, -2)).reshape(tuple(self._flow.variables[state].shape))


class _Trial:
    """The model in the widest type that it runs in, on the example and on random inputs."""

    def __init__(self, subject: _Opened, example: Any) -> None:
        self._subject = subject
        self._before: list[list[np.ndarray]] = []
        self._given: list[Any] = []
        self._failed = "it does not run in float32"
        types = ("float32",) if keras.config.backend() == "jax" else tuple(_CLOSE)
        for self._type in types:
            try:
                before = evaluated(subject.rebuilt((), self._type), example)
            except Exception as error:  # layers of others may insist on their own type
                self._failed = f"the model could not be tried in {self._type}: {type(error).__name__}"
            else:
                self._before, self._given = [before], [example]
                break
        other = keras.tree.map_structure(resembling, as_arrays(example))
        if self._given:
            with contextlib.suppress(Exception):  # the model may not take any inputs: special tokens must be in place
                self._before.append(evaluated(subject.rebuilt((), self._type), other))
                self._given.append(other)

    def difference(self, folds: Sequence[Fold]) -> str | None:
        """How the outputs differ from those before, None where they do not."""
        if not self._given:
            return self._failed
        try:
            model = self._subject.rebuilt(folds, self._type)
            after = [evaluated(model, one) for one in self._given]
        except Exception as error:
            return f"folded, the model fails: {type(error).__name__}"
        worst = max(itertools.starmap(largest_change, zip(self._before, after, strict=True)))
        return None if worst <= _CLOSE[self._type] else f"folded, the outputs change by {worst:.1e} of the largest"
