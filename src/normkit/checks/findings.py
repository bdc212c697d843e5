"""What a check found: findings, and the diagnosis that holds them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from normkit.tables import Result, Table, number, plain

__all__ = ["SEVERITIES", "Diagnosis", "Finding", "Fix", "Severity", "number", "share"]

Severity = Literal["error", "warning", "info"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "info")
_SHOWN = 3  # paths of one finding in the table; the others are counted


@dataclass(frozen=True)
class Fix:
    """What to do.

    Attributes:
        line: of code, as the user would write it.
        verb: the change that `Diagnosis.fix` makes, see `normkit.checks.fixes`; None where a person has to.
        arguments: of that change, plain values.
        safe: whether it only brings about what the model was meant to do, and can be measured and undone. The others
            change what is trained.
        others: further lines, each a way out by itself.
    """

    line: str
    verb: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    safe: bool = False
    others: tuple[str, ...] = ()


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, or worth to know, at one layer or in the whole model.

    Attributes:
        severity: `error`: results are wrong or will be; `warning`: likely harm; `info`: a choice to be made knowingly.
        path: of the layer; "" for the model, the optimizer or the data.
        words: one sentence, with the numbers that were measured.
        evidence: these numbers, by name.
        fix: what to do.
        cause: where this explains why evaluation is worse than training: the words for it in a sentence.
        weight: among several causes the one with the largest is named.
        code: of the rule; filled in when the rule is run.
    """

    severity: Severity
    path: str
    words: str
    evidence: Mapping[str, float | int | str | None] = field(default_factory=dict)
    fix: Fix | None = None
    cause: str | None = None
    weight: float = 0.0
    code: str = ""


@dataclass(frozen=True)
class Diagnosis(Result):
    """What `normkit.check` found.

    Attributes:
        model: name of the model's class.
        sentence: the whole in one sentence.
        findings: the most severe first, then by rule, then in the order of the layers.
        layers: how many norm layers were looked at.
        rules: codes of the rules that were run.
        skipped: what was not examined, and why.
        seen: how the flow of data was seen, see :class:`normkit.surgery.graph.Graph`; None where it was not.
    """

    model: str
    sentence: str
    findings: tuple[Finding, ...]
    layers: int
    rules: tuple[str, ...]
    skipped: Mapping[str, str] = field(default_factory=dict)
    seen: str | None = None
    _repair: Callable[[bool], Any] | None = field(default=None, repr=False, compare=False)

    @property
    def errors(self) -> tuple[Finding, ...]:
        """The findings of severity `error`."""
        return self.of("error")

    @property
    def healthy(self) -> bool:
        """Whether there is neither an error nor a warning."""
        return not any(finding.severity in ("error", "warning") for finding in self.findings)

    def of(self, severity: Severity) -> tuple[Finding, ...]:
        """The findings of one severity."""
        return tuple(finding for finding in self.findings if finding.severity == severity)

    def table(self) -> Table:
        """One row per rule and sentence; layers with the same are put together."""
        rows = [
            (severity, code, _places(paths), words, line)
            for (severity, code, words, line), paths in _together(self.findings).items()
        ]
        headings = ("", "rule", "layer", "found", "do")
        title = "\n".join([self.sentence, *(f"not examined: {part}: {why}" for part, why in self.skipped.items())])
        return Table(headings, rows, words=len(headings), title=title)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; what is not finite becomes None."""
        findings = [{**asdict(finding), "evidence": plain(finding.evidence)} for finding in self.findings]
        own = {name: getattr(self, name) for name in ("model", "sentence", "layers", "seen")}
        return {**own, "findings": findings, "rules": list(self.rules), "skipped": dict(self.skipped)}


def _together(findings: tuple[Finding, ...]) -> dict[tuple[str, str, str, str], list[str]]:
    """The paths of the findings that read the same."""
    found: dict[tuple[str, str, str, str], list[str]] = {}
    for finding in findings:
        line = "" if finding.fix is None else " or ".join((finding.fix.line, *finding.fix.others))
        found.setdefault((finding.severity, finding.code, finding.words, line), []).append(finding.path)
    return found


def _places(paths: list[str]) -> str:
    shown = ", ".join(path for path in paths[:_SHOWN] if path)
    return shown if len(paths) <= _SHOWN else f"{shown} and {len(paths) - _SHOWN} more"


def share(value: float) -> str:
    """A share in words: `17 %`, `0.2 %`, `<0.1 %`."""
    percent = 100 * value
    if 0 < percent < 0.1:
        return "<0.1 %"
    return f"{percent:.0f} %" if percent >= 1 or percent == 0 else f"{percent:.1f} %"
