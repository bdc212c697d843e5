"""What a check found: findings, and the diagnosis that holds them."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from normkit.checks.evidence import Gap
from normkit.checks.output import blocks, text
from normkit.errors import NormRuntimeError, message
from normkit.tables import Result, Table, number, plain

__all__ = ["PAGE", "SEVERITIES", "Diagnosis", "Finding", "Fix", "Severity", "number", "share"]

Severity = Literal["error", "warning", "info"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "info")
PAGE = "docs/rules.md"  # where every rule has a section of its own


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
        code, title: of the rule; filled in when the rule is run.
    """

    severity: Severity
    path: str
    words: str
    evidence: Mapping[str, float | int | str | None] = field(default_factory=dict)
    fix: Fix | None = None
    cause: str | None = None
    weight: float = 0.0
    code: str = ""
    title: str = ""

    @property
    def url(self) -> str:
        """Where the rule is explained."""
        return f"{PAGE}#{self.code.lower()}"


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
        gap: the same batches with the statistics of the batch and with the kept ones; None where it was not measured.
        allowed: findings that the settings allow: known, and left out of everything else.
        notes: what `fix` did and left, in sentences.
        fixed: the changes that it made.
    """

    model: str
    sentence: str
    findings: tuple[Finding, ...]
    layers: int
    rules: tuple[str, ...]
    skipped: Mapping[str, str] = field(default_factory=dict)
    seen: str | None = None
    gap: Gap | None = None
    allowed: tuple[Finding, ...] = ()
    notes: tuple[str, ...] = ()
    fixed: tuple[Fix, ...] = ()
    _repair: Callable[[Diagnosis, bool], Diagnosis] | None = field(default=None, repr=False, compare=False)

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

    def fix(self, unsafe: bool = False) -> Diagnosis:
        """Do what the findings say, in place, as far as normkit has a verb for it; then check again.

        Each change is made once; recalibrating comes last. If the model is worse for it, by the number of errors and
        warnings or, where all changes keep what the model computes in training, by its loss in evaluation, everything
        is undone, and the notes say so.

        Args:
            unsafe: make also changes after which the model has to be trained again, such as another norm.

        Returns:
            The new diagnosis; its `notes` say what was done, and what is left to a person.

        Raises:
            NormRuntimeError: for a diagnosis that was loaded from a file and has no model any more.
        """
        if self._repair is None:
            must = "a diagnosis must be of this process to be acted upon"
            raise NormRuntimeError(message(must, hint="normkit.check(model, data).fix()"))
        return self._repair(self, unsafe)

    def table(self) -> Table:
        """One row per rule and sentence; layers with the same are put together."""
        rows = [
            (block.severity, block.code, where, words, block.lines[0] if block.lines else "")
            for block in blocks(self.findings)
            for where, words in block.entries
        ]
        return Table(("", "rule", "layer", "found", "do"), rows, words=5, title=self.sentence)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; what is not finite becomes None."""
        own = {name: getattr(self, name) for name in ("model", "sentence", "layers", "seen")}
        own["gap"] = None if self.gap is None else plain(asdict(self.gap))
        named = {name: [_plain(finding) for finding in getattr(self, name)] for name in ("findings", "allowed")}
        return {**own, **named, "rules": list(self.rules), "skipped": dict(self.skipped), "notes": list(self.notes)}

    def __str__(self) -> str:
        return text(self)

    def _repr_html_(self) -> str:
        if importlib.util.find_spec("jinja2") is None:  # the look is that of the report, which is an extra
            return super()._repr_html_()
        from normkit.report.diagnosis import fragment

        return fragment(self)

    def _formats(self) -> Mapping[str, Callable[[], str | bytes]]:
        def page() -> str:
            from normkit.report.diagnosis import page

            return page(self)

        return {**super()._formats(), ".html": page}

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_repair": None}  # it holds the model and the data


def _plain(finding: Finding) -> dict[str, Any]:
    return {**asdict(finding), "evidence": plain(finding.evidence), "url": finding.url}


def share(value: float) -> str:
    """A share in words: `17 %`, `0.2 %`, `<0.1 %`."""
    percent = 100 * value
    if 0 < percent < 0.1:
        return "<0.1 %"
    return f"{percent:.0f} %" if percent >= 1 or percent == 0 else f"{percent:.1f} %"
