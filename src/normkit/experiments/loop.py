"""A training loop of the user's: what it is given, and what becomes of what it reports."""

from __future__ import annotations

import contextlib
import itertools
import math
import numbers
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from normkit.errors import NormTypeError, NormValueError, message
from normkit.experiments.code import call
from normkit.experiments.config import GOALS, TrialConfig, Variant
from normkit.experiments.memory import PeakMemory
from normkit.experiments.protocol import Training
from normkit.experiments.results import Evaluation, Stops, TrialResult, never

__all__ = ["NormChoice", "Trial", "run_loop"]


class _EndedError(BaseException):
    """Ends a loop whose report was not finite, or not good enough; not an Exception, which loops catch."""


class NormChoice:
    """The normalization of a trial: call it for a layer, or read its name.

    `norm(num_features)` gives a layer for any number of spatial axes, an identity for `none`;
    `norm(num_features, activation)` one that normalizes before or after that activation, as the variant says. It takes
    what the framework's own `NormFactory` takes: `axis` is where the channels are, by default 1 in PyTorch and -1 in
    Keras and Flax, and Keras needs no number of channels. `str(norm)` is the short name (`batch:after`), for frameworks
    that we make no layers for and for branches of your own.
    """

    def __init__(self, label: str, make: Callable[[], Callable[..., Any]]) -> None:
        self._label, self._make = label, make
        self._factory: Callable[..., Any] | None = None
        self.used = False

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """A layer of the framework that trains."""
        self.used = True
        self._factory = self._factory or self._make()
        return self._factory(*arguments, **named)

    def __str__(self) -> str:
        self.used = True
        return self._label

    def __repr__(self) -> str:
        return f"<norm {self._label}>"

    def __eq__(self, other: object) -> bool:
        return str(self) == str(other)

    def __hash__(self) -> int:
        return hash(self._label)


class Trial:
    """One trial of a loop of yours: what to train with, and where to report.

    Attributes:
        norm: the normalization, see :class:`NormChoice`.
        lr: learning rate.
        batch_size: samples per step.
        seed: seeds of Python, NumPy and the framework are set from it already.
        epochs: passes over the data that the comparison asks for.
    """

    def __init__(self, config: TrialConfig, norm: NormChoice, metric: str | None, stops: Stops = never) -> None:
        self.norm, self.lr, self.batch_size = norm, config.lr, config.batch_size
        self.seed, self.epochs = config.seed, config.epochs
        self._metric, self._stops, self._started = metric, stops, time.perf_counter()
        self._inside = 0.0  # seconds spent in reports
        self._curve: list[Evaluation] = []
        self._diverged_at: int | None = None
        self._pruned = False

    def report(self, step: int, **values: Any) -> None:
        """Say how training goes: `trial.report(step, loss=..., accuracy=...)`, a few times an epoch or once in each.

        Args:
            step: steps taken so far, a whole number that grows.
            values: numbers by name, tensors of one element too, measured on data that is not trained on. The metric
                of the comparison must be among them; without `metric=` that is `accuracy`, a share, else `loss`.

        A value that is not finite ends the trial, which is then recorded as diverged; with a pruner of the comparison
        so does one that falls behind, and the trial is recorded as pruned.
        Raises NormValueError or NormTypeError for anything else that cannot be used.
        """
        begun = time.perf_counter()
        seconds = begun - self._started - self._inside
        step = _whole(step)
        if self._curve and step <= self._curve[-1].step:
            must = "the step of a report must be larger than that of the report before"
            raise NormValueError(message(must, f"{step} after {self._curve[-1].step}"))
        numbers_by_name = {name: _number(name, value) for name, value in values.items()}
        name = self.metric_in(numbers_by_name)
        if not all(map(math.isfinite, numbers_by_name.values())):
            self._diverged_at = step
            raise _EndedError
        self._curve.append(Evaluation(step, seconds, numbers_by_name.get("loss"), numbers_by_name[name]))
        self._pruned = self._stops(step, numbers_by_name[name])
        if self._pruned:
            raise _EndedError
        self._inside += time.perf_counter() - begun

    def metric_in(self, values: Mapping[str, float], said: str = "trial.report must be given") -> str:
        """Name of the metric, decided by the first report."""
        if self._metric is None:
            self._metric = next((name for name in GOALS if name in values), None)
            if self._metric is None:
                must = f"{said} accuracy or loss, or the comparison metric= and goal="
                raise NormValueError(message(must, ", ".join(values) or "nothing"))
        if self._metric not in values:
            must = f"{said} {self._metric}, the metric of this comparison, every time"
            raise NormValueError(message(must, ", ".join(values) or "nothing"))
        value = values[self._metric]
        if self._metric == "accuracy" and math.isfinite(value) and not 0 <= value <= 1:
            raise NormValueError(message("accuracy must be a share from 0 to 1", f"{value:g}", "divide by 100"))
        return self._metric


