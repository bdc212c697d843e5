"""A norm layer as plain values: what it computes, its parameters and what it keeps, whatever framework it lives in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from normkit.core.catalog import CATALOG

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
        gain: `w`, or `1+w` where gamma starts at 0.
        gamma, beta: float64, None where the layer has none.
        kept: by name, `mean` and `var` or `std` (with eps inside), float64; empty where nothing is kept.
        count: batches behind what is kept, None where they are not counted.
        spatial: number of axes besides batch and channels, None where the layer takes any.
    """

    kind: str
    shape: tuple[int, ...]
    axis: int
    eps: float
    groups: int | None = None
    virtual_batch_size: int | None = None
    rate: float | None = None
    bessel: bool = True
    gain: str = "w"
    gamma: np.ndarray | None = None
    beta: np.ndarray | None = None
    kept: Mapping[str, Any] = field(default_factory=dict)
    count: int | None = None
    spatial: int | None = None

    @property
    def words(self) -> str:
        """The name in a sentence, with its size: `batch norm of 64`."""
        return f"{CATALOG[self.kind].name.replace('_', ' ')} of {' x '.join(map(str, self.shape))}"

    def variance(self) -> np.ndarray | None:
        """The kept variance; a kept standard deviation has eps inside."""
        if "var" in self.kept:
            return np.asarray(self.kept["var"])
        return None if "std" not in self.kept else np.square(self.kept["std"]) - self.eps

    def deviation(self) -> np.ndarray | None:
        """The kept standard deviation, eps inside."""
        if "std" in self.kept:
            return np.asarray(self.kept["std"])
        return None if "var" not in self.kept else np.sqrt(self.kept["var"] + self.eps)


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
