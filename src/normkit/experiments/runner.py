"""Worker processes, and the trials they are given."""

from __future__ import annotations

import contextlib
import os
import pickle
import queue
import random
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import normkit.errors
from normkit.errors import NormError, NormRuntimeError, message
from normkit.experiments.config import TrialConfig
from normkit.experiments.devices import environment
from normkit.experiments.results import TrialResult
from normkit.experiments.session import Job, Plan
from normkit.experiments.store import Store
from normkit.experiments.worker import PLAN, Failure, Report, Watched
from normkit.processes import ended, interpreter

__all__ = ["Crew", "run_trials", "take_trials"]

_PLANNING = "reading the question"  # what a worker was asked, in an error
_POLL = 1.0  # seconds between looks at what others do


class Crew:
    """Worker processes, one thread each, that share a question. Whatever ends the context, none is left behind.

    Args:
        job: the question; replaced by the complete one once it is planned.
        size: how many, may be set until trials are run; each is started when it is first asked something.
        log: where the workers' own output goes, None for standard error.
        devices: GPUs to spread the workers over; each sees one.
    """

    def __init__(self, job: Job, size: int, log: Path | None = None, devices: tuple[str, ...] = ()) -> None:
        self.job, self.size, self._devices = job, size, devices
        self._log_path, self._log = log, log.open("ab") if log else None
        self._answers: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()
        self._workers: dict[int, _Worker] = {}
        self.judge: Callable[[int, Report], bool] = lambda *_: False

    def __enter__(self) -> Crew:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in self._workers.values():
            worker.process.kill()
        for worker in self._workers.values():
            worker.close()
        if self._log is not None and self._log_path is not None:
            self._log.close()
            with contextlib.suppress(OSError):
                if self._log_path.stat().st_size == 0:
                    self._log_path.unlink()

    def plan(self, meanwhile: Callable[[], None] = lambda: None) -> Plan:
        """Let the first worker make the question complete. Raises what it found to be wrong with it.

        `meanwhile` is called here while the worker starts.
        """
        self.ask(0, PLAN, _PLANNING)
        meanwhile()
        while (answered := self.answer()) is None:
            pass
        plan: Plan = answered[1]
        self.job = plan.job
        return plan

    def ask(self, number: int, question: Any, what: str) -> None:
        """Give a worker a question; `what` names it in an error."""
        if number not in self._workers:
            here = environment(self._devices, number)
            self._workers[number] = _Worker(number, self.job, self._answers, self._log, here, self._judged)
        self._workers[number].questions.put((question, what))

    def _judged(self, number: int, report: Report) -> bool:
        return self.judge(number, report)

    def answer(self) -> tuple[int, Any] | None:
        """The number of the next worker that has answered, with its answer; None after a second without one.

        Raises what it raised, and NormRuntimeError for a worker that died.
        """
        try:
            # The timeout lets Ctrl-C through on systems where waiting for a lock blocks it.
            number, answer = self._answers.get(timeout=1.0)
        except queue.Empty:
            return None
        if isinstance(answer, Exception):
            raise answer
        return number, answer


class _Worker:
    """One process and the thread that talks to it."""

    def __init__(
        self,
        number: int,
        job: Job,
        answers: queue.SimpleQueue[Any],
        log: IO[bytes] | None,
        env: dict[str, str],
        judge: Callable[[int, Report], bool],
    ) -> None:
        # One thread per worker, also for libraries that read the environment when they are loaded.
        threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            interpreter("normkit.experiments.worker"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env={**os.environ, **threads, **env},
        )
        self.questions: queue.SimpleQueue[tuple[Any, str] | None] = queue.SimpleQueue()
        self._number, self._answers, self._judge = number, answers, judge
        self._thread = threading.Thread(target=self._talk, args=(pickle.dumps(job),), daemon=True)
        self._thread.start()

    def close(self) -> None:
        """After the process was killed: wait for both to end."""
        self.questions.put(None)
        self.process.wait()
        self._thread.join()
        for pipe in (self.process.stdin, self.process.stdout):
            # What was still to be written to a killed worker is lost, as it should be.
            with contextlib.suppress(OSError):
                if pipe is not None:
                    pipe.close()

    def _talk(self, said: bytes) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        while (asked := self.questions.get()) is not None:
            question, what = asked
            try:
                self.process.stdin.write(said + pickle.dumps(question))
                self.process.stdin.flush()
                said = b""
                while isinstance(answer := pickle.load(self.process.stdout), Report):
                    self.process.stdin.write(pickle.dumps(self._judge(self._number, answer)))
                    self.process.stdin.flush()
                if isinstance(answer, Failure):
                    answer = _failed(answer, what)
            except (OSError, EOFError, pickle.UnpicklingError):
                answer = _dead(self.process, what)
            except Exception as error:  # a silent end of this thread would leave the run waiting for ever
                answer = error
            self._answers.put((self._number, answer))


