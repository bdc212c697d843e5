"""The norm layers of a model of Flax NNX whose classes say what they compute."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from flax import nnx

from normkit.core.record import NormRecord
from normkit.errors import NormError
from normkit.nnx.maps import call_of
from normkit.nnx.porting import NAMES, read, walk
from normkit.surgery.sites import Site

__all__ = ["sites"]


def sites(model: nnx.Module) -> Iterator[Site]:
    """Every norm layer, once, by its first path.

    Left out are subclasses with a `__call__` of their own, which may compute anything, and layers that no record
    describes: over other axes, or with a state for every lane of a vmap.
    """
    for path, layer in walk(model):
        record = _record(layer)
        if record is not None:
            values = {"gamma": record.gamma, "beta": record.beta, **record.kept}
            names = {role: NAMES[role] for role, value in values.items() if value is not None}
            constant = bool(record.kept) and bool(layer.use_running_average)
            yield Site(path, type(layer).__name__, record, "class", names, constant)


def _record(layer: Any) -> NormRecord | None:
    if not call_of(type(layer)).__module__.startswith(("flax.nnx.", "normkit.nnx.")):
        return None
    with contextlib.suppress(NormError):
        record = read(layer)
        if record is not None and all(
            value is None or value.shape == record.shape for value in (record.gamma, record.beta, *record.kept.values())
        ):
            return record
    return None
