"""A norm layer as plain values: what it computes, its parameters and what it keeps, whatever framework it lives in."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from normkit.core.catalog import CATALOG
from normkit.core.schedule import RenormSchedule
from normkit.errors import NormValueError, message

__all__ = ["NormRecord", "TrackedLayer"]


@dataclass(frozen=True)
class NormRecord:
    """One norm layer.

    Attributes:
        kind: short name in the catalog.
        shape: of gamma, beta and what is kept: (C,), or the normalized shape of layer and RMS norm.
        axis: of the channels, 1 or -1 (the last axes for layer and RMS norm with several).
        eps: added to the variance.
        groups: of group norm.
        virtual_batch_size: of ghost batch norm.
        rate: weight of a new batch in what is kept; None averages all batches equally.
        bessel: whether the kept variance is the unbiased one.
        debiased: whether the first values' share is taken out of what is kept.
        nonfinite: `skip` or `update`; `skip` for layers of a framework, as it is the default of ours.
        clips: of batch renormalization: its schedule, or fixed `rmin`, `rmax`, `dmax`, which do not clip if missing.
        gain: `w`, or `1+w` where gamma starts at 0.
        cast: of RMS norm, where half precision is rounded.
        gamma, beta: float64, None where the layer has none.
        kept: by name, `mean` and `var` or `std` (with eps inside), float64; empty where nothing is kept, so that
            evaluation takes the statistics of its input.
        count: batches behind what is kept, None where they are not counted.
        spatial: number of axes besides batch and channels, None where the layer takes any.
        frozen: whether it is batch norm with nothing to train: gamma, beta and what is kept are constants.
    """

    kind: str
    shape: tuple[int, ...]
    axis: int
    eps: float
    groups: int | None = None
    virtual_batch_size: int | None = None
    rate: float | None = None
    bessel: bool = True
    debiased: bool = False
    nonfinite: str = "skip"
    clips: RenormSchedule | Mapping[str, float | None] | None = None
    gain: str = "w"
    cast: str = "gemma"
    gamma: np.ndarray | None = None
    beta: np.ndarray | None = None
    kept: Mapping[str, Any] = field(default_factory=dict)
    count: int | None = None
    spatial: int | None = None
    frozen: bool = False

    @property
    def name(self) -> str:
        """Its short name: that in the catalog, or `frozen`."""
        return "frozen" if self.frozen else self.kind

    @property
    def words(self) -> str:
        """The name in a sentence, with its size: `batch norm of 64`."""
        name = f"{'frozen ' if self.frozen else ''}{CATALOG[self.kind].name.replace('_', ' ')}"
        return f"{name} of {' x '.join(map(str, self.shape))}"

    def gamma_for(self, gain: str) -> np.ndarray | None:
        """Gamma of the same layer with another gain."""
        if self.gamma is None or gain == self.gain:
            return self.gamma
        return self.gamma + (1.0 if gain == "w" else -1.0)

    def variance(self) -> np.ndarray | None:
        """The kept variance; a kept standard deviation has eps inside, and none below its root has a variance."""
        if "var" in self.kept:
            return np.asarray(self.kept["var"])
        return None if "std" not in self.kept else np.maximum(np.square(self.kept["std"]) - self.eps, 0.0)

    def deviation(self) -> np.ndarray | None:
        """The kept standard deviation, eps inside."""
        if "std" in self.kept:
            return np.asarray(self.kept["std"])
        return None if "var" not in self.kept else np.sqrt(self.kept["var"] + self.eps)

    def schedule(self) -> RenormSchedule:
        """The clips as a schedule. Raises NormValueError for fixed ones that no schedule has."""
        if isinstance(self.clips, RenormSchedule):
            return self.clips
        low, high, shift = ((self.clips or {}).get(name) for name in ("rmin", "rmax", "dmax"))
        if low is None or high is None or shift is None or high < 1 or not math.isclose(low * high, 1, rel_tol=1e-6):
            must = "the clips of batch renorm must be a schedule, or have rmax >= 1, rmin = 1 / rmax and dmax"
            raise NormValueError(message(must, dict(self.clips or {}), "give the layer a `renorm_schedule`"))
        return RenormSchedule(high, shift, start=0, r_end=0, d_end=0)


@dataclass(frozen=True)
class TrackedLayer:
    """A norm layer with kept statistics.

    Attributes:
        path: its name in the model.
        layer: the layer.
        eps: added to its variance.
        bessel: whether pooled variances are kept with Bessel's factor.
        pooled: whether its statistics are those of all samples together; else (instance norm) averages over samples.
    """

    path: str
    layer: Any
    eps: float
    bessel: bool
    pooled: bool = True
