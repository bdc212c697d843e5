"""docs/rules.md, made from the rules themselves: `python -m normkit.checks.pages docs/rules.md`."""

from __future__ import annotations

import sys
from pathlib import Path

from normkit.checks import rules as _rules  # noqa: F401  # fills RULES
from normkit.checks.rule import RULES, Rule
from normkit.files import save

__all__ = ["facts", "main", "page"]

_HEAD = """# The rules of `normkit check`

Written by `python -m normkit.checks.pages docs/rules.md` from the rules themselves; `normkit explain NK102` shows the
same. A rule is asked where what it needs could be examined. Limits are changed by `limits={"NK102": {"share": 0.1}}` or
in `[tool.normkit.check]` of pyproject.toml.
"""
_FRAMEWORKS = {"torch": "PyTorch", "keras": "Keras"}
_WHAT = {
    "layers": "the norm layers",
    "graph": "the flow of data",
    "calls": "what norms are given",
    "trained calls": "what norms are given in training mode",
    "gap": "the same batches in training and evaluation",
    "dependence": "a sample alone and in its batch",
    "step": "one training step",
    "optimizer": "the optimizer",
    "data": "the data",
}


def facts(rule: Rule) -> list[tuple[str, str]]:
    """What a rule needs, its limits, and where it is asked: name and words."""
    limits = ", ".join(f"{name} = {value:g}" for name, value in rule.limits.items())
    found = {
        "needs": ", ".join(_WHAT.get(part, part) for part in rule.needs),
        "limits": limits or "none",
        "frameworks": ", ".join(_FRAMEWORKS[name] for name in rule.frameworks),
    }
    return list(found.items())


def page() -> str:
    """The whole page."""
    listed = [f"- [{rule.code}](#{rule.code.lower()}) {rule.title}" for _, rule in sorted(RULES.items())]
    return "\n".join([_HEAD, *listed, "", *(_section(rule) for _, rule in sorted(RULES.items()))])


def _section(rule: Rule) -> str:
    known = "; ".join(f"{name}: {words}" for name, words in facts(rule))
    return f'<a id="{rule.code.lower()}"></a>\n## {rule.code}: {rule.title}\n{rule.story.strip()}\n\n{known}.\n'


def main(arguments: list[str]) -> None:
    """Write the page."""
    save(Path(arguments[0] if arguments else "docs/rules.md"), page())


if __name__ == "__main__":
    main(sys.argv[1:])
