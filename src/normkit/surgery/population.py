"""Moments of whole data sets at the norms of a model, and what replacing the kept statistics by them did."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import numpy as np

from normkit.core.algebra import Pooled, merge, unbiased
from normkit.core.record import TrackedLayer
from normkit.errors import NormRuntimeError, NormValueError, message
from normkit.surgery import batches
from normkit.surgery.protocol import Recording
from normkit.tables import Result, Table, number, plain

__all__ = ["LayerChange", "Measure", "Statistics", "layers_of", "population", "replaced", "score"]

T = TypeVar("T")


class Measure(NamedTuple):
    """What is measured before and after: its name, and the function that does it."""

    name: str
    of: Callable[[], float | None]


@dataclass(frozen=True)
class LayerChange:
    """What a layer kept, against what its inputs really are.

    Attributes:
        path: its name in the model.
        values: per channel behind the new statistics (instance norm: samples); 0 where the layer was never called.
        shift: by how many new standard deviations the mean moved, in the channel where it moved most.
        narrowest, widest: new over old variance, in the channels where that is least and most.
    """

    path: str
    values: int
    shift: float
    narrowest: float
    widest: float


@dataclass(frozen=True)
class Statistics(Result):
    """What `normkit.recalibrate` or `normkit.adapt` did to the kept statistics of a model.

    Attributes:
        layers: one entry per norm layer with kept statistics that is not frozen.
        kept: `new`, or `old` where those were better and `keep="best"`.
        measure: what `before` and `after` are: `loss`, `entropy`; `outputs`, where `after` is the change of the outputs
            in proportion to their size; or nothing.
        before, after: that measure with the old and the new statistics.
    """

    layers: tuple[LayerChange, ...]
    kept: str
    measure: str = ""
    before: float | None = None
    after: float | None = None
    _undo: Callable[[], None] = field(default=lambda: None, repr=False, compare=False)

    def undo(self) -> None:
        """Give the model back what it kept before; of `method="entropy"` gamma and beta as well."""
        self._undo()

    def table(self) -> Table:
        """One row per layer."""
        words = {"": "", "outputs": f"outputs moved by {number(self.after)} of their size; "}
        measured = words.get(self.measure, f"{self.measure} {number(self.before)} -> {number(self.after)}; ")
        rows = [
            (layer.path, str(layer.values), number(layer.shift), number(layer.narrowest), number(layer.widest))
            for layer in self.layers
        ]
        headings = ("layer", "values", "mean moved (std)", "variance, least", "most")
        return Table(headings, rows, title=f"{measured}the {self.kept} statistics are kept")

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; what is not finite becomes None."""
        own = {name: getattr(self, name) for name in ("kept", "measure", "before", "after")}
        return {**plain(own), "layers": [plain(vars(layer)) for layer in self.layers]}


class _Enough(BaseException):
    """Ends a forward pass that has shown what it was run for. No code of the user's is meant to catch it."""


def layers_of(recording: Recording, model: Any) -> list[TrackedLayer]:
    """The layers that may get new statistics. Raises NormValueError where there is none."""
    layers = list(recording.tracked(model))
    if not layers:
        must = "`model` must hold batch norms with running statistics that are not frozen"
        raise NormValueError(message(must, type(model).__name__))
    return layers


def population(
    recording: Recording, model: Any, layers: Sequence[TrackedLayer], data: Any, steps: int | None, exact: bool
) -> dict[int, Pooled]:
    """The moments of the whole data at each layer that was called, by its number; those of all processes together.

    Variances are those that the layer keeps: unbiased ones where it keeps unbiased ones.

    Every batch is normalized by its own moments, or with `exact` by those of all data: then one pass over the data for
    each call of a layer, in their order, in which the calls before it have their final statistics.
    """
    find = _layer_by_layer if exact else _in_one_pass
    found = find(recording, model, layers, lambda: batches.inputs(data, steps))
    if not found:
        must = "`model` must call its norm layers when it is run on a batch"
        hint = "what a function compiled before does (tf.function) is not seen"
        raise NormValueError(message(must, "no call of any", hint))
    for place, moments in found.items():
        if not (np.isfinite(moments.mean).all() and np.isfinite(moments.var).all()):
            must = "`data` must give finite values at every norm layer"
            raise NormValueError(message(must, f"NaN or infinity at {layers[place].path}"))
    return {
        place: Pooled(n, mean, unbiased(var, n) if layers[place].bessel else var)
        for place, (n, mean, var) in found.items()
    }


def replaced(
    recording: Recording,
    layers: Sequence[TrackedLayer],
    find: Callable[[], Mapping[int, Pooled]],
    measure: Measure,
    keep: str,
    restore: Callable[[], None] = lambda: None,
) -> Statistics:
    """Write the moments that `find` gives into the layers, all or nothing.

    With `keep="best"` they stay only where they make the measure no worse. `restore` undoes what `find` changed.
    """
    old = [recording.kept(layer.layer) for layer in layers]

    def undo() -> None:
        restore()
        for layer, values in zip(layers, old, strict=True):
            recording.keep(layer.layer, values)

    before = measure.of()
    try:
        found = find()
        changes = tuple(_change(recording, layer, found.get(place)) for place, layer in enumerate(layers))
        for place, moments in found.items():
            layer = layers[place].layer
            recording.keep(layer, recording.as_kept(layer, moments.mean, moments.var))
        after = measure.of()
        better = keep == "new" or _no_worse(before, after)
        if not better:
            undo()
    except BaseException:
        undo()
        raise
    return Statistics(changes, "new" if better else "old", measure.name, before, after, undo)