def run_loop(
    config: TrialConfig,
    train: Callable[..., Any],
    metric: str | None,
    training: Callable[[], Training],
    stops: Stops = never,
) -> TrialResult:
    """Run the user's `train(trial)` once.

    It may return the metric on data that did not choose the rate (a number, or a mapping that holds it); without that
    its last report is what is compared.
    """
    variant = Variant.parse(config.norm)
    norm = NormChoice(config.norm, lambda: training().norm_factory(variant.name, variant.position, None))
    memory = PeakMemory()
    trial = Trial(config, norm, metric, stops)
    label = config.model
    returned = None
    with contextlib.suppress(_EndedError):
        returned = call(label, train, trial)
    peak, curve = memory.bytes(), tuple(trial._curve)
    diverged, pruned = trial._diverged_at is not None, trial._pruned
    final = None if diverged or pruned or returned is None else _returned(trial, returned, label)
    if final is not None and not math.isfinite(final):
        diverged = True
    if not curve and not diverged:
        must = f"{label} must call trial.report(step, loss=..., accuracy=...) at least once"
        raise NormValueError(message(must, hint="report on data that is not trained on"))
    if not norm.used and config.norm != "none":
        must = f"{label} must use trial.norm"
        raise NormValueError(message(must, hint="put trial.norm(num_features) where the normalization belongs"))
    steps = curve[-1].step if curve else 0
    seconds = curve[-1].seconds if curve else 0.0
    if diverged:
        steps = max(steps, trial._diverged_at or 0)
    return TrialResult(
        config=config,
        metric=trial._metric or "accuracy",
        curve=curve,
        train_losses=(),
        steps=steps,
        seconds=seconds,
        diverged=diverged,
        final=None if diverged or pruned else curve[-1].metric if final is None else final,
        tested=final is not None,
        step_seconds=_step_seconds(curve),
        peak_memory=peak,
        versions=(),
        pruned=pruned,
    )


def _step_seconds(curve: Sequence[Evaluation]) -> float | None:
    """Median time of a step between two reports, evaluation included; the first report has the set-up before it."""
    pairs = itertools.pairwise(curve)
    times = [(later.seconds - earlier.seconds) / (later.step - earlier.step) for earlier, later in pairs]
    return statistics.median(times) if times else None


def _returned(trial: Trial, returned: Any, label: str) -> float:
    said = f"{label} must return a number, nothing, or"
    values = dict(returned) if isinstance(returned, Mapping) else {trial._metric or "accuracy": returned}
    found = {name: _number(name, value) for name, value in values.items() if name in (trial._metric, *GOALS)}
    return found[trial.metric_in(found, said)]


def _whole(step: Any) -> int:
    if isinstance(step, bool) or not isinstance(step, numbers.Integral):
        raise NormTypeError(message("the step of a report must be a whole number", repr(step)))
    if step < 0:
        raise NormValueError(message("the step of a report must be at least 0", step))
    return int(step)


def _number(name: str, value: Any) -> float:
    if hasattr(value, "detach"):
        value = value.detach()  # PyTorch warns of a loss that still carries its graph, as people report it
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise NormTypeError(message(f"`{name}` of a report must be a number", type(value).__name__)) from error
