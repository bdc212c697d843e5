"""A rule: a function from evidence to findings, with a code, limits and a story."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

from normkit.checks.evidence import PARTS, Evidence, Part
from normkit.checks.findings import PAGE, Finding

__all__ = ["RULES", "Limits", "Rule", "rule"]

Limits = Mapping[str, float]
Run = Callable[[Evidence, Limits], Iterator[Finding]]
_CODE = re.compile(r"NK\d{3}")


@dataclass(frozen=True)
class Rule:
    """One question that is asked of every model.

    Attributes:
        code: `NK102`; never given to another rule.
        title: what is wrong, in a few words.
        needs: the parts of the evidence without which it cannot be asked.
        uses: further parts that it looks at where they are there.
        limits: its thresholds by name, each may be set by the user.
        frameworks: for which it means something.
        story: what goes wrong, how it is seen, what to do, and the source.
    """

    code: str
    title: str
    needs: tuple[Part, ...]
    limits: Limits
    frameworks: tuple[str, ...]
    story: str
    run: Run
    uses: tuple[Part, ...] = ()

    @property
    def url(self) -> str:
        """Where it is explained."""
        return f"{PAGE}#{self.code.lower()}"

    def __call__(self, seen: Evidence, limits: Limits | None = None) -> list[Finding]:
        """The findings, with code and title filled in."""
        chosen = {**self.limits, **(limits or {})}
        return [replace(finding, code=self.code, title=self.title) for finding in self.run(seen, chosen)]


# By code. Filled by importing `normkit.checks.rules`.
RULES: dict[str, Rule] = {}


def rule(
    code: str,
    title: str,
    *needs: Part,
    uses: tuple[Part, ...] = (),
    limits: Limits | None = None,
    frameworks: tuple[str, ...] = ("torch", "keras"),
) -> Callable[[Run], Run]:
    """Make a function a rule: (evidence, limits) -> findings. Its docstring is its story."""

    def register(function: Run) -> Run:
        assert _CODE.fullmatch(code), code
        assert code not in RULES, f"{code} is given twice"
        assert set(needs) | set(uses) <= set(PARTS), (needs, uses)
        story = inspect.getdoc(function) or ""
        RULES[code] = Rule(code, title, needs, limits or {}, frameworks, story, function, uses)
        return function

    return register
