"""The process of one peer: it makes a case ready, returns outputs through files, and times steps when it is asked to.

It imports its peer's library and no other. The memory state is set before.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from normkit.benchmarking.cases import Case
from normkit.benchmarking.values import Given, load, save
from normkit.processes import serve

__all__ = ["DROP", "MEMORIES", "Failure", "Prepare", "Setup", "Time", "Timing", "main"]

MEMORIES = ("recycled", "fresh")
DROP = "drop"  # asked: forget the case
_UNMEASURED = 2  # calls before the timed ones: after another process ran, caches and threads are not this one's
# mallopt's parameters, of malloc.h. Up to the first threshold memory comes from the heap instead of fresh pages, what
# is freed is not given back to the system, and all threads share one heap.
_RECYCLED = {"M_MMAP_THRESHOLD": (-3, 1 << 30), "M_TRIM_THRESHOLD": (-1, -1), "M_ARENA_MAX": (-8, 1)}


class Setup(NamedTuple):
    """The first question: who the worker is."""

    make: str  # `module:function` of the peer
    memory: str
    threads: int


class Prepare(NamedTuple):
    """Make a case ready and write the outputs of one step under `name`."""

    case: Case
    folder: Path
    name: str


class Time(NamedTuple):
    """Time so many steps."""

    calls: int


class Timing(NamedTuple):
    """One step."""

    seconds: float
    faults: int | None  # pages that the system handed out meanwhile; None where it does not say


class Failure(NamedTuple):
    """What a question raised, in words."""

    text: str
    final: bool = False  # whether every other question would raise the same


class _Timer:
    def __init__(self, setup: Setup) -> None:
        if hasattr(os, "sched_setaffinity"):  # JAX and TensorFlow take a thread for each core that they may use
            os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: setup.threads])
        if setup.memory == "recycled":
            recycle()
        module, _, function = setup.make.partition(":")
        self._make = getattr(importlib.import_module(module), function)
        self._runner: Any = None

    def prepare(self, question: Prepare) -> None:
        self.drop()
        given = Given.of(load(question.folder, "given"))
        self._runner = self._make(question.case, given)
        save(question.folder, question.name, self._runner.outputs(self._runner.step()))

    def time(self, calls: int) -> list[Timing]:
        step = self._runner.step
        found = []
        gc.collect()
        gc.disable()
        try:
            for _ in range(_UNMEASURED):
                step()
            for _ in range(calls):
                before = _page_faults()
                begun = time.perf_counter()
                step()  # its results are freed here, within the time: memory is part of the step
                seconds = time.perf_counter() - begun
                after = _page_faults()
                found.append(Timing(seconds, None if before is None or after is None else after - before))
        finally:
            gc.enable()
        return found

    def drop(self) -> None:
        self._runner = None
        gc.collect()


def recycle() -> None:
    """Let malloc reuse what was freed, as a training with a caching allocator does. Raises OSError without glibc."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        raise OSError("recycled memory needs glibc's mallopt")
    for name, (parameter, value) in _RECYCLED.items():
        if not mallopt(parameter, value):
            raise OSError(f"mallopt refused {name}")


def _page_faults() -> int | None:
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def main() -> None:
    """Serve one parent: a Setup comes first, then Prepare, Time and DROP."""
    serve(lambda setup, _: _begin(setup))


def _begin(setup: Setup) -> Callable[[Any], Any]:
    timer = _answer(_Timer, setup)
    if isinstance(timer, Failure):
        failure = timer._replace(final=True)
        return lambda _: failure

    def answer(question: Any) -> Any:
        if isinstance(question, Prepare):
            return _answer(timer.prepare, question)
        return _answer(timer.time, question.calls) if isinstance(question, Time) else _answer(timer.drop)

    return answer


def _answer(function: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return function(*arguments)
    except Exception as error:
        said = " ".join(str(error).split())
        return Failure(f"{type(error).__name__}: {said}" if said else type(error).__name__)
