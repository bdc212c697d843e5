"""What an argument may be. One object validates, words its own error and makes the bad values a test feeds back.

Because the three jobs live together they cannot drift apart: `tests/core/test_constraints.py` takes every constraint
of every public constructor, feeds it each of its own `bad()` values and matches the message.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from normkit.errors import NormTypeError, NormValueError, message

__all__ = ["Constraint", "Flag", "Integer", "OneOf", "Optional", "Real", "check"]


class Constraint(Protocol):
    """Says whether a value is allowed, what would be, and which values are not."""

    def allows(self, value: Any) -> bool: ...
    def words(self) -> str: ...
    def bad(self) -> Iterable[Any]: ...


@dataclass(frozen=True)
class Integer:
    """A whole number of at least `low`. Booleans are refused: `BatchNorm2d(True)` is a mistake, not one channel."""

    low: int = 1

    def allows(self, value: Any) -> bool:
        return isinstance(value, numbers.Integral) and not isinstance(value, bool) and int(value) >= self.low

    def words(self) -> str:
        return f"a whole number of at least {self.low}"

    def bad(self) -> Iterable[Any]:
        return (self.low - 1, self.low + 0.5, "3", True)


@dataclass(frozen=True)
class Real:
    """A finite real number between `low` and `high`, both included; `above=True` leaves `low` itself out."""

    low: float = -math.inf
    high: float = math.inf
    above: bool = False

    def allows(self, value: Any) -> bool:
        if not isinstance(value, numbers.Real) or isinstance(value, bool) or not math.isfinite(value):
            return False
        number = float(value)
        return self.low < number <= self.high if self.above else self.low <= number <= self.high

    def words(self) -> str:
        low = "" if self.low == -math.inf else f" {'above' if self.above else 'of at least'} {self.low:g}"
        high = "" if self.high == math.inf else f"{' and' if low else ''} of at most {self.high:g}"
        return f"a finite number{low}{high}"

    def bad(self) -> Iterable[Any]:
        yield from (math.nan, math.inf, "0.1", True)
        if self.low > -math.inf:
            yield self.low if self.above else self.low - 1
        if self.high < math.inf:
            yield self.high + 1


@dataclass(frozen=True)
class Flag:
    """True or False, and nothing that merely behaves like it."""

    def allows(self, value: Any) -> bool:
        return isinstance(value, bool)

    def words(self) -> str:
        return "True or False"

    def bad(self) -> Iterable[Any]:
        return ("yes", 1, None)


@dataclass(frozen=True)
class OneOf:
    """One of the listed words."""

    choices: tuple[str, ...]

    def allows(self, value: Any) -> bool:
        return isinstance(value, str) and value in self.choices

    def words(self) -> str:
        return "one of " + ", ".join(map(repr, self.choices))

    def bad(self) -> Iterable[Any]:
        return ("no such choice", 0)


@dataclass(frozen=True)
class Optional:
    """None, or what another constraint allows."""

    inner: Constraint

    def allows(self, value: Any) -> bool:
        return value is None or self.inner.allows(value)

    def words(self) -> str:
        return f"None or {self.inner.words()}"

    def bad(self) -> Iterable[Any]:
        return (value for value in self.inner.bad() if value is not None)


def check(owner: str, constraints: Mapping[str, Constraint], values: Mapping[str, Any]) -> None:
    """Raise NormValueError (NormTypeError for a value of a foreign type) for the first value that is not allowed."""
    for name, value in values.items():
        constraint = constraints.get(name)
        if constraint is None or constraint.allows(value):
            continue
        kind = NormValueError if isinstance(value, numbers.Real) or isinstance(constraint, OneOf) else NormTypeError
        raise kind(message(f"{owner}: `{name}` must be {constraint.words()}", repr(value)))
