"""What a study measured, as plain numbers: one :class:`Measured` per norm and circumstance."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from normkit.experiments import Comparison
from normkit.experiments.analysis import Group, VariantSummary
from normkit.experiments.results import StepNoise, TrialResult, unpacked
from normkit.studies.probed import Probed, probed
from normkit.studies.stepwise import step_noise

__all__ = ["USUAL", "Against", "Measured", "Measurements", "measured"]

USUAL = ""  # the name of the circumstance in which nothing is changed


@dataclass(frozen=True)
class Measured:
    """One norm in one circumstance. What is per seed is taken at its best rate, and empty where it has none.

    Attributes:
        arm: name of the circumstance, empty where nothing is changed.
        norm: short name, with the position where it is not the default.
        inputs: scaling of the inputs.
        batch_size: samples per step.
        rates: all that were tried, rising.
        usable: those at which every seed learned.
        best_lr: the rate with the best mean validation metric, None where every rate diverged in some seed.
        seeds: number of seeds.
        runs: number of runs, over all rates and seeds.
        diverged: how many of them diverged.
        epochs: of each run.
        budget: steps of each run.
        steps: to the target per seed, None where a seed did not get there.
        seconds: likewise, training alone.
        step_seconds: median time of a step.
        final: metric on the test part per seed.
        gaps: metric in training mode - metric in evaluation mode, on the same training batches, per seed.
        depths: standard deviations at the inputs of the activations at initialization, first layer to last, per seed.
        examples: number of test examples, 0 where it is not known.
        trained: seconds of training in all runs.
        probed: what the probes say at each rate, where the circumstance asks for them.
        noise: of the statistics of batch norm by time step, per seed, where the circumstance asks for it.
    """

    arm: str
    norm: str
    inputs: str = "standard"
    batch_size: int = 32
    rates: tuple[float, ...] = ()
    usable: tuple[float, ...] = ()
    best_lr: float | None = None
    seeds: int = 0
    runs: int = 0
    diverged: int = 0
    epochs: int = 0
    budget: int = 0
    steps: tuple[int | None, ...] = ()
    seconds: tuple[float | None, ...] = ()
    step_seconds: float | None = None
    final: tuple[float, ...] = ()
    gaps: tuple[float, ...] = ()
    depths: tuple[tuple[float, ...], ...] = ()
    examples: int = 0
    trained: float = 0.0
    probed: tuple[Probed, ...] = ()
    noise: tuple[tuple[StepNoise, ...], ...] = ()

    @property
    def label(self) -> str:
        """In a sentence: `batch`, `batch (30 % wrong labels)`."""
        inputs = "" if self.inputs == "standard" else f"inputs {self.inputs}"
        around = ", ".join(filter(None, [self.arm, inputs]))
        return f"{self.norm} ({around})" if around else self.norm

    @property
    def largest(self) -> float | None:
        """The largest usable rate."""
        return self.usable[-1] if self.usable else None

    @property
    def mean(self) -> float | None:
        """Mean of `final`."""
        return statistics.fmean(self.final) if self.final else None

    @property
    def spread(self) -> float | None:
        """Standard deviation of `final` between seeds."""
        return statistics.stdev(self.final) if len(self.final) > 1 else None

    def at(self, rate: float | None) -> Probed:
        """What the probes say at this rate; nothing where it was not tried."""
        return next((found for found in self.probed if found.lr == rate), Probed(rate or 0.0))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            **asdict(self),
            "probed": [one._asdict() for one in self.probed],
            "noise": [[step_noise(step) for step in steps] for steps in self.noise],
            "label": self.label,
            "mean": self.mean,
            "spread": self.spread,
        }


class Against(NamedTuple):
    """A number that a formula gives, and what was measured of it, per seed, on random networks without training."""

    what: str
    formula: float
    measured: tuple[float, ...]


class Measurements:
    """All that a study measured on one network and data set, and beside it, of the numbers that formulas give."""

    def __init__(self, found: Iterable[Measured], against: Iterable[Against] = ()) -> None:
        self._found, self.against = tuple(found), tuple(against)

    def __iter__(self) -> Iterator[Measured]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)

    def all(self, **which: Any) -> tuple[Measured, ...]:
        """Those whose fields have these values."""
        return tuple(m for m in self._found if all(getattr(m, name) == value for name, value in which.items()))

    def one(self, norm: str, arm: str = USUAL, **which: Any) -> Measured:
        """The only one of this norm and circumstance. Raises LookupError where there is not exactly one."""
        found = self.all(norm=norm, arm=arm, **which)
        if len(found) != 1:
            raise LookupError(f"{len(found)} measurements of {norm} {arm} {which}")
        return found[0]

    def arms(self) -> tuple[str, ...]:
        """The circumstances, in the order in which they were measured."""
        return tuple(dict.fromkeys(m.arm for m in self._found))


def measured(comparison: Comparison, arms: Mapping[str, str]) -> tuple[Measured, ...]:
    """The measurements of a finished comparison; `arms` names its conditions, by their words."""
    return tuple(
        _measured(comparison, group, variant, arms[group.setting.conditions])
        for group in comparison.groups
        for variant in group.variants
    )


def _measured(comparison: Comparison, group: Group, variant: VariantSummary, arm: str) -> Measured:
    trials = [trial for trial in comparison.trials if _belongs(trial, group, variant)]
    best = [trial for trial in trials if trial.config.lr == variant.best_lr]
    smallest = min(trial.config.lr for trial in trials)
    first = [trial.snapshots[0] for trial in trials if trial.config.lr == smallest and trial.snapshots]
    examples = next((len(unpacked(trial.examples)) for trial in trials if trial.examples), 0)
    return Measured(
        arm=arm,
        norm=variant.norm,
        inputs=group.setting.inputs,
        batch_size=group.setting.batch_size,
        rates=tuple(rate.lr for rate in variant.rates),
        usable=tuple(rate.lr for rate in variant.rates if rate.usable),
        best_lr=variant.best_lr,
        seeds=comparison.config.seeds,
        runs=len(trials),
        diverged=sum(trial.diverged for trial in trials),
        epochs=comparison.config.epochs,
        budget=variant.budget,
        steps=variant.steps_to_target,
        seconds=variant.seconds_to_target,
        step_seconds=variant.seconds_per_step,
        final=variant.final,
        gaps=tuple(trial.gap.train_metric - trial.gap.eval_metric for trial in best if trial.gap is not None),
        depths=tuple(tuple(site.std for site in snapshot.sites) for snapshot in first),
        examples=examples,
        trained=sum(trial.seconds for trial in trials),
        probed=tuple(_probed(trials, rate.lr) for rate in variant.rates)
        if trials[0].config.conditions.landscape
        else (),
        noise=tuple(trial.noise for trial in best if trial.noise),
    )


def _probed(trials: list[TrialResult], lr: float) -> Probed:
    return probed(lr, sorted((trial for trial in trials if trial.config.lr == lr), key=lambda trial: trial.config.seed))


def _belongs(trial: TrialResult, group: Group, variant: VariantSummary) -> bool:
    config = trial.config
    setting = config.batch_size, config.inputs, str(config.conditions)
    return setting == tuple(group.setting) and config.norm == variant.norm
