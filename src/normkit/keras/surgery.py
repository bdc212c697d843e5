"""Building a Keras model anew from the configs of its layers, with changes; what all verbs that do so share."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np

from normkit.core import algebra
from normkit.errors import NormError, NormTypeError, NormValueError, message
from normkit.keras import layers
from normkit.keras.factory import GroupNormalization
from normkit.keras.graph import functional, stock
from normkit.keras.porting import read
from normkit.keras.probe import check_built, untouched
from normkit.keras.recording import array, given
from normkit.surgery.sites import Site

__all__ = [
    "Changes",
    "Subject",
    "check_known",
    "check_runs",
    "evaluated",
    "like",
    "named_in",
    "policy",
    "rebuilt",
    "sites",
]

_NAMES = {"gamma": "gamma", "beta": "beta", "mean": "moving_mean", "var": "moving_variance"}
_MAY_GO = ("mask", "training")  # what Keras hands to those layers alone that take it


def check_known(model: Any) -> None:
    """Raise NormTypeError or NormValueError for a model whose layers and their calls are not known."""
    if isinstance(model, keras.Sequential):
        check_built(model)
    if functional(model) is None:
        must = "`model` must be a Sequential or Functional model, with the `call` of Keras, so that its calls are known"
        raise NormTypeError(message(must, type(model).__name__))


def check_runs(model: Any, example: Any) -> None:
    """Raise where a model cannot be looked into, or says itself that the example does not fit."""
    check_known(model)
    evaluated(model, example)


def evaluated(model: Any, example: Any) -> list[np.ndarray]:
    """The outputs of a model on an example in inference."""
    with untouched(model):
        return [array(output) for output in keras.tree.flatten(model(given(model, example), training=False))]


class Subject:
    """What holds of every change of a Keras model: see `normkit.surgery.protocol.Subject`."""

    without_optimizer = "the result is not compiled: compile it, with a new optimizer, before it is trained further"

    def __init__(self, model: Any, example: Any) -> None:
        self._model, self._example = model, example
        self._layers = {id(layer): layer for layer in model._flatten_layers(include_self=False)}

    def check(self, inplace: bool, optimizer: Any) -> None:
        """Raise for what Keras cannot do."""
        if inplace:
            must = "`inplace` must be False for Keras, whose layers make their weights once and are wired for good"
            raise NormValueError(message(must, hint="take the model that is returned"))
        if optimizer is not None:
            must = "`optimizer` must be None for Keras, whose optimizers belong to the variables they were built with"
            raise NormValueError(message(must, type(optimizer).__name__, "compile the result"))

    def change(self, result: Any) -> float:
        """The relative change of the outputs on the example."""
        return algebra.largest_change(evaluated(self._model, self._example), evaluated(result, self._example))


def sites(known: Mapping[int, Any], paths: Mapping[int, str]) -> Iterator[Site]:
    """The norms among layers, by their paths; one without a path, which another layer calls, by Keras' own."""
    for number, layer in known.items():
        record = None
        if stock(type(layer)) and layer.built:
            with contextlib.suppress(NormError):  # along an axis that is neither the first nor the last of features
                record = read(layer)
        if record is not None:
            names = {**_NAMES, "gamma": "scale"} if record.kind == "rms" else _NAMES
            path = paths.get(number, layer.path)
            yield Site(path, type(layer).__name__, record, "class", names, bool(record.kept))


def named_in(model: Any, within: str = "") -> dict[int, str]:
    """Paths of the layers that a model calls, also of those in models inside, by their identity: the first of each."""
    found: dict[int, str] = {}
    for layer in model.layers:
        found.setdefault(id(layer), f"{within}{layer.name}")
        if functional(layer) is not None:
            found = named_in(layer, f"{found[id(layer)]}/") | found
    return found


def policy(layer: Any) -> dict[str, Any]:
    """The type of a layer as configs have it: layers without a `get_config` of their own keep what they are given."""
    return dict(keras.dtype_policies.serialize(layer.dtype_policy))


def like(layer: Any, name: str, old: Any) -> Any:
    """A layer of the same config that is not built, with a name, and the type and `trainable` of another layer.

    Raises:
        NormTypeError: where it cannot be made from its config.
    """
    try:
        changes: dict[str, Any] = {"name": name, "dtype": policy(old)}
        if not old.trainable:
            changes["trainable"] = False
        # One that chooses its groups by the input has done so by now.
        kind = layers.GroupNormalization if isinstance(layer, GroupNormalization) else type(layer)
        return kind.from_config({**layer.get_config(), **changes})
    except Exception as error:
        must = f"a new layer must be one that can be made from its config ({error})"
        raise NormTypeError(message(must, type(layer).__name__, "give the class a `get_config`")) from error


