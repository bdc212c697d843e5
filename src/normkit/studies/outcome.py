"""What a study found: the verdict, the numbers it rests on, and the comparisons behind them."""

from __future__ import annotations

import json
import os
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from normkit.experiments import Comparison
from normkit.files import OutputFolder, save
from normkit.studies.measurements import Measured, Measurements
from normkit.studies.presets import STUDIES, Study
from normkit.studies.stepwise import LEGEND, noise_table
from normkit.studies.verdict import Check, Level, combined, decided
from normkit.tables import Result, Table, plain

__all__ = ["Case", "Outcome", "Outcomes", "Overview", "table"]

_WIDTH = 120  # characters of a line in the terminal
MARKS = {True: "yes ", False: "no  ", None: "open"}
FORMAT = 1  # of results.json
_LEGEND = (
    "rate: the best one; up to: the largest at which every seed learns; epochs, steps, seconds: until 95 % of the "
    "validation part are right; gap: accuracy in training mode less that in evaluation mode, on the same batches."
)


@dataclass(frozen=True)
class Case:
    """One network on one data set.

    Attributes:
        data: name of the data set.
        model: `cnn` or `mlp`.
        found: everything that was measured.
        checks: what the criterion says of it.
        comparisons: the finished comparisons, one per part of the study.
    """

    data: str
    model: str
    found: Measurements
    checks: tuple[Check, ...]
    comparisons: tuple[Comparison, ...]

    @property
    def level(self) -> Level:
        """The verdict on this network and data set."""
        return decided(self.checks)

    @property
    def title(self) -> str:
        """In words: `mlp on digits`."""
        return f"{self.model} on {self.data}"

    @property
    def noise(self) -> Table | None:
        """Of the batch statistics by time step, where the study measures it."""
        return noise_table((m.arm or m.norm, m.noise) for m in self.found)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; of the comparisons the keys of their trials."""
        return {
            "data": self.data,
            "model": self.model,
            "verdict": str(self.level),
            "checks": [check._asdict() for check in self.checks],
            "measured": [_finite(m.to_dict()) for m in self.found],
            "formulas": [against._asdict() for against in self.found.against],
            "trials": [trial.config.key() for comparison in self.comparisons for trial in comparison.trials],
        }


@dataclass(frozen=True)
class Outcome:
    """A finished study.

    Attributes:
        study: what was asked.
        quick: whether it was the small version.
        cases: one per network and data set.
        environment: how it was produced: versions, system, cores, workers, seconds, started, command.
    """

    study: Study
    quick: bool
    cases: tuple[Case, ...]
    environment: dict[str, Any]

    @property
    def level(self) -> Level:
        """The verdict on all networks and data sets together."""
        return combined(case.level for case in self.cases)

    @cached_property
    def sentence(self) -> str:
        """The verdict in a sentence."""
        each = {case.level for case in self.cases}
        by_case = "" if len(each) == 1 else f" ({'; '.join(f'{case.title}: {case.level}' for case in self.cases)})"
        return f"{self.study.name}: {self.level}{by_case}. {self.study.claim}"

    @cached_property
    def basis(self) -> str:
        """The numbers that the verdict rests on: runs, epochs, steps, seconds, diverged runs, spread over seeds."""
        found = [m for case in self.cases for m in case.found]
        runs, diverged = sum(m.runs for m in found), sum(m.diverged for m in found)
        spreads = [m.spread for m in found if m.spread is not None]
        spread = (
            f"between seeds the test accuracy of a variant at its best rate varies by {_span(spreads, 100, '.1f')} "
            "points (standard deviation)"
            if spreads
            else "with one seed nothing is known of the spread between seeds"
        )
        return (
            f"{runs} runs with {_span([m.seeds for m in found])} seeds, {_span([m.epochs for m in found])} epochs "
            f"({_span([m.budget for m in found])} steps) each, {sum(m.trained for m in found):.0f} s of training in "
            f"all; {diverged} of the runs ({100 * diverged / max(1, runs):.0f} %) diverged; {spread}."
        )

    @property
    def caveats(self) -> tuple[str, ...]:
        """What a reader has to know before believing it."""
        said = [
            "Intervals are 95 %, paired by seed, each for itself: with many checks one in twenty may miss by chance.",
        ]
        known = (
            f"with other seeds it came out so: {self.study.repeated}"
            if self.study.repeated
            else ("how often it reaches another verdict with other seeds has not been measured")
        )
        said.append(
            "The thresholds of this study come from papers and from what a reader would call a benefit, not from a "
            f"calibration; {known}."
        )
        if self.quick:
            said.insert(0, "This is the quick version: fewer seeds, rates and networks, so much may stay open.")
        return tuple(said)

    @property
    def command(self) -> str:
        """What to type for it; of one among all with the other options that were typed for all."""
        given = str(self.environment.get("command") or f"normkit study all{' --quick' if self.quick else ''}")
        return given.replace("normkit study all", f"normkit study {self.study.name}", 1)

    @property
    def measured(self) -> str:
        """The first thing that was asked, as it was measured, of each case."""
        shown = [
            f"{case.title}: {case.checks[0].said.partition('; asked for')[0]}" for case in self.cases if case.checks
        ]
        return "; ".join(shown)

    def __str__(self) -> str:
        lines = [*_wrapped(self.sentence), ""]
        for case in self.cases:
            lines.append(f"{case.title}: {case.level}")
            for check in case.checks:
                lines += _wrapped(f"{MARKS[check.holds]}  {check.said}", "  ")
            lines += ["", *str(table(case.found)).splitlines(), ""]
            if case.noise is not None:
                lines += [*str(case.noise).splitlines(), *_wrapped(LEGEND), ""]
        lines += _wrapped(_LEGEND)
        lines += _wrapped(f"It rests on {self.basis}")
        for said in (self.study.reading, *self.caveats):
            lines += _wrapped(said)
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        from normkit.report.studies import fragment

        return fragment(self)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the trials as plain values for JSON."""
        return {
            "format": FORMAT,
            "study": self.study.name,
            "claim": self.study.claim,
            "method": self.study.method,
            "quick": self.quick,
            "verdict": str(self.level),
            "basis": self.basis,
            "caveats": list(self.caveats),
            "cases": [case.to_dict() for case in self.cases],
            "environment": self.environment,
        }

    def save(self, path: str | os.PathLike[str] = "normkit-studies") -> Path:
        """Write `report.html` and `results.json` into the folder `path`, each whole or not at all.

        Returns the path of the report. Raises NormRuntimeError where the folder cannot be written.
        """
        from normkit.report.studies import page

        return _saved(path, lambda: page(self), self.to_dict())


