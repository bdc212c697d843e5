"""Where the norm layers of a model are, and how each was recognized."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from normkit.core.catalog import CATALOG
from normkit.core.record import NormRecord
from normkit.errors import NormTypeError, NormValueError, message, nearest

__all__ = ["Site", "named"]

_LISTED = 40  # names in an error, at most


@dataclass(frozen=True)
class Site:
    """One norm layer.

    Attributes:
        path: where it is registered first.
        kind: name of its class.
        record: what it computes, and its values.
        how: `class` for a layer of the framework or ours; `probe` for one that gives, on random inputs with random
            parameters, the numbers of a formula of the catalog.
        names: of its attributes that hold gamma, beta, mean, var.
        constant: whether it normalizes by kept statistics in the mode the model is in.
    """

    path: str
    kind: str
    record: NormRecord
    how: Literal["class", "probe"]
    names: Mapping[str, str]
    constant: bool

    def __str__(self) -> str:
        return self.kind if self.how == "class" else f"{self.kind}, by its numbers a {self.record.words}"


def named(argument: str, keys: Any, layers: Mapping[str, Any], kinds: Mapping[str, str]) -> dict[str, Any]:
    """The layers that are meant, path to key: where several name one, a path before a class or function before a kind.

    Args:
        argument: name of the argument, for errors.
        keys: one or several of: a path, a class, a function of (path, layer), a short name of the catalog.
        layers: that can be meant, by path.
        kinds: their short names, by path; empty where short names mean nothing.

    Raises NormTypeError for another kind of key, NormValueError for one that means no layer.
    """
    single = isinstance(keys, str | type) or callable(keys) or not isinstance(keys, Iterable)
    found: dict[str, tuple[int, Any]] = {}
    for key in [keys] if single else keys:
        if isinstance(key, str):
            rank = 2 if key in layers else 0
            meant = [key] if rank else [path for path, kind in kinds.items() if kind == key]
            known = set(kinds.values()) if key in CATALOG else {*layers, *kinds.values()}
            hint = nearest(key, known) if 0 < len(known) <= _LISTED else None
        elif callable(key):
            rank, hint = 1, None
            test = (lambda _, layer, kind=key: isinstance(layer, kind)) if isinstance(key, type) else key
            meant = [path for path, layer in layers.items() if test(path, layer)]
        else:
            must = f"`{argument}` must hold paths, classes{', short names' if kinds else ''} and functions"
            raise NormTypeError(message(must, repr(key)))
        if not meant:
            must = f"every entry of `{argument}` must mean a layer of the model"
            raise NormValueError(message(must, getattr(key, "__name__", repr(key)), hint))
        for path in meant:
            if path not in found or found[path][0] < rank:
                found[path] = rank, key
    return {path: key for path, (_, key) in found.items()}
