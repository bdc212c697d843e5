"""Results that are tables: in the terminal, in a notebook, as plain values, in a file.

A verb's result derives from :class:`Result` and says two things: its :class:`Table` and its `to_dict`::

    @dataclass(frozen=True)
    class Edits(Result):
        edits: tuple[Edit, ...]

        def table(self) -> Table:
            rows = [(edit.path, edit.before, number(edit.change)) for edit in self.edits]
            return Table(("layer", "before", "change"), rows, words=2)

        def to_dict(self) -> dict[str, Any]:
            return {"edits": [plain(vars(edit)) for edit in self.edits]}

`str()`, `_repr_html_` and `save` follow. A sentence or two above the table goes into `Table.title`.
"""

from __future__ import annotations

import html
import json
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from normkit.errors import NormValueError, message
from normkit.files import save

__all__ = ["Result", "Table", "number", "plain"]


@dataclass(frozen=True)
class Table:
    """A table of strings.

    Attributes:
        headings: one per column.
        rows: cells, as many as there are headings.
        words: so many columns from the left hold words and are aligned to the left; the others hold numbers.
        title: lines above the table.
    """

    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: int = 1
    title: str = ""

    def __str__(self) -> str:
        rows = [self.headings, *self.rows]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(
                f"{cell:{'<' if place < self.words else '>'}{width}}"
                for place, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        ]
        return "\n".join([self.title, *lines] if self.title else lines)

    def _repr_html_(self) -> str:
        heading, *rows = [
            "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row)
            for tag, row in [("th", self.headings), *(("td", row) for row in self.rows)]
        ]
        title = "".join(f"<p>{html.escape(line)}</p>" for line in self.title.splitlines())
        body = "".join(f"<tr>{row}</tr>" for row in rows)
        return f"{title}<table><thead><tr>{heading}</tr></thead><tbody>{body}</tbody></table>"


class Result(ABC):
    """What a verb found, as a table."""

    @abstractmethod
    def table(self) -> Table:
        """What the terminal and the notebook show."""

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""

    def __str__(self) -> str:
        return str(self.table())

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()

    def _formats(self) -> Mapping[str, Callable[[], str | bytes]]:
        """What `save` can write: the ending of the file, and what makes its content."""
        return {
            ".txt": lambda: f"{self}\n",
            ".json": lambda: json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n",
            ".html": self._repr_html_,
        }

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the file in the format that its ending says, whole or not at all. Returns the path.

        Raises NormValueError for an ending that cannot be written, NormRuntimeError where the file cannot be.
        """
        path = Path(path)
        formats = self._formats()
        maker = formats.get(path.suffix.lower())
        if maker is None:
            *others, last = formats
            must = f"`path` must end in {', '.join(others)} or {last}"
            raise NormValueError(message(must, repr(str(path))))
        save(path, maker())
        return path


def number(value: float | None) -> str:
    """A number in a cell: three digits, `-` where there is none."""
    return "-" if value is None else f"{value:.3g}"


def plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values for JSON; what is not finite becomes None."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
