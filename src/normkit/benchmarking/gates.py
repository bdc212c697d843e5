"""What the compiled kernels have to reach, as data, and whether they did."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

from normkit.benchmarking.cases import TINY, Case
from normkit.benchmarking.results import Measurements

__all__ = ["GATES", "Gate", "Verdict", "verdicts"]

OWN = "normkit"
EAGER = ("torch", "torch-inplace")  # the faster of the two counts
_LARGE = 32 * 10**6  # bytes; glibc maps what is larger anew for every allocation
_LONG = 0.5  # ms

Values = Callable[[Measurements, Case, str], float | None]
Pick = Callable[[Case], bool]


@dataclass(frozen=True)
class Gate:
    """One demand.

    Attributes:
        text: in words.
        pick: which cases it is about.
        value: what is measured of a case; None where nothing is.
        over: how the values of the cases are put together: their geometric mean, or the worst of them.
        bound: what the result has to keep to,
        at: `most` or `least`.
        memory: the state of memory that it is about.
    """

    text: str
    pick: Pick
    value: Values
    over: Literal["mean", "worst"]
    at: Literal["most", "least"]
    bound: float
    memory: str = "recycled"


class Verdict(NamedTuple):
    """A gate beside what was measured: `value` is None where nothing was, `cases` says of how many."""

    gate: Gate
    value: float | None
    cases: int
    worst: str  # the case furthest on the wrong side

    @property
    def passed(self) -> bool | None:
        """Whether it is met; None where nothing was measured."""
        if self.value is None:
            return None
        return self.value <= self.gate.bound if self.gate.at == "most" else self.value >= self.gate.bound

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        gate = self.gate
        asked = {"gate": gate.text, "memory": gate.memory, "over": gate.over, "at": gate.at, "bound": gate.bound}
        return {**asked, "value": self.value, "cases": self.cases, "worst": self.worst, "passed": self.passed}


def verdicts(found: Measurements) -> list[Verdict]:
    """Every gate beside what was measured."""
    return [_verdict(gate, found) for gate in GATES]


def _verdict(gate: Gate, found: Measurements) -> Verdict:
    cases = [case for case, memory in found.cases() if memory == gate.memory and gate.pick(case)]
    values = {case: value for case in cases if (value := gate.value(found, case, gate.memory)) is not None}
    if not values:
        return Verdict(gate, None, 0, "")
    furthest = max if gate.at == "most" else min
    worst = furthest(values, key=lambda case: values[case])
    value = values[worst] if gate.over == "worst" else statistics.geometric_mean(values.values())
    return Verdict(gate, value, len(values), str(worst))


def _copies(found: Measurements, case: Case, memory: str) -> float | None:
    own = found.of(case, memory, OWN)
    return None if own is None else own.copies


def _against(*peers: str, long: bool = False) -> Values:
    """Times as fast as the fastest of peers; with `long` only where that takes `_LONG` at least."""

    def ratio(found: Measurements, case: Case, memory: str) -> float | None:
        own = found.of(case, memory, OWN)
        others = [other.ms for peer in peers if (other := found.of(case, memory, peer))]
        if own is None or not others or (long and min(others) < _LONG):
            return None
        return min(others) / own.ms

    return ratio


def _slower(*peers: str) -> Values:
    def ratio(found: Measurements, case: Case, memory: str) -> float | None:
        faster = _against(*peers)(found, case, memory)
        return faster and 1 / faster

    return ratio


def _of_float32(found: Measurements, case: Case, memory: str) -> float | None:
    """Copies of a bfloat16 case as a multiple of those of its float32 twin."""
    half, single = (_copies(found, each, memory) for each in (case, replace(case, dtype="float32")))
    return None if half is None or single is None else half / single


def _training(norms: Iterable[str], dtypes: Sequence[str] = ("float32", "bfloat16")) -> Pick:
    named = tuple(norms)
    return lambda case: case.norm in named and case.training and case.dtype in dtypes and case.shape != TINY


def _large(case: Case) -> bool:
    return case.norm == "batch" and case.training and case.bytes > _LARGE


_BATCH, _OTHERS = ("batch",), ("layer", "rms", "group", "instance")
_BOTH: tuple[str, ...] = ("float32", "bfloat16")
GATES = (
    Gate("batch norm + ReLU, float32, in copies", _training(_BATCH, ["float32"]), _copies, "mean", "most", 3.2),
    Gate("the same, the worst case", _training(_BATCH, ["float32"]), _copies, "worst", "most", 5.0),
    *(
        Gate(f"{norm} norm, float32, in copies", _training([norm], ["float32"]), _copies, "worst", "most", 3.2)
        for norm in _OTHERS
    ),
    Gate(
        "bfloat16 in copies, of float32's",
        _training((*_BATCH, *_OTHERS), ["bfloat16"]),
        _of_float32,
        "worst",
        "most",
        1.3,
    ),
    Gate("evaluation + ReLU, in copies", lambda case: not case.training, _copies, "worst", "most", 1.3),
    *(
        Gate(f"batch norm + ReLU, {dtype}, eager's time over ours", _training(_BATCH, [dtype]), _against(*EAGER),
             "mean", "least", 2.5)
        for dtype in _BOTH
    ),
    *(
        Gate(f"RMS norm, {dtype}, eager's time over ours", _training(["rms"], [dtype]), _against(*EAGER),
             "worst", "least", bound)
        for dtype, bound in zip(_BOTH, (4.0, 8.0), strict=True)
    ),
    Gate(
        "any case where eager takes 0.5 ms or more, eager's time over ours",
        lambda case: case.shape != TINY,
        _against(*EAGER, long=True),
        "worst",
        "least",
        1.0,
    ),
    *(
        Gate(f"batch norm + ReLU, {peer}'s time over ours", _training(_BATCH), _against(peer), "mean", "least", bound)
        for peer, bound in (("torch-compile", 10.0), ("jax", 5.0), ("keras-tensorflow", 5.0))
    ),
    Gate(
        "batch norm + ReLU, channels_last, oneDNN's time over ours",
        lambda case: _training(_BATCH)(case) and case.layout == "channels_last",
        _against("onednn"),
        "worst",
        "least",
        1.0,
    ),
    Gate("batch norm + ReLU above 32 MB, eager's time over ours", _large, _against(*EAGER), "worst", "least", 3.0,
         "fresh"),
    Gate("8x16x4x4, our time over eager's", lambda case: case.shape == TINY, _slower(*EAGER), "worst", "most", 1.2),
)  # fmt: skip
