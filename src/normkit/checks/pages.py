"""docs/rules.md, made from the rules themselves: `python -m normkit.checks.pages docs/rules.md`.

The rates at which rules find their faults are those of benchmarks/check_rates.csv beside docs, where that is there.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from normkit.checks import rules as _rules  # noqa: F401  # fills RULES
from normkit.checks.rule import RULES, Rule
from normkit.files import save

__all__ = ["Rate", "facts", "main", "page", "rates"]

Rate = dict[str, str]  # a row of benchmarks/check_rates.csv by column

_HEAD = """# The rules of `normkit check`

Written by `python -m normkit.checks.pages docs/rules.md` from the rules themselves; `normkit explain NK102` shows the
same. A rule is asked where what it needs could be examined. Limits are changed by `limits={"NK102": {"share": 0.1}}` or
in `[tool.normkit.check]` of pyproject.toml.
"""
_RATES = """<a id="rates"></a>
## How often they are right

Measured by `python benchmarks/check_rates.py` on one processor: faults of several strengths planted in, or trained
into, small PyTorch networks (convolutions, dense layers, residual blocks, sequences) that had learned scikit-learn's
digits or which of two photographs an 8 x 8 piece is of. Found is the share of planted networks in which the rule was
heard, as a note or louder. The first strengths are often below the limit, where a rule should be silent. False alarms
are warnings and errors in {healthy} looks at networks trained in the usual way, by batches of 16 to 64, at data they
learned and at data held out; notes are counted apart. NK305, which Keras alone has, and NK901 and NK902, which take
several processes, were not measured.

What was chosen after a look at such numbers: the `share` of NK102, and that the noise of averages counts in it, by the
first of the three seeds of healthy networks; and to plant NK105 in dense layers alone, since convolutions and sequences
were hardly ever found to lean on such batches. The alarms of NK101 are gaps that were there, which recalibrating
closes: two residual networks whose averages were off. Large networks may differ.
"""
_HEADINGS = ("rule", "planted", "found by strength", "trials each", "false alarms", "notes")
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


def page(measured: Sequence[Rate] = ()) -> str:
    """The whole page, with a table of rates where they were measured."""
    listed = [f"- [{rule.code}](#{rule.code.lower()}) {rule.title}" for _, rule in sorted(RULES.items())]
    sections = [_section(rule) for _, rule in sorted(RULES.items())]
    return "\n".join([_HEAD, *listed, "", *_table(measured), *sections])


def rates(path: Path) -> list[Rate]:
    """What benchmarks/check_rates.py wrote; nothing where there is no such file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _table(measured: Sequence[Rate]) -> list[str]:
    """How often rules find what was planted, and are heard where nothing was."""
    if not measured:
        return []
    healthy = {row["code"]: row for row in measured if row["fault"] == "none"}
    looks = max(int(row["trials"]) for row in healthy.values())
    lines = [_row(_HEADINGS), _row("-" * len(name) for name in _HEADINGS)]
    for code, quiet in healthy.items():
        planted = [row for row in measured if row["code"] == code and row["fault"] != "none"]
        found = ", ".join(f"{row['strength']}: {_percent(row['found'], row)}" for row in planted)
        notes = int(quiet["found"]) - int(quiet["serious"])
        alarms = (_percent(quiet["serious"], quiet), _percent(notes, quiet))
        lines.append(_row((f"[{code}](#{code.lower()})", planted[0]["fault"], found, planted[0]["trials"], *alarms)))
    return [_RATES.format(healthy=looks), *lines, ""]


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _percent(part: str | int, row: Rate) -> str:
    return f"{100 * int(part) / int(row['trials']):.0f} %"


def _section(rule: Rule) -> str:
    known = "; ".join(f"{name}: {words}" for name, words in facts(rule))
    return f'<a id="{rule.code.lower()}"></a>\n## {rule.code}: {rule.title}\n{rule.story.strip()}\n\n{known}.\n'


def main(arguments: list[str]) -> None:
    """Write the page."""
    path = Path(arguments[0] if arguments else "docs/rules.md")
    save(path, page(rates(path.resolve().parents[1] / "benchmarks" / "check_rates.csv")))


if __name__ == "__main__":
    main(sys.argv[1:])
