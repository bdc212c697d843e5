"""The verb `check`: examine, ask the rules, say it in one sentence."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from normkit.checks import rules as _rules  # noqa: F401  # fills RULES
from normkit.checks.evidence import Evidence
from normkit.checks.examination import Request, examine
from normkit.checks.findings import SEVERITIES, Diagnosis, Finding, number, share
from normkit.checks.rule import RULES, Limits, Rule
from normkit.core.constraints import Constraint, Flag, Integer
from normkit.core.constraints import check as checked
from normkit.errors import NormTypeError, NormValueError, message, nearest

__all__ = ["check", "chosen", "diagnosed"]

_STEPS = 8
_ARGUMENTS: dict[str, Constraint] = {"steps": Integer(1), "show_progress": Flag()}


def check(
    model: Any,
    data: Any = None,
    *,
    optimizer: Any = None,
    loss: Callable[[Any, Any], Any] | None = None,
    forward: Callable[[Any, Any], Any] | None = None,
    steps: int = _STEPS,
    select: Iterable[str] | None = None,
    ignore: Iterable[str] = (),
    limits: Mapping[str, Limits] | None = None,
    show_progress: bool = True,
) -> Diagnosis:
    """Find normalization mistakes, with evidence."""
    checked("check", _ARGUMENTS, {"steps": steps, "show_progress": show_progress})
    for name, function in (("loss", loss), ("forward", forward)):
        if function is not None and not callable(function):
            raise NormTypeError(message(f"`{name}` must be a function", repr(function)))
    asked = chosen(select, ignore)
    wanted = frozenset(part for rule in asked for part in (*rule.needs, *rule.uses))
    with _teller(show_progress) as tell:
        seen = examine(Request(model, data, optimizer, loss, forward, steps, tell, wanted=wanted))
    return diagnosed(seen, asked, limits or {})


def chosen(select: Iterable[str] | None, ignore: Iterable[str]) -> tuple[Rule, ...]:
    """The rules that are meant by codes or beginnings of codes (`NK1`). Raises NormValueError for unknown ones."""
    for name, codes in (("select", select or ()), ("ignore", ignore)):
        for code in codes:
            if not any(known.startswith(code) for known in RULES) or not code:
                must = f"`{name}` must hold codes of rules, or their beginnings"
                raise NormValueError(message(must, repr(code), nearest(code, RULES)))
    wanted = tuple(select) if select is not None else ("NK",)
    return tuple(
        rule for code, rule in sorted(RULES.items()) if code.startswith(wanted) and not code.startswith(tuple(ignore))
    )


def diagnosed(seen: Evidence, asked: Iterable[Rule], limits: Mapping[str, Limits]) -> Diagnosis:
    """Ask the rules whose evidence is there."""
    run, findings = [], list[Finding]()
    for rule in asked:
        if seen.framework in rule.frameworks and seen.examined.issuperset(rule.needs):
            run.append(rule.code)
            findings += rule(seen, limits.get(rule.code))
    places = {layer.path: number for number, layer in enumerate(seen.layers)}
    findings.sort(key=lambda f: (SEVERITIES.index(f.severity), f.code, places.get(f.path, -1)))
    return Diagnosis(
        model=seen.model,
        sentence=_sentence(seen, findings, len(run)),
        findings=tuple(findings),
        layers=len(seen.layers),
        rules=tuple(run),
        skipped={part: why for part, why in seen.skipped.items() if why},
        seen=None if seen.graph is None else seen.graph.how,
    )


def _sentence(seen: Evidence, findings: list[Finding], rules: int) -> str:
    gap = next((finding for finding in findings if finding.code == "NK101"), None)
    if gap is not None and seen.gap is not None:
        return _of_gap(seen, findings)
    serious = [finding for finding in findings if finding.severity != "info"]
    layers = f"{len(seen.layers)} layer{'s' if len(seen.layers) != 1 else ''}, {rules} rules"
    if not serious:
        notes = f" ({len(findings)} note{'s' if len(findings) > 1 else ''})" if findings else ""
        return f"no normalization problem found in {layers}{notes}"
    first = serious[0]
    counted = ", ".join(
        f"{count} {severity}{'s' if count != 1 else ''}"
        for severity in SEVERITIES[:2]
        if (count := sum(f.severity == severity for f in serious))
    )
    where = f" at {first.path}" if first.path else ""
    do = "" if first.fix is None else f". Do: {first.fix.line}"
    return f"{counted} in {layers}. First: {first.words}{where}{do}"


def _of_gap(seen: Evidence, findings: list[Finding]) -> str:
    gap = seen.gap
    assert gap is not None
    values = f"loss {number(gap.eval)} / {number(gap.train)}"
    if gap.measure == "outputs":
        values = f"outputs differ by {share(gap.eval)} of their size"
    causes = [finding for finding in findings if finding.cause]
    cause = max(causes, key=lambda finding: finding.weight, default=None)
    text = f"eval is worse than train on the same {gap.batches} batches ({values})"
    if gap.measure == "outputs":
        text = f"eval differs from train on the same {gap.batches} batches ({values})"
    if cause is None:
        return f"{text}. Cause: not found"
    first = next((f.path for f in findings if f.code == cause.code and f.path), gap.first or "")
    text += f". Cause: {cause.cause}{f', first at {first}' if first else ''}"
    text += f". Recalibrating closes {share(max(0.0, gap.closed))}"
    return text if cause.fix is None else f"{text}. Do: {cause.fix.line}"


class _teller:  # noqa: N801  # a context manager, used as one
    """Says on a terminal what is being looked at, in one line that goes away."""

    def __init__(self, show: bool) -> None:
        self._show = show and sys.stderr.isatty()
        self._width = 0

    def __enter__(self) -> Callable[[str], None]:
        return self._tell

    def __exit__(self, *_: object) -> None:
        if self._width:
            sys.stderr.write("\r" + " " * self._width + "\r")
            sys.stderr.flush()

    def _tell(self, words: str) -> None:
        if self._show:
            line = f"checking: {words}"
            sys.stderr.write("\r" + line.ljust(self._width))
            sys.stderr.flush()
            self._width = max(self._width, len(line))
