"""Claims about normalization as preset comparisons, each with a criterion and a verdict. The verb is :func:`study`."""

from __future__ import annotations

from normkit.studies.outcome import Outcome, Outcomes, Overview
from normkit.studies.presets import STUDIES, Study
from normkit.studies.verb import study

__all__ = ["STUDIES", "Outcome", "Outcomes", "Overview", "Study", "study"]
