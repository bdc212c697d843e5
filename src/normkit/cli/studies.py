"""The command that tries what is claimed about normalization."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from normkit.cli.console import Storage, Workers, interrupted, typed
from normkit.experiments.config import MODELS
from normkit.experiments.verb import TRIALS
from normkit.studies import Outcome, Outcomes
from normkit.studies import study as run_study

__all__ = ["study"]


def study(
    context: typer.Context,
    name: Annotated[
        str | None, typer.Argument(help="Of the study, or all. [default: list them]", show_default=False)
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="digits, wine, an .npz file with x_train, y_train, x_test, y_test, or a name or id of OpenML (mnist). "
            "[default: what the study was made for]",
            show_default=False,
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help=f"{' or '.join(MODELS)} alone. [default: both, for images]", show_default=False),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer seeds, rates and networks: an impression.")] = False,
    seeds: Annotated[
        int | None, typer.Option(help="Number of seeds. [default: the study's]", show_default=False)
    ] = None,
    workers: Workers = None,
    storage: Storage = None,
    out: Annotated[Path, typer.Option(help="Folder for the runs; each study gets a folder in it.")] = Path(
        "normkit-studies"
    ),
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON and nothing else.")] = False,
) -> int:
    """Try what is claimed about normalization: does it hold here?

    Finished runs are kept: the same command goes on where an earlier one ended.
    """
    try:
        found = run_study(
            name,
            data,
            model=model,
            quick=quick,
            seeds=seeds,
            workers=workers,
            storage=storage,
            out=out if name is not None else None,
            command=typed(context),
        )
    except KeyboardInterrupt:
        kept = storage is not None or (out / TRIALS).exists()
        return interrupted("finished runs are kept, run the same command again to go on" if kept else None)
    if as_json:
        sys.stdout.write(json.dumps(found.to_dict(), allow_nan=False) + "\n")
        return 0
    print(found)
    if isinstance(found, Outcome | Outcomes):
        folder = out / found.study.name if isinstance(found, Outcome) else out
        print(f"\nreport: {folder / 'report.html'}")
    return 0
