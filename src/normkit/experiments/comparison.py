"""A finished comparison."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from normkit.errors import NormRuntimeError, message
from normkit.experiments.analysis import Group, summarize
from normkit.experiments.config import Config, Task
from normkit.experiments.results import TrialResult
from normkit.files import OutputFolder, write

__all__ = ["Comparison"]

FORMAT = 2  # of results.json


@dataclass(frozen=True)
class Comparison:
    """A finished comparison.

    Attributes:
        config: the question, with nothing left open.
        task: what the variants were judged by.
        data: the data, in words; empty for a loop of the user's.
        trials: every trial, seed by seed.
        environment: how it was produced: versions, system, cores, instruction_sets, workers, seconds, command, started
            (trials run now, the others were kept from before), loss and optimizer in words.
        notes: what was decided on the way and a reader should know, in sentences.
    """

    config: Config
    task: Task
    data: str
    trials: tuple[TrialResult, ...]
    environment: dict[str, Any]
    notes: tuple[str, ...] = ()

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """The summary of every variant, one group per batch size and input scaling."""
        return summarize(self.trials, self.task)

    def __str__(self) -> str:
        from normkit.report.words import text

        return text(self)

    def _repr_html_(self) -> str:
        from normkit.report.render import fragment

        return fragment(self)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values for JSON: question, environment, sentences, summary, trials."""
        from normkit.report.words import sentences

        return {
            "format": FORMAT,
            "config": dataclasses.asdict(self.config),
            "task": self.task._asdict(),
            "data": self.data,
            "environment": self.environment,
            "notes": list(self.notes),
            "sentences": sentences(self),
            "summary": [
                {
                    **group.setting._asdict(),
                    "variants": [variant.to_dict() for variant in group.variants],
                    "against_baseline": [{**d._asdict(), "claimed": d.claimed} for d in group.against_baseline],
                    "pairs": [{**d._asdict(), "claimed": d.claimed} for d in group.pairs],
                }
                for group in self.groups
            ],
            "trials": [trial.to_dict() for trial in self.trials],
        }

    def save(self, path: str | os.PathLike[str] = "normkit-report") -> Path:
        """Write `report.html`, `results.json` and every figure as SVG and PNG into the folder `path`.

        Each file is written whole or not at all. Returns the path of the report. Raises NormRuntimeError where the
        folder cannot be written.
        """
        from normkit.report.render import page, pictures
        from normkit.report.words import to_json

        files: dict[str, str | bytes] = {"results.json": to_json(self), "report.html": page(self)}
        files |= {f"figures/{name}": content for name, content in pictures(self).items()}
        with OutputFolder(path) as folder:
            for name, content in files.items():
                try:
                    (folder / name).parent.mkdir(exist_ok=True)
                    write(folder / name, content)
                except OSError as error:
                    must = f"{name} must fit into the output folder"
                    raise NormRuntimeError(message(must, f"{folder} ({error.strerror})")) from error
        return folder / "report.html"
