"""Keras' side of `normkit.fold`: the model looked into, and built anew with the folds."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import keras
import numpy as np

from normkit.core.algebra import largest_change
from normkit.errors import NormError, NormTypeError, NormValueError, message
from normkit.keras.graph import capture, functional, stock
from normkit.keras.porting import read
from normkit.keras.probe import as_arrays, check_built, untouched
from normkit.keras.recording import array, given
from normkit.surgery.folding import Fold, changed, resembling, settled
from normkit.surgery.graph import Node
from normkit.surgery.sites import Site

__all__ = ["opened"]

# Of the largest output, by the type that a trial runs in. A fold in float64 rounds at 1e-16, but a part that computes
# in float32 whatever its type, which Keras does not tell, passes that on as a spacing of float32, 6e-8, now and then.
# In float32, the widest type of JAX as it is set up: a hundred spacings.
_CLOSE = {"float64": 1e-6, "float32": 100 * 2.0**-23}
_NAMES = {"gamma": "gamma", "beta": "beta", "mean": "moving_mean", "var": "moving_variance"}


def opened(model: Any, example: Any) -> _Opened:
    """Look into a model. Raises NormTypeError and NormValueError where that is not possible."""
    if isinstance(model, keras.Sequential):
        check_built(model)
    if functional(model) is None:
        must = "`model` must be a Sequential or Functional model, with the `call` of Keras, so that its calls are known"
        raise NormTypeError(message(must, type(model).__name__))
    _outputs(model, example)  # what the model itself says against the example is heard here
    return _Opened(model, example)


class _Opened:
    """See `normkit.surgery.folding.Opened`."""

    without_optimizer = "the result is not compiled: compile it, with a new optimizer, before it is trained further"

    def __init__(self, model: Any, example: Any) -> None:
        self._model, self._example = model, example
        self._flow = capture(model, given(model, example))
        self.graph = self._flow.graph
        self._layers = {id(layer): layer for layer in model._flatten_layers(include_self=False)}
        self.sites = tuple(self._sites())

    def run(self, node: Node, values: Mapping[int, Any]) -> Any:
        return self._flow.run(node, values)

    def shape(self, state: str) -> tuple[int, ...]:
        return self._value(state).shape

    def bias_beside(self, weight: str) -> str | None:
        owner, _, name = weight.rpartition(".")
        return f"{owner}.bias" if name in ("kernel", "pointwise_kernel") else None

    def obstacle(self, norm: str, weight: str) -> str | None:  # noqa: ARG002  # Keras has no hooks on maps
        return self._flow.obstacles.get(norm)

    def check(self, inplace: bool, optimizer: Any) -> None:
        if inplace:
            must = "`inplace` must be False for Keras, whose layers make their weights once and are wired for good"
            raise NormValueError(message(must, hint="model = normkit.fold(model, example)"))
        if optimizer is not None:
            must = "`optimizer` must be None for Keras, whose optimizers belong to the variables they were built with"
            raise NormValueError(message(must, type(optimizer).__name__, "compile the result"))

    def settle(self, folds: Sequence[Fold]) -> dict[int, str]:
        return settled(folds, _Trial(self, self._example).difference) if folds else {}

    def finish(self, folds: Sequence[Fold], *, inplace: bool, optimizer: Any) -> tuple[Any, float]:
        self.check(inplace, optimizer)
        result = self.rebuilt(folds)
        return result, largest_change(_outputs(self._model, self._example), _outputs(result, self._example))

    def rebuilt(self, folds: Sequence[Fold], dtype: str | None = None) -> Any:
        """A new model with these folds, in its own types or in one.

        Raises:
            NormTypeError: where a layer cannot be made from its config.
        """
        values = self._values(folds)
        leaves = {fold.site.path: fold.leaves for fold in folds if fold.leaves != "whole"}
        paths = self._flow.paths
        made: dict[int, Any] = {}

        def twin(layer: Any) -> Any:
            if functional(layer) is not None:
                return clone(layer)
            config, path = layer.get_config(), paths.get(id(layer))
            if dtype is not None and isinstance(layer, keras.layers.Layer) and "dtype" in config:
                config["dtype"] = dtype
            if path in leaves and leaves[path] == "nothing":
                return keras.layers.Identity(name=layer.name, dtype=config["dtype"])
            if path in leaves and "center" in config:  # RMS norm has no such arguments: its scale stays at 1
                config |= {"center": False, "scale": False}
            if f"{path}.bias" in values:
                config["use_bias"] = values[f"{path}.bias"] is not None
            return type(layer).from_config(config)

        def clone(model: Any) -> Any:
            options: dict[str, Any] = {"clone_function": twin, "cache": made}
            if not isinstance(model, keras.Sequential):
                options["call_function"] = _call
                options["input_tensors"] = keras.tree.map_structure(_input_like, model.input)
            new = keras.models.clone_model(model, **options)
            if not new.built:  # a Sequential model without an Input
                new.build(model.input_shape)
            new._trainable = model._trainable  # set in the public way it would go down to every layer
            return new

        with untouched(self._model), _not_compiled(self._model):
            try:
                result = clone(self._model)
            except Exception as error:
                must = f"`model` must consist of layers that can be made from their configs ({error})"
                raise NormTypeError(message(must, type(self._model).__name__)) from error
        for number, layer in self._layers.items():
            if number in made and functional(layer) is None and paths.get(number) not in leaves:
                _copy(layer, made[number])
        owners = {path: made.get(number) for number, path in paths.items()}
        for state, value in values.items():
            owner, _, name = state.rpartition(".")
            if value is not None:
                getattr(owners[owner], name).assign(value)
        return result

    def _sites(self) -> Iterator[Site]:
        for number, layer in self._layers.items():
            record = None
            if stock(type(layer)) and layer.built:
                with contextlib.suppress(NormError):  # along an axis that is neither the first nor the last of features
                    record = read(layer)
            if record is not None:
                names = {**_NAMES, "gamma": "scale"} if record.kind == "rms" else _NAMES
                path = self._flow.paths.get(number, layer.path)
                yield Site(path, type(layer).__name__, record, "class", names, bool(record.kept))

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
                before = _outputs(subject.rebuilt((), self._type), example)
            except Exception as error:  # layers of others may insist on their own type
                self._failed = f"the model could not be tried in {self._type}: {type(error).__name__}"
            else:
                self._before, self._given = [before], [example]
                break
        other = keras.tree.map_structure(resembling, as_arrays(example))
        if self._given:
            with contextlib.suppress(Exception):  # the model may not take any inputs: special tokens must be in place
                self._before.append(_outputs(subject.rebuilt((), self._type), other))
                self._given.append(other)

    def difference(self, folds: Sequence[Fold]) -> str | None:
        """How the outputs differ from those before, None where they do not."""
        if not self._given:
            return self._failed
        try:
            model = self._subject.rebuilt(folds, self._type)
            after = [_outputs(model, one) for one in self._given]
        except Exception as error:
            return f"folded, the model fails: {type(error).__name__}"
        worst = max(itertools.starmap(largest_change, zip(self._before, after, strict=True)))
        return None if worst <= _CLOSE[self._type] else f"folded, the outputs change by {worst:.1e} of the largest"


def _outputs(model: Any, example: Any) -> list[np.ndarray]:
    with untouched(model):
        return [array(output) for output in keras.tree.flatten(model(given(model, example), training=False))]


def _call(layer: Any, *args: Any, **kwargs: Any) -> Any:
    """An identity in the place of a norm takes nothing but the input."""
    return layer(*args[:1]) if type(layer) is keras.layers.Identity and args else layer(*args, **kwargs)


def _input_like(tensor: Any) -> Any:
    """A further input of the same name, also where Keras gave it, sparse and optional as that one is."""
    layer = tensor._keras_history.operation
    return type(layer).from_config(layer.get_config()).output


def _copy(old: Any, new: Any) -> None:
    """The values of a layer, save those that only one of both has."""
    its = [variable for variable in new.variables if variable.name != "bias" or _has_bias(old)]
    mine = [variable for variable in old.variables if variable.name != "bias" or _has_bias(new)]
    for source, target in zip(mine, its, strict=True):
        target.assign(source.value)


def _has_bias(layer: Any) -> bool:
    return getattr(layer, "use_bias", True)


@contextlib.contextmanager
def _not_compiled(model: Any) -> Iterator[None]:
    """A compiled model would have its clone compiled from a config, which not every loss and metric has."""
    compiled = [one for one in model._flatten_layers() if getattr(one, "compiled", False)]
    for one in compiled:
        one.compiled = False
    try:
        yield
    finally:
        for one in compiled:
            one.compiled = True
