"""Comparisons of normalizations: configuration, data, trials, analysis. The verb itself is :func:`compare`."""

from __future__ import annotations

from normkit.experiments.config import Config, TrialConfig, Variant
from normkit.experiments.verb import Comparison, compare

__all__ = ["Comparison", "Config", "TrialConfig", "Variant", "compare"]
