"""Files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

from normkit.errors import NormRuntimeError, NormValueError, message

__all__ = ["OutputFolder", "save", "write"]


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


def save(path: Path, content: str | bytes, name: str = "`path`") -> None:
    """As :func:`write`; raises NormRuntimeError, with the name of the argument, where the file cannot be written."""
    try:
        write(path, content)
    except OSError as error:
        must = f"{name} must be one that can be written"
        raise NormRuntimeError(message(must, f"{path} ({error.strerror})")) from error


class OutputFolder:
    """A folder that can be written, known before hours of training.

    Entering makes the folder and writes a trial file; raises NormRuntimeError where that fails. Leaving with an error
    removes the folders that entering made, as far as they are still empty.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        if not os.fspath(path):
            raise NormValueError(message("the output folder must have a name", repr(path), "--out normkit-report"))
        self.path = Path(path)
        self._made: list[Path] = []

    def __enter__(self) -> Path:
        try:
            missing = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
            for folder in reversed(missing):
                try:
                    folder.mkdir()
                    self._made.append(folder)
                except FileExistsError:
                    if not folder.is_dir():  # else another process was quicker
                        raise
            with tempfile.NamedTemporaryFile(dir=self.path, prefix=".normkit-") as file:
                file.write(b"normkit")
        except OSError as error:
            self._remove()
            must = "the output folder must be one that can be written"
            raise NormRuntimeError(message(must, f"{self.path} ({error.strerror})", "choose another --out")) from error
        return self.path

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if kind is not None:
            self._remove()

    def _remove(self) -> None:
        with contextlib.suppress(OSError):
            for folder in reversed(self._made):
                folder.rmdir()
