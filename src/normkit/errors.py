"""The errors of normkit, and the one helper that words them.

Every message says what must hold, what came instead and, where there is one, what to do about it::

    `num_channels` must be divisible by `num_groups`; got 72 and 32. hint: use 24 groups
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "MissingExtraError",
    "NormError",
    "NormRuntimeError",
    "NormTypeError",
    "NormValueError",
    "message",
    "nearest",
]


class NormError(Exception):
    """Base of all errors that normkit raises on purpose. The command line prints these without a traceback."""


class NormValueError(NormError, ValueError):
    """An argument, an input or a file has a value that cannot be used."""


class NormTypeError(NormError, TypeError):
    """An argument has a type that cannot be used."""


class NormRuntimeError(NormError, RuntimeError):
    """Something outside the arguments prevents the work: a folder that cannot be written, a dead worker."""


class MissingExtraError(NormError, ImportError):
    """An optional dependency is not installed; the message names the extra that brings it."""


def message(must: str, got: object = None, hint: str | None = None) -> str:
    """Word an error: what must hold, what came, what to do."""
    text = must if got is None else f"{must}; got {got}"
    return text if hint is None else f"{text}. hint: {hint}"


def nearest(name: str, known: Iterable[str]) -> str:
    """Word the hint for a misspelled name: the closest known names first, then all of them."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    listed = "known: " + ", ".join(names)
    return f"did you mean {' or '.join(close)}? {listed}" if close else listed
