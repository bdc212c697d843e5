"""Keras' side of `normkit.insert`: norms made, put between the layers of a model built anew, and set by an example."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np

from normkit.core.algebra import Pooled, merge
from normkit.core.record import NormRecord, TrackedLayer
from normkit.errors import NormError, NormTypeError, NormValueError, message
from normkit.keras import porting
from normkit.keras.factory import norm_layer
from normkit.keras.graph import Flow, capture, functional, stock
from normkit.keras.probe import own_errors
from normkit.keras.recording import array, given, watching
from normkit.keras.surgery import Changes, Subject, check_runs, like, policy, rebuilt, sites
from normkit.surgery import batches
from normkit.surgery.conversion import write
from normkit.surgery.graph import KNOWN, LINEAR, Graph, Node
from normkit.surgery.insertion import (
    Place,
    as_identity,
    check_identity,
    check_place,
    subtracts,
    without_bias,
)
from normkit.surgery.plan import Edit

__all__ = ["opened"]

_WITHIN = ".activation"  # behind the path of a layer that applies one itself


def opened(model: Any, norm: str | Callable[..., Any], example: Any) -> _Opened:
    """Look into a model. Raises NormTypeError and NormValueError where that is not possible."""
    check_runs(model, example)
    return _Opened(model, norm, example)


class _Made(NamedTuple):
    """A norm for a place.

    Attributes:
        norm: as it was made, built on what it is to take.
        values: of its weights, None where it came without.
        record: of it, None where it is no norm that we know.
        split: the layer whose activation comes behind it, None where it stays where it is.
        freed: path of the bias that goes, None where none does.
    """

    norm: Any
    values: list[Any] | None
    record: NormRecord | None
    split: Any
    freed: str | None


class _Opened(Subject):
    """See `normkit.surgery.insertion.Opened`."""

    def __init__(self, model: Any, norm: str | Callable[..., Any], example: Any) -> None:
        super().__init__(model, example)
        self._norm = norm
        self._flow = capture(model, given(model, example))
        paths = self._flow.paths
        self._by_path = {paths[number]: layer for number, layer in self._layers.items() if number in paths}
        self.sites = tuple(sites(self._layers, paths))
        self.graph = _with_activations(self._flow, self._by_path, {site.path for site in self.sites})
        self._made: dict[Place, _Made] = {}

    def layers(self) -> dict[str, Any]:
        return self._by_path

    def holds_layers(self, path: str) -> bool:
        return any(True for _ in _inner(self._by_path[path]))

    def obstacle(self, path: str) -> str | None:
        layer = self._by_path.get(path)
        if layer is None or not self.holds_layers(path):
            return None
        return "it is a model: name the layers in it" if functional(layer) is not None else "it calls layers itself"

    def prepared(self, place: Place) -> Edit:
        channels, spatial = place.shape[place.axis], len(place.shape) - 2
        first = place.axis == 1 and spatial > 0
        if isinstance(self._norm, str):
            norm = norm_layer(self._norm, axis=1 if first else -1)
        else:
            norm = self._norm(channels, **({"axis": 1} if first else {}))
        if not isinstance(norm, keras.layers.Layer):
            raise NormTypeError(message("`norm` must give a keras.layers.Layer", type(norm).__name__))
        values = [array(variable.value) for variable in norm.variables] if norm.built else None
        if not norm.built:
            with own_errors():
                norm.build((None, *place.shape[1:]))
        record = None
        with contextlib.suppress(NormError):  # of a kind or along an axis that no record has
            record = porting.read(norm)
        check_place(record, place)
        path = place.path.removesuffix(_WITHIN)
        layer, name, why = self._by_path.get(path), type(norm).__name__, place.why
        old = type(layer).__name__ if layer is not None else path
        activated = path == place.path and place.side == "output" and self.graph.calls(path + _WITHIN)
        split = layer if activated else None
        if split is not None:
            _check_splits(split)
            name += " and its activation"
        freed = place.bias if subtracts(record, place) and self._may_lose(place.bias) else None
        if freed is not None:
            why += "; its bias goes, the norm subtracts it again"
        self._made[place] = _Made(norm, values, record, split, freed)
        where = f"{old}, {name} behind it" if place.side == "output" else f"{name} in front of {old}"
        return Edit(path, old, where, why)

    def finish(
        self, places: Sequence[Place], *, identity: bool, data: Any, inplace: bool, optimizer: Any
    ) -> tuple[Any, float]:
        self.check(inplace, optimizer)
        made = {place: self._made[place] for place in places}
        if identity:
            for one in made.values():
                check_identity(one.record, type(one.norm).__name__)
        names = {operation.name for operation in _operations(self._model)}
        norms = {place: self._norm_for(place, names) for place in places}
        configs: dict[str, dict[str, Any]] = {}
        front: dict[str, Any] = {}
        behind: dict[str, list[Any]] = {}
        for place, one in made.items():
            path = place.path.removesuffix(_WITHIN)
            if place.side == "input":
                front[path] = norms[place]
                continue
            behind[path] = [norms[place]]
            config = configs.setdefault(path, {})
            if one.freed is not None:
                config["use_bias"] = False
            if one.split is not None:
                config["activation"] = "linear"
                behind[path].append(_activation(one.split, names))
        result, _ = rebuilt(self._model, self._flow.paths, Changes(configs=configs, front=front, behind=behind))
        for place, one in made.items():
            for target, value in zip(norms[place].variables if one.values else (), one.values or (), strict=True):
                target.assign(value)
        freed = {place: one.freed for place, one in made.items() if one.freed is not None}
        biases = {place: array(self._flow.variables[path].value) for place, path in freed.items()}
        if identity:
            known = [(norms[place], biases.get(place)) for place in places]
            _calibrate(result, known, [self._example] if data is None else batches.inputs(data))
        else:
            for place, bias in biases.items():
                record = porting.read(norms[place])
                assert record is not None
                write(porting, norms[place], without_bias(record, bias))
        return result, self.change(result)

    def _norm_for(self, place: Place, names: set[str]) -> Any:
        path = place.path.removesuffix(_WITHIN)
        name = _unused(f"{path.rpartition('/')[2]}_norm", names)
        return like(self._made[place].norm, name, self._beside(place))

    def _beside(self, place: Place) -> Any:
        """The layer whose type a norm takes: that of its place, or the nearest before a function."""
        node = next(node for node in self.graph.nodes if node.path == place.path)
        while node.inputs and node.path.removesuffix(_WITHIN) not in self._by_path:
            node = self.graph.producers(node)[0]
        return self._by_path.get(node.path.removesuffix(_WITHIN), self._model)

    def _may_lose(self, bias: str | None) -> bool:
        return bias is not None and len(self.graph.readers(bias)) == 1


def _with_activations(flow: Flow, layers: Mapping[str, Any], norms: set[str]) -> Graph:
    """The graph as the rules of inserting norms have it.

    What a layer applies as its activation counts as a layer of its own, and so does a function; a convolution that is
    made of two is one; what nobody can look into is unknown.
    """
    return Graph(flow.graph.how, tuple(_node(node, flow, layers, norms) for node in flow.graph.nodes))


def _node(node: Node, flow: Flow, layers: Mapping[str, Any], norms: set[str]) -> Node:
    if node.op in ("input", "output"):
        return node
    if node.op in LINEAR:
        first = node.state["weight"].endswith(".depthwise_kernel")  # of a separable one
        return dataclasses.replace(node, layer=True, op="depthwise" if first else node.op)
    if node.id not in flow.calls:
        return dataclasses.replace(node, layer=True, path=node.path + _WITHIN)
    layer = layers.get(node.path)
    if layer is None:
        return dataclasses.replace(node, layer=True)
    if porting.is_norm(layer) or isinstance(layer, porting.ALONE):
        return node if node.path in norms else dataclasses.replace(node, op="normalize")
    kernels = any(len(variable.shape) > 1 for variable in layer.variables)
    opaque = not stock(type(layer)) or isinstance(layer, keras.layers.Lambda) or kernels or any(_inner(layer))
    return dataclasses.replace(node, op="unknown") if opaque and node.op not in KNOWN else node


def _inner(layer: Any) -> Iterator[Any]:
    """The layers that a layer holds, but for one that is its activation."""
    own = getattr(layer, "activation", None)
    return (one for one in layer._flatten_layers(include_self=False) if one is not own)


def _operations(model: Any) -> Iterator[Any]:
    """Every layer and function of a model, also of models inside."""
    for one in functional(model)._operations:
        yield one
        if functional(one) is not None:
            yield from _operations(one)


def _check_splits(layer: Any) -> None:
    """Raise NormValueError where the activation of a layer cannot become a layer of its own."""
    if isinstance(layer.activation, keras.layers.Layer) and layer.activation.variables:
        raise NormValueError("its activation has weights, which other layers may share")
    if layer.activity_regularizer is not None:
        raise NormValueError("its `activity_regularizer` looks at what its activation gives")


def _activation(layer: Any, names: set[str]) -> Any:
    """The activation of a layer as one of its own."""
    name = _unused(f"{layer.name}_activation", names)
    if isinstance(layer.activation, keras.layers.Layer):
        return like(layer.activation, name, layer)
    return keras.layers.Activation(layer.activation, name=name, dtype=policy(layer))


def _unused(name: str, names: set[str]) -> str:
    """A name that no layer has, which is then taken."""
    free, number = name, 0
    while free in names:
        number += 1
        free = f"{name}_{number}"
    names.add(free)
    return free


def _calibrate(model: Any, norms: Sequence[tuple[Any, np.ndarray | None]], data: Iterable[Any]) -> None:
    """Make each norm give in evaluation what comes in, by the statistics of the data, with the bias that is gone."""
    seen: dict[int, Pooled] = {}

    def passing(number: int, found: Pooled) -> NormRecord:
        norm, bias = norms[number]
        record = porting.read(norm)
        assert record is not None
        if bias is None:
            return as_identity(record, found)
        return without_bias(as_identity(record, found._replace(mean=found.mean + bias)), bias)

    def decide(number: int, measure: Callable[[], Pooled]) -> Pooled:
        found = measure()
        seen[number] = merge(*zip(seen[number], found, strict=True)) if number in seen else found
        record = passing(number, found)
        write(porting, norms[number][0], record)  # so that the norms behind it are given what they will be given
        var = record.variance()
        assert var is not None
        return Pooled(found.count, found.mean, var)

    layers = [TrackedLayer(norm.name, norm, norm.epsilon, False) for norm, _ in norms]
    with watching(model, layers, decide) as run:
        for x in data:
            run(x)
    for number, found in seen.items():
        write(porting, norms[number][0], passing(number, found))
