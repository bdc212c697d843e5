"""From the values at the activations to what is kept of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from normkit.experiments.protocol import SiteValues
from normkit.experiments.results import SiteStats

__all__ = ["Sites"]


class Sites:
    """The activations of one network, measured again and again; each snapshot's drift is against the one before."""

    def __init__(self) -> None:
        self._before: dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]] = {}

    def measure(self, values: Sequence[SiteValues]) -> tuple[SiteStats, ...]:
        """The statistics of all sites, accumulated in float64. A network that diverges gives NaN and infinity."""
        with np.errstate(all="ignore"):
            return tuple(self._measured(site) for site in values)

    def _measured(self, site: SiteValues) -> SiteStats:
        channels = np.moveaxis(site.input, site.axis, 0).reshape(site.input.shape[site.axis], -1)
        mean, std = _moments(channels)
        drift = _drift(self._before.get(site.name), mean)
        self._before[site.name] = mean, std
        gamma, beta = _spread(site.gamma), _spread(site.beta)
        return SiteStats(
            name=site.name,
            activation=site.activation,
            mean=float(mean.mean()),
            # Within the channels: what differs between them only, as biases do, tells nothing of the input. In a deep
            # plain network that is soon all that is left, and hides that the signal has died away.
            std=float(np.sqrt(np.mean(np.square(std)))),
            dead=_dead(np.moveaxis(site.output, site.axis, 0).reshape(len(channels), -1)),
            drift=drift,
            gamma_mean=gamma[0],
            gamma_std=gamma[1],
            beta_mean=beta[0],
            beta_std=beta[1],
        )


def _moments(channels: NDArray[np.floating]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    mean = channels.mean(1, dtype=np.float64)
    return mean, np.sqrt(np.mean(np.square(channels - mean[:, None]), axis=1))


def _drift(before: tuple[NDArray[np.float64], NDArray[np.float64]] | None, mean: NDArray[np.float64]) -> float | None:
    """Channels that were constant before have no unit to measure by and are left out."""
    if before is None or before[0].shape != mean.shape:
        return None
    old, unit = before
    moved = np.abs(mean - old)[unit != 0] / unit[unit != 0]
    return float(moved.mean()) if len(moved) else None


def _dead(channels: NDArray[np.floating]) -> float:
    # A single value is constant without telling anything.
    return float(np.mean(channels.max(1) == channels.min(1))) if channels.shape[1] > 1 else 0.0


def _spread(values: NDArray[np.floating] | None) -> tuple[float, float] | tuple[None, None]:
    if values is None:
        return None, None
    return float(values.mean(dtype=np.float64)), float(values.std(dtype=np.float64))
