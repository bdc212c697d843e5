"""A worker process: takes questions from its standard input and answers on its standard output, until the input ends.

It is started as a fresh interpreter and not through multiprocessing, which would run the user's main script again:
a script that calls `normkit.compare` without a main guard would start itself without end.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import Any, NamedTuple

from normkit.errors import NormError
from normkit.experiments.config import TrialConfig
from normkit.experiments.session import Job, Session
from normkit.processes import serve

__all__ = ["PLAN", "Failure", "Report", "Watched", "main"]

PLAN = "plan"


class Failure(NamedTuple):
    """What a question raised, in words."""

    text: str
    kind: str | None  # name of the class of an error that normkit worded, else None
    trace: str | None


class Report(NamedTuple):
    """What a worker says in the middle of a trial; the parent answers whether the trial has to stop."""

    step: int
    metric: float


class Watched(NamedTuple):
    """A trial that reports on its way."""

    config: TrialConfig


def main() -> None:
    """Serve one parent: a Job comes first, PLAN is answered with its plan, a TrialConfig with its result.

    A Watched trial asks with a Report after every evaluation.
    """
    serve(_begin)


def _begin(job: Job, ask: Callable[[Any], Any]) -> Callable[[Any], Any]:
    session: Session | None = None

    def answer(question: Any) -> Any:
        nonlocal session
        if session is None:
            made = _answer(Session, job)
            if not isinstance(made, Session):
                return made
            session = made
        if question == PLAN:
            return _answer(session.plan)
        if isinstance(question, Watched):
            return _answer(session.run, question.config, lambda step, metric: bool(ask(Report(step, metric))))
        return _answer(session.run, question)

    return answer


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
