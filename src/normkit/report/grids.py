"""Pictures of which values share a statistic: SVG written by hand, the same bytes everywhere.

A letter in every cell says what its colour says. In a page the colours are those of the page; a file of its own has
light ones.
"""

from __future__ import annotations

import html
import itertools
from collections.abc import Sequence

from normkit.report.look import LIGHT
from normkit.teaching.cells import letter
from normkit.teaching.walk import Walk

__all__ = ["element", "picture"]

_CELL, _GAP = 22, 8  # pixels: the height of a cell, which is the width of a pixel's; between blocks
_COLUMN = 54  # the width of a cell that has a name above it
_LABEL, _LINE = 84, 20  # the names of the rows; a line of text
_SHOWN = 8  # rows, blocks and cells across a block, at most
_LETTER, _BOLD = 6, 8  # pixels of a small letter, and of a bold one
_VARIANTS = [name for name in LIGHT if name.startswith("v")]


def element(walk: Walk) -> str:
    """The grid of one input as an SVG element, in the colours of the page."""
    body, width, height = _grid(walk, 0, 0)
    return _svg(body, width, height)


def picture(walks: Sequence[tuple[str, Walk]]) -> str:
    """The grids of several normalizers, two in a row, each under its title, as a file."""
    grids = [_grid(walk, 0, 0) for _, walk in walks]
    sizes = [(max(width, len(title) * _BOLD), tall) for (title, _), (_, width, tall) in zip(walks, grids, strict=True)]
    second = max(width for width, _ in sizes[::2]) + 4 * _GAP  # where the second column begins
    bodies, y = [], 0
    for start in range(0, len(walks), 2):
        for (title, walk), x in zip(walks[start : start + 2], (_GAP, second), strict=False):
            bodies += [_text(x, y + _LINE, title, "ink", anchor="start", bold=True), _grid(walk, x, y + 2 * _LINE)[0]]
        y += max(height for _, height in sizes[start : start + 2]) + 3 * _LINE
    svg = _svg(
        "".join(bodies),
        second * (len(walks) > 1) + max((width for width, _ in sizes[1::2]), default=sizes[0][0]) + 2 * _GAP,
        y,
    )
    for name, color in LIGHT.items():
        svg = svg.replace(f"var(--{name})", color)
    head, body = svg.split(">", 1)
    paper = f'<rect width="100%" height="100%" fill="{LIGHT["paper"]}"/>'
    return f'<?xml version="1.0" encoding="utf-8"?>\n{head} font-family="sans-serif">{paper}{body}\n'


def _grid(walk: Walk, x: int, y: int) -> tuple[str, int, int]:
    """The grid with its upper left corner at (x, y): its elements, width and height."""
    frame, cube = walk.frame, walk.frame.cube(walk.shares)
    rows, blocks, cells = (min(length, _SHOWN) for length in frame.lengths)
    unnamed = frame.blocks == ("",)  # then the cells have names: a table with its columns within
    table = unnamed or cells == 1
    width, gap = (_COLUMN, 0) if table else (_CELL, _GAP)
    wide = cells if table else min(frame.shape[-1], cells)
    tall, step = -(-cells // wide), wide * width + gap
    across, room = (frame.cells[:cells], width) if unnamed else (frame.blocks[:blocks], step)
    x += _LABEL
    found = [
        _text(x + at * room + (room - gap) // 2, y + 12, _short(name, room), "soft", small=True)
        for at, name in enumerate(across)
    ]
    for r in range(rows):
        top = y + _LINE + r * (tall * _CELL + gap)
        found.append(_text(x - _GAP, top + tall * _CELL // 2 + 4, frame.rows[r], "soft", anchor="end", small=True))
        for b, c in itertools.product(range(blocks), range(cells)):
            left, above = x + b * step + c % wide * width, top + c // wide * _CELL
            share = int(cube[r, b, c])
            color = _VARIANTS[share % len(_VARIANTS)]
            paint = f'fill="var(--{color})" fill-opacity=".22" stroke="var(--{color})"'
            found.append(f'<rect x="{left}" y="{above}" width="{width}" height="{_CELL}" {paint}/>')
            found.append(_text(left + width // 2, above + 15, letter(share), "ink", small=True))
    return "".join(found), _LABEL + blocks * step, _LINE + rows * (tall * _CELL + gap)


def _short(name: str, width: int) -> str:
    """A name that fits above so many pixels: the words of long ones become their first letters."""
    if len(name) * _LETTER <= width:
        return name
    return "".join(part if part.isdigit() else part[:1] for part in name.replace(",", " , ").split())


def _svg(body: str, width: int, height: int) -> str:
    size = f'viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">{body}</svg>'


def _text(
    x: int, y: int, words: str, color: str, *, anchor: str = "middle", small: bool = False, bold: bool = False
) -> str:
    weight = ' font-weight="600"' if bold else ""
    style = f'font-size="{11 if small else 13}"{weight} text-anchor="{anchor}"'
    return f'<text x="{x}" y="{y}" fill="var(--{color})" {style}>{html.escape(words)}</text>'