@dataclass(frozen=True)
class Outcomes:
    """Several finished studies.

    Attributes:
        outcomes: what each found.
        left_out: names of studies that could not be run on this data, and why.
    """

    outcomes: tuple[Outcome, ...]
    left_out: tuple[tuple[str, str], ...] = ()

    def table(self) -> Table:
        """One row per study: what is said, what was measured, the verdict, the command."""
        rows = [(o.study.claim, o.measured, str(o.level), o.command) for o in self.outcomes]
        return Table(("claim", "measured", "verdict", "command"), rows, words=4)

    def __str__(self) -> str:
        lines: list[str] = []
        for outcome in self.outcomes:
            lines += [*_wrapped(outcome.sentence), *_wrapped(f"measured: {outcome.measured}", "  "), ""]
        for name, why in self.left_out:
            lines += _wrapped(f"{name}: left out, {why}")
        return "\n".join(lines).rstrip()

    def _repr_html_(self) -> str:
        from normkit.report.studies import overview_fragment

        return overview_fragment(self)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the trials as plain values for JSON."""
        return {
            "format": FORMAT,
            "studies": [outcome.to_dict() for outcome in self.outcomes],
            "left_out": [list(pair) for pair in self.left_out],
        }

    def save(self, path: str | os.PathLike[str] = "normkit-studies") -> Path:
        """Write the table as `report.html` and `results.json`, and every study into a folder of its name.

        Returns the path of the report. Raises NormRuntimeError where the folder cannot be written.
        """
        from normkit.report.studies import overview

        report = _saved(path, lambda: overview(self), self.to_dict())
        for outcome in self.outcomes:
            outcome.save(Path(path) / outcome.study.name)
        return report


@dataclass(frozen=True)
class Overview(Result):
    """The studies that can be run."""

    studies: tuple[Study, ...] = tuple(STUDIES.values())

    def table(self) -> Table:
        """One row per study."""
        return Table(("study", "claim"), [(study.name, study.claim) for study in self.studies], words=2)

    def __str__(self) -> str:
        width = 2 + max(len(study.name) for study in self.studies)
        lines: list[str] = []
        for study in self.studies:
            said = textwrap.wrap(study.claim, _WIDTH - width)
            lines += [f"{study.name:{width}}{said[0]}", *(" " * width + line for line in said[1:])]
        return "\n".join([*lines, "", "Run one with `normkit study NAME`, all with `normkit study all --quick`."])

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"studies": [{"name": s.name, "claim": s.claim, "method": s.method} for s in self.studies]}


def table(found: Iterable[Measured]) -> Table:
    """One row per norm and circumstance; columns without any value are left out."""
    rows = list(found)
    columns: list[tuple[str, Callable[[Measured], str]]] = [
        ("circumstance", lambda m: m.arm or ("as usual" if any(row.arm for row in rows) else "")),
        ("norm", lambda m: m.norm),
        ("inputs", lambda m: m.inputs if len({row.inputs for row in rows}) > 1 else ""),
        ("rate", lambda m: "diverged" if m.best_lr is None else f"{m.best_lr:g}"),
        ("up to", _largest),
        ("epochs", _epochs),
        ("steps", lambda m: _mean(m.steps, f"> {m.budget}", ".0f")),
        ("seconds", lambda m: _mean(m.seconds, "-", ".2f")),
        ("diverged", lambda m: f"{m.diverged} of {m.runs}"),
        ("test %", lambda m: "-" if m.mean is None else f"{100 * m.mean:.1f}"),
        ("± seeds", lambda m: "-" if m.spread is None else f"{100 * m.spread:.1f}"),
        ("gap", lambda m: f"{100 * sum(m.gaps) / len(m.gaps):.1f}" if m.gaps else "-"),
    ]
    shown = [(name, [cell(m) for m in rows]) for name, cell in columns]
    shown = [(name, cells) for name, cells in shown if any(cells) or name == "norm"]
    words = sum(name in ("circumstance", "norm", "inputs") for name, _ in shown)
    headings, cells = zip(*shown, strict=True)
    return Table(headings, list(zip(*cells, strict=True)), words=words)


def _largest(m: Measured) -> str:
    if m.largest is None:
        return "none"
    return f"{'≥ ' if m.largest == m.rates[-1] else ''}{m.largest:g}"


def _epochs(m: Measured) -> str:
    """Passes over the training data until the target."""
    per_epoch = m.budget / m.epochs if m.epochs else 0
    passes = [None if step is None or not per_epoch else step / per_epoch for step in m.steps]
    return _mean(passes, f"> {m.epochs}", ".1f")


def _mean(values: Sequence[float | None], otherwise: str, form: str) -> str:
    known = [value for value in values if value is not None]
    return format(sum(known) / len(known), form) if known and len(known) == len(values) else otherwise


def _span(values: Sequence[float], factor: int = 1, form: str = "g") -> str:
    ends = [format(factor * end, form) for end in (min(values), max(values))]
    return ends[0] if ends[0] == ends[1] else f"{ends[0]} to {ends[1]}"


def _wrapped(text: str, indent: str = "") -> list[str]:
    after = indent + " " * 6 if indent else ""
    return textwrap.wrap(
        text, _WIDTH, initial_indent=indent, subsequent_indent=after, break_on_hyphens=False, break_long_words=False
    )


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    depths = [list(plain({str(n): value for n, value in enumerate(row)}).values()) for row in values["depths"]]
    return {**plain(values), "depths": depths}


def _saved(path: str | os.PathLike[str], page: Callable[[], str], results: dict[str, Any]) -> Path:
    shown = page()
    with OutputFolder(path) as folder:
        save(folder / "results.json", json.dumps(results, allow_nan=False) + "\n")
        save(folder / "report.html", shown)
    return folder / "report.html"
