"""How much memory a piece of work takes, as the system sees it."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import re
from pathlib import Path

__all__ = ["PeakMemory"]

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class PeakMemory:
    """Bytes by which this process grows at most, counted from here. Linux only; elsewhere nothing is known.

    What an earlier piece of work freed is handed back to the system first, or it would hide what the next one needs.
    """

    def __init__(self) -> None:
        gc.collect()
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
        self._start: int | None = None
        try:
            _CLEAR.write_text("5")  # the peak starts again from the present size
        except OSError:
            return
        self._start = _read("VmRSS")

    def bytes(self) -> int | None:
        """The growth so far."""
        peak = _read("VmHWM")
        return None if self._start is None or peak is None else max(0, peak - self._start)


def _read(name: str) -> int | None:
    try:
        found = re.search(rf"{name}:\s+(\d+) kB", _STATUS.read_text())
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None
