"""The way to an Optuna storage: opened, asked again while its connection is lost, and what it raises put into words."""

from __future__ import annotations

import contextlib
import importlib.util
import re
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, TypeVar

from normkit.errors import MissingExtraError, NormError, NormRuntimeError, message
from normkit.experiments.liveness import with_heartbeat

__all__ = ["Connection", "hidden", "import_optuna", "is_shared", "quiet"]

_BUSY = 60  # seconds that one process waits for another to let go of an SQLite file
# Seconds. A database that is restarted or moves to another machine is back within minutes; what takes longer is for a
# person to mend. The waits double from the first to the longest: soon back after a hiccup, no rush at a server in need.
_OUTAGE, _FIRST_WAIT, _LONGEST_WAIT = 300.0, 0.5, 15.0
_OPENING = 0.1, 0.2, 0.4, 0.8  # waits before a storage that cannot be opened is given up
T = TypeVar("T")


def import_optuna() -> None:
    """Load what an open storage needs: most of a second. Raises MissingExtraError where it is not installed."""
    try:
        # What Optuna itself loads late, for a storage behind a URL.
        import alembic.command  # noqa: F401
        import filelock  # noqa: F401  # of the same extra
        import optuna.storages  # noqa: F401
        import sqlalchemy.orm  # noqa: F401
    except ImportError as error:
        must = f"the comparison needs {error.name}, which is not installed"
        raise MissingExtraError(message(must, hint="pip install 'normkit[lab]'")) from error


def hidden(text: str) -> str:
    """A storage URL, or what was said of one, without the password."""
    return re.sub(r"(://[^:/@\s]*:)[^@\s]*@", r"\1***@", text)


def is_shared(url: str | None) -> bool:
    """Whether this is a database server, which many machines can reach."""
    return url is not None and not url.startswith("sqlite")


class Connection:
    """An open storage.

    Args:
        url: any storage URL of Optuna, None keeps everything in memory.
        where: the place, for errors, in the latter case.

    Raises NormRuntimeError where it cannot be opened, MissingExtraError where what opens it is missing.

    Attributes:
        storage: Optuna's.
        lost: called whenever the connection was lost, before it is tried again.
    """

    def __init__(self, url: str | None, where: str = "") -> None:
        import_optuna()
        import optuna

        self.optuna, self._url, self._where = optuna, url, where
        self._engine: Any = None
        self._patient = False  # a wrong address or password is said at once
        self.lost: Callable[[], None] = lambda: None
        self.storage = self.ask("opened", self._opened)
        self._patient = is_shared(url)

    def ask(self, done: str, question: Callable[..., T], *arguments: Any) -> T:
        """Call a function that reads or writes; `done` says in an error what it was to do: opened, read, written.

        A connection to a server that was lost is tried again for some minutes, so that `question` must be one that can
        be asked twice: nobody knows whether the answer was lost or the question.

        Raises NormRuntimeError in the end, and Optuna's UpdateFinishedTrialError as it is.
        """
        until, wait = time.monotonic() + _OUTAGE, _FIRST_WAIT
        while True:
            try:
                with _uninterrupted():
                    return question(*arguments)
            except (NormError, self.optuna.exceptions.UpdateFinishedTrialError):
                raise
            except Exception as error:
                if not (self._patient and _is_lost(error)) or time.monotonic() + wait > until:
                    raise self._worded(done, error) from error
            self.lost()
            time.sleep(wait)
            wait = min(2 * wait, _LONGEST_WAIT)

    def close(self) -> None:
        """Give the connections back."""
        self.storage.remove_session()
        if self._engine is not None:
            self._engine.dispose()

    def hurry(self) -> None:
        """From here on a lost connection is not waited for."""
        self._patient = False

    def _opened(self) -> Any:
        for wait in (*_OPENING, None):
            with quiet(self.optuna):
                try:
                    return self._storage_of_url()
                except ImportError as error:
                    name = next(
                        (cause.name for cause in (error.__cause__, error) if isinstance(cause, ImportError)), ""
                    )
                    must = f"{hidden(self._url or '')} needs {name or 'a driver'}, which is not installed"
                    hint = "for PostgreSQL pip install 'normkit[postgresql]'"
                    raise MissingExtraError(message(must, hint=hint)) from error
                except Exception:
                    # Another process may be making the same tables: one of the two then fails half way.
                    if wait is None:
                        raise
            time.sleep(wait)
        raise AssertionError

    def _storage_of_url(self) -> Any:
        storages = self.optuna.storages
        if self._url is None:
            return storages.InMemoryStorage()
        arguments = {} if is_shared(self._url) else {"connect_args": {"timeout": _BUSY}}
        made = with_heartbeat(_with_driver(self._url), **arguments)
        self._engine = made.engine
        # get_storage keeps finished trials in memory, so that looking again is cheap.
        return storages.get_storage(made)

    def _worded(self, done: str, error: Exception) -> NormRuntimeError:
        """A full disk, a lost connection, a file that is no study."""
        reason: BaseException = error
        while reason.__cause__ is not None:  # the driver says it best
            reason = reason.__cause__
        must = f"the trials must be {done} in {hidden(self._url or self._where)}"
        hint = "make room or mend the connection, then run the same command again: finished trials are kept"
        return NormRuntimeError(message(must, hidden(str(reason).splitlines()[0]), hint))


def _with_driver(url: str) -> str:
    """`postgresql://` with the driver that is there: SQLAlchemy means psycopg2 by it up to 2.0, and psycopg since."""
    kind, colon, rest = url.partition("://")
    found = (name for name in ("psycopg2", "psycopg") if importlib.util.find_spec(name))
    driver = next(found, "") if kind == "postgresql" else ""
    return f"{kind}+{driver}{colon}{rest}" if driver else url


def _is_lost(error: BaseException) -> bool:
    """Whether it was the connection: a driver's OperationalError or InterfaceError, by itself or as Optuna's cause."""
    from sqlalchemy.exc import InterfaceError, OperationalError

    return any(isinstance(known, InterfaceError | OperationalError) for known in (error, error.__cause__))


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
def quiet(optuna: Any) -> Iterator[None]:
    """Without Optuna's own remarks, and with its level as it was afterwards."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(before)
