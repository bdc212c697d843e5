"""Trials in worker processes, one thread each."""

from __future__ import annotations

import contextlib
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence

from normkit.errors import NormRuntimeError, message
from normkit.experiments.config import TrialConfig
from normkit.experiments.data import Dataset
from normkit.experiments.trial import TrialResult
from normkit.experiments.worker import Failure

__all__ = ["cores", "run_trials"]

_MAIN = "import sys; sys.path[:] = {path!r}; from normkit.experiments.worker import main; main()"


def cores() -> int:
    """Number of cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def run_trials(
    configs: Sequence[TrialConfig],
    data: Dataset,
    workers: int,
    done: Callable[[TrialResult], None],
) -> list[TrialResult]:
    """Run all trials and return their results in the order of `configs`.

    `done` is called in this thread as each result arrives. The first failing trial or dying worker ends the run with a
    NormRuntimeError. Whatever ends it, no worker is left behind.
    """
    todo: queue.SimpleQueue[tuple[int, TrialConfig]] = queue.SimpleQueue()
    for item in enumerate(configs):
        todo.put(item)
    arrived: queue.SimpleQueue[tuple[int, TrialResult | Exception]] = queue.SimpleQueue()
    processes = [_start() for _ in range(min(workers, len(configs)))]
    setup = pickle.dumps((configs[0].framework, data))
    threads = [
        threading.Thread(target=_serve, args=(process, setup, todo, arrived), daemon=True) for process in processes
    ]
    for thread in threads:
        thread.start()
    results: dict[int, TrialResult] = {}
    try:
        while len(results) < len(configs):
            try:
                # The timeout lets Ctrl-C through on systems where waiting for a lock blocks it.
                number, answer = arrived.get(timeout=1.0)
            except queue.Empty:
                continue
            if isinstance(answer, Exception):
                raise answer
            results[number] = answer
            done(answer)
    finally:
        for process in processes:
            process.kill()
        for process, thread in zip(processes, threads, strict=True):
            process.wait()
            thread.join()
            _close(process)
    return [results[number] for number in range(len(configs))]


def _start() -> subprocess.Popen[bytes]:
    # One thread per worker, also for libraries that read the environment when they are loaded.
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-c", _MAIN.format(path=sys.path)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env)


def _close(process: subprocess.Popen[bytes]) -> None:
    for pipe in (process.stdin, process.stdout):
        # What was still to be written to a killed worker is lost, as it should be.
        with contextlib.suppress(OSError):
            if pipe is not None:
                pipe.close()


def _serve(
    process: subprocess.Popen[bytes],
    setup: bytes,
    todo: queue.SimpleQueue[tuple[int, TrialConfig]],
    arrived: queue.SimpleQueue[tuple[int, TrialResult | Exception]],
) -> None:
    """Feed one worker until nothing is left to do. Runs in a thread of its own."""
    try:
        _feed(process, setup, todo, arrived)
    except Exception as error:  # a silent end of this thread would leave the run waiting for ever
        arrived.put((-1, error))


def _feed(
    process: subprocess.Popen[bytes],
    setup: bytes,
    todo: queue.SimpleQueue[tuple[int, TrialConfig]],
    arrived: queue.SimpleQueue[tuple[int, TrialResult | Exception]],
) -> None:
    assert process.stdin is not None
    assert process.stdout is not None
    while True:
        try:
            number, config = todo.get_nowait()
        except queue.Empty:
            return
        try:
            process.stdin.write(setup + pickle.dumps(config))
            process.stdin.flush()
            setup = b""
            answer = pickle.load(process.stdout)
        except (OSError, EOFError, pickle.UnpicklingError):
            arrived.put((number, _dead(process, config)))
            return
        if isinstance(answer, Failure):
            arrived.put((number, _failed(answer, config)))
            return
        arrived.put((number, answer))


def _dead(process: subprocess.Popen[bytes], config: TrialConfig) -> NormRuntimeError:
    code = process.wait()
    how = f"exit code {code}"
    if code < 0:
        try:
            how = signal.Signals(-code).name
        except ValueError:
            how = f"signal {-code}"
    must = f"a worker must live until its trial is done; it ended with {how} while training {config}"
    hint = "the system may have run out of memory, try fewer workers" if how == "SIGKILL" else None
    return NormRuntimeError(message(must, hint=hint))


def _failed(failure: Failure, config: TrialConfig) -> NormRuntimeError:
    error = NormRuntimeError(message(f"training {config} failed: {failure.text}"))
    if failure.trace:
        error.__cause__ = RuntimeError(failure.trace)
    return error
