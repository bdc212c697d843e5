"""The command that measures how fast normalizers are."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from normkit.benchmarking import cases as grid
from normkit.benchmarking import peers as known
from normkit.benchmarking import results, tuning
from normkit.benchmarking.harness import measure
from normkit.benchmarking.page import page
from normkit.benchmarking.worker import MEMORIES
from normkit.errors import NormValueError, message, nearest
from normkit.experiments.devices import cores
from normkit.files import save
from normkit.kernels.registry import VARIABLE

__all__ = ["EXIT_CODES", "bench"]

EXIT_CODES = (
    "Exit codes: 0 done, 2 bad input or usage, 130 interrupted (finished cases are shown and kept), 1 anything else: a "
    "full disk, or a peer that failed, died, took too long or was wrong, while the others went on."
)
_ROUNDS, _QUICK_ROUNDS = 9, 3
_TUNE_ROUNDS = 5  # many cases, of microseconds each


def bench(
    cases: Annotated[
        str | None,
        typer.Option(
            help='Words of the names of cases, several separated by commas: "batch 7x7 float32, rms". [default: all]',
            show_default=False,
        ),
    ] = None,
    peers: Annotated[
        str | None,
        typer.Option(
            help=f"{', '.join(peer.name for peer in known.PEERS)}; the first is what others are compared with. "
            "[default: those that are installed]",
            show_default=False,
        ),
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(
            help="States of memory: recycled (malloc reuses what was freed; glibc only), fresh (as the peer comes). "
            "[default: both; recycled with --quick]",
            show_default=False,
        ),
    ] = None,
    rounds: Annotated[
        int | None,
        typer.Option(
            help=f"Turns of every peer. [default: {_ROUNDS}; {_QUICK_ROUNDS} with --quick]", show_default=False
        ),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(help="Threads, and cores, of every peer. [default: all cores]", show_default=False)
    ] = None,
    timeout: Annotated[float, typer.Option(help="Seconds that a peer may take to answer.")] = 300.0,
    quick: Annotated[bool, typer.Option("--quick", help="Few small cases: whether it works, not how fast.")] = False,
    csv: Annotated[
        Path | None, typer.Option(help="Append every finished case to this CSV file.", show_default=False)
    ] = None,
    from_: Annotated[
        Path | None,
        typer.Option("--from", help="Measure nothing, take the rows of this CSV file.", show_default=False),
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print the results as JSON and nothing else.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw the results: file.svg.", show_default=False)] = None,
    page_: Annotated[
        Path | None,
        typer.Option(
            "--page",
            help="Write the page with gates and measurements, from the CSV file if one is named.",
            show_default=False,
        ),
    ] = None,
    tune: Annotated[
        bool,
        typer.Option(
            "--tune",
            help="Time the compiled kernels against PyTorch's on small samples, and say where they lose clearly, as "
            f"rules for a file that {VARIABLE} names. Takes a minute or two.",
        ),
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="With --tune: write the rules to this JSON file.", show_default=False)
    ] = None,
) -> int:
    """Measure how fast normalizers are: time of a training step, in copies of the tensor, and of others beside ours.

    Every peer's outputs are checked before it is timed. Progress goes to standard error.
    """
    if plot is not None and plot.suffix.lower() != ".svg":
        raise NormValueError(message("`--plot` must end in .svg", repr(str(plot))))
    if tune:
        others = {"--peers": peers, "--memory": memory, "--csv": csv, "--from": from_, "--plot": plot, "--page": page_}
        _alone(others)
        return _tune(cases, rounds, threads, timeout, quick=quick, out=out, json_=json_)
    if out is not None:
        raise NormValueError(message("`--out` must come with `--tune`", repr(str(out))))
    names = tuple(peer.name for peer in known.PEERS)
    if from_ is not None:
        found = results.read(from_, names)
    else:
        found = measure(
            grid.chosen(grid.QUICK if quick else grid.GRID, cases),
            known.chosen(known.PEERS, peers),
            _memories(memory, MEMORIES[:1] if quick else MEMORIES),
            rounds=_at_least_one("--rounds", rounds, _QUICK_ROUNDS if quick else _ROUNDS),
            threads=_at_least_one("--threads", threads, cores()),
            timeout=timeout,
            tell=_tell,
            keep=lambda rows: None if csv is None else results.append(csv, rows),
        )
    if json_:
        print(json.dumps(found.to_dict(), indent=1, allow_nan=False))
    else:
        print(found)
    if plot is not None:
        found.save(plot)
    if page_ is not None:
        save(page_, page(found if csv is None or not csv.exists() else results.read(csv, names)), "`--page`")
    return _code(found)


def _tune(
    cases: str | None,
    rounds: int | None,
    threads: int | None,
    timeout: float,
    *,
    quick: bool,
    out: Path | None,
    json_: bool,
) -> int:
    if out is not None and not os.access(out.absolute().parent, os.W_OK):  # known before minutes of measuring
        raise NormValueError(message("`--out` must be in a folder that can be written", repr(str(out))))
    wanted = tuning.covered(grid.chosen(tuning.QUICK if quick else tuning.CASES, cases))
    found = measure(
        wanted,
        tuning.KERNELS,
        MEMORIES[:1],
        rounds=_at_least_one("--rounds", rounds, _QUICK_ROUNDS if quick else _TUNE_ROUNDS),
        threads=_at_least_one("--threads", threads, cores()),
        timeout=timeout,
        tell=_tell,
        keep=lambda _: None,
    )
    result = tuning.tuned(wanted, found)
    print(json.dumps(result.to_dict(), indent=1, allow_nan=False) if json_ else result)
    if out is not None and not found.interrupted:
        save(out, result.file(), "`--out`")
        _tell(f"{len(result.rules)} rules in {out}: {VARIABLE}={out} lets them count")
    return _code(found)


def _alone(others: Mapping[str, object]) -> None:
    for option, value in others.items():
        if value is not None:
            raise NormValueError(message(f"`--tune` must go without `{option}`", repr(str(value))))


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _code(found: results.Measurements) -> int:
    return 130 if found.interrupted else 1 if found.faults else 0


def _memories(wanted: str | None, default: tuple[str, ...]) -> tuple[str, ...]:
    if wanted is None:
        return default
    names = tuple(name.strip() for name in wanted.split(",") if name.strip())
    for name in names or ("",):
        if name not in MEMORIES:
            raise NormValueError(message("`--memory` must name known states", repr(name), nearest(name, MEMORIES)))
    return names


def _at_least_one(option: str, value: int | None, default: int) -> int:
    if value is not None and value < 1:
        raise NormValueError(message(f"`{option}` must be at least 1", value))
    return default if value is None else value
