"""How the loss lies around a network in training, and what its layers do to each other's gradients.

The measures of Santurkar et al. 2018 (arXiv:1805.11604), of one batch in training mode. Everything here works on a
function from the parameters of the layers to the loss and its gradients, whoever computes it, in float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from normkit.experiments.protocol import ProbedTrainer, SiteValues, Surface, Vector
from normkit.experiments.results import LayerProbe, Probe

__all__ = ["LENGTHS", "PERCENTILES", "Along", "Probing", "Shift", "along_gradient", "shifts"]

LENGTHS = (0.5, 1.0, 2.0, 4.0)  # in learning rates: from half of one to four, as in the paper's VGG
PERCENTILES = (15, 50, 85)  # of figure 1 of arXiv:1502.03167


class Shift(NamedTuple):
    """The gradient G of a layer against G' after all layers before it have moved: ||G - G'||, cos(G, G')."""

    difference: float
    cosine: float


class Along(NamedTuple):
    """The loss along the negative gradient g from where the parameters are, over steps of length a.

    Attributes:
        losses: lowest and highest L(w - a g), the loss variation.
        changes: lowest and highest ||grad L(w) - grad L(w - a g)||, the gradient predictiveness.
        smoothness: the highest ||grad L(w) - grad L(w - a g)|| / (a ||g||), the effective beta-smoothness; NaN where
            there is no gradient.
    """

    losses: tuple[float, float]
    changes: tuple[float, float]
    smoothness: float


def shifts(
    surface: Surface, before: Sequence[Vector], after: Sequence[Vector], gradients: Sequence[Vector]
) -> tuple[Shift, ...]:
    """The internal covariate shift of every layer in one update from `before`, where `gradients` are, to `after`.

    G is the gradient of layer i where all layers are as before, G' where those in front of it have moved and it and
    those behind it have not. Nothing is in front of the first layer, whose shift is therefore 0.
    """
    found = [Shift(0.0, 1.0)]
    for place in range(1, len(before)):
        _, moved = surface([*after[:place], *before[place:]])
        found.append(Shift(_length([gradients[place] - moved[place]]), _cosine(gradients[place], moved[place])))
    return tuple(found)


def along_gradient(
    surface: Surface, at: Sequence[Vector], gradients: Sequence[Vector], lengths: Sequence[float]
) -> Along:
    """The loss, and the change of its gradient, over steps of these lengths (times the gradient) from `at`.

    `gradients` are those at `at`.
    """
    size = _length(gradients)
    losses, changes, ratios = [], [], []
    for length in lengths:
        loss, there = surface([part - length * slope for part, slope in zip(at, gradients, strict=True)])
        change = _length([a - b for a, b in zip(gradients, there, strict=True)])
        losses.append(loss)
        changes.append(change)
        ratios.append(change / (length * size) if size else math.nan)
    return Along((min(losses), max(losses)), (min(changes), max(changes)), max(ratios))


class Probing:
    """Looks at a trial at some of its steps, evenly spread from the first to the last; changes nothing of it."""

    def __init__(self, count: int, steps: int, lr: float, looked_at: Any) -> None:
        self._at = set(np.linspace(0, max(0, steps - 1), count).round().astype(int).tolist()) if count else set()
        self._lengths = tuple(lr * length for length in LENGTHS)
        self._looked_at = looked_at
        self._open: tuple[int, Surface, list[Vector]] | None = None
        self.probes: list[Probe] = []

    def before(self, step: int, trainer: Any, x: Any, y: Any) -> None:
        """In front of the step with this number, which is taken on this batch."""
        if step in self._at:
            able: ProbedTrainer = trainer  # conditions on other frameworks are refused before
            self._open = step, able.surface(x, y), able.layers()

    def after(self, trainer: Any) -> None:
        """Behind it."""
        if self._open is None:
            return
        able: ProbedTrainer = trainer
        step, surface, before = self._open
        self._open = None
        with np.errstate(all="ignore"):  # of a network that is about to diverge
            self.probes.append(self._probe(step, surface, before, able.layers(), able.probe(self._looked_at)))

    def _probe(
        self, step: int, surface: Surface, before: list[Vector], after: list[Vector], sites: Sequence[SiteValues]
    ) -> Probe:
        loss, gradients = surface(before)
        along = along_gradient(surface, before, gradients, self._lengths)
        layers = []
        for shift, size, old, new, slope in zip(
            shifts(surface, before, after, gradients), surface.weights, before, after, gradients, strict=True
        ):
            turned = math.acos(min(1.0, max(-1.0, _cosine(old[:size], new[:size]))))
            layers.append(LayerProbe(*shift, _length([slope[:size]]), _length([old[:size]]), turned))
        return Probe(
            step=step,
            loss=loss,
            gradient=_length(gradients),
            layers=tuple(layers),
            losses=along.losses,
            changes=along.changes,
            smoothness=along.smoothness,
            percentiles=tuple(_percentiles(site) for site in sites),
        )


def _percentiles(site: SiteValues) -> tuple[float, ...]:
    """Of what enters the first unit of an activation, over the samples and positions."""
    return tuple(np.percentile(np.take(site.input, 0, site.axis).astype(np.float64), PERCENTILES).tolist())


def _length(parts: Sequence[NDArray[np.float64]]) -> float:
    return math.sqrt(sum(float(part @ part) for part in parts))


def _cosine(a: Vector, b: Vector) -> float:
    lengths = _length([a]) * _length([b])
    return float(a @ b) / lengths if lengths else math.nan
