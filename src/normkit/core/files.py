"""Files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from normkit.errors import NormRuntimeError, NormValueError, message

__all__ = ["save", "write"]


def write(path: Path, content: str | bytes) -> None:
    """Write `content` under `path` in one step: an interruption leaves the old file, or none."""
    handle, created = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    temporary = Path(created)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes files for the owner alone; a report is meant to be passed on like any other file.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def save(path: str | os.PathLike[str], makers: Mapping[str, Callable[[], str | bytes]]) -> Path:
    """Write what the maker for the ending of `path` gives, whole or not at all. Returns the path.

    Raises NormValueError for another ending, NormRuntimeError where the file cannot be written.
    """
    path = Path(path)
    maker = makers.get(path.suffix.lower())
    if maker is None:
        *others, last = makers
        endings = f"{', '.join(others)} or {last}"
        raise NormValueError(message(f"`path` must end in {endings}", repr(str(path))))
    content = maker()
    try:
        write(path, content)
    except OSError as error:
        must = "`path` must be one that can be written"
        raise NormRuntimeError(message(must, f"{path} ({error.strerror})")) from error
    return path
