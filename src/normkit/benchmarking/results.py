"""What was measured: rows with their circumstances, as a table, as plain values, in a CSV file that grows."""

from __future__ import annotations

import csv
import errno
import io
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from normkit.benchmarking.cases import Case
from normkit.errors import NormRuntimeError, NormValueError, message
from normkit.tables import Result, Table, number

__all__ = ["COLUMNS", "Fault", "Measurement", "Measurements", "append", "read"]

CIRCUMSTANCES = ("processor", "instructions", "threads", "system", "versions", "date")
COLUMNS = (
    "norm", "activation", "shape", "layout", "dtype", "mode", "memory", "peer", "ms", "lower_ms", "upper_ms", "copy_ms",
    "copies", "least_ms", "faults", "rounds", *CIRCUMSTANCES,
)  # fmt: skip
_TIMES = ("ms", "lower_ms", "upper_ms", "copy_ms", "least_ms")


@dataclass(frozen=True)
class Measurement:
    """One peer on one case.

    Attributes:
        case, memory, peer: what was measured.
        ms: milliseconds of a step, the median over the rounds of the median within a turn; `lower_ms` and `upper_ms`
            are the quartiles over the rounds.
        copy_ms: of a copy of a tensor of the case, in the same rounds.
        least_ms: of the least memory traffic of a step in the same state of memory, in the same rounds.
        faults: pages that the system handed out during a step; None where it does not say.
        rounds: how many.
        circumstances: processor, widest instruction set of our kernels, threads, system, versions, date of the run.
    """

    case: Case
    memory: str
    peer: str
    ms: float
    lower_ms: float
    upper_ms: float
    copy_ms: float
    least_ms: float
    faults: float | None
    rounds: int
    circumstances: Mapping[str, str]

    @property
    def copies(self) -> float:
        """The time as a multiple of that of a copy."""
        return self.ms / self.copy_ms

    @property
    def least(self) -> float:
        """The time as a multiple of that of the least memory traffic."""
        return self.ms / self.least_ms

    def row(self) -> dict[str, str]:
        """The columns of the CSV file."""
        case = self.case
        return {
            "norm": case.norm,
            "activation": case.activation or "",
            "shape": case.size,
            "layout": case.layout,
            "dtype": case.dtype,
            "mode": "train" if case.training else "eval",
            "memory": self.memory,
            "peer": self.peer,
            **{name: f"{getattr(self, name):.6g}" for name in (*_TIMES, "copies")},
            "faults": "" if self.faults is None else f"{self.faults:g}",
            "rounds": str(self.rounds),
            **self.circumstances,
        }

    @classmethod
    def of_row(cls, row: Mapping[str, str]) -> Measurement:
        """The measurement that :meth:`row` gave."""
        shape = tuple(int(length) for length in row["shape"].split("x"))
        layout: Any = row["layout"]
        case = Case(row["norm"], shape, row["activation"] or None, layout, row["dtype"], row["mode"] == "train")
        ms, lower, upper, copy, least = (float(row[name]) for name in _TIMES)
        pages = float(row["faults"]) if row["faults"] else None
        under = {name: row[name] for name in CIRCUMSTANCES}
        return cls(case, row["memory"], row["peer"], ms, lower, upper, copy, least, pages, int(row["rounds"]), under)


@dataclass(frozen=True)
class Fault:
    """A peer that was not measured on a case, and what it did instead."""

    case: str
    memory: str
    peer: str
    what: str


