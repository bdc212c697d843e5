"""Whether the process that announced a trial still works on it: lock files on one machine, heartbeats on many."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

__all__ = ["Beats", "Lock", "with_heartbeat"]

# Seconds. A beat is one small write per running trial; four may be missed, as when a machine swaps or a connection is
# made anew, before a trial is taken for dead. To take one for dead by mistake costs only the time to run it again.
_BEAT, _GRACE = 15.0, 60.0


class Lock:
    """A file that the system unlocks when this process ends, however it ends; seen on this machine alone.

    Raises OSError where it cannot be made. `host` and `path` go into the claim.
    """

    def __init__(self, folder: Path | None) -> None:
        import filelock

        self.host = socket.gethostname()
        self.path = (folder or Path(tempfile.gettempdir())).absolute() / ".normkit-locks"
        self.path /= f"{os.getpid()}-{secrets.token_hex(4)}.lock"
        self._held = filelock.FileLock(self.path)
        try:
            self._held.acquire(timeout=0)
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """Let go of it, and leave nothing behind."""
        self._held.release()
        with contextlib.suppress(OSError):
            self.path.unlink()
            self.path.parent.rmdir()

    @staticmethod
    def is_held(path: Path) -> bool:
        """Whether the process that made this file lives. The file of a dead one is removed."""
        import filelock

        if not path.exists():
            return False
        probe = filelock.FileLock(path)
        try:
            probe.acquire(timeout=0)
        except (filelock.Timeout, OSError):
            return True
        probe.release()
        with contextlib.suppress(OSError):
            path.unlink()
        return False


class Beats:
    """Optuna's heartbeat of the trials that run here, and which others have lost theirs, by the clock of the database.

    Args:
        storage: of Optuna, made by :func:`with_heartbeat`.
        study: its number.
        own: the trials that run here, asked for at every beat.

    Optuna knows nothing of a trial without any beat, whose process ended between the announcement and the first: one
    that has been seen for long gets a beat from here, once, and is judged by that.
    """

    def __init__(self, storage: Any, study: int, own: Callable[[], Iterable[int]]) -> None:
        self._storage, self._study, self._own = storage, study, own
        self._first_seen: dict[int, float] = {}
        self._vouched: set[int] = set()
        self._blind_until = 0.0
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Beat from now on."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._beat, daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Beat no more."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join(_BEAT)  # without an end only where the database hangs

    def missed(self) -> None:
        """The storage could not be reached: nobody's beats came through, so that for a while nobody is judged."""
        self._blind_until = time.monotonic() + _GRACE

    def dead(self, running: Iterable[int]) -> set[int]:
        """Which of the trials that others run have no process any more."""
        numbers, now = set(running), time.monotonic()
        if not numbers or now < self._blind_until:
            return set()
        stale = numbers & set(self._storage._get_stale_trial_ids(self._study))
        self._first_seen = {number: self._first_seen.get(number, now) for number in numbers}
        for number in numbers - stale - self._vouched:
            if now - self._first_seen[number] > _GRACE:
                self._storage.record_heartbeat(number)
                self._vouched.add(number)
        return stale

    def _beat(self) -> None:
        from optuna.exceptions import OptunaError
        from sqlalchemy.exc import SQLAlchemyError

        while not self._ended.wait(_BEAT):
            for number in list(self._own()):
                # A beat that is lost is followed by others; that the connection is lost the main thread notices.
                with contextlib.suppress(OptunaError, SQLAlchemyError):
                    self._storage.record_heartbeat(number)


def with_heartbeat(url: str, **engine: Any) -> Any:
    """Optuna's storage behind a URL of SQLAlchemy, with a heartbeat."""
    from optuna.exceptions import ExperimentalWarning
    from optuna.storages import RDBStorage

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        return RDBStorage(
            url,
            engine_kwargs=engine,
            heartbeat_interval=_BEAT,  # type: ignore[arg-type]  # annotated as whole; fractions make tests short
            grace_period=_GRACE,  # type: ignore[arg-type]
        )
