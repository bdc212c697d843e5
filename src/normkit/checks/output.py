"""A diagnosis in words: blocks of findings, the text of the terminal, annotations for GitHub."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from normkit.checks.findings import Diagnosis, Finding

__all__ = ["Block", "blocks", "counted", "github", "text", "wrapped"]

_SHOWN = 3  # entries of a block, paths of an entry, lines of code; the others are counted
_WIDTH = 100
_UNBROKEN = "\u2007%"  # while lines are broken: a space that is no place to break
# In GitHub's workflow commands these have a meaning; in values of properties all of them, in the message the first.
_ESCAPED = {"%": "%25", "\r": "%0D", "\n": "%0A", ":": "%3A", ",": "%2C"}
_COMMANDS = {"error": "error", "warning": "warning", "info": "notice"}


class Block(NamedTuple):
    """All findings of a rule that are equally severe.

    Attributes:
        severity, code, title, url: of the rule.
        entries: where, and what was found there; "" is the whole model.
        more: layers that are not in the entries.
        lines: of code, what to do.
        more_lines: further ones.
        others: further lines, each a way out by itself.
    """

    severity: str
    code: str
    title: str
    url: str
    entries: tuple[tuple[str, str], ...]
    more: int
    lines: tuple[str, ...]
    more_lines: int
    others: tuple[str, ...] = ()


def blocks(findings: Iterable[Finding], shown: int = _SHOWN) -> list[Block]:
    """Findings put together: by rule and severity, then by what they say. The order stays."""
    groups: dict[tuple[str, str], list[Finding]] = {}
    for finding in findings:
        groups.setdefault((finding.severity, finding.code), []).append(finding)
    return [_block(own, shown) for own in groups.values()]


def _block(findings: list[Finding], shown: int) -> Block:
    paths: dict[str, list[str]] = {}
    for finding in findings:
        paths.setdefault(finding.words, []).append(finding.path)
    fixes = [finding.fix for finding in findings if finding.fix is not None]
    lines = list(dict.fromkeys(fix.line for fix in fixes))
    others = dict.fromkeys(line for fix in fixes for line in fix.others)
    first, entries = findings[0], [(_places(own, shown), words) for words, own in paths.items()]
    return Block(
        severity=first.severity,
        code=first.code,
        title=first.title,
        url=first.url,
        entries=tuple(entries[:shown]),
        more=sum(map(len, list(paths.values())[shown:])),
        lines=tuple(lines[:shown]),
        more_lines=len(lines[shown:]),
        others=tuple(others),
    )


def _places(paths: list[str], shown: int) -> str:
    named = [path for path in paths if path]
    text = ", ".join(named[:shown])
    return text if len(named) <= shown else f"{text} and {len(named) - shown} more"


def counted(findings: Iterable[Finding]) -> str:
    """How many of each severity: `2 errors, 1 warning`."""
    kinds = [finding.severity for finding in findings]
    words = {kind: "note" if kind == "info" else kind for kind in _COMMANDS}
    return ", ".join(
        f"{kinds.count(kind)} {word}{'s' if kinds.count(kind) != 1 else ''}"
        for kind, word in words.items()
        if kind in kinds
    )


def text(diagnosis: Diagnosis) -> str:
    """The sentence; a block per rule; what was not examined."""
    # The sentence is one line, for whoever reads the first line alone.
    parts = ["\n".join([diagnosis.sentence, *(line for note in diagnosis.notes for line in wrapped(note, "    "))])]
    parts += ["\n".join(_lines(block)) for block in blocks(diagnosis.findings)]
    last = [f"allowed: {block.code} {block.title}: {_first(block)}" for block in blocks(diagnosis.allowed)]
    last += [f"not examined: {part}: {why}" for part, why in diagnosis.skipped.items()]
    parts += ["\n".join(line for words in last for line in wrapped(words, "    "))] if last else []
    return "\n\n".join(parts)


def _first(block: Block) -> str:
    where, words = block.entries[0]
    others = len(block.entries) - 1 + block.more
    return f"{where or words}{f' and {others} more' if others else ''}"


def _lines(block: Block) -> list[str]:
    lines = [f"{block.severity} {block.code}  {block.title}"]
    for where, words in block.entries:
        lines += wrapped(f"{where}: {words}" if where else words, "      ", "    ")
    if block.more:
        lines.append(f"    and {block.more} more layer{'s' if block.more > 1 else ''}")
    lines += [f"    do: {line}" for line in block.lines]  # code is not broken: it is there to be pasted
    if block.more_lines:
        lines.append(f"    and {block.more_lines} more such line{'s' if block.more_lines > 1 else ''}")
    lines += [f"    or: {line}" for line in block.others]
    return [*lines, f"    see: normkit explain {block.code}"]


def wrapped(words: str, later: str = "", first: str = "") -> list[str]:
    """Lines of at most 100 characters; paths, codes and shares are not broken."""
    lines = textwrap.wrap(
        words.replace(" %", _UNBROKEN),
        _WIDTH,
        initial_indent=first,
        subsequent_indent=later,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return [line.replace(_UNBROKEN, " %") for line in lines]


def github(diagnosis: Diagnosis, file: str = "") -> str:
    """One workflow command of GitHub per block, the sentence as a notice first.

    https://docs.github.com/actions/reference/workflow-commands-for-github-actions
    """
    lines = [_command("notice", "normkit check", diagnosis.sentence, file)]
    for block in blocks(diagnosis.findings):
        said = "; ".join(f"{where}: {words}" if where else words for where, words in block.entries)
        more = f"; and {block.more} more" if block.more else ""
        do = f". Do: {block.lines[0]}" if block.lines else ""
        lines.append(_command(_COMMANDS[block.severity], f"{block.code} {block.title}", f"{said}{more}{do}", file))
    return "\n".join(lines)


def _command(kind: str, title: str, words: str, file: str) -> str:
    properties = {"title": title, **({"file": file} if file else {})}
    named = ",".join(f"{name}={_escaped(value, 5)}" for name, value in properties.items())
    return f"::{kind} {named}::{_escaped(words, 3)}"


def _escaped(value: str, count: int) -> str:
    for sign, code in list(_ESCAPED.items())[:count]:
        value = value.replace(sign, code)
    return value
