"""What a trial gave, as frozen values that survive JSON. Everything behind the trials works on these alone."""

from __future__ import annotations

import base64
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from normkit.experiments.conditions import Conditions
from normkit.experiments.config import TrialConfig

__all__ = [
    "Evaluation",
    "Gap",
    "LayerProbe",
    "Probe",
    "SiteStats",
    "Snapshot",
    "StepNoise",
    "Stops",
    "TrialResult",
    "never",
    "packed",
    "unpacked",
]


Stops = Callable[[int, float], bool]  # whether a trial is to be given up, of a step and the metric there


def never(step: int, metric: float) -> bool:  # noqa: ARG001
    """What no pruner watches goes on to its end."""
    return False


class Evaluation(NamedTuple):
    """The validation part (or what the user's loop reported) after so many steps and seconds of training.

    `loss` is None where a loop reports none; `metric` is what the comparison is judged by, accuracy as a share.
    """

    step: int
    seconds: float
    loss: float | None
    metric: float


class Gap(NamedTuple):
    """The same training batches scored in training mode and in evaluation mode, after training."""

    train_loss: float
    eval_loss: float
    train_metric: float
    eval_metric: float


class SiteStats(NamedTuple):
    """The input of one activation over a batch, in training mode.

    Attributes:
        name: path of the module that calls the activation; a number follows where it calls several.
        activation: what is called: `relu`, `gelu`.
        mean: mean over all values.
        std: standard deviation within the channels, sqrt(mean over the channels of their variance over batch and
            positions).
        dead: share of channels that the activation turns into a constant over the whole batch.
        drift: how far the channel means moved since the snapshot before, in that snapshot's standard deviations: mean
            over the channels of |mean - mean before| / std before. None in the first snapshot.
        gamma_mean, gamma_std, beta_mean, beta_std: over the channels, of the norm that feeds the activation directly
            or that it feeds; None where there is none or it has no such parameter.
    """

    name: str
    activation: str
    mean: float
    std: float
    dead: float
    drift: float | None
    gamma_mean: float | None
    gamma_std: float | None
    beta_mean: float | None
    beta_std: float | None


class Snapshot(NamedTuple):
    """All sites in the order of their calls, after so many steps; step 0 is initialization."""

    step: int
    sites: tuple[SiteStats, ...]


class LayerProbe(NamedTuple):
    """One layer in one step.

    Attributes:
        difference, cosine: of its gradient before and after the layers in front of it took the step:
            :class:`normkit.experiments.landscape.Shift`.
        gradient: norm of the gradient of its weight.
        weight: norm of its weight before the step.
        turned: angle in radians between its weight before and after the step.
    """

    difference: float
    cosine: float
    gradient: float
    weight: float
    turned: float


class Probe(NamedTuple):
    """The loss around the network before a step, of the batch that the step was taken on.

    Attributes:
        step: steps taken before.
        loss: of the batch.
        gradient: norm of its gradient by all parameters.
        layers: one after the other.
        losses, changes, smoothness: along the gradient: :class:`normkit.experiments.landscape.Along`.
        percentiles: 15th, 50th and 85th of what enters the first unit of each activation, after the step.
    """

    step: int
    loss: float
    gradient: float
    layers: tuple[LayerProbe, ...]
    losses: tuple[float, float]
    changes: tuple[float, float]
    smoothness: float
    percentiles: tuple[tuple[float, ...], ...]


class StepNoise(NamedTuple):
    """How much the statistics of batch norm vary between batches at one time step of a trained network.

    By what is normalized: W x, or W x, U h and c.

    Attributes:
        alive: values that a statistic is of, mean over the batches: the sequences that have not ended.
        expected: what `means` would be if these were independent: sqrt(mean of 1 / values).
        means: standard deviation of the batch mean / that of all values of the step.
        variances: standard deviation of the batch variance / its mean. Both are medians over the channels, NaN where
            no channel varies.
    """

    alive: float
    expected: float
    means: tuple[float, ...]
    variances: tuple[float, ...]


