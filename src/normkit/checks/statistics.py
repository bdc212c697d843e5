"""The statistics that a layer keeps against those of the data, and how far the latter scatter over batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from normkit.checks.evidence import Call, Layer
from normkit.core.algebra import merge

__all__ = ["STALE", "Scatter", "fresh", "new", "scatter", "stale"]

# A channel is off by this many standard deviations of the mean or this factor of the variance, and by this many
# standard errors of what data and averages show; a layer by this share of its channels. At 0.05 one channel of 16 was
# enough, and 15 % of the healthy networks of benchmarks/check_rates.py were blamed.
STALE = {"shift": 0.25, "ratio": 2.0, "errors": 3.0, "share": 0.1}
_RATE = 0.1  # weight of a batch up to which the noise of an average is no fault


@dataclass(frozen=True)
class Scatter:
    """Statistics of batches at one layer, per channel; sigma is the standard deviation of all of them, eps inside.

    Attributes:
        batches: how many.
        samples: in the smallest of them.
        mean: standard deviation over batches of (mean of the batch - mean) / sigma; 0 for a single batch.
        std: the same of the standard deviation of the batch over sigma.
        expected: of `mean`, if batches were drawn at random: the root of the mean variance of the means of samples over
            their number, over sigma; None where it is not known.
        population: moments of all batches together.
    """

    batches: int
    samples: int
    mean: NDArray[Any]
    std: NDArray[Any]
    expected: NDArray[Any] | None
    population: Any

    @property
    def dispersion(self) -> float:
        """Variance of the means over the expected one, mean over channels: about 1 for batches drawn at random.

        0 where the expected one is not known.
        """
        if self.expected is None or not (self.expected > 0).any():
            return 0.0
        varies = self.expected > 0
        return float(np.square(self.mean[varies] / self.expected[varies]).mean())

    @property
    def noise(self) -> float:
        """The noise of the mean, over all channels: the root of the mean square."""
        return _root_mean_square(self.mean)

    @property
    def noise_of_std(self) -> float:
        """The same of the standard deviation."""
        return _root_mean_square(self.std)


def scatter(calls: Sequence[Call], eps: float) -> Scatter | None:
    """Over all calls that tell it; None where none does."""
    told = [call for call in calls if call.mean is not None and call.var is not None and call.finite and call.count]
    if not told:
        return None
    means, variances = (np.stack([getattr(call, name) for call in told]) for name in ("mean", "var"))
    population = merge([call.count for call in told], list(means), list(variances))
    sigma = np.sqrt(population.var + eps)
    several = len(told) > 1
    mean = means.std(axis=0, ddof=1) / sigma if several else np.zeros_like(sigma)
    std = (np.sqrt(variances + eps) / sigma).std(axis=0, ddof=1) if several else np.zeros_like(sigma)
    known = [call.between / call.shape[0] for call in told if call.between is not None]
    expected = np.sqrt(np.mean(known, axis=0)) / sigma if len(known) == len(told) else None
    return Scatter(len(told), min(call.shape[0] for call in told), mean, std, expected, population)


def _root_mean_square(values: NDArray[Any]) -> float:
    return float(np.sqrt(np.square(values).mean()))


def stale(layer: Layer, calls: Sequence[Call], limits: Mapping[str, float]) -> float:
    """The share of channels whose kept statistics are not those of the data.

    |kept mean - mean| / sigma > limits["shift"], or a ratio of standard deviations (eps inside) beyond the root of
    limits["ratio"]; and both by more than limits["errors"] standard errors of the difference. Both sides have one: k
    batches have 1/k of the variance of a batch, a running average of rate r has r / (2 - r) of it.
    """
    seen = scatter(calls, layer.record.eps)
    std, mean = layer.record.deviation(), layer.record.kept.get("mean")
    if seen is None or std is None or mean is None:
        return 0.0
    sigma = np.sqrt(seen.population.var + layer.record.eps)
    # Few batches tell little of how they scatter: not less than samples do.
    least = np.zeros_like(sigma) if seen.expected is None else seen.expected
    rate = min(layer.record.rate or 0.0, _RATE)
    part = np.sqrt(1 / seen.batches + rate / (2 - rate))
    error = np.maximum(seen.mean, least) * part
    relative = np.maximum(seen.std, 1 / np.sqrt(2 * seen.samples)) * part
    with np.errstate(divide="ignore", invalid="ignore"):
        shift, ratio = np.abs(mean - seen.population.mean) / sigma, np.abs(np.log(std / sigma))
    moved = shift > np.maximum(limits["shift"], limits["errors"] * error)
    changed = ratio > np.maximum(np.log(limits["ratio"]) / 2, limits["errors"] * relative)
    return float((moved | changed | ~np.isfinite(shift) | ~np.isfinite(ratio)).mean())


def fresh(layer: Layer) -> bool:
    """Whether a layer keeps exactly what it started with: mean 0, variance 1."""
    kept = layer.record.kept
    spread = kept.get("var", kept.get("std"))
    return spread is not None and bool((np.asarray(kept["mean"]) == 0).all() and (np.asarray(spread) == 1).all())


def new(layer: Layer) -> bool:
    """Whether nothing of a layer shows that it was ever trained."""
    gamma, beta = layer.record.gamma_for("w"), layer.record.beta
    first = gamma is None or bool((gamma == gamma.flat[0]).all() and gamma.flat[0] in (0.0, 1.0))
    return fresh(layer) and not layer.record.count and first and (beta is None or not beta.any())
