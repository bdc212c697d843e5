"""Trials in an Optuna study: what is finished stays, whoever computed it and whatever ended the program.

Execution is at least once, counting exactly once. Every trial carries the key of its configuration; the first complete
trial of a key counts. A running trial is a claim: others leave its configuration alone as long as the process that
made it lives (:mod:`normkit.experiments.liveness`). Claims are atomic in the database: Optuna inserts a trial while it
holds the lock of the study's row, so that whoever sees one sees all that were inserted before it. Each claim is looked
at again after it was inserted, and of all claims on a key the first holds; the others give way.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import secrets
import socket
import threading
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from types import TracebackType
from typing import Any

from normkit.errors import NormError, NormRuntimeError, message
from normkit.experiments.config import GOALS, Config, TrialConfig
from normkit.experiments.connection import Connection, is_shared, quiet
from normkit.experiments.liveness import Beats, Lock
from normkit.experiments.pruning import family, is_behind, may_lose
from normkit.experiments.results import TrialResult

__all__ = ["QUESTION", "STUDY", "Store", "plain"]

# Prefixes: of the names of our studies, and of the attributes of a study that say what is asked in it.
STUDY, QUESTION = "normkit ", "question "
_DIED = "its process ended"
# Deaths of a trial that one process sees before it asks for help: the first may be a machine that was switched off, the
# second chance; a trial that ends three processes (of memory, as a rule) would end all there are, one after the other.
_DEATHS = 3


def plain(result: TrialResult) -> TrialResult:
    """The result as it comes back from the storage, so that a resumed comparison equals one that was not."""
    return TrialResult.from_dict(json.loads(json.dumps(result.to_dict())))


class Store:
    """The trials of one question, in an Optuna storage.

    Args:
        name: of the study; keys tell its trials apart, so that several questions may share a study.
        direction: `max` or `min`, for Optuna's own tools.
        url: any storage URL of Optuna, None keeps the trials in memory.
        folder: where the lock file lies, None takes the system's folder for temporary files. A database server needs
            none: heartbeats tell who lives.
        pruner: one of :data:`normkit.experiments.pruning.PRUNERS`. What it ended counts for comparisons with the same
            pruner alone; others train it to the end.

    Raises NormRuntimeError where the storage cannot be opened or written. Use it as a context manager: leaving gives
    up what is still claimed.
    """

    def __init__(
        self,
        name: str,
        direction: str,
        url: str | None = None,
        folder: Path | None = None,
        pruner: str | None = None,
    ) -> None:
        self._claims: dict[int, str] = {}
        self._direction, self._pruner = f"{direction}imize", pruner
        self._judging = threading.Lock()  # workers report in threads of their own
        self._connection = Connection(url, str(folder or "memory"))
        self._optuna, self._storage = self._connection.optuna, self._connection.storage
        self._lock: Lock | None = None
        self._beats: Beats | None = None
        try:
            if not is_shared(url):
                self._lock = self._connection.ask("opened", Lock, folder)
            self._study = self._connection.ask("opened", self._created, name, direction)
        except BaseException:
            self._leave()
            raise
        if url is not None:
            self._beats = Beats(self._storage, self._study, lambda: tuple(self._claims))
            self._connection.lost = self._beats.missed
        self._before = max((trial._trial_id for trial in self._trials()), default=-1)

    @classmethod
    def of(cls, config: Config, url: str | None = None, folder: Path | None = None) -> Store:
        """The trials of what a question is about: all questions about one model or loop share a study."""
        goal = config.goal or GOALS.get(config.metric or "", "max")
        return cls(f"{STUDY}{config.subject}", goal, url, folder, config.pruner)

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._connection.hurry()
        # What cannot be written now is found dead by others, since nothing shows any longer that this process lives.
        with contextlib.suppress(NormError):
            for number in list(self._claims):
                self.give_up(number, "interrupted" if error is None else type(error).__name__)
        self._leave()

    def describe(self, name: str, question: Mapping[str, Any]) -> None:
        """Say what is asked, so that other machines can help."""
        with quiet(self._optuna):
            self._connection.ask("written", self._storage.set_study_user_attr, self._study, QUESTION + name, question)

    def finished(self, keys: Set[str]) -> dict[str, TrialResult]:
        """The first complete trial of each of these keys, as far as there is one."""
        found: dict[str, TrialResult] = {}
        for trial in self._trials():
            key = trial.user_attrs.get("key")
            if key in keys and key not in found and self._counts(trial):
                found[key] = TrialResult.from_dict(trial.user_attrs["result"])
        return found

    def finished_keys(self) -> set[str]:
        """The keys of all complete trials."""
        return self._finished_in(self._trials())

    def stops(self, number: int, step: int, metric: float) -> bool:
        """Keep what a trial of this process reports, and say whether the pruner ends it."""
        with self._judging:
            return self._connection.ask("written", self._judged, number, step, metric)

    def claimed_elsewhere(self) -> dict[str, str]:
        """Keys that another living process works on, and which. Trials of dead processes are closed as failed."""
        return self._claimed_in(self._trials())

    def _finished_in(self, trials: Sequence[Any]) -> set[str]:
        return {trial.user_attrs["key"] for trial in trials if self._counts(trial)}

    def _claimed_in(self, trials: Sequence[Any]) -> dict[str, str]:
        claims: dict[str, str] = {}
        theirs = [trial for trial in self._running(trials) if trial._trial_id not in self._claims]
        dead = self._dead(theirs)
        for trial in theirs:
            owner = trial.user_attrs["owner"]
            if trial._trial_id in dead:
                self._close(trial._trial_id, _DIED)
            else:
                claims[trial.user_attrs["key"]] = f"process {owner['pid']} on {owner['host']}"
        return claims

    def claim(self, config: TrialConfig) -> int | None:
        """Announce that this process trains this configuration. None where another does, or has done it.

        Raises NormRuntimeError for a trial that has ended several processes since this one began.
        """
        key, trials = config.key(), self._trials()
        if key in self._finished_in(trials) or key in self._claimed_in(trials):
            return None
        self._refuse_deadly(config, trials)
        number = self._announced(config)
        trials = self._trials()
        running = [trial for trial in self._running(trials) if trial.user_attrs["key"] == key]
        earlier = [trial for trial in running if trial._trial_id < number]
        if len(earlier) > len(self._dead(earlier)) or key in self._finished_in(trials):
            self.give_up(number, "another process was quicker")
            return None
        return number

    def finish(self, number: int, result: TrialResult) -> None:
        """Keep a result, also where another process took the claim for dead. One that diverged is pruned for Optuna."""
        del self._claims[number]
        try:
            self._connection.ask("written", self._keep, number, result)
        except self._optuna.exceptions.UpdateFinishedTrialError:
            # Closed as dead, unless it was us, and the connection was lost before the answer came.
            if result.config.key() in self.finished_keys():
                return
            number = self._announced(result.config)
            self._connection.ask("written", self._keep, number, result)
            del self._claims[number]

    def give_up(self, number: int, reason: str) -> None:
        """Close a claim without a result."""
        del self._claims[number]
        self._close(number, reason)

    def _refuse_deadly(self, config: TrialConfig, trials: Sequence[Any]) -> None:
        died = [
            trial
            for trial in trials
            if trial._trial_id > self._before
            and trial.user_attrs.get("key") == config.key()
            and trial.user_attrs.get("failed") == _DIED
        ]
        if len(died) >= _DEATHS:
            must = f"a trial must leave its process alive; {len(died)} processes ended while training {config}"
            hint = "the systems may have run out of memory; the same command begins to count anew"
            raise NormRuntimeError(message(must, hint=hint))

    def _announced(self, config: TrialConfig) -> int:
        mark, tries = secrets.token_hex(8), itertools.count()
        number: int = self._connection.ask("written", lambda: self._inserted(config, mark, again=next(tries) > 0))
        self._claims[number] = config.key()
        if self._beats is not None:
            self._beats.start()
        return number

    def _inserted(self, config: TrialConfig, mark: str, *, again: bool) -> int:
        # Where the connection was lost before the answer came, it is there already.
        for trial in self._storage.get_all_trials(self._study, deepcopy=False) if again else ():
            if trial.user_attrs.get("owner", {}).get("mark") == mark:
                return int(trial._trial_id)
        lock = {"lock": str(self._lock.path)} if self._lock else {}
        with quiet(self._optuna):
            number: int = self._storage.create_new_trial(
                self._study,
                template_trial=self._optuna.trial.create_trial(
                    state=self._optuna.trial.TrialState.RUNNING,
                    params={"lr": config.lr, "batch_size": config.batch_size, "seed": config.seed},
                    distributions=self._distributions(),
                    user_attrs={
                        "key": config.key(),
                        "norm": config.norm,
                        "config": config.canonical(),
                        "owner": {"host": socket.gethostname(), "pid": os.getpid(), "mark": mark, **lock},
                    },
                ),
            )
        return number

    def _keep(self, number: int, result: TrialResult) -> None:
        states = self._optuna.trial.TrialState
        if result.diverged:
            self._storage.set_trial_user_attr(number, "diverged", True)
        self._storage.set_trial_user_attr(number, "result", result.to_dict())
        # The state comes last: a trial is complete only when everything of it is there.
        if result.diverged or result.pruned:
            self._storage.set_trial_state_values(number, states.PRUNED)
        else:
            assert result.final is not None
            self._storage.set_trial_state_values(number, states.COMPLETE, [result.final])

    def _counts(self, trial: Any) -> bool:
        states = self._optuna.trial.TrialState
        complete = trial.state in (states.COMPLETE, states.PRUNED) and "result" in trial.user_attrs
        return complete and trial.user_attrs.get("pruned") in (None, self._pruner)

    def _judged(self, number: int, step: int, metric: float) -> bool:
        assert self._pruner is not None
        self._storage.set_trial_intermediate_value(number, step, metric)
        trials, index = self._family(number)
        with quiet(self._optuna):
            behind, remembered = is_behind(self._optuna, self._pruner, self._direction, trials, index)
        for name, value in remembered.items():
            self._storage.set_trial_system_attr(number, name, value)
        if not behind or not may_lose(trials, index):
            return False
        self._storage.set_trial_user_attr(number, "pruned", self._pruner)
        # Another machine may have ended the last other rate in the same moment: whoever sees that goes on.
        if may_lose(*self._family(number)):
            return True
        self._storage.set_trial_user_attr(number, "pruned", None)
        return False

    def _family(self, number: int) -> tuple[list[Any], int]:
        """The trials that compete with one of ours, itself included, and which it is."""
        known = self._storage.get_all_trials(self._study, deepcopy=False)
        mine = family(next(trial for trial in known if trial._trial_id == number).user_attrs["config"])
        failed = self._optuna.trial.TrialState.FAIL
        trials = [trial for trial in known if trial.state != failed and family(trial.user_attrs["config"]) == mine]
        return trials, [trial._trial_id for trial in trials].index(number)

    def _leave(self) -> None:
        if self._beats is not None:
            self._beats.stop()
        if self._lock is not None:
            self._lock.release()
        self._connection.close()

    def _created(self, name: str, direction: str) -> int:
        """The number of the study."""
        ways = self._optuna.study.StudyDirection
        goal = {"max": ways.MAXIMIZE, "min": ways.MINIMIZE}[direction]
        with quiet(self._optuna):
            self._optuna.create_study(study_name=name, storage=self._storage, load_if_exists=True, direction=goal)
        return int(self._storage.get_study_id_from_name(name))

    def _distributions(self) -> dict[str, Any]:
        # Optuna wants to know where parameters come from. Ours come from a grid, so these only have to hold it.
        kinds = self._optuna.distributions
        return {
            "lr": kinds.FloatDistribution(1e-300, 1e300, log=True),
            "batch_size": kinds.IntDistribution(1, 2**31),
            "seed": kinds.IntDistribution(0, 2**31),
        }

    def _trials(self) -> list[Any]:
        return list(self._connection.ask("read", self._storage.get_all_trials, self._study, False))

    def _running(self, trials: Sequence[Any]) -> list[Any]:
        running = self._optuna.trial.TrialState.RUNNING
        return [trial for trial in trials if trial.state == running and "owner" in trial.user_attrs]

    def _dead(self, running: Sequence[Any]) -> set[int]:
        """Which of these trials of others have no process any more: of this machine the lock tells, else the beats."""
        beating, dead = [], set[int]()
        for trial in running:
            owner = trial.user_attrs["owner"]
            if self._lock is None or owner["host"] != self._lock.host or "lock" not in owner:
                beating.append(trial._trial_id)
            elif not Lock.is_held(Path(owner["lock"])):
                dead.add(trial._trial_id)
        if beating and self._beats is not None:
            dead |= self._connection.ask("read", self._beats.dead, beating)
        return dead

    def _close(self, number: int, reason: str) -> None:
        # Two processes may find the same dead trial; whoever comes second finds it closed.
        with contextlib.suppress(self._optuna.exceptions.UpdateFinishedTrialError):
            self._connection.ask("written", self._failed, number, reason)

    def _failed(self, number: int, reason: str) -> None:
        self._storage.set_trial_user_attr(number, "failed", reason)
        self._storage.set_trial_state_values(number, self._optuna.trial.TrialState.FAIL)
