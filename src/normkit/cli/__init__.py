"""The command line. :func:`main` is its entry point."""

from __future__ import annotations

import sys

__all__ = ["main"]


def main(arguments: list[str] | None = None) -> int:
    """Run `normkit` with these arguments (those of the process by default) and return the exit code."""
    try:
        from normkit.cli.app import run
    except ImportError as error:
        if error.name not in ("typer", "click", "rich"):
            raise
        print(
            f"error: the command line needs {error.name}, which is not installed. hint: pip install 'normkit[lab]'",
            file=sys.stderr,
        )
        return 2
    return run(sys.argv[1:] if arguments is None else arguments)
