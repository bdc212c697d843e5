"""The user's functions and objects: loaded from `file.py:name` or handed over, and told apart when they change."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import inspect
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any, NamedTuple

from normkit.errors import MissingExtraError, NormError, NormValueError, message

__all__ = ["Code", "call", "takes", "told_when_imported"]

_loaded: dict[Path, tuple[str, ModuleType, list[Path]]] = {}
_importing = threading.local()


class Code(NamedTuple):
    """A function or object of the user's, as it travels to a worker.

    Attributes:
        label: `file.py:name` as the user wrote it, or `python:name`.
        pickled: the object where it was handed over in Python, else None.
        fingerprint: of an object that was handed over; that of a file is known when it is loaded.
    """

    label: str
    pickled: bytes | None = None
    fingerprint: str = ""

    @classmethod
    def of(cls, value: Any) -> Code:
        """Carry an object of this process, by value where its module is the main script or a notebook."""
        try:
            import cloudpickle
        except ImportError as error:
            must = "handing over functions and data in Python needs cloudpickle, which is not installed"
            raise MissingExtraError(message(must, hint="pip install 'normkit[lab]'")) from error
        name = getattr(value, "__qualname__", type(value).__qualname__).rsplit(".", 1)[-1]
        try:
            pickled = cloudpickle.dumps(value)
        except Exception as error:
            must = f"what is handed over must be something that can be pickled, {name} is not ({error})"
            raise NormValueError(message(must, hint="write it into a file and name it as file.py:name")) from error
        source = _source(value) if callable(value) else None
        digest = hashlib.sha256(pickled if source is None else source.encode()).hexdigest()
        return cls(f"python:{name}", pickled, digest)

    def load(self, guard: Callable[[str], contextlib.AbstractContextManager[None]] | None = None) -> tuple[Any, str]:
        """The object and its fingerprint: of a file that of the file and of what it imports from its own folder.

        `guard` is entered, with the name of the file, while the file runs. Raises NormValueError for a file that is
        missing, raises, ends the program or has no such name.
        """
        if self.pickled is not None:
            import pickle

            return pickle.loads(self.pickled), self.fingerprint
        file, _, name = self.label.rpartition(":")
        path = Path(file)
        if not path.is_file():
            raise NormValueError(message("a file.py:name must name a file that exists", repr(file)))
        module, fingerprint = _module(path.resolve(), guard)
        try:
            return getattr(module, name), fingerprint
        except AttributeError:
            public = [known for known in vars(module) if not known.startswith("_")]
            defined = [known for known in public if getattr(vars(module)[known], "__module__", "") == module.__name__]
            must = f"{path.name} must define {name}"
            raise NormValueError(message(must, ", ".join(defined) or "nothing of its own")) from None


def takes(function: Any, name: str) -> bool:
    """Whether a function can be called with an argument of that name."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return False
    return name in parameters or any(known.kind is known.VAR_KEYWORD for known in parameters.values())


def call(label: str, function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    """Call a function of the user's; what it raises is worded with the line it comes from."""
    try:
        return function(*arguments, **named)
    except NormError:
        raise
    except Exception as error:
        raise NormValueError(f"{label} raised {_worded(error)}") from error


@contextlib.contextmanager
def told_when_imported(verb: str) -> Iterator[None]:
    """Refuse to run while a user's file is being imported: it would start itself without end."""
    file = getattr(_importing, "file", None)
    if file is not None:
        must = f"{file} must not call {verb} when it is imported"
        raise NormValueError(message(must, hint='put the call under `if __name__ == "__main__":`'))
    yield


def _module(path: Path, guard: Any) -> tuple[ModuleType, str]:
    content = path.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    if path not in _loaded or _loaded[path][0] != digest:
        before = set(sys.modules)
        module = _executed(path, guard)
        _loaded[path] = digest, module, sorted(_beside(path, set(sys.modules) - before))
    _, module, files = _loaded[path]
    for file in files:
        digest += hashlib.sha256(file.read_bytes()).hexdigest()
    return module, hashlib.sha256(digest.encode()).hexdigest()[:16]


def _executed(path: Path, guard: Any) -> ModuleType:
    # Not under its own name: a file may be called like a library that is imported somewhere.
    name = f"normkit_user_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look their module up
    folder = str(path.parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)  # and it stays: functions import late
    _importing.file = path.name
    try:
        with guard(path.name) if guard else contextlib.nullcontext():
            spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[name]
        if isinstance(error, KeyboardInterrupt | NormError):
            raise
        must = f"{path.name} must be a file that can be imported, it raised {_worded(error)}"
        hint = None
        if isinstance(error, SystemExit):
            hint = 'put what is for the command line under `if __name__ == "__main__":`'
        raise NormValueError(message(must, hint=hint)) from error
    finally:
        _importing.file = None
    return module


def _beside(path: Path, modules: set[str]) -> Iterator[Path]:
    """The files that were imported from the folder of a file, or below it."""
    for name in modules:
        file = getattr(sys.modules.get(name), "__file__", None)
        if file is None or name.startswith("normkit"):
            continue
        found = Path(file)
        if found.suffix == ".py" and path.parent in found.parents and "site-packages" not in found.parts:
            yield found


def _worded(error: BaseException) -> str:
    """Type, text and, where the user's code is to blame, its line."""
    text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    frames = inspect.getinnerframes(error.__traceback__) if error.__traceback__ else []
    mine = [frame for frame in frames if _of_the_user(frame.filename)]
    return f"{text} (line {mine[-1].lineno} of {Path(mine[-1].filename).name})" if mine else text


def _of_the_user(filename: str) -> bool:
    path = Path(filename)
    library = Path(__file__).parents[1] in path.parents or "site-packages" in path.parts
    return path.suffix == ".py" and not library and not filename.startswith((sys.base_prefix, "<"))


def _source(value: Any) -> str | None:
    """The source of a function or class and of what it names in its own module: comments elsewhere change nothing."""
    seen: dict[str, str] = {}
    todo = [value]
    while todo:
        item = inspect.unwrap(todo.pop())
        name = getattr(item, "__qualname__", None)
        if name is None or name in seen:
            continue
        try:
            seen[name] = inspect.getsource(item)
        except (OSError, TypeError):
            return None
        codes = [item.__code__] if hasattr(item, "__code__") else [
            member.__code__ for member in vars(item).values() if hasattr(member, "__code__")
        ]  # fmt: skip
        space = vars(sys.modules.get(item.__module__, ModuleType("")))
        for known in sorted({used for code in codes for used in _names(code)}):
            found = space.get(known)
            if callable(found) and getattr(found, "__module__", None) == item.__module__:
                todo.append(found)
            elif isinstance(found, int | float | str | bool | tuple):
                seen[f"{name} {known}"] = repr(found)
    return "\n".join(seen[name] for name in sorted(seen))


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
