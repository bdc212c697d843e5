"""Looking into a model: what a framework has to offer for it, and the passes over the data that make the evidence."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from normkit.checks.evidence import (
    PARTS,
    Call,
    Data,
    Dependence,
    Evidence,
    Gap,
    Group,
    Layer,
    Part,
    Step,
    apart,
    pooled,
)
from normkit.checks.statistics import STALE, stale
from normkit.core.algebra import Pooled, unbiased
from normkit.errors import NormTypeError, NormValueError, message
from normkit.frameworks import framework_of, part
from normkit.surgery import batches
from normkit.surgery.graph import Graph
from normkit.surgery.protocol import recording

__all__ = ["Batch", "Examination", "Forward", "Loss", "Mode", "Request", "See", "examination", "examine"]

# How a pass is run: as in training; in evaluation, but for norms that take the statistics of the batch as in training;
# in evaluation.
Mode = Literal["train", "batch", "eval"]
# Called with the path of a norm, its input, the name of that input's type, and its mask, whenever a norm is called.
See = Callable[[str, NDArray[Any], str, NDArray[Any] | None], None]

Loss = Callable[[Any, Any], Any]  # of outputs and targets
Forward = Callable[[Any, Any], Any]  # of the model and what the loader gives

# What one part of the work gives, where that is not the part of the same name alone.
_GIVES: dict[Part, tuple[Part, ...]] = {"gap": ("calls", "gap")}

_CLASSES = 1000  # more different whole numbers than this are no classes
_VALUES = 4096  # outputs of one sample that are kept, of maps of pixels a part


class Batch(NamedTuple):
    """Inputs, targets or None, and what the loader gave."""

    x: Any
    y: Any
    raw: Any


class Examination(Protocol):
    """The module `normkit.<framework>.examination`."""

    def layers(self, model: Any) -> tuple[Layer, ...]:
        """Every norm layer, once, in the order of registration. Raises NormValueError for a model that is not built."""

    def backend(self) -> str:
        """What computes: that of Keras, else the framework."""

    def unread(self, model: Any) -> Mapping[str, str]:
        """Paths of norm layers that `layers` leaves out, since no record can say what they compute, and why."""

    def stuck(self, model: Any, batch: Batch, forward: Forward | None) -> frozenset[str]:
        """Paths of norms that keep statistics, yet are called in training mode in evaluation, beyond `Layer.stuck`."""

    def parameters(self, model: Any) -> Mapping[str, bool]:
        """Every parameter by its path, and whether it gets gradients."""

    def graph(self, model: Any, x: Any) -> Graph:
        """Who feeds whom in evaluation."""

    def untouched(self, model: Any) -> contextlib.AbstractContextManager[None]:
        """Inside, modes, kept statistics and random numbers may change; leaving restores them."""

    def running(
        self, model: Any, mode: Mode, see: See | None, forward: Forward | None
    ) -> contextlib.AbstractContextManager[Callable[[Batch], Any]]:
        """Inside, the result runs the model on a batch and returns its outputs; leaving restores everything."""

    def step(
        self,
        model: Any,
        batch: Batch,
        loss: Loss | None,
        forward: Forward | None,
    ) -> Step:
        """One forward and backward pass in training mode; gradients and everything else are restored."""

    def groups(self, model: Any, optimizer: Any) -> tuple[Group, ...]:
        """The parameters that an optimizer holds. Raises NormTypeError for what is none."""

    def optimizer(self, model: Any) -> Any:
        """The optimizer that the model itself holds, None without."""

    def loss(self, model: Any, given: Loss | None) -> Loss | None:
        """The loss that was given, or that the model itself holds, as a function of outputs and targets; or None."""

    def loader(self, data: Any) -> Mapping[str, Any]:
        """What a loader of the framework says of itself: fields of :class:`Data`."""


class Request(NamedTuple):
    """What is to be examined, as it was given to `normkit.check`."""

    model: Any
    data: Any
    optimizer: Any
    loss: Loss | None
    forward: Forward | None
    steps: int
    tell: Callable[[str], None]
    batch_size: int | None = None
    data_name: str = "data"
    wanted: frozenset[Part] = frozenset(PARTS)  # the parts that some rule looks at


def examination(framework: str) -> Examination:
    """The examination module of a framework. Raises NormTypeError where there is none."""
    if framework not in ("torch", "keras"):
        must = "`model` must be a torch.nn.Module or a Keras model"
        raise NormTypeError(message(must, f"a model of {framework}"))
    return cast(Examination, part(framework, "examination"))


def examine(request: Request) -> Evidence:
    """See all that can be seen. Raises for a model or data that cannot be run in evaluation; nothing is changed."""
    model = request.model
    side = examination(framework_of(model))
    work = _Work(request, side, side.layers(model))
    with side.untouched(model):
        work.run()
    return work.evidence()


@dataclass
class _Work:
    request: Request
    side: Examination
    layers: tuple[Layer, ...]
    found: dict[str, Any] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    batches: list[Batch] = field(default_factory=list)
    order: list[str] = field(default_factory=list)

    def run(self) -> None:
        request, side = self.request, self.side
        self._compare()
        self.skipped |= side.unread(request.model)
        self.found["parameters"] = side.parameters(request.model)
        optimizer = request.optimizer if request.optimizer is not None else side.optimizer(request.model)
        if optimizer is None:
            self.skipped["optimizer"] = "none was given"
        else:
            several = optimizer if isinstance(optimizer, tuple | list) else (optimizer,)
            self.found["groups"] = tuple(group for one in several for group in side.groups(request.model, one))
        if request.data is None:
            self.skipped |= dict.fromkeys(("graph", "calls", "trained calls", "gap", "dependence", "step", "data"), "")
            self.skipped["data"] = "none was given: what depends on it was not looked at"
            return
        self._take()
        if not self.batches:
            return
        measure = _Measure(self)
        try:
            kept = self._pass("eval", None, "kept statistics", measure)
        except Exception as error:
            if not self._single_value():
                raise  # what fails in evaluation is the user's to know
            why = f"evaluation fails: {_words(error)}"
            self.skipped |= dict.fromkeys(("graph", "trained calls", "gap", "dependence", "step"), why)
            return
        stuck = side.stuck(request.model, self.batches[0], request.forward)
        self.layers = tuple(replace(layer, stuck=layer.stuck or layer.path in stuck) for layer in self.layers)
        self._tell("the flow of data")
        self._attempt("graph", self._graph)
        self._attempt("gap", lambda: self._statistics(measure, kept))
        self._attempt("trained calls", self._trained)
        self._attempt("dependence", self._dependence)
        self._attempt("step", self._step)

    def evidence(self) -> Evidence:
        first = {path: number for number, path in enumerate(dict.fromkeys(self.order))}
        layers = sorted(self.layers, key=lambda layer: first.get(layer.path, len(first)))
        model = self.request.model
        framework = framework_of(model)
        return Evidence(
            framework=framework,
            backend=self.side.backend(),
            model=type(model).__name__,
            layers=tuple(layers),
            data_name=self.request.data_name,
            training=model.training if framework == "torch" else None,
            skipped=self.skipped,
            **self.found,
        )

    def _tell(self, words: str) -> None:
        self.request.tell(words)

    def _attempt(self, part: Part, work: Callable[[], None]) -> None:
        """Let one part of the examination fail without the others: a model that cannot train can be looked at."""
        if not self.request.wanted.intersection(_GIVES.get(part, (part,))):
            self.skipped |= dict.fromkeys(_GIVES.get(part, (part,)), "")
            return
        try:
            work()
        except Exception as error:
            self.skipped[part] = _words(error)

    def _single_value(self) -> bool:
        """Whether evaluation fails at a norm that is given a single value per statistic, which then is a finding."""
        calls: dict[str, list[Call]] = {}
        with contextlib.suppress(Exception):  # it is known to fail
            self._pass("eval", calls, "evaluation again")
        self.found["calls"] = calls
        return bool(self.order) and calls[self.order[-1]][-1].count == 1

    def _compare(self) -> None:
        """What all processes keep, before a forward pass of DistributedDataParallel makes that the same."""
        own = {
            layer.path: (np.asarray(layer.record.kept["mean"]), np.asarray(layer.record.variance()))
            for layer in self.layers
            if layer.tracks
        }
        everyone = recording(framework_of(self.request.model)).gathered(own)
        self.found["processes"] = len(everyone)
        if len(everyone) == 1:
            self.skipped["ranks"] = ""
            return
        eps = {layer.path: layer.record.eps for layer in self.layers}
        shared = [path for path in own if all(path in kept for kept in everyone)]
        stacks = {path: [np.stack(each) for each in zip(*(k[path] for k in everyone), strict=True)] for path in shared}
        self.found["ranks"] = {path: apart(mean, var, 0.0, eps[path]) for path, (mean, var) in stacks.items()}

    def _take(self) -> None:
        data = self.request.data
        batches.repeatable("data", data)
        whole, batch_size = batches.whole(data), self.request.batch_size
        if batch_size is not None and not whole:
            must = "`batch_size` is for data that is an array, or a pair of arrays"
            raise NormValueError(message(must, type(data).__name__, "a loader has a batch size of its own"))
        for raw, (x, y) in batches.raw(data, self.request.steps, batch_size):
            self.batches.append(Batch(x, y, raw))
        if not self.batches:
            self.skipped |= dict.fromkeys(("calls", "trained calls", "gap", "dependence", "step"), "the data is empty")
            return
        sizes = tuple(batches.size(batch.x) for batch in self.batches)
        classes = tuple(filter(None, (_classes(batch.y) for batch in self.batches)))
        known = self.side.loader(data)
        if whole:
            known = {"samples": batches.size(data), "batch_size": batch_size, **known}
        enough = len(classes) == len(self.batches)
        self.found["data"] = Data(sizes, classes=classes if enough else (), **known)

    def _graph(self) -> None:
        if self.request.forward is not None:
            self.skipped["graph"] = "the model is called by a function of yours"
            return
        self.found["graph"] = self.side.graph(self.request.model, self.batches[0].x)

    def _pass(
        self,
        mode: Mode,
        calls: dict[str, list[Call]] | None,
        name: str,
        measure: Callable[[Batch, Any], Any] | None = None,
    ) -> list[Any]:
        """Run all batches in a mode, record the calls of norms, and return what is measured of each batch.

        It is no generator: one that an error leaves half way gives the model's state back whenever it is collected.
        """
        records = {layer.path: layer.record for layer in self.layers}
        number = 0

        def see(path: str, x: NDArray[Any], dtype: str, mask: NDArray[Any] | None) -> None:
            assert calls is not None
            self.order.append(path)
            calls.setdefault(path, []).append(Call.of(x, records[path], number, dtype, mask))

        watch = None if calls is None else see
        found = []
        with self.side.running(self.request.model, mode, watch, self.request.forward) as forward:
            for number, batch in enumerate(self.batches):  # `see` reads the number
                self._tell(f"{name}, batch {number + 1} of {len(self.batches)}")
                outputs = forward(batch)
                found.append(None if measure is None else measure(batch, outputs))
        return found

    def _statistics(self, measure: _Measure, kept: list[_Seen]) -> None:
        """The same batches with their own statistics, and with those of all of them."""
        calls: dict[str, list[Call]] = {}
        self.found["calls"] = calls  # also of a pass that fails at a layer with a single value
        train = self._pass("batch", calls, "statistics of batches", measure)
        population = pooled(calls)
        with self._replaced(population):
            new = self._pass("eval", None, "population statistics", measure)
        self.found["gap"] = measure.gap(train, kept, new, self._first(calls))

    @contextlib.contextmanager
    def _replaced(self, population: Mapping[str, Pooled]) -> Iterator[None]:
        """The kept statistics are those of the data, inside."""
        side = recording(framework_of(self.request.model))
        changed = [(layer, population.get(layer.path)) for layer in side.tracked(self.request.model)]
        with self.side.untouched(self.request.model):
            for layer, moments in changed:
                if moments is not None and moments.count > 1:
                    var = unbiased(moments.var, moments.count) if layer.bessel else moments.var
                    side.keep(layer.layer, side.as_kept(layer.layer, moments.mean, var))
            yield

    def _first(self, calls: Mapping[str, Sequence[Call]]) -> str | None:
        """The first layer in the order of calls whose kept statistics are not those of the data."""
        by_path = {layer.path: layer for layer in self.layers}
        off = (path for path in calls if stale(by_path[path], calls[path], STALE) > STALE["share"])
        return next(off, None)

    def _trained(self) -> None:
        calls: dict[str, list[Call]] = {}
        self._pass("train", calls, "training mode")
        self.found["trained_calls"] = calls

    def _dependence(self) -> None:
        suspects = tuple(layer.path for layer in self.layers if layer.by_batch)
        # One sample alone, two where a norm of the batch would have a single value per statistic.
        calls = [call for path in suspects for call in self.found["calls"].get(path, ())]
        alone = 2 if any(call.count == call.shape[0] for call in calls) else 1
        batch = next((batch for batch in self.batches if batches.size(batch.x) > alone), None)
        if batch is None:
            self.skipped["dependence"] = f"no batch holds more than {alone} sample{'s' if alone > 1 else ''}"
            return
        self._tell("evaluation of single samples")
        array = recording(framework_of(self.request.model)).array
        few = Batch(*(_cut(part, alone) for part in batch))
        with self.side.running(self.request.model, "eval", None, self.request.forward) as forward:
            together, again, single = (array(forward(part)) for part in (batch, batch, few))
        if together.ndim == 0 or len(together) != batches.size(batch.x) or single.shape != together[:alone].shape:
            self.skipped["dependence"] = "the model does not give one output per sample"
            return
        if not np.array_equal(together, again, equal_nan=True):
            self.skipped["dependence"] = "evaluation is random"
            return
        scale = float(np.abs(together).max(initial=0.0)) or 1.0
        change = float(np.abs(together[:alone] - single).max(initial=0.0)) / scale
        self.found["dependence"] = Dependence(change, suspects)

    def _step(self) -> None:
        self._tell("one training step")
        self.found["step"] = self.side.step(
            self.request.model, self.batches[0], self.request.loss, self.request.forward
        )


class _Seen(NamedTuple):
    """What one batch gave: its loss, NaN without; some of its outputs, (samples, values), None where there are none."""

    loss: float
    outputs: NDArray[Any] | None


class _Measure:
    """What a pass is judged by: the loss, and how far outputs are from those of another pass."""

    def __init__(self, work: _Work) -> None:
        request = work.request
        self._loss = work.side.loss(request.model, request.loss)
        if request.loss is None and all(batch.y is None for batch in work.batches):
            self._loss = None  # that of a compiled model needs targets
        self._side, self._model = recording(framework_of(request.model)), request.model

    def __call__(self, batch: Batch, outputs: Any) -> _Seen:
        if self._loss is None and getattr(outputs, "loss", None) is not None:
            self._loss = lambda outputs, _: outputs.loss  # models of transformers that are given labels
        if self._loss is None:
            return _Seen(float("nan"), _some(self._side.array(outputs)))
        target = None if batch.y is None else self._side.given(self._model, batch.y)
        loss = float(self._side.array(self._loss(outputs, target)).mean())
        values = None
        with contextlib.suppress(TypeError, AttributeError, IndexError):  # outputs that only the loss can read
            values = _some(self._side.array(outputs))
        return _Seen(loss, values)

    def gap(self, train: list[_Seen], kept: list[_Seen], new: list[_Seen], first: str | None) -> Gap:
        moved = _moved(kept, train)
        if self._loss is None:
            return Gap("outputs", len(train), 0.0, moved, _moved(new, train), 0.0, first, moved)
        losses = [np.array([seen.loss for seen in way]) for way in (train, kept, new)]
        differences = losses[1] - losses[0]
        error = float(differences.std(ddof=1) / np.sqrt(len(train))) if len(train) > 1 else 0.0
        values = [float(way.mean()) for way in losses]
        return Gap("loss", len(train), values[0], values[1], values[2], error, first, moved)


def _some(outputs: NDArray[Any]) -> NDArray[Any] | None:
    """At most so many values of each sample, always the same."""
    if outputs.ndim == 0 or not outputs.size:
        return None
    rows = outputs.reshape(len(outputs), -1)
    return rows[:, :: -(-rows.shape[1] // _VALUES)]


def _moved(way: Sequence[_Seen], other: Sequence[_Seen]) -> float:
    """Root mean square change of the outputs, over their deviation from sample to sample.

    NaN where it is not known, infinity where one of them is not finite.
    """
    pairs = [(a.outputs, b.outputs) for a, b in zip(way, other, strict=True)]
    told = [(a, b) for a, b in pairs if a is not None and b is not None and a.shape == b.shape]
    if len(told) < len(pairs):
        return float("nan")
    if not all(np.isfinite(value).all() for pair in told for value in pair):
        return float("inf")
    alike = len({b.shape[1] for _, b in told}) == 1
    centre = np.concatenate([b for _, b in told]).mean(axis=0) if alike else np.mean([b.mean() for _, b in told])
    size = _root([b - centre for _, b in told])
    change = _root([a - b for a, b in told])
    return change / size if size else float(change > 0)


def _root(arrays: Sequence[NDArray[Any]]) -> float:
    """The root of the mean square of all values."""
    return float(np.sqrt(sum(np.square(y).sum() for y in arrays) / sum(y.size for y in arrays)))


def _cut(x: Any, samples: int) -> Any:
    """The first samples."""
    if isinstance(x, Mapping):
        return {name: _cut(value, samples) for name, value in x.items()}
    if isinstance(x, tuple | list):
        return tuple(_cut(part, samples) for part in x)
    return x[:samples] if hasattr(x, "shape") and len(x.shape) else x


def _words(error: Exception) -> str:
    """Its class and the first line of what it says."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"


def _classes(y: Any) -> Mapping[int, int]:
    """How many samples of each class; empty where targets are no classes."""
    if not hasattr(y, "shape"):
        return {}
    values = np.asarray(y.detach().cpu() if hasattr(y, "detach") else y)
    if values.ndim == 2 and values.shape[1] == 1:
        values = values[:, 0]
    if values.ndim == 2 and values.size and np.isin(values, (0, 1)).all() and (values.sum(axis=1) == 1).all():
        values = values.argmax(axis=1)
    whole = values.ndim == 1 and values.size and values.dtype.kind in "iu"
    counted = Counter(values.tolist()) if whole else Counter[int]()
    return dict(counted) if 0 < len(counted) <= _CLASSES else {}
