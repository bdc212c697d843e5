"""The side of Flax NNX of `normkit.fold`: the model looked into, the folds carried out and tried."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from normkit.core.algebra import largest_change
from normkit.nnx.factory import Identity
from normkit.nnx.graph import capture, joined, variables
from normkit.nnx.probe import as_arrays
from normkit.nnx.sites import sites
from normkit.nnx.states import is_frozen
from normkit.nnx.surgery import Subject, evaluated, modules, place
from normkit.surgery.folding import Fold, changed, resembling, settled
from normkit.surgery.graph import Node
from normkit.surgery.sites import Site

__all__ = ["opened"]

# Of the largest output, by the type that a trial runs in. A fold in float64 rounds at 1e-16, but a part that computes
# in float32 whatever its type passes that on as a spacing of float32, 6e-8. In float32: a hundred spacings.
_CLOSE = {"float64": 1e-6, "float32": 100 * 2.0**-23}


def opened(model: nnx.Module, example: Any) -> _Opened:
    """Look into a model. Raises NormTypeError where that is not possible, and whatever the model raises."""
    return _Opened(model, example)


class _Opened(Subject):
    """See `normkit.surgery.folding.Opened`."""

    def __init__(self, model: nnx.Module, example: Any) -> None:
        super().__init__(model, example)
        found = [site for site in sites(model) if site.path]
        self._flow = capture(model, as_arrays(example, model), {site.path for site in found})
        self._variables = variables(model)
        layers = modules(model)
        self.graph = self._flow.graph
        self.sites = tuple(self._as_called(site, layers[site.path]) for site in found)

    def run(self, node: Node, values: Mapping[int, Any]) -> Any:
        return self._flow.run(node, values)

    def shape(self, state: str) -> tuple[int, ...]:
        value = self.value(self._variables, state)
        assert value is not None
        return value.shape

    def bias_beside(self, weight: str) -> str | None:
        return joined(self._flow.maps[weight][0], "bias") if weight in self._flow.maps else None

    def obstacle(self, norm: str, weight: str) -> str | None:  # noqa: ARG002  # NNX has no hooks
        return self._flow.obstacles.get(norm)

    def settle(self, folds: Sequence[Fold]) -> dict[int, str]:
        return settled(folds, _Trial(self, self._model, self._example).difference) if folds else {}

    def finish(self, folds: Sequence[Fold], *, inplace: bool, optimizer: Any) -> tuple[Any, float]:
        self.check(inplace, optimizer)
        result, difference = self.changed(lambda model: self.apply(model, folds), inplace)
        assert difference is not None
        return result, difference

    def value(self, own: Mapping[str, Any], state: str) -> np.ndarray | None:
        """A variable in float64, a kernel in the order of the rules; None where there is none."""
        if state not in own:
            return None
        value = np.asarray(own[state].get_value()).astype(np.float64)
        return self._flow.maps[state][1].turned(value) if state in self._flow.maps else value.ravel()

    def apply(self, model: nnx.Module, folds: Sequence[Fold]) -> None:
        """Carry out folds on this model, or a copy of it."""
        own, layers = variables(model), modules(model)
        owners = {joined(path, "bias"): (layers[path], kernel) for kernel, (path, _) in self._flow.maps.items()}
        for path, value in changed(folds, lambda state: self.value(own, state)).items():
            if value is None:
                _drop(layers.values(), own[path], "bias")
            elif path in self._flow.maps:
                _write(own[path], self._flow.maps[path][1].turned_back(value, own[path].shape))
            elif path in own:
                _write(own[path], value.reshape(own[path].shape))
            else:
                layer, kernel = owners[path]
                made = value.reshape(self._flow.maps[kernel][1].outputs)
                layer.bias = type(own[kernel])(jnp.asarray(made, own[kernel].dtype))
                layer.use_bias = True
        for fold in folds:
            norm = layers[fold.site.path]
            if fold.leaves == "nothing":
                place(model, norm, Identity(fold.site.record.axis))
            elif fold.leaves == "bare":
                for name in ("scale", "bias"):
                    _drop([norm], getattr(norm, name, None), name)

    def _as_called(self, site: Site, layer: Any) -> Site:
        """Whether a norm evaluates is also a matter of what it is called with; each call has to be a node."""
        if len(self._flow.asked.get(site.path, ())) > max(1, len(self.graph.calls(site.path))):
            self._flow.obstacles[site.path] = f"{site.path} is also called in a loop, or under jax.vmap"
        if not site.record.kept or is_frozen(layer):
            return site
        asked = self._flow.asked.get(site.path, [])
        if False in asked:
            self._flow.obstacles[site.path] = f"{site.path} is called with use_running_average=False"
        own = bool(layer.use_running_average)
        return dataclasses.replace(site, constant=all(own if one is None else True for one in asked))


class _Trial:
    """The model in the widest type that JAX has, on the example and on random inputs."""

    def __init__(self, subject: _Opened, model: nnx.Module, example: Any) -> None:
        self._subject, self._model = subject, model
        self._type = str(jnp.zeros(()).dtype)  # as JAX is set up
        self._before: list[list[np.ndarray]] = []
        self._given: list[Any] = []
        self._failed = ""
        arrays = jax.tree.map(self._wide, as_arrays(example, model))
        for given in (arrays, jax.tree.map(resembling, arrays)):
            try:
                self._before.append(self._outputs((), given))
            except Exception as error:  # layers of others may insist on their own type, or take no such numbers
                self._failed = f"the model could not be tried in {self._type}: {type(error).__name__}"
            else:
                self._given.append(given)

    def difference(self, folds: Sequence[Fold]) -> str | None:
        """How the outputs differ from those before, None where they do not."""
        if not self._given:
            return self._failed
        try:
            after = [self._outputs(folds, given) for given in self._given]
        except Exception as error:
            return f"folded, the model fails: {type(error).__name__}"
        worst = max(itertools.starmap(largest_change, zip(self._before, after, strict=True)))
        return None if worst <= _CLOSE[self._type] else f"folded, the outputs change by {worst:.1e} of the largest"

    def _wide(self, part: Any) -> Any:
        if not hasattr(part, "dtype"):
            return part
        return np.asarray(part, dtype=self._type if jnp.issubdtype(part.dtype, jnp.floating) else None)

    def _outputs(self, folds: Sequence[Fold], given: Any) -> list[np.ndarray]:
        copy = nnx.clone(self._model)
        _widen(copy, self._type)
        self._subject.apply(copy, folds)
        if jax.default_backend() == "cpu":  # another setting, and all that JAX has compiled is compiled again
            return evaluated(copy, given)
        with jax.default_matmul_precision("highest"):  # other devices may round float32 for products
            return evaluated(copy, given)


def _widen(model: nnx.Module, kind: str) -> None:
    """Give parameters and statistics a type, and let layers compute in that of their inputs and parameters."""
    for variable in variables(model).values():
        value = variable.get_value()
        if jnp.issubdtype(value.dtype, jnp.floating):
            variable.set_value(jnp.asarray(value, kind))
    for layer in modules(model).values():
        if type(layer).__module__.startswith(("flax.nnx.", "normkit.nnx.")):
            for name in ("dtype", "preferred_element_type"):
                if getattr(layer, name, None) is not None:
                    setattr(layer, name, None)


def _write(variable: Any, value: np.ndarray) -> None:
    """Give a variable other values, in its type and place."""
    old = variable.get_value()
    variable.set_value(jax.device_put(value.astype(old.dtype), getattr(old, "sharding", None)))


def _drop(layers: Any, variable: Any, name: str) -> None:
    """Take a parameter out of the layers that have it under this name, and say so in their flags."""
    for layer in layers:
        if variable is not None and vars(layer).get(name) is variable:
            setattr(layer, name, nnx.data(None))
            if hasattr(layer, f"use_{name}"):
                setattr(layer, f"use_{name}", False)
