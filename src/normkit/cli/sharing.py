"""The command that lets another machine help."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from normkit.cli.console import interrupted
from normkit.errors import NormError
from normkit.experiments.connection import hidden
from normkit.experiments.progress import progress
from normkit.experiments.verb import checked_workers

__all__ = ["worker"]


def worker(
    storage: Annotated[
        str,
        typer.Option(
            help="Where the trials are kept: the storage URL that compare or study was given.", show_default=False
        ),
    ],
    workers: Annotated[
        int | None,
        typer.Option(
            help="Processes, one thread each. [default: one per core, or per GPU where there are several and the "
            "trials may use them]",
            show_default=False,
        ),
    ] = None,
    wait: Annotated[
        bool, typer.Option("--wait", help="Do not end: take up what is asked later, and trials of dead processes.")
    ] = False,
) -> int:
    """Take trials of the comparisons and studies in a storage, on this machine or another one, until none is left.

    Start it anywhere, as often as you like, once compare or study has begun with a --storage that all machines reach,
    such as postgresql://user:password@host/db. Files of your own (file.py:build, data.npz) must be here too, at the
    same path or, for file.py, in this folder; what differs is refused. The results come together where compare runs.
    """
    from normkit.experiments.machine import Machine

    try:
        with Machine(storage, checked_workers(workers), progress(), _said) as machine:
            trained = machine.work(wait=wait)
    except KeyboardInterrupt:
        return interrupted("finished trials are kept, others take up the rest")
    reasons = tuple(machine.refused.values())
    if reasons and not trained:
        raise reasons[0]
    print(f"{trained} trial{'s' * (trained != 1)} trained here, none left to claim in {hidden(storage)}")
    return 0


def _said(reason: NormError) -> None:
    print(f"left to others: {reason}", file=sys.stderr, flush=True)