@dataclass(frozen=True)
class Changes:
    """What is different in a model that is built anew, by the paths of layers.

    Attributes:
        configs: entries of a layer's config.
        instead: layers in the place of others, under the same name.
        front: layers in front of another.
        behind: layers that follow another, one after the other; also behind a function.
        dtype: of all layers; None keeps theirs.
        fresh: paths of layers that keep the first values of their weights.
    """

    configs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    instead: Mapping[str, Any] = field(default_factory=dict)
    front: Mapping[str, Any] = field(default_factory=dict)
    behind: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    dtype: str | None = None
    fresh: Collection[str] = ()


def rebuilt(model: Any, paths: Mapping[int, str], changes: Changes) -> tuple[Any, dict[str, Any]]:
    """A new model with changes and, elsewhere, the same weights; and its layers by path.

    Args:
        model: one that `functional` knows.
        paths: of its layers and functions, by their identity.
        changes: see the class.

    Raises:
        NormTypeError: where a layer cannot be made from its config.
    """
    with untouched(model), _not_compiled(model):
        building = _Building(paths, changes)
        try:
            result = building.clone(model)
        except NormError:
            raise
        except Exception as error:
            must = f"`model` must consist of layers that can be made from their configs ({error})"
            raise NormTypeError(message(must, type(model).__name__)) from error
    made = building.made
    for layer in {id(layer): layer for layer in model._flatten_layers(include_self=False)}.values():
        path = paths.get(id(layer))
        if id(layer) in made and functional(layer) is None and path not in {*changes.instead, *changes.fresh}:
            _copy(layer, made[id(layer)])
    return result, {path: made[number] for number, path in paths.items() if number in made}


class _Building:
    def __init__(self, paths: Mapping[int, str], changes: Changes) -> None:
        self._paths, self._changes = paths, changes
        self.made: dict[int, Any] = {}  # by the identity of the old layer or function
        self._path_of: dict[int, str] = {}  # of the new ones

    def clone(self, model: Any) -> Any:
        if isinstance(model, keras.Sequential):
            new = self._sequential(model)
        else:
            new = keras.models.clone_model(
                model,
                clone_function=self._twin,
                call_function=self._call,
                input_tensors=keras.tree.map_structure(_input_like, model.input),
                cache=self.made,
            )
        new._trainable = model._trainable  # set in the public way it would go down to every layer
        return new

    def _sequential(self, model: Any) -> Any:
        stack: list[Any] = []
        for layer in model._layers:
            if isinstance(layer, keras.layers.InputLayer):
                stack.append(type(layer).from_config(layer.get_config()))
                continue
            path = self._paths.get(id(layer), "")
            if id(layer) not in self.made:
                self.made[id(layer)] = self._twin(layer)
            front = [self._changes.front[path]] if path in self._changes.front else []
            stack += [*front, self.made[id(layer)], *self._changes.behind.get(path, ())]
        new = keras.Sequential(stack, name=model.name)
        if not new.built:  # without an Input
            new.build(model.input_shape)
        return new

    def _twin(self, layer: Any) -> Any:
        if functional(layer) is not None:
            return self.clone(layer)
        path = self._paths.get(id(layer), "")
        new = self._changes.instead.get(path)
        if new is None:
            config = layer.get_config()
            if self._changes.dtype is not None and isinstance(layer, keras.layers.Layer) and "dtype" in config:
                config["dtype"] = self._changes.dtype
            new = type(layer).from_config({**config, **self._changes.configs.get(path, {})})
        self._path_of[id(new)] = path
        return new

    def _call(self, layer: Any, *args: Any, **kwargs: Any) -> Any:
        path = self._path_of.get(id(layer), "")
        if path in self._changes.front:
            args = (self._changes.front[path](args[0]), *args[1:])
        if path in self._changes.instead:  # Keras gave these to the layer that was there
            known = layer._call_signature.parameters
            kwargs = {name: value for name, value in kwargs.items() if name in known or name not in _MAY_GO}
        y = layer(*args, **kwargs)
        for new in self._changes.behind.get(path, ()):
            y = new(y)
        return y


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
