"""What is asked and what is allowed: arguments of `normkit.check`, `[tool.normkit.check]`, comments in a file."""

from __future__ import annotations

import io
import math
import re
import tokenize
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from normkit.checks import rules as _rules  # noqa: F401  # fills RULES
from normkit.checks.evidence import Part
from normkit.checks.findings import Finding
from normkit.checks.rule import RULES, Limits, Rule
from normkit.errors import NormTypeError, NormValueError, message, nearest

__all__ = ["KEYS", "Settings", "comments", "configured"]

KEYS = ("select", "ignore", "steps", "limits", "allow")  # of [tool.normkit.check]
_TABLE = "[tool.normkit.check]"
_EVERYWHERE = ("*",)
# normkit: ignore[NK601, NK602] backbone.*, head
_COMMENT = re.compile(r"#\s*normkit:\s*ignore\b(?:\[(?P<codes>[^\]]*)\](?P<paths>.*))?")


@dataclass(frozen=True)
class Settings:
    """Which rules are asked, their limits, and what is allowed where.

    Attributes:
        select: codes of rules, or their beginnings (`NK1`); None: all.
        ignore: likewise, rules that are not asked.
        limits: code to name of a limit to its value.
        allow: code, or its beginning, to patterns of paths (`backbone.*`) at which it may find what it likes.

    Raises NormValueError, with the nearest names, for codes and limits that there are not; NormTypeError for values of
    another type.
    """

    select: tuple[str, ...] | None = None
    ignore: tuple[str, ...] = ()
    limits: Mapping[str, Limits] = field(default_factory=dict)
    allow: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        select: Iterable[str] | None = None,
        ignore: Iterable[str] | None = None,
        limits: Mapping[str, Limits] | None = None,
        allow: Mapping[str, Iterable[str]] | None = None,
    ) -> Settings:
        """Check what a user gives."""
        for name, given in (("limits", limits), ("allow", allow)):
            if given is not None and not isinstance(given, Mapping):
                example = '{"NK102": {"share": 0.1}}' if name == "limits" else '{"NK601": ["backbone.*"]}'
                raise NormTypeError(message(f"`{name}` must be a mapping from codes of rules", repr(given), example))
        chosen = None if select is None else _codes("select", select)
        ignored = () if ignore is None else _codes("ignore", ignore)
        allowed = {code: _patterns(code, paths) for code, paths in (allow or {}).items()}
        _codes("allow", allowed)
        return cls(chosen, ignored, {code: _limits(code, own) for code, own in (limits or {}).items()}, allowed)

    @property
    def rules(self) -> tuple[Rule, ...]:
        """The rules to ask."""
        wanted = ("NK",) if self.select is None else self.select
        return tuple(
            rule for code, rule in sorted(RULES.items()) if code.startswith(wanted) and not code.startswith(self.ignore)
        )

    @property
    def wanted(self) -> frozenset[Part]:
        """The parts of the evidence that these rules look at."""
        return frozenset(part for rule in self.rules for part in (*rule.needs, *rule.uses))

    def allows(self, finding: Finding) -> bool:
        """Whether this may be found there."""
        return any(
            finding.code.startswith(code) and any(fnmatchcase(finding.path, pattern) for pattern in patterns)
            for code, patterns in self.allow.items()
        )

    def allowing(self, more: Iterable[tuple[str, tuple[str, ...]]]) -> Settings:
        """The same, and these codes are allowed at these paths."""
        allow = dict(self.allow)
        for code, patterns in more:
            allow[code] = (*allow.get(code, ()), *patterns)
        return Settings(self.select, self.ignore, self.limits, allow)


def configured(folder: Path) -> dict[str, Any]:
    """`[tool.normkit.check]` of the nearest pyproject.toml at or above a folder; empty where there is none.

    Raises NormValueError for a file that cannot be read, and for keys that there are not.
    """
    folder = folder.absolute()
    path = next(
        (own / "pyproject.toml" for own in (folder, *folder.parents) if (own / "pyproject.toml").is_file()), None
    )
    if path is None:
        return {}
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise NormValueError(
            message("pyproject.toml must be a file of TOML that can be read", f"{path} ({error})")
        ) from error
    table: Any = found
    for name in ("tool", "normkit", "check"):
        table = table.get(name, {}) if isinstance(table, Mapping) else {}
    if not isinstance(table, Mapping):
        raise NormValueError(message(f"{_TABLE} of {path} must be a table", repr(table)))
    for key in table:
        if key not in KEYS:
            raise NormValueError(message(f"{_TABLE} of {path} must hold known keys", repr(key), nearest(key, KEYS)))
    return dict(table)


def comments(source: str, file: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    """What comments allow: `# normkit: ignore[NK601] backbone.*`, without a path in the whole model.

    Raises NormValueError, with the line, for comments without codes or with unknown ones.
    """
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        found = _COMMENT.search(token.string) if token.type == tokenize.COMMENT else None
        if found is None:
            continue
        where = f"line {token.start[0]} of {file}"
        if not (found["codes"] or "").strip():
            must = f"{where}: a comment must name rules, and may name paths"
            raise NormValueError(message(must, repr(token.string), "# normkit: ignore[NK601] backbone.*"))
        codes = _codes(where, [code.strip() for code in found["codes"].split(",")])
        patterns = tuple(found["paths"].replace(",", " ").split()) or _EVERYWHERE
        yield from ((code, patterns) for code in codes)


def _codes(name: str, codes: Iterable[str]) -> tuple[str, ...]:
    if isinstance(codes, str) or not isinstance(codes, Iterable):
        raise NormTypeError(message(f"`{name}` must hold codes of rules", repr(codes), '["NK102"]'))
    codes = tuple(codes)
    for code in codes:
        if not isinstance(code, str) or not code or not any(known.startswith(code) for known in RULES):
            must = f"`{name}` must hold codes of rules, or their beginnings"
            raise NormValueError(message(must, repr(code), nearest(str(code), RULES)))
    return codes


def _limits(code: str, limits: Any) -> Limits:
    if code not in RULES:
        raise NormValueError(
            message("`limits` must be for rules that there are", repr(code), nearest(str(code), RULES))
        )
    known = RULES[code].limits
    if not isinstance(limits, Mapping):
        raise NormTypeError(message(f"`limits` of {code} must be a mapping from names to numbers", repr(limits)))
    for name, value in limits.items():
        if name not in known:
            hint = nearest(str(name), known) if known else "it has none"
            raise NormValueError(message(f"`limits` of {code} must have names that it knows", repr(name), hint))
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise NormTypeError(message(f"`limits` of {code}: {name} must be a finite number", repr(value)))
    return dict(limits)


def _patterns(code: str, paths: Any) -> tuple[str, ...]:
    if isinstance(paths, str) or not isinstance(paths, Iterable) or not all(isinstance(p, str) for p in paths):
        must = f"`allow` of {code} must be a list of patterns of paths"
        raise NormTypeError(message(must, repr(paths), '["backbone.*"], or ["*"] for the whole model'))
    return tuple(paths)
