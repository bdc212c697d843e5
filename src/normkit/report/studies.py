"""A study as one HTML page that needs nothing else, and the table of several."""

from __future__ import annotations

from typing import Any, NamedTuple

from normkit.report import look, words
from normkit.report.render import figures_of, require
from normkit.studies.outcome import Case, Outcome, Outcomes, table
from normkit.studies.verdict import Level
from normkit.tables import Table

__all__ = ["fragment", "overview", "overview_fragment", "page"]

_DRAWINGS = 6  # of a case: one per circumstance, and a page must stay small
_TITLES = {
    "curves": "How fast they learn",
    "rates": "Which learning rates work",
    "final": "Where they end",
    "costs": "What a step costs",
    "depth-before": "Activations at initialization",
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

    figures = [
        (kind, words.setting(comparison, group), figure)
        for kind in outcome.study.figures
        for comparison in case.comparisons
        for group in comparison.groups
        for name, figure in figures_of(comparison, group).items()
        if name == kind
    ]
    drawings = [
        _Drawn(_TITLES[kind], where or "as usual", draw.svg(figure, f"{kind}{number}-{place}"))
        for place, (kind, where, figure) in enumerate(figures[:_DRAWINGS])
    ]
    checks = [(_ANSWER[check.holds], check.said) for check in case.checks]
    left = max(0, len(figures) - _DRAWINGS)
    return _Shown(case.title, str(case.level), _CLASS[case.level], checks, table(case.found), drawings, left)


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
