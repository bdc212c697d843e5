"""Another machine: it takes trials of the comparisons in a storage, whoever asked for them."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from types import TracebackType

from normkit.errors import NormError
from normkit.experiments.connection import Connection
from normkit.experiments.devices import crew_size, gpus, may_use
from normkit.experiments.progress import Progress
from normkit.experiments.questions import Question
from normkit.experiments.results import TrialResult
from normkit.experiments.runner import Crew, take_trials
from normkit.experiments.session import Plan
from normkit.experiments.store import QUESTION, STUDY, Store

__all__ = ["Machine"]

_LOOK = 5.0  # seconds between looks for new questions: no hurry beside trials, no load for a database


class _RefusedError(Exception):
    """A question that this machine cannot help with."""

    def __init__(self, reason: NormError) -> None:
        super().__init__(str(reason))
        self.reason = reason


class Machine:
    """What can train the trials of a storage. Leaving the context gives up what is claimed.

    Args:
        storage: URL of Optuna that all machines reach.
        workers: processes; by default one per core, or one per GPU where there are several (see
            :func:`normkit.experiments.devices.crew_size`).
        teller: is told about the trials of each question.
        tell: is told why this machine cannot help with a question.

    Raises NormRuntimeError where the storage cannot be opened or read.
    """

    def __init__(self, storage: str, workers: int | None, teller: Progress, tell: Callable[[NormError], None]) -> None:
        self._storage, self._workers, self._teller, self._tell = storage, workers, teller, tell
        self._connection = Connection(storage)
        self._open = contextlib.ExitStack()
        self._open.callback(self._connection.close)
        self._stores: dict[str, Store] = {}
        self._finished: set[str] = set()
        self.refused: dict[str, NormError] = {}

    def __enter__(self) -> Machine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.__exit__(kind, error, trace)

    def work(self, *, wait: bool = False) -> int:
        """Take trials until none is left to claim, and return how many were trained here.

        Those that others are at are left to them. With `wait` there is no end: new questions are taken up, and the
        trials of processes that died. Raises what a trial raised.
        """
        trained = 0
        while True:
            took = sum(map(self._helped, self._questions()))
            trained += took
            if took:
                continue  # meanwhile more may have been asked
            if not wait:
                return trained
            time.sleep(_LOOK)

    def _questions(self) -> Iterator[Question]:
        """What is asked in the storage, as far as it is neither finished nor refused."""
        for study in self._connection.ask("read", self._connection.storage.get_all_studies):
            for name, plain in study.user_attrs.items():
                known = name in self._finished or name in self.refused
                if known or not (study.study_name.startswith(STUDY) and name.startswith(QUESTION)):
                    continue
                try:
                    yield Question.from_dict(plain)
                except NormError as error:
                    self._refuse(name, error)

    def _helped(self, question: Question) -> int:
        name, keys = QUESTION + question.name, set(question.trials)
        if name not in self._stores:
            self._stores[name] = self._open.enter_context(Store.of(question.config, self._storage))
        store = self._stores[name]
        open_ = keys - store.finished_keys()
        if not open_:
            self._finished.add(name)
        if not open_ - store.claimed_elsewhere().keys():
            return 0
        try:
            return self._trained(question, store)
        except _RefusedError as refused:
            self._refuse(name, refused.reason)
            return 0

    def _trained(self, question: Question, store: Store) -> int:
        devices = gpus() if may_use(question.config) else ()
        size = crew_size(self._workers, question.config, devices)
        trained = 0

        def done(result: TrialResult | None, _: int) -> None:
            nonlocal trained
            trained += result is not None
            self._teller.advance(str(result.config) if result else "by another process")

        try:
            crew = Crew(question.job(), size, devices=devices)
        except NormError as error:
            raise _RefusedError(error) from error
        with crew:
            plan = _planned(question, crew)
            total, kept = len(question.trials), len(store.finished_keys() & set(question.trials))
            self._teller.start(total, f"{question.config.subject}: {total - kept} of {total} trials to do", kept)
            try:
                take_trials(plan.trials, crew, store, done, stay=False)
            finally:
                self._teller.stop()
        return trained

    def _refuse(self, name: str, error: NormError) -> None:
        self.refused[name] = error
        self._tell(error)


def _planned(question: Question, crew: Crew) -> Plan:
    try:
        plan = crew.plan()
        question.check(plan)
    except NormError as error:
        raise _RefusedError(error) from error
    return plan
