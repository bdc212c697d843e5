"""A table of words and numbers: in a terminal and in HTML."""

from __future__ import annotations

import html
from collections.abc import Sequence

__all__ = ["as_html", "as_text"]


def as_text(headings: Sequence[str], rows: Sequence[Sequence[str]], words: int) -> str:
    """Columns of equal width: the first `words` of them to the left, numbers to the right.

    >>> print(as_text(["layer", "mean"], [["conv", "1"], ["x", "12.5"]], 1))
    layer  mean
    conv      1
    x      12.5
    """
    lines = [headings, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            f"{cell:{'<' if place < words else '>'}{width}}"
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def as_html(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The same as a `<table>`, everything escaped."""
    heading, *body = [
        "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in line)
        for tag, line in [("th", headings), *(("td", row) for row in rows)]
    ]
    drawn = "".join(f"<tr>{row}</tr>" for row in body)
    return f"<table><thead><tr>{heading}</tr></thead><tbody>{drawn}</tbody></table>"
