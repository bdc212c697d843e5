"""Measuring: one process per peer, started once for each memory state, its outputs checked before it is timed.

A case is timed in rounds. In a round every peer, and each of the two units, has one turn, in an order drawn anew: two
calls that are not measured, then the timed ones. What else the machine does meets all of them.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import queue
import random
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from normkit.benchmarking.cases import Case
from normkit.benchmarking.circumstances import circumstances
from normkit.benchmarking.peers import UNITS, Peer, Units, found
from normkit.benchmarking.results import Fault, Measurement, Measurements
from normkit.benchmarking.values import load, remove, save
from normkit.benchmarking.worker import DROP, Failure, Prepare, Setup, Time, Timing
from normkit.errors import NormError
from normkit.processes import ended, interpreter

__all__ = ["PeerError", "measure"]

_TURN = 0.02  # seconds: a turn has so many calls that they last about so long,
_CALLS = (3, 200)  # within these bounds,
_SLOW = 0.3  # and a single call where that takes longer than this.
_DEATHS = 2  # a process that dies is started again for the next case, but not after so many deaths
_SEED = 0  # of the order of turns


class PeerError(NormError):
    """A peer failed, died or took too long; the message says which of them."""

    def __init__(self, text: str, *, dead: bool) -> None:
        super().__init__(text)
        self.dead = dead


class _Process:
    """The process of one peer."""

    def __init__(self, peer: Peer, memory: str, threads: int, timeout: float, log: Path) -> None:
        count = str(threads)
        env = {
            **os.environ,
            "OMP_NUM_THREADS": count,
            "MKL_NUM_THREADS": count,
            "TF_NUM_INTRAOP_THREADS": count,
            "OMP_WAIT_POLICY": "passive",  # threads that spin after their work would slow down whoever comes next
            **peer.environment,
        }
        self._log, self._timeout = log, timeout
        with log.open("ab") as file:
            self._process = subprocess.Popen(
                interpreter("normkit.benchmarking.worker"),
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file, env=env,
            )  # fmt: skip
        self._answers: queue.SimpleQueue[tuple[bool, Any]] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()
        self._send(Setup(peer.make, memory, threads), "starting")

    def ask(self, question: Any, what: str) -> Any:
        """The answer; `what` says in an error what was going on. Raises PeerError, and ends a process that hangs."""
        self._send(question, what)
        alive, answer = self._wait()
        if alive is None:
            self.end()
            raise PeerError(f"took more than {self._timeout:g} s while {what}", dead=True)
        if not alive:
            raise self._death(what)
        if isinstance(answer, Failure):
            raise PeerError(f"failed while {what}: {answer.text}", dead=answer.final)
        return answer

    def _send(self, question: Any, what: str) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(pickle.dumps(question))
            self._process.stdin.flush()
        except OSError:
            raise self._death(what) from None

    def end(self) -> None:
        """Kill it, and wait until it and the thread that listens to it have ended."""
        self._process.kill()
        self._process.wait()
        self._thread.join()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(OSError):  # what was still to be written to it is lost, as it should be
                pipe.close()

    def _wait(self) -> tuple[bool | None, Any]:
        """(whether the process lives, its answer); (None, None) when the time is over."""
        until = time.monotonic() + self._timeout
        while (left := until - time.monotonic()) > 0:
            try:
                # In short waits, since on some systems Ctrl-C does not reach one that waits for a lock.
                return self._answers.get(timeout=min(left, 1.0))
            except queue.Empty:
                continue
        return None, None

    def _listen(self) -> None:
        assert self._process.stdout is not None
        while True:
            try:
                self._answers.put((True, pickle.load(self._process.stdout)))
            except Exception:  # it has ended, or something else than an answer came: both are its end
                self._answers.put((False, None))
                return

    def _death(self, what: str) -> PeerError:
        self._process.kill()
        how = ended(self._process)
        lines = self._log.read_text(errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")
        return PeerError(f"died ({how}) while {what}" + (f": {last}" if last else ""), dead=True)


class _Crew:
    """The processes of one memory state. Whatever ends the context, none is left behind."""

    def __init__(self, memory: str, threads: int, timeout: float, folder: Path) -> None:
        self.memory, self._threads, self._timeout, self.folder = memory, threads, timeout, folder
        self._processes: dict[str, _Process] = {}
        self._deaths: dict[str, int] = {}

    def __enter__(self) -> _Crew:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes.values():
            process.end()

    def start(self, peers: Sequence[Peer]) -> None:
        """Start those that do not run, without waiting for them."""
        for peer in peers:
            if peer.name not in self._processes and not self.lost(peer):
                log = self.folder / f"{peer.name}-{self.memory}.log"
                self._processes[peer.name] = _Process(peer, self.memory, self._threads, self._timeout, log)

    def lost(self, peer: Peer) -> bool:
        """Whether a peer died too often to be started again."""
        return self._deaths.get(peer.name, 0) >= _DEATHS

    def ask(self, peer: Peer, question: Any, what: str) -> Any:
        """The answer of a peer, which is started if it does not run. Raises PeerError."""
        try:
            self.start([peer])
            return self._processes[peer.name].ask(question, what)
        except PeerError as error:
            if error.dead:
                self._deaths[peer.name] = self._deaths.get(peer.name, 0) + 1
            if error.dead and peer.name in self._processes:
                self._processes.pop(peer.name).end()
            raise

    def drop(self) -> None:
        """Let all forget the case they have."""
        for name, process in list(self._processes.items()):
            try:
                process.ask(DROP, "forgetting a case")
            except PeerError:
                self._processes.pop(name).end()


def measure(
    cases: Sequence[Case],
    peers: Sequence[Peer],
    memories: Sequence[str],
    *,
    rounds: int,
    threads: int,
    timeout: float,
    tell: Callable[[str], None],
    keep: Callable[[Sequence[Measurement]], None],
    units: Units = UNITS,
) -> Measurements:
    """Measure peers on cases.

    Args:
        cases, peers, memories: every combination that makes sense. The first peer is what others are compared with.
        rounds: turns of each peer per case.
        threads: of each process, which may use as many cores.
        timeout: seconds for one question to a peer; the first one holds the import, each Prepare a compilation.
        tell: hears a line of text per case.
        keep: gets the measurements of a case as soon as there are any.
        units: what the units are measured by.

    Returns:
        All that was measured. Ctrl-C ends the processes and returns what was finished, marked as interrupted.
    """
    present, missing = found(peers)
    needed = {module for peer in (*present, *units) for module in peer.needs}
    programs = {name: text for peer in present for name, text in peer.version().items()}
    under = circumstances(needed, threads, programs)
    rows: list[Measurement] = []
    faults: list[Fault] = []
    interrupted = False
    order = random.Random(_SEED)
    total, number = len(memories) * len(cases), 0
    with tempfile.TemporaryDirectory(prefix="normkit-bench-") as name:
        try:
            for memory in memories:
                with _Crew(memory, threads, timeout, Path(name)) as crew:
                    crew.start((*present, *units))
                    for case in cases:
                        number += 1
                        measured, failed = _case(crew, case, present, units, rounds, order, under)
                        rows += measured
                        faults += failed
                        keep(measured)
                        words = [f"{row.peer} {row.ms:.3g} ms" for row in measured]
                        words += [f"{fault.peer} {fault.what}" for fault in failed]
                        tell(f"[{number}/{total}] {case}, {memory} memory: {', '.join(words) or 'nobody'}")
        except KeyboardInterrupt:
            interrupted = True
    return Measurements(tuple(rows), tuple(peer.name for peer in peers), tuple(faults), missing, interrupted)


def _case(
    crew: _Crew,
    case: Case,
    peers: Sequence[Peer],
    units: Units,
    rounds: int,
    order: random.Random,
    under: Mapping[str, str],
) -> tuple[list[Measurement], list[Fault]]:
    """Measure a case; returns the measurements, in the order of the peers, and what went wrong."""
    faults: list[Fault] = []
    crew.drop()
    asked = [peer for peer in peers if peer.applies(case) and not crew.lost(peer)]
    ready = _prepared(crew, case, asked, units, faults)
    calls: dict[str, int] = {}
    turns: dict[str, list[list[Timing]]] = {peer.name: [] for peer in ready}
    for turn in range(-1, rounds):  # the first, which is not kept, shows how long a call lasts
        order.shuffle(ready)
        for peer in list(ready):
            try:
                timings = crew.ask(peer, Time(calls.get(peer.name, 1)), f"being timed on {case}")
            except PeerError as error:
                ready.remove(peer)
                faults.append(Fault(str(case), crew.memory, peer.name, str(error)))
                continue
            if turn < 0:
                calls[peer.name] = _calls(timings[0].seconds)
            else:
                turns[peer.name].append(timings)
    if any(unit not in ready for unit in units):
        return [], faults
    copy, least = (_median_ms(turns[unit.name]) for unit in units)
    names = {peer.name for peer in ready}
    measured = []
    for peer in peers:
        if peer.name in names:
            each = [_median_ms([timings]) for timings in turns[peer.name]]
            lower, _, upper = statistics.quantiles(each, n=4) if len(each) > 1 else (each[0],) * 3
            pages = [t.faults for timings in turns[peer.name] for t in timings if t.faults is not None]
            measured.append(
                Measurement(
                    case, crew.memory, peer.name, statistics.median(each), lower, upper, copy, least,
                    statistics.median(pages) if pages else None, len(each), under,
                )
            )  # fmt: skip
    return measured, faults


def _prepared(crew: _Crew, case: Case, peers: Sequence[Peer], units: Units, faults: list[Fault]) -> list[Peer]:
    """The peers, and the units, that are ready and whose outputs are right."""
    from normkit.benchmarking.exact import given, wrong  # late: it brings much, and only measuring needs it

    numbers = given(case)
    save(crew.folder, "given", numbers.arrays())
    ready: list[Peer] = []
    try:
        for peer in (*peers, *units):
            try:
                crew.ask(peer, Prepare(case, crew.folder, peer.name), f"making {case} ready")
                ready.append(peer)
            except PeerError as error:
                faults.append(Fault(str(case), crew.memory, peer.name, str(error)))
        outputs = {peer.name: load(crew.folder, peer.name) for peer in ready if peer not in units}
        mistakes = wrong(case, numbers, outputs, {peer.name: peer.room for peer in peers})
    finally:
        for peer in (*peers, *units):
            remove(crew.folder, peer.name)
        remove(crew.folder, "given")
    faults += [Fault(str(case), crew.memory, name, f"is wrong: {what}") for name, what in mistakes.items()]
    right = [peer for peer in ready if peer.name not in mistakes]
    whole = all(unit in right for unit in units) and len(right) > len(units)
    return right if whole else []


def _calls(seconds: float) -> int:
    least, most = _CALLS
    return 1 if seconds > _SLOW else min(most, max(least, round(_TURN / max(seconds, 1e-9))))


def _median_ms(turns: Sequence[Sequence[Timing]]) -> float:
    """The median over turns of the median within a turn, in milliseconds."""
    return 1e3 * statistics.median(statistics.median(t.seconds for t in timings) for timings in turns)
