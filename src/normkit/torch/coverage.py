"""Which kernel runs what on this machine, found by asking the code that decides."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from normkit.core import catalog
from normkit.core.axes import Sizes
from normkit.core.plan import plan
from normkit.core.spec import NormSpec
from normkit.kernels import instruction_sets, registry
from normkit.kernels.native import instruction_set
from normkit.tables import Result, Table
from normkit.torch import _compiled, _execute, _halves

__all__ = ["SYNCHRONIZED", "Coverage", "coverage"]

SYNCHRONIZED = "batch_norm, synchronized"

_SHAPE = (4, 8, 4, 4)  # any will do: kernels ask for types, layouts and whether there are values
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
_SPECS: tuple[tuple[NormSpec, Sizes], ...] = (
    (catalog.BATCH, ()),
    (catalog.GHOST, (("n", 2),)),
    (catalog.RENORM, ()),
    (catalog.INSTANCE, ()),
    (catalog.GROUP, (("g", 2),)),
    (catalog.LAYER, (("*c", _SHAPE[1:]),)),
    (catalog.LAYER_2D, ()),
    (catalog.RMS, (("*c", _SHAPE[1:]),)),
    (catalog.RMS_2D, ()),
)


class Row(NamedTuple):
    """What runs a normalizer, and why the compiled kernels do not, where they do not."""

    normalizer: str
    layout: str
    dtype: str
    kernel: str
    why_not_native: str


@dataclass(frozen=True)
class Coverage(Result):
    """The kernels of this machine.

    Attributes:
        instruction_sets: that compiled kernels can use here, from the widest; empty without compiled kernels.
        used: the one in use, None without compiled kernels.
        rows: by normalizer, layout and type, in training with float32 parameters (float64 for a float64 input).
    """

    instruction_sets: tuple[str, ...]
    used: str | None
    rows: tuple[Row, ...]

    def table(self) -> Table:
        """One row for each normalizer, layout and type."""
        sets = f"{', '.join(self.instruction_sets)}; in use: {self.used}" if self.used else "no compiled kernels"
        title = f"instruction sets: {sets}\nIn eager PyTorch on the CPU, per sample of {_SHAPE[1:]} values:"
        return Table(("normalizer", "layout", "type", "kernel", "why not native"), self.rows, words=5, title=title)

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        return {
            "instruction_sets": list(self.instruction_sets),
            "used": self.used,
            "rows": [row._asdict() for row in self.rows],
        }


def coverage() -> Coverage:
    """Ask every kernel about every normalizer, layout and type. Evaluation by running statistics is as batch norm."""
    sets = instruction_sets()
    return Coverage(sets, sets[instruction_set()] if sets else None, (*_rows(), *_synchronized()))


def _rows() -> Iterator[Row]:
    for spec, sizes in _SPECS:
        p = plan(spec, len(_SHAPE), sizes)
        for layout, form in _FORMATS.items():
            for dtype in _DTYPES:
                x = torch.ones(_SHAPE, dtype=dtype).contiguous(memory_format=form)
                gamma = torch.ones(_channels(spec), dtype=_execute.accumulator(dtype))
                native = _compiled.covers(spec, p, x, gamma, None)
                theirs = _execute.covers(spec, p, x, gamma, None)
                covering = {"native": not isinstance(native, str), "torch": not isinstance(theirs, str)}
                kernel = next(
                    name
                    for name in registry.ORDER
                    if covering.get(name, True) and registry.tried(name, spec.name, dtype, layout, _SHAPE)
                )
                why = native if isinstance(native, str) else "" if kernel == "native" else "a rule begins further down"
                yield Row(spec.name, layout, str(dtype)[6:], kernel, why)


def _synchronized() -> Iterator[Row]:
    """Batch norm by the statistics of several processes, of which PyTorch has no kernel for CPUs."""
    for layout, form in _FORMATS.items():
        for dtype in _DTYPES:
            x = torch.ones(_SHAPE, dtype=dtype).contiguous(memory_format=form)
            native = _compiled.covers_shared(x, torch.ones(_SHAPE[1], dtype=_execute.accumulator(dtype)), None)
            why = native or ("" if _halves.tried(catalog.BATCH, dtype) else "a rule begins further down")
            yield Row(SYNCHRONIZED, layout, str(dtype)[6:], "formula" if why else "native", why)


def _channels(spec: NormSpec) -> tuple[int, ...]:
    return _SHAPE[1:] if spec.axes[-1][0] in spec.affine_names else _SHAPE[1:2]
