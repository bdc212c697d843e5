"""A worker process: takes questions from its standard input and answers on its standard output, until the input ends.

It is started as a fresh interpreter and not through multiprocessing, which would run the user's main script again:
a script that calls `normkit.compare` without a main guard would start itself without end.
"""

from __future__ import annotations

import pickle
import traceback
from collections.abc import Callable
from typing import Any, NamedTuple

from normkit.errors import NormError
from normkit.experiments.session import Session
from normkit.processes import pipes

__all__ = ["PLAN", "Failure", "main"]

PLAN = "plan"


class Failure(NamedTuple):
    """What a question raised, in words."""

    text: str
    kind: str | None  # name of the class of an error that normkit worded, else None
    trace: str | None


def main() -> None:
    """Serve one parent: a Job comes first, PLAN is answered with its plan, a TrialConfig with its result."""
    questions, answers = pipes()
    try:
        job = pickle.load(questions)
        session: Session | None = None
        while True:
            question = pickle.load(questions)
            if session is None:
                answer = _answer(Session, job)
                session = answer if isinstance(answer, Session) else None
            if session is not None:
                answer = _answer(session.plan) if question == PLAN else _answer(session.run, question)
            pickle.dump(answer, answers)
            answers.flush()
    except (EOFError, BrokenPipeError):
        return  # no more questions, or the parent is gone


def _answer(function: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return function(*arguments)
    except NormError as error:
        cause = error.__cause__
        trace = "".join(traceback.format_exception(cause)) if cause and not isinstance(cause, NormError) else None
        return Failure(str(error), type(error).__name__, trace)
    except SystemExit as error:
        return Failure(f"the program was ended (SystemExit: {error})", "NormValueError", traceback.format_exc())
    except Exception as error:
        return Failure(f"{type(error).__name__}: {error}", None, traceback.format_exc())
