"""docs/performance.md: the gates beside what was measured, and every measurement, from the rows of a CSV file."""

from __future__ import annotations

from normkit.benchmarking.gates import Verdict, verdicts
from normkit.benchmarking.peers import PEERS
from normkit.benchmarking.results import Measurements
from normkit.tables import Table, number

__all__ = ["page"]

_TOP = """# How fast

`make bench-page` makes this page from the rows of `benchmarks/performance.csv`; `make bench` measures anew, appends to
that file and makes the page again.

A step is forward and backward of the layer with gradients of the input, gamma and beta (evaluation: forward alone), on
tensors that are there. Every peer is a process of its own, started once, with as many threads and cores as the others
and OMP_WAIT_POLICY=passive. Before it is timed, its y, dx, dgamma and dbeta are compared with a float64 formula as a
whole and with the reference on statistics drawn at random: ours within the tolerance of the conformance suite, others
within 16 times that. In every round each peer has one turn, in an order drawn anew: two calls that are not measured,
then the timed ones. A time is the median over the rounds of the median within a turn.

The unit is a copy of a tensor of the case into one that is there, by PyTorch's `copy_` in a process of its own that has
its turn in every round: it is the same code for every peer, and what a peer did to its allocator does not reach it.
Where a processor's caches hold the copied tensor, a copy is far faster than any step can be: so "least traffic" gives
the time as a multiple of `y = empty_like(x).copy_(x); dx = add(x, dy)` (evaluation: the first alone) as well, which in
the same state of memory reads and writes only what every step has to.

Memory: *recycled* lets malloc reuse what was freed (`M_MMAP_THRESHOLD`, `M_TRIM_THRESHOLD`, `M_ARENA_MAX`), *fresh* is
as the peer comes. "Eager" in a gate is the faster of PyTorch's layers with the activation in place and out of place."""


def page(found: Measurements) -> str:
    """The page, in Markdown."""
    names = found.measured()
    peers = [[peer.name, peer.about] for peer in PEERS if peer.name in names]
    unmeasured = [peer.name for peer in PEERS if peer.name not in names]
    parts = [_TOP]
    if not found.rows:
        return "\n\n".join([*parts, "Nothing has been measured yet."]) + "\n"
    if found.missing or unmeasured:
        parts.append(f"Not measured: {', '.join(unmeasured)}.")
    runs = dict.fromkeys(tuple(row.circumstances.items()) for row in found.rows)
    parts += ["## Under what circumstances", *(_listed(dict(run)) for run in runs)]
    parts += ["## What was asked and what was measured", markdown(_gates(verdicts(found)))]
    parts += ["## Who was measured", markdown(Table(("peer", "what it is"), peers, words=2))]
    parts += ["## All measurements", "Times of others are multiples of the first peer's.", markdown(found.table())]
    return "\n\n".join(parts) + "\n"


def markdown(table: Table) -> str:
    """A table in Markdown."""
    marks = [":--" if place < table.words else "--:" for place in range(len(table.headings))]
    lines = [table.headings, marks, *table.rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _listed(run: dict[str, str]) -> str:
    return (
        f"- {run['date']}: {run['processor']}, {run['system']}, {run['threads']} threads, kernels for "
        f"{run['instructions']}; {run['versions'].replace(' ', ', ').replace('=', ' ')}."
    )


def _gates(found: list[Verdict]) -> Table:
    words = {True: "met", False: "**missed**", None: "not measured"}
    rows = []
    for verdict in found:
        gate = verdict.gate
        over = "geometric mean" if gate.over == "mean" else "worst case"
        asked = f"{'at most' if gate.at == 'most' else 'at least'} {gate.bound:g}"
        where = f"{verdict.cases} case{'s' * (verdict.cases != 1)}, furthest: {verdict.worst}" if verdict.cases else "-"
        cells = [gate.text, gate.memory, over, asked, number(verdict.value), words[verdict.passed], where]
        rows.append(cells)
    return Table(("gate", "memory", "of the cases", "asked", "measured", "", "from"), rows, words=7)
