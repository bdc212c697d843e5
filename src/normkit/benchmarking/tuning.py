"""`normkit bench --tune`: the rules of `kernels.registry` that this machine's own measurements ask for.

For each normalizer, type and layout that PyTorch's own kernel covers, and a few sizes of a sample, a training step is
timed with either kernel. A rule lets the search begin at PyTorch's kernel up to the largest size to which the compiled
one loses clearly at every size measured: in each shape and each size of the batch, since a rule knows neither.
"""

from __future__ import annotations

import importlib
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from normkit.benchmarking.cases import DTYPES, LAYOUTS, Case, Layout
from normkit.benchmarking.peers import Peer
from normkit.benchmarking.results import CIRCUMSTANCES, Measurements
from normkit.errors import NormRuntimeError, message
from normkit.kernels import instruction_sets
from normkit.kernels.registry import Rule
from normkit.tables import Result, Table

__all__ = ["CASES", "KERNELS", "MARGIN", "QUICK", "Tuning", "covered", "tuned"]

_MADE = "normkit.benchmarking.peers.torch"
KERNELS = (
    Peer("native", f"{_MADE}:by_native", ("torch",), "our layers by the compiled kernels"),
    Peer("torch", f"{_MADE}:by_torch", ("torch",), "our layers by PyTorch's kernels"),
)
# Of the medians of interleaved turns. On a machine that does something else too they differ by some percent from run to
# run, and a rule that changes nothing is one too many.
MARGIN = 1.1
# (C, *S) by the number of values of a sample: where the cost of a call decides, up to where arithmetic does.
IMAGES = {16: (4, 2, 2), 64: (16, 2, 2), 256: (16, 4, 4), 1024: (16, 8, 8), 4096: (64, 8, 8)}
BATCHES = (8, 256)


def _cases(sizes: Sequence[int], batches: Sequence[int]) -> Iterator[Case]:
    for dtype, size, n in itertools.product(DTYPES, sizes, batches):
        for norm, layout in itertools.product(("batch", "instance", "group"), LAYOUTS):
            yield Case(norm, (n, *IMAGES[size]), None, layout, dtype)
        for norm in ("batch", "layer", "rms"):
            yield Case(norm, (n, size), dtype=dtype)


CASES = tuple(_cases(tuple(IMAGES), BATCHES))
QUICK = tuple(_cases((16, 1024), BATCHES[:1]))


class _Kind(NamedTuple):
    """What a rule is about, but for the size."""

    normalizer: str
    dtype: str
    layout: Layout


@dataclass(frozen=True)
class Tuning(Result):
    """What was measured and the rules that follow.

    Attributes:
        found: times of both kernels.
        rules: where the compiled kernels lose clearly.
    """

    found: Measurements
    rules: tuple[Rule, ...]

    def table(self) -> Table:
        """Times by case, the rules above."""
        times = self.found.table()
        shown = [f"{r.normalizer} {r.dtype} {r.layout}, fewer than {r.below} values a sample: {r.use}"
                 for r in self.rules] or ["no rule: the compiled kernels lose nowhere clearly"]  # fmt: skip
        return Table(
            times.headings, times.rows, times.words, "\n".join([times.title, *shown] if times.title else shown)
        )

    def to_dict(self) -> dict[str, Any]:
        """The rules as in the file, the measurements, and what went wrong."""
        told = self.found.to_dict()
        return {**self._file(), **{name: told[name] for name in ("rows", "faults", "missing", "interrupted")}}

    def file(self) -> str:
        """The file that `NORMKIT_KERNELS` may name."""
        return json.dumps(self._file(), indent=1) + "\n"

    def _file(self) -> dict[str, Any]:
        under = self.found.rows[0].circumstances if self.found.rows else {}
        return {
            "measured": {name: under[name] for name in CIRCUMSTANCES if name in under} | {"margin": MARGIN},
            "rules": [vars(rule) for rule in self.rules],
        }


def covered(cases: Sequence[Case]) -> tuple[Case, ...]:
    """The cases that both kernels cover. Raises NormRuntimeError where there is nothing to choose from."""
    why = KERNELS[0].missing()
    if why or not instruction_sets():
        must = "`--tune` must have PyTorch and the compiled kernels to choose from"
        raise NormRuntimeError(message(must, why or "an installation without a C++ compiler"))
    covers: Callable[[Case], bool] = importlib.import_module(_MADE).covered_by_both
    return tuple(case for case in cases if covers(case))


def tuned(cases: Sequence[Case], found: Measurements) -> Tuning:
    """The rules that follow from the times of `KERNELS` on cases, all of which were to be measured."""
    loses: dict[_Kind, dict[int, bool]] = {}
    for case in cases:
        kind, size = _Kind(case.spec.name, case.dtype, case.layout), case.values // case.shape[0]
        sizes = loses.setdefault(kind, {})
        sizes[size] = sizes.get(size, True) and _loses(found, case)
    rules = []
    for kind, sizes in loses.items():
        lost = list(itertools.takewhile(sizes.__getitem__, sorted(sizes)))
        if lost:
            rules.append(Rule(KERNELS[1].name, *kind, below=lost[-1] + 1))
    return Tuning(found, tuple(rules))


def _loses(found: Measurements, case: Case) -> bool:
    """Whether the compiled kernel loses clearly; what was not measured is no reason for a rule."""
    rows = [row for row in found.rows if row.case == case]
    times = {row.peer: row.ms for row in rows}
    native, theirs = (times.get(peer.name) for peer in KERNELS)
    return native is not None and theirs is not None and native > MARGIN * theirs
