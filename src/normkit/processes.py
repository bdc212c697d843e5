"""Worker processes that are asked through their standard input and answer on their standard output.

They are started as fresh interpreters and not through multiprocessing, which would run the user's main script again.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

__all__ = ["ended", "interpreter", "serve"]

_MAIN = "import sys; sys.path[:] = {path!r}; from {module} import main; main()"


def interpreter(module: str) -> list[str]:
    """The command that calls `main()` of a module in a fresh interpreter, with the same search path."""
    return [sys.executable, "-c", _MAIN.format(path=sys.path, module=module)]


def serve(begin: Callable[[Any, Callable[[Any], Any]], Callable[[Any], Any]]) -> None:
    """In the worker: answer questions, until there are no more or the parent is gone.

    What is read first has no answer: `begin` gets it and returns what answers all that follows. Its second argument
    is a function that asks the parent something in the middle of an answer. From here on the process ends with its
    parent, and Ctrl-C is the parent's business.
    """
    questions, answers = _pipes()

    def ask(question: Any) -> Any:
        pickle.dump(question, answers)
        answers.flush()
        return pickle.load(questions)

    with contextlib.suppress(EOFError, BrokenPipeError):
        answer = begin(pickle.load(questions), ask)
        while True:
            pickle.dump(answer(pickle.load(questions)), answers)
            answers.flush()


def _pipes() -> tuple[IO[bytes], IO[bytes]]:
    """Return (questions, answers)."""
    # Ctrl-C reaches the whole group of processes; the parent decides what happens then.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever else is printed must not get between the answers
    questions = os.fdopen(os.dup(sys.stdin.fileno()), "rb")
    with Path(os.devnull).open() as nothing:  # code that asks for input finds none, instead of our questions
        os.dup2(nothing.fileno(), sys.stdin.fileno())
    return questions, answers


def _end_with_parent(parent: int) -> None:
    """End this process once its parent is gone: in the middle of long work the closed pipe goes unnoticed."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def ended(process: subprocess.Popen[bytes]) -> str:
    """Wait for the end of a process and return how it ended: its exit code, or a signal by name."""
    code = process.wait()
    if code >= 0:
        return f"exit code {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"
