"""Trials in an Optuna study: what is finished stays, whoever computed it and whatever ended the program.

Execution is at least once, counting exactly once. Every trial carries the key of its configuration; the first complete
trial of a key counts. A running trial is a claim: others leave its configuration alone as long as the process that
made it lives, which a lock file tells (the system unlocks it when the process ends, however it ends). Optuna's own
`enqueue_trial(skip_if_exists=True)` looks before it inserts, so two processes can both insert; a claim is looked at
again after it was made, and of two claims the later gives way.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import signal
import socket
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator, Set
from datetime import datetime, timedelta
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from normkit.errors import MissingExtraError, NormError, NormRuntimeError, message
from normkit.experiments.config import TrialConfig
from normkit.experiments.results import TrialResult

__all__ = ["Store", "hidden", "plain"]

_PATIENCE = timedelta(hours=1)  # with a trial of another machine; to run one again by mistake costs only time
_BUSY = 60  # seconds that one process waits for another to let go of an SQLite file


def hidden(text: str) -> str:
    """A storage URL, or what was said of one, without the password."""
    return re.sub(r"(://[^:/@\s]*:)[^@\s]*@", r"\1***@", text)


def plain(result: TrialResult) -> TrialResult:
    """The result as it comes back from the storage, so that a resumed comparison equals one that was not."""
    return TrialResult.from_dict(json.loads(json.dumps(result.to_dict())))


class Store:
    """The trials of one question, in an Optuna storage.

    Args:
        name: of the study; keys tell its trials apart, so that several questions may share a study.
        direction: `max` or `min`, for Optuna's own tools.
        url: any storage URL of Optuna, None keeps the trials in memory.
        folder: where the lock file lies, None takes the system's folder for temporary files.

    Raises NormRuntimeError where the storage cannot be opened or written. Use it as a context manager: leaving gives
    up what is still claimed.
    """

    def __init__(self, name: str, direction: str, url: str | None = None, folder: Path | None = None) -> None:
        try:
            import filelock
            import optuna
        except ImportError as error:
            must = f"the comparison needs {error.name}, which is not installed"
            raise MissingExtraError(message(must, hint="pip install 'normkit[lab]'")) from error
        self._optuna, self._filelock = optuna, filelock
        self._url, self._claims = url, dict[int, str]()
        locks = (folder or Path(tempfile.gettempdir())).absolute() / ".normkit-locks"
        self._lock = locks / f"{os.getpid()}-{secrets.token_hex(4)}.lock"
        self._held = filelock.FileLock(self._lock)
        try:
            with self._told("opened"):
                self._held.acquire(timeout=0)
                self._storage, self._study = self._opened(name, direction)
        except BaseException:
            self._unlock()
            raise

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # What cannot be written now is found dead by the next process, since the lock is gone.
        with contextlib.suppress(NormError):
            for number in list(self._claims):
                self.give_up(number, "interrupted" if error is None else type(error).__name__)
        self._unlock()
        self._storage.remove_session()

    def finished(self, keys: Set[str]) -> dict[str, TrialResult]:
        """The first complete trial of each of these keys, as far as there is one."""
        found: dict[str, TrialResult] = {}
        for trial in self._trials():
            key = trial.user_attrs.get("key")
            if key in keys and key not in found and trial.state in self._complete and "result" in trial.user_attrs:
                found[key] = TrialResult.from_dict(trial.user_attrs["result"])
        return found

    def finished_keys(self) -> set[str]:
        """The keys of all complete trials."""
        return {
            trial.user_attrs["key"]
            for trial in self._trials()
            if trial.state in self._complete and "result" in trial.user_attrs
        }

    def claimed_elsewhere(self) -> dict[str, str]:
        """Keys that another living process works on, and which. Trials of dead processes are closed as failed."""
        claims: dict[str, str] = {}
        for trial in self._running():
            owner = trial.user_attrs["owner"]
            if trial._trial_id in self._claims:
                continue
            if self._lives(trial):
                claims[trial.user_attrs["key"]] = f"process {owner['pid']} on {owner['host']}"
            else:
                self._close(trial._trial_id, "its process ended")
        return claims

    def claim(self, config: TrialConfig) -> int | None:
        """Announce that this process trains this configuration. None where another does, or has done it."""
        key = config.key()
        if key in self.finished_keys() or key in self.claimed_elsewhere():
            return None
        number = self._announced(config)
        earlier = [
            trial
            for trial in self._running()
            if trial._trial_id < number and trial.user_attrs["key"] == key and self._lives(trial)
        ]
        if earlier or key in self.finished_keys():
            self.give_up(number, "another process was quicker")
            return None
        return number

    def finish(self, number: int, result: TrialResult) -> None:
        """Keep a result, also where another process took the claim for dead. A diverged trial is recorded as pruned."""
        del self._claims[number]
        with self._told("written"):
            try:
                self._keep(number, result)
            except self._optuna.exceptions.UpdateFinishedTrialError:
                number = self._announced(result.config)
                self._keep(number, result)
                del self._claims[number]

    def give_up(self, number: int, reason: str) -> None:
        """Close a claim without a result."""
        del self._claims[number]
        self._close(number, reason)

    def _announced(self, config: TrialConfig) -> int:
        create = self._optuna.trial.create_trial
        with self._told("written"), _quiet(self._optuna):
            number: int = self._storage.create_new_trial(
                self._study,
                template_trial=create(
                    state=self._optuna.trial.TrialState.RUNNING,
                    params={"lr": config.lr, "batch_size": config.batch_size, "seed": config.seed},
                    distributions=self._distributions(),
                    user_attrs={
                        "key": config.key(),
                        "norm": config.norm,
                        "config": config.canonical(),
                        "owner": {"host": socket.gethostname(), "pid": os.getpid(), "lock": str(self._lock)},
                    },
                ),
            )
        self._claims[number] = config.key()
        return number

    def _keep(self, number: int, result: TrialResult) -> None:
        states = self._optuna.trial.TrialState
        self._storage.set_trial_user_attr(number, "diverged", result.diverged)
        self._storage.set_trial_user_attr(number, "result", result.to_dict())
        # The state comes last: a trial is complete only when everything of it is there.
        if result.diverged:
            self._storage.set_trial_state_values(number, states.PRUNED)
        else:
            assert result.final is not None
            self._storage.set_trial_state_values(number, states.COMPLETE, [result.final])

    @property
    def _complete(self) -> tuple[Any, ...]:
        states = self._optuna.trial.TrialState
        return states.COMPLETE, states.PRUNED

    def _unlock(self) -> None:
        self._held.release()
        with contextlib.suppress(OSError):
            self._lock.unlink()
            self._lock.parent.rmdir()

    def _opened(self, name: str, direction: str) -> tuple[Any, int]:
        """The storage and the number of the study in it."""
        optuna = self._optuna
        ways = {"max": optuna.study.StudyDirection.MAXIMIZE, "min": optuna.study.StudyDirection.MINIMIZE}
        for wait in (0.1, 0.2, 0.4, 0.8, None):
            with _quiet(optuna):
                try:
                    storage = self._storage_of_url()
                    optuna.create_study(
                        study_name=name, storage=storage, load_if_exists=True, direction=ways[direction]
                    )
                    return storage, storage.get_study_id_from_name(name)
                except Exception:
                    # Another process may be making the same tables: one of the two then fails half way.
                    if wait is None:
                        raise
            time.sleep(wait)
        raise AssertionError

    def _storage_of_url(self) -> Any:
        storages = self._optuna.storages
        if self._url is None:
            return storages.InMemoryStorage()
        if not self._url.startswith("sqlite"):
            return storages.get_storage(self._url)
        # get_storage keeps finished trials in memory, so that looking again is cheap.
        return storages.get_storage(storages.RDBStorage(self._url, engine_kwargs={"connect_args": {"timeout": _BUSY}}))

    def _distributions(self) -> dict[str, Any]:
        # Optuna wants to know where parameters come from. Ours come from a grid, so these only have to hold it.
        kinds = self._optuna.distributions
        return {
            "lr": kinds.FloatDistribution(1e-300, 1e300, log=True),
            "batch_size": kinds.IntDistribution(1, 2**31),
            "seed": kinds.IntDistribution(0, 2**31),
        }

    def _trials(self) -> list[Any]:
        with self._told("read"):
            return list(self._storage.get_all_trials(self._study, deepcopy=False))

    def _running(self) -> Iterator[Any]:
        running = self._optuna.trial.TrialState.RUNNING
        return (trial for trial in self._trials() if trial.state == running and "owner" in trial.user_attrs)

    def _lives(self, trial: Any) -> bool:
        """Whether the process of a claim still runs. Of another machine that cannot be known, only how long ago."""
        owner = trial.user_attrs["owner"]
        if owner["host"] != socket.gethostname():
            return trial.datetime_start is None or datetime.now() - trial.datetime_start < _PATIENCE
        if not Path(owner["lock"]).exists():
            return False
        probe = self._filelock.FileLock(owner["lock"])
        try:
            probe.acquire(timeout=0)
        except (self._filelock.Timeout, OSError):
            return True
        probe.release()
        with contextlib.suppress(OSError):
            Path(owner["lock"]).unlink()
        return False

    def _close(self, number: int, reason: str) -> None:
        # Two processes may find the same dead trial; whoever comes second finds it closed.
        with self._told("written"), contextlib.suppress(self._optuna.exceptions.UpdateFinishedTrialError):
            self._storage.set_trial_user_attr(number, "failed", reason)
            self._storage.set_trial_state_values(number, self._optuna.trial.TrialState.FAIL)

    @contextlib.contextmanager
    def _told(self, done: str) -> Iterator[None]:
        """Word what the storage raises: a full disk, a lost connection, a file that is no study."""
        try:
            with _uninterrupted():
                yield
        except (NormError, self._optuna.exceptions.UpdateFinishedTrialError):
            raise
        except Exception as error:
            reason = str(error.__cause__ or error).splitlines()[0]
            where = hidden(self._url or str(self._lock.parent))
            reason = hidden(reason)
            must = f"the trials must be {done} in {where}"
            hint = "make room or mend the connection, then run the same command again: finished trials are kept"
            raise NormRuntimeError(message(must, reason, hint)) from error


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ctrl-C waits: in the middle of a transaction it may be lost, or leave a lock that nobody gives back."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[tuple[int, FrameType | None]] = []
    asked = {sign: signal.getsignal(sign) for sign in (signal.SIGINT, signal.SIGTERM)}
    before = {sign: handler for sign, handler in asked.items() if callable(handler)}
    try:
        for sign in before:
            signal.signal(sign, lambda *arrived: came.append(arrived))
        yield
    finally:
        for sign, handler in before.items():
            signal.signal(sign, handler)
    for number, frame in came[:1]:
        before[signal.Signals(number)](number, frame)


@contextlib.contextmanager
def _quiet(optuna: Any) -> Iterator[None]:
    """Without Optuna's own remarks, and with its level as it was afterwards."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(before)