def score(
    recording: Recording, model: Any, data: Any, measured: Callable[[Any, Any], float], steps: int | None = None
) -> float:
    """The mean of `measured(outputs, targets)` over the samples of all processes, the model in evaluation mode."""

    def total() -> tuple[float, int]:
        value, count = 0.0, 0
        with recording.watching(model, (), lambda _, measure: measure()) as forward:
            for x, y in batches.labelled(data, steps):
                outputs = forward(x)
                size = len(recording.array(outputs))
                value += size * float(measured(outputs, None if y is None else recording.given(model, y)))
                count += size
        return value, count

    values, counts = zip(*_together(recording, total), strict=True)
    if not sum(counts):
        raise NormValueError(message("data to measure on must hold at least one batch", "none"))
    return math.fsum(values) / sum(counts)


def _in_one_pass(
    recording: Recording, model: Any, layers: Sequence[TrackedLayer], data: Callable[[], Iterator[Any]]
) -> dict[int, Pooled]:
    def work() -> tuple[bool, dict[int, Pooled]]:
        found: dict[int, Pooled] = {}

        def decide(place: int, measure: Callable[[], Pooled]) -> Pooled:
            batch = _spread(layers[place], measure())
            found[place] = _merged(layers[place], [found[place], batch] if place in found else [batch])
            return batch

        ran = False
        with recording.watching(model, layers, decide) as forward:
            for x in data():
                ran = True
                forward(x)
        return ran, found

    parts = _together(recording, work)
    _check_any([ran for ran, _ in parts])
    return {
        place: _merged(layer, [found[place] for _, found in parts if place in found])
        for place, layer in enumerate(layers)
        if any(place in found for _, found in parts)
    }


def _layer_by_layer(
    recording: Recording, model: Any, layers: Sequence[TrackedLayer], data: Callable[[], Iterator[Any]]
) -> dict[int, Pooled]:
    def look() -> list[int] | None:
        order: list[int] = []

        def decide(place: int, measure: Callable[[], Pooled]) -> Pooled:
            order.append(place)
            return measure()

        with recording.watching(model, layers, decide) as forward:
            for x in data():
                forward(x)
                return order
        return None

    orders = [order for order in _together(recording, look) if order is not None]
    _check_any([True for _ in orders])
    order, done = orders[0], list[Pooled]()

    def work() -> Pooled | None:
        found: Pooled | None = None
        at = 0

        def decide(place: int, measure: Callable[[], Pooled]) -> Pooled:
            nonlocal at, found
            if place != order[at]:
                raise _unsteady(layers[place])
            if at < len(done):
                at += 1
                return done[at - 1]
            found = _merged(layers[place], [measure()] if found is None else [found, measure()])
            raise _Enough

        with recording.watching(model, layers, decide) as forward:
            for x in data():
                at = 0
                try:
                    forward(x)
                except _Enough:
                    continue
                raise _unsteady(layers[order[at]])
        return found

    for place in order:
        parts = [part for part in _together(recording, work) if part is not None]
        done.append(_spread(layers[place], _merged(layers[place], parts)))
    return {
        place: _merged(layers[place], [done[at] for at, called in enumerate(order) if called == place])
        for place in set(order)
    }


def _no_worse(before: float | None, after: float | None) -> bool:
    """Whether a measure has not grown: any number is better than NaN, and NaN no better than anything."""
    assert before is not None
    assert after is not None
    return after <= before or (math.isnan(before) and not math.isnan(after))


def _unsteady(layer: TrackedLayer) -> NormValueError:
    must = "`exact` needs a model that calls its norm layers in the same order for every batch"
    return NormValueError(message(must, f"another one at {layer.path}", "exact=False"))


def _merged(layer: TrackedLayer, parts: Sequence[Pooled]) -> Pooled:
    return merge(*zip(*parts, strict=True), between=layer.pooled)


def _spread(layer: TrackedLayer, moments: Pooled) -> Pooled:
    """Refuse the moments of a single value, which normalizes to nothing and says nothing of the variance."""
    if layer.pooled and moments.count < 2:
        must = f"{layer.path} must be given batches of at least 2 values per channel"
        raise NormValueError(message(must, f"{moments.count}", "larger batches, or exact=True, which takes any"))
    return moments


def _together(recording: Recording, work: Callable[[], T]) -> list[T]:
    """What all processes found. An error of one is an error of all: none waits for what never comes."""
    mine: T | None = None
    error: Exception | None = None
    try:
        mine = work()
    except Exception as raised:
        error = raised
    values = recording.gathered((error is None, mine))
    if error is not None:
        raise error
    if not all(worked for worked, _ in values):
        raise NormRuntimeError(
            message("all processes must succeed", "an error in another one; its own output says which")
        )
    return [value for _, value in values]


def _check_any(parts: Sequence[bool]) -> None:
    if not any(parts):
        raise NormValueError(message("`data` must hold at least one batch", "none"))


def _change(recording: Recording, layer: TrackedLayer, new: Pooled | None) -> LayerChange:
    if new is None:
        return LayerChange(layer.path, 0, 0.0, 1.0, 1.0)
    mean, var = recording.moments(layer.layer)
    shift = np.zeros(1) if mean is None else np.abs(new.mean - mean) / np.sqrt(new.var + layer.eps)
    ratio = (new.var + layer.eps) / (var + layer.eps)
    return LayerChange(layer.path, int(new.count), float(shift.max()), float(ratio.min()), float(ratio.max()))
