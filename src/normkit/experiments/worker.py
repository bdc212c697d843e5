"""A worker process: takes trials from its standard input and answers on its standard output, until the input ends.

It is started as a fresh interpreter and not through multiprocessing, which would run the user's main script again:
a script that calls `normkit.compare` without a main guard would start itself without end.
"""

from __future__ import annotations

import os
import pickle
import signal
import sys
import threading
import time
import traceback
from typing import NamedTuple

from normkit.errors import NormError
from normkit.experiments.config import TrialConfig
from normkit.experiments.data import Dataset, Prepared, prepare
from normkit.experiments.protocol import training
from normkit.experiments.trial import run_trial

__all__ = ["Failure", "main"]


class Failure(NamedTuple):
    """What a trial raised, in words."""

    text: str
    trace: str | None  # None for an error that normkit worded


def main() -> None:
    """Serve one parent: first the framework and the data come, then one configuration after the other."""
    # Ctrl-C reaches the whole group of processes; the parent decides what happens then.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever else is printed must not get between the answers
    questions = sys.stdin.buffer
    prepared: dict[str, Prepared] = {}
    try:
        framework, data = pickle.load(questions)
        module = training(framework)
        module.limit_threads(1)
        while True:
            config = pickle.load(questions)
            pickle.dump(_answer(config, data, prepared, module), answers)
            answers.flush()
    except (EOFError, BrokenPipeError):
        return  # no more trials, or the parent is gone


def _end_with_parent(parent: int) -> None:
    """End this process once its parent is gone: in the middle of a long trial the closed pipe goes unnoticed."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


def _answer(config: TrialConfig, data: Dataset, prepared: dict[str, Prepared], module: object) -> object:
    try:
        if config.inputs not in prepared:
            prepared[config.inputs] = prepare(data, config.inputs)
        return run_trial(config, prepared[config.inputs], data.classes, module)  # type: ignore[arg-type]
    except NormError as error:
        return Failure(str(error), None)
    except Exception as error:
        return Failure(f"{type(error).__name__}: {error}", traceback.format_exc())
