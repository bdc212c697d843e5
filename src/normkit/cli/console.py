"""What commands say about themselves: how they were started, and that they were interrupted."""

from __future__ import annotations

import shlex
import sys
from typing import Annotated

import typer

from normkit.experiments.connection import hidden
from normkit.experiments.verb import TRIALS

__all__ = ["Storage", "Workers", "interrupted", "typed"]

# Options that several commands have.
Workers = Annotated[
    int | None, typer.Option(help="Processes, one thread each. [default: one per core]", show_default=False)
]
Storage = Annotated[
    str | None,
    typer.Option(
        help=f"Where trials are kept, a storage URL of Optuna. [default: {TRIALS} in the output folder]",
        show_default=False,
    ),
]


def typed(context: typer.Context) -> str:
    """What was typed, without what was left at its default."""
    said = ["normkit", str(context.info_name)]
    for parameter in context.command.params:
        value, name = context.params[str(parameter.name)], parameter.opts[0]
        if value == parameter.default or value is None:
            continue
        if value is True:
            said.append(name)
        else:
            shown = hidden(str(value))
            said += [name, shown] if name.startswith("-") else [shown]
    return shlex.join(said)


def interrupted(how: str | None = None) -> int:
    """Say so, and return the exit code for it."""
    print(f"interrupted: {how or 'nothing was written'}", file=sys.stderr)
    return 130
