"""A study as one HTML page that needs nothing else, and the table of several."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from normkit.experiments.inference import estimate
from normkit.report import look
from normkit.report.figures import Final, Finals, Pen, percentiles
from normkit.report.render import figures_of, require
from normkit.studies.outcome import Case, Outcome, Outcomes, table
from normkit.studies.presets import Study
from normkit.studies.stepwise import LEGEND
from normkit.studies.verdict import Level
from normkit.tables import Table

if TYPE_CHECKING:
    from normkit.report.draw import Drawable

__all__ = ["fragment", "overview", "overview_fragment", "page"]

_DRAWINGS = 6  # of a case: one per circumstance, and a page must stay small
_TITLES = {
    "curves": "How fast they learn",
    "rates": "Which learning rates work",
    "final": "Where they end",
    "costs": "What a step costs",
    "depth-before": "Activations at initialization",
    "percentiles": "What enters one unit: 15th, 50th and 85th percentile",
}
_CLASS = {Level.HOLDS: "info", Level.PARTLY: "warning", Level.NOT: "error", Level.UNKNOWN: ""}
_ANSWER = {True: "yes", False: "no", None: "open"}


class _Drawn(NamedTuple):
    """A figure with its heading and the circumstance it shows."""

    title: str
    where: str
    svg: str


class _Shown(NamedTuple):
    """One network on one data set, ready for the template."""

    title: str
    level: str
    kind: str
    checks: list[tuple[str, str]]
    table: Table
    noise: Table | None
    drawings: list[_Drawn]
    left_out: int


def page(outcome: Outcome) -> str:
    """The whole page, without anything to load."""
    return _rendered("page.html.j2", outcome)


def fragment(outcome: Outcome) -> str:
    """The same as one element, for notebooks."""
    return _rendered(_STUDY, outcome)


def overview(outcomes: Outcomes) -> str:
    """The table of several studies as a page; beside it each has a folder of its name."""
    return _table_of("page.html.j2", outcomes, linked=True)


def overview_fragment(outcomes: Outcomes) -> str:
    """The same as one element, for notebooks."""
    return _table_of(_OVERVIEW, outcomes, linked=False)


_STUDY, _OVERVIEW = "study.html.j2", "studies.html.j2"


def _rendered(template: str, outcome: Outcome) -> str:
    require()
    text: str = look.template(template).render(
        body=_STUDY,
        name="normkit study",
        title=outcome.study.name,
        outcome=outcome,
        study=outcome.study,
        kind=_CLASS[outcome.level],
        noise_legend=LEGEND,
        cases=[_shown(outcome, case, number) for number, case in enumerate(outcome.cases)],
        facts=_facts(outcome),
    )
    return text


def _table_of(template: str, outcomes: Outcomes, *, linked: bool) -> str:
    require()
    text: str = look.template(template).render(
        body=_OVERVIEW,
        name="normkit study",
        title="all",
        outcomes=[(outcome, _CLASS[outcome.level]) for outcome in outcomes.outcomes],
        left_out=outcomes.left_out,
        linked=linked,
    )
    return text


def _shown(outcome: Outcome, case: Case, number: int) -> _Shown:
    from normkit.report import draw

    found = [figure for kind in outcome.study.figures for figure in _figures(outcome.study, case, kind)]
    drawings = [
        _Drawn(title, where, draw.svg(figure, f"study{number}-{place}"))
        for place, (title, where, figure) in enumerate(found[:_DRAWINGS])
    ]
    checks = [(_ANSWER[check.holds], check.said) for check in case.checks]
    left = max(0, len(found) - _DRAWINGS)
    tables = table(case.found), case.noise
    return _Shown(case.title, str(case.level), _CLASS[case.level], checks, *tables, drawings, left)


def _figures(study: Study, case: Case, kind: str) -> Iterator[tuple[str, str, Drawable]]:
    """Heading, circumstance and numbers of every figure of a kind; where all end fits into a single one."""
    if kind == "final":
        yield _TITLES[kind], "Mean and 95 % interval over the seeds, at the best rate", _finals(case)
        return
    figure: Drawable | None
    for part, comparison in zip(study.parts_for(case.model), case.comparisons, strict=True):
        for group in comparison.groups:
            scaled = f"inputs {group.setting.inputs}" if len(part.inputs) > 1 else ""
            where = ", ".join(filter(None, [part.names()[group.setting.conditions], scaled])) or "as usual"
            if kind == "percentiles":
                under = [t for t in comparison.trials if str(t.config.conditions) == group.setting.conditions]
                bands = percentiles(group, under)
                figure = bands if bands.lines else None
            else:
                figure = figures_of(comparison, group).get(kind)
            if figure is not None:
                yield _TITLES[kind], where, figure


def _finals(case: Case) -> Finals:
    slots = {norm: slot for slot, norm in enumerate(dict.fromkeys(m.norm for m in case.found))}
    lines = []
    for m in case.found:
        ends = estimate(m.final) if m.final else None
        low, high = (ends.low, ends.high) if ends is not None else (None, None)
        lines.append(Final(m.label, Pen(slots[m.norm]), m.final, m.mean, low, high))
    return Finals(case.comparisons[0].task, "test accuracy", "", tuple(lines))


def _facts(outcome: Outcome) -> list[tuple[str, Any]]:
    known = outcome.environment
    runs = sum(m.runs for case in outcome.cases for m in case.found)
    facts = {
        "Command": outcome.command,
        "Version": "quick" if outcome.quick else "full",
        "Runs": f"{runs}, {known['started']} of them trained now, in {known['seconds']:.0f} s",
        "Loss": known.get("loss"),
        "Optimizer": known.get("optimizer"),
        "Machine": f"{known.get('cores')} cores, {known.get('workers')} workers, {known.get('system')}",
        "Versions": ", ".join(f"{name} {version}" for name, version in known.get("versions", {}).items()),
    }
    return [(name, value) for name, value in facts.items() if value]
