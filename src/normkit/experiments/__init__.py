"""Comparisons of normalizations: configuration, data, trials, analysis. The verb itself is :func:`compare`."""

from __future__ import annotations

from normkit.experiments.comparison import Comparison
from normkit.experiments.config import Config, TrialConfig, Variant
from normkit.experiments.loop import Trial
from normkit.experiments.verb import compare

__all__ = ["Comparison", "Config", "Trial", "TrialConfig", "Variant", "compare"]
