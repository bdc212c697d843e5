"""A diagnosis of `normkit.check` as one HTML page that needs nothing else, and as an element for notebooks."""

from __future__ import annotations

from normkit.checks import rules as _rules  # noqa: F401  # fills RULES
from normkit.checks.findings import Diagnosis
from normkit.checks.output import blocks, counted
from normkit.checks.rule import RULES
from normkit.report import look

__all__ = ["fragment", "page"]

_ENTRIES = 12  # of a block: a page has more room than a terminal
_BODY = "diagnosis.html.j2"


def page(diagnosis: Diagnosis) -> str:
    """The whole page, without anything to load."""
    return _rendered("page.html.j2", diagnosis)


def fragment(diagnosis: Diagnosis) -> str:
    """The same as one element."""
    return _rendered(_BODY, diagnosis)


def _rendered(template: str, diagnosis: Diagnosis) -> str:
    found = counted(diagnosis.findings) or "no findings"
    facts = [f"{diagnosis.layers} normalization layer{'s' if diagnosis.layers != 1 else ''}"]
    facts.append(f"{len(diagnosis.rules)} rule{'s' if len(diagnosis.rules) != 1 else ''}")
    text: str = look.template(template).render(
        body=_BODY,
        name="normkit check",
        title=diagnosis.model,
        diagnosis=diagnosis,
        facts=f"{', '.join(facts)}: {found}",
        blocks=[(block, _story(block.code)) for block in blocks(diagnosis.findings, _ENTRIES)],
        allowed=blocks(diagnosis.allowed, _ENTRIES),
    )
    return text


def _story(code: str) -> list[str]:
    """The paragraphs of a rule's story; a diagnosis of another version may name a rule that is not there."""
    return RULES[code].story.split("\n\n") if code in RULES else []