@dataclass(frozen=True)
class TrialResult:
    """What one trial gave.

    Attributes:
        config: what was trained.
        metric: name of the metric it is judged by: `accuracy`, `loss`, or the user's.
        curve: validation, from step 0 about a fifth of an epoch apart (a loop of the user's: as reported); ends early
            where the trial diverged or was pruned.
        train_losses: mean loss over the steps of each complete epoch; empty for a loop of the user's.
        steps: steps that were taken.
        seconds: time in those steps, evaluation and compilation left out; of a loop of the user's all the time outside
            its reports.
        diverged: whether a loss or metric was not finite; training stopped there.
        final: the metric on the test part after training; of a loop what it returned, or else its last report. None
            where it diverged or was pruned.
        tested: whether `final` comes from data that did not choose the rate.
        examples: the metric of each test example, packed (see :func:`packed`), None where it is not known.
        gap: training against evaluation mode, None where it is not known.
        step_seconds: median time of one step.
        peak_memory: bytes by which the process grew at most while training, None where the system does not tell.
        snapshots: the inputs of the activations at initialization and after each epoch.
        versions: names and versions of what trained.
        probes: the loss around the network at some steps, where the conditions ask for it.
        pruned: whether a pruner ended it, which saw it fall behind other rates of its norm.
        noise: of the statistics of batch norm by time step, where the conditions ask for it; one entry where all steps
            share a statistic.
    """

    config: TrialConfig
    metric: str
    curve: tuple[Evaluation, ...]
    train_losses: tuple[float, ...]
    steps: int
    seconds: float
    diverged: bool
    final: float | None
    tested: bool = True
    examples: str | None = None
    gap: Gap | None = None
    step_seconds: float | None = None
    peak_memory: int | None = None
    snapshots: tuple[Snapshot, ...] = ()
    versions: tuple[tuple[str, str], ...] = ()
    probes: tuple[Probe, ...] = ()
    pruned: bool = False
    noise: tuple[StepNoise, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, strict: what is not finite becomes None."""
        plain = asdict(replace(self, curve=(), snapshots=(), gap=None, versions=(), probes=(), noise=()))
        plain["key"] = self.config.key()
        plain["curve"] = [_plain(evaluation) for evaluation in self.curve]
        plain["snapshots"] = [
            {"step": snapshot.step, "sites": [_plain(site) for site in snapshot.sites]} for snapshot in self.snapshots
        ]
        plain["train_losses"] = list(self.train_losses)
        plain["gap"] = None if self.gap is None else self.gap._asdict()
        plain["versions"] = dict(self.versions)
        plain["probes"] = [_plain(probe) for probe in self.probes]
        plain["noise"] = [_plain(step) for step in self.noise]
        return plain

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> TrialResult:
        """The inverse of :meth:`to_dict`."""
        values = {name: value for name, value in plain.items() if name != "key"}
        return cls(
            **{
                **values,
                "config": _config(plain["config"]),
                "curve": tuple(Evaluation(*_floats(row)) for row in plain["curve"]),
                "snapshots": tuple(
                    Snapshot(snapshot["step"], tuple(SiteStats(*_floats(row)) for row in snapshot["sites"]))
                    for snapshot in plain["snapshots"]
                ),
                "train_losses": tuple(plain["train_losses"]),
                "gap": None if plain["gap"] is None else Gap(**plain["gap"]),
                "versions": tuple(plain["versions"].items()),
                "probes": tuple(_probe(row) for row in plain.get("probes", ())),  # trials from before had none
                "noise": tuple(_step_noise(row) for row in plain.get("noise", ())),
            }
        )


def _config(plain: dict[str, Any]) -> TrialConfig:
    """Trials from before there were conditions had none."""
    return TrialConfig(**{**plain, "conditions": Conditions.made(plain.get("conditions", {}))})


def packed(values: NDArray[Any]) -> str:
    """Values of the test examples as text: bits where all are 0 or 1, else float16; the first letter tells which."""
    if np.isin(values, (0, 1)).all():
        return f"b{len(values)}:" + base64.b64encode(np.packbits(values.astype(bool)).tobytes()).decode()
    limit = float(np.finfo(np.float16).max)
    return f"h{len(values)}:" + base64.b64encode(np.clip(values, -limit, limit).astype("<f2").tobytes()).decode()


def unpacked(text: str) -> NDArray[np.float64]:
    """The inverse of :func:`packed`."""
    head, _, body = text.partition(":")
    raw = base64.b64decode(body)
    if head[0] == "b":
        return np.unpackbits(np.frombuffer(raw, np.uint8), count=int(head[1:])).astype(np.float64)
    return np.frombuffer(raw, "<f2").astype(np.float64)


def _probe(row: list[Any]) -> Probe:
    probe = Probe(*_floats(row))
    return probe._replace(
        layers=tuple(LayerProbe(*layer) for layer in probe.layers),
        losses=(probe.losses[0], probe.losses[1]),
        changes=(probe.changes[0], probe.changes[1]),
        percentiles=tuple(map(tuple, probe.percentiles)),
    )


def _step_noise(row: list[Any]) -> StepNoise:
    alive, expected, means, variances = _floats(row)
    return StepNoise(alive, expected, tuple(means), tuple(variances))


def _plain(row: tuple[Any, ...]) -> list[Any]:
    # Five digits are more than such a statistic means, and the file stays small. NaN and infinity are no JSON: a site
    # of a network that is about to diverge may hold them.
    return [
        _shorter(value) if isinstance(value, float) else _plain(value) if isinstance(value, tuple) else value
        for value in row
    ]


def _shorter(value: float) -> float | str:
    return float(f"{value:.5g}") if math.isfinite(value) else str(value)


def _floats(row: list[Any]) -> list[Any]:
    return [
        _floats(value) if isinstance(value, list) else float(value) if value in ("nan", "inf", "-inf") else value
        for value in row
    ]