def run_trials(
    configs: Sequence[TrialConfig],
    crew: Crew,
    store: Store,
    done: Callable[[TrialResult | None, int], None],
) -> dict[str, TrialResult]:
    """Run what is not finished yet, and return the results of all by their keys; see :func:`take_trials`."""
    take_trials(configs, crew, store, done)
    return store.finished({config.key() for config in configs})


def take_trials(
    configs: Sequence[TrialConfig],
    crew: Crew,
    store: Store,
    done: Callable[[TrialResult | None, int], None],
    *,
    stay: bool = True,
) -> None:
    """Run what is not finished yet.

    `done` is called in this thread with every result that was trained here, and with None for one that another process
    finished meanwhile; its second argument is the number of finished trials. What another living process works on is
    waited for, and taken over if that process ends; without `stay` it is left to the others. The first failing trial or
    dying worker ends the run with an error; finished trials stay in the store.
    """
    wanted = {config.key(): config for config in configs}
    finished = store.finished_keys() & wanted.keys()
    todo = deque(config for key, config in wanted.items() if key not in finished)
    if not stay:
        random.shuffle(todo)  # all machines in one order would claim the same trials, and lose most claims
    waiting: dict[str, TrialConfig] = {}
    idle, busy = list(range(crew.size))[::-1], dict[int, tuple[int, TrialConfig]]()
    looked = time.monotonic()
    watched = crew.job.config.pruner is not None
    crew.judge = lambda number, report: store.stops(busy[number][0], *report)
    while todo or busy or (waiting and stay):
        while idle and todo:
            config = todo.popleft()
            claim = store.claim(config)
            if claim is None:
                waiting[config.key()] = config
                continue
            number = idle.pop()
            busy[number] = claim, config
            crew.ask(number, Watched(config) if watched else config, f"training {config}")
        answered = None
        if busy:
            answered = crew.answer()
        elif waiting and not todo:
            time.sleep(_POLL)
        if answered is not None:
            number, result = answered
            claim, config = busy.pop(number)
            store.finish(claim, result)
            idle.append(number)
            finished.add(config.key())
            done(result, len(finished))
        if waiting and time.monotonic() - looked >= _POLL:
            looked = time.monotonic()
            for key in waiting.keys() & store.finished_keys():
                del waiting[key]
                finished.add(key)
                done(None, len(finished))
            for key in waiting.keys() - store.claimed_elsewhere().keys():
                todo.append(waiting.pop(key))


def _dead(process: subprocess.Popen[bytes], what: str) -> NormRuntimeError:
    how = ended(process)
    must = f"a worker must live until its work is done; it ended with {how} while {what}"
    hint = "the system may have run out of memory, try fewer workers" if how == "SIGKILL" else None
    return NormRuntimeError(message(must, hint=hint))


def _failed(failure: Failure, what: str) -> NormError:
    kind = getattr(normkit.errors, failure.kind) if failure.kind else NormRuntimeError
    planning = failure.kind is not None and what == _PLANNING
    error: NormError = kind(failure.text if planning else f"{what} failed: {failure.text}")
    if failure.trace:
        error.__cause__ = RuntimeError(failure.trace)
    return error