@dataclass(frozen=True)
class Measurements(Result):
    """All that was measured.

    Attributes:
        rows: the measurements.
        peers: who was asked for, in the order of the table; the others are compared with the first.
        faults: peers that failed, died, took too long or were wrong, with the case.
        missing: peers that cannot run here, and why.
        interrupted: whether Ctrl-C ended it.
    """

    rows: tuple[Measurement, ...]
    peers: tuple[str, ...]
    faults: tuple[Fault, ...] = ()
    missing: Mapping[str, str] = field(default_factory=dict)
    interrupted: bool = False

    def of(self, case: Case, memory: str, peer: str) -> Measurement | None:
        """The measurement of a peer on a case."""
        return next((r for r in self.rows if (r.case, r.memory, r.peer) == (case, memory, peer)), None)

    def cases(self) -> list[tuple[Case, str]]:
        """Case and memory state of what was measured, in order."""
        return list(dict.fromkeys((row.case, row.memory) for row in self.rows))

    def measured(self) -> list[str]:
        """The peers of which there is anything."""
        seen = {row.peer for row in self.rows}
        return [peer for peer in self.peers if peer in seen]

    def table(self, *, notes: bool = True) -> Table:
        """A row per case and memory state: the first peer in ms, copies and least traffic, the others in its times."""
        first, *others = self.measured() or ["nobody"]
        rows = []
        for case, memory in self.cases():
            own = self.of(case, memory, first)
            some = next(row for row in self.rows if (row.case, row.memory) == (case, memory))
            cells = [str(case), memory, number(some.copy_ms)]
            cells += ["-"] * 3 if own is None else [number(own.ms), number(own.copies), number(own.least)]
            for peer in others:
                other = self.of(case, memory, peer)
                cells.append(f"{other.ms / own.ms:.2f}" if own and other else "-")
            rows.append(cells)
        headings = ["case", "memory", "copy ms", f"{first} ms", "copies", "least traffic"]
        headings += [f"{peer} / {first}" for peer in others]
        return Table(headings, rows, words=2, title="\n".join(self._notes()) if notes else "")

    def _notes(self) -> list[str]:
        lines = [f"{name} was left out: {why}" for name, why in self.missing.items()]
        lines += [f"{f.peer} on {f.case}, {f.memory} memory, {f.what}" for f in self.faults]
        return lines + (["interrupted: what follows was finished"] if self.interrupted else [])

    def to_dict(self) -> dict[str, Any]:
        """Rows as in the CSV file, with numbers as numbers, and what went wrong."""
        from normkit.benchmarking.gates import verdicts

        numbers = (*_TIMES, "copies", "faults", "rounds", "threads")
        rows = [{k: float(v) if k in numbers and v else v for k, v in row.row().items()} for row in self.rows]
        return {
            "rows": rows,
            "peers": list(self.peers),
            "faults": [vars(fault) for fault in self.faults],
            "missing": dict(self.missing),
            "interrupted": self.interrupted,
            "gates": [verdict.to_dict() for verdict in verdicts(self)],
        }

    def _formats(self) -> Mapping[str, Callable[[], str | bytes]]:
        return {".svg": self._svg, **super()._formats()}

    def _svg(self) -> str:
        from normkit.benchmarking.plot import figure, svg

        return svg(figure(self))


def append(path: Path, rows: Sequence[Measurement]) -> None:
    """Append rows to a CSV file in one write: another process' rows stay whole, and so do the file and ours.

    Raises NormRuntimeError where it cannot be written, NormValueError where it has other columns.
    """
    if not rows:
        return
    if path.exists() and path.stat().st_size:
        with path.open(newline="") as file:
            _check_columns(path, next(csv.reader(file), []))
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            size = os.fstat(descriptor).st_size
            content = _written(rows, heading=size == 0)
            if os.write(descriptor, content) != len(content):
                os.ftruncate(descriptor, size)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        finally:
            os.close(descriptor)
    except OSError as error:
        must = "`--csv` must be a file that can be written"
        raise NormRuntimeError(message(must, f"{path} ({error.strerror})")) from error


def _written(rows: Sequence[Measurement], *, heading: bool) -> bytes:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, COLUMNS, lineterminator="\n")
    if heading:
        writer.writeheader()
    writer.writerows(row.row() for row in rows)
    return buffer.getvalue().encode()


def read(path: Path, peers: Sequence[str]) -> Measurements:
    """The measurements in a CSV file, of every case from one run: the newest that holds the first of `peers`, if any.

    `peers` says in what order; peers that it does not name follow. Raises NormValueError where it is no such file.
    """
    try:
        with path.open(newline="") as file:
            reader = csv.DictReader(file)
            _check_columns(path, reader.fieldnames or [])
            lines = list(reader)
    except OSError as error:
        must = "the CSV file must be one that can be read"
        raise NormValueError(message(must, f"{path} ({error.strerror})")) from error
    try:
        rows = [Measurement.of_row(line) for line in lines]
    except (TypeError, ValueError, AttributeError) as error:
        raise NormValueError(message("every row of the CSV file must be whole", f"{path} ({error})")) from error
    newest: dict[tuple[Case, str], tuple[bool, str]] = {}
    for row in rows:
        key, run = (row.case, row.memory), (row.peer in peers[:1], row.circumstances["date"])
        newest[key] = max(newest.get(key, run), run)
    kept = [row for row in rows if row.circumstances["date"] == newest[row.case, row.memory][1]]
    names = list(dict.fromkeys([*peers, *(row.peer for row in kept)]))
    return Measurements(tuple(kept), tuple(names))


def _check_columns(path: Path, columns: Sequence[str]) -> None:
    if tuple(columns) != COLUMNS:
        must = "the CSV file must have the columns of `normkit bench`"
        raise NormValueError(message(must, f"{', '.join(columns)} in {path}", "choose another file"))
