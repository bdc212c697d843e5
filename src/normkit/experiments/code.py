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

__all__ = ["Code", "call", "content_hash", "files_of_the_user", "refuse_when_imported", "takes", "takes_norm"]

_loaded: dict[Path, tuple[str, ModuleType]] = {}
_importing = threading.local()


class Code(NamedTuple):
    """A function or object of the user's, as it travels to a worker.

    Attributes:
        label: `file.py:name` as the user wrote it, or `python:name`.
        path: of the file, absolute; empty for an object.
        pickled: the object where it was handed over in Python, else None.
        fingerprint: of an object that was handed over; files are told apart by :func:`files_of_the_user`.
    """

    label: str
    path: str = ""
    pickled: bytes | None = None
    fingerprint: str = ""

    @classmethod
    def named(cls, label: str) -> Code:
        """What `file.py:name` stands for, seen from the present folder."""
        return cls(label, str(Path(label.rpartition(":")[0]).absolute()))

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
        source = _source(value)
        digest = hashlib.sha256(pickled if source is None else source.encode())
        for content in files_of_the_user().values():
            digest.update(content.encode())
        return cls(f"python:{name}", "", pickled, digest.hexdigest())

    def may_import(self, module: str) -> bool:
        """Whether its file names this module; of an object that is not known, and assumed."""
        path = Path(self.path)
        if self.pickled is not None or not path.is_file():
            return True
        return module in path.read_text(errors="replace")

    def load(self, guard: Callable[[str], contextlib.AbstractContextManager[None]] | None = None) -> Any:
        """The object. `guard` is entered, with the name of the file, while the file runs.

        Raises NormValueError for a file that is missing, raises, ends the program or has no such name.
        """
        if self.pickled is not None:
            import pickle

            return pickle.loads(self.pickled)
        file, _, name = self.label.rpartition(":")
        path = Path(self.path)
        if not path.is_file():
            raise NormValueError(message("a file.py:name must name a file that exists", repr(file)))
        module = _module(path.resolve(), guard)
        try:
            return getattr(module, name)
        except AttributeError:
            public = [known for known in vars(module) if not known.startswith("_")]
            defined = [known for known in public if getattr(vars(module)[known], "__module__", "") == module.__name__]
            must = f"{path.name} must define {name or 'what is named after the colon'}"
            raise NormValueError(message(must, ", ".join(defined) or "nothing of its own")) from None


def content_hash(path: Path) -> str:
    """A hash of what is in a file now."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def files_of_the_user() -> dict[str, str]:
    """The files of all modules that are loaded and belong to no library, with a hash of what is in them now.

    The main script is none of them: it asks, and may be edited between two questions.
    """
    found = {}
    for name, module in sorted(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if file and name != "__main__" and _of_the_user(file) and Path(file).is_file():
            found[file] = content_hash(Path(file))
    return found


def takes(function: Any, name: str) -> bool:
    """Whether a function can be called with an argument of that name."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return False
    return name in parameters or any(known.kind is known.VAR_KEYWORD for known in parameters.values())


def takes_norm(function: Any, name: str, hint: str) -> bool:
    """Whether a function that builds a model is to be given `norm`; False where it can be called with nothing.

    Raises NormValueError where neither is possible.
    """
    try:
        signature = inspect.signature(function)
        if "norm" not in signature.parameters:
            with contextlib.suppress(TypeError):
                signature.bind()
                return False
        signature.bind(norm=None)
    except (TypeError, ValueError) as error:
        must = f"{name} must take a parameter `norm` or nothing, and no other without a default ({error})"
        raise NormValueError(message(must, hint=f"def {name}(norm): ... {hint}")) from None
    return True


def call(label: str, function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    """Call a function of the user's; what it raises is worded with the line it comes from."""
    try:
        return function(*arguments, **named)
    except NormError:
        raise
    except Exception as error:
        raise NormValueError(f"{label} raised {_worded(error)}") from error


def refuse_when_imported(verb: str) -> None:
    """Refuse to run while a user's file is being imported: it would start itself without end."""
    file = getattr(_importing, "file", None)
    if file is not None:
        must = f"{file} must not call {verb} when it is imported"
        raise NormValueError(message(must, hint='put the call under `if __name__ == "__main__":`'))


def _module(path: Path, guard: Any) -> ModuleType:
    """The module of a file, run again where the file has changed."""
    digest = content_hash(path)
    if path not in _loaded or _loaded[path][0] != digest:
        _loaded[path] = digest, _executed(path, guard)
    return _loaded[path][1]


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


def _worded(error: BaseException) -> str:
    """Type, text and, where the user's code is to blame, its line."""
    text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    frames = inspect.getinnerframes(error.__traceback__) if error.__traceback__ else []
    mine = [frame for frame in frames if _of_the_user(frame.filename)]
    return f"{text} (line {mine[-1].lineno} of {Path(mine[-1].filename).name})" if mine else text


def _of_the_user(filename: str) -> bool:
    path = Path(filename)
    library = Path(__file__).parents[1] in path.parents or "site-packages" in path.parts
    return path.suffix == ".py" and not library and not filename.startswith((sys.base_prefix, sys.prefix, "<"))


def _source(value: Any) -> str | None:
    """The source of a plain function and of what it names in its own module: comments elsewhere change nothing.

    None where that is not all that decides: a closure, an instance, a global that is no plain value. The pickled bytes
    then tell it apart, at worst too often, which costs only time.
    """
    seen: dict[str, str] = {}
    todo = [value]
    while todo:
        item = todo.pop()
        function = inspect.isfunction(item)
        if not (function or inspect.isclass(item)) or (function and (item.__closure__ or "<" in item.__qualname__)):
            return None
        if item.__qualname__ in seen:
            continue
        try:
            seen[item.__qualname__] = inspect.getsource(item)
        except (OSError, TypeError):
            return None
        members = [item] if function else [member for member in vars(item).values() if inspect.isfunction(member)]
        used = {(name, id(m.__globals__)): m.__globals__ for m in members for name in _names(m.__code__)}
        for (known, _), space in sorted(used.items(), key=lambda pair: pair[0]):
            if known not in space:
                continue
            found = space[known]
            if isinstance(found, int | float | str | bool | None):
                seen[f"{item.__qualname__} {known}"] = repr(found)
            elif getattr(found, "__module__", None) == item.__module__:
                todo.append(found)
            elif not (inspect.ismodule(found) or callable(found)):
                return None
    return "\n".join(seen[name] for name in sorted(seen))


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
