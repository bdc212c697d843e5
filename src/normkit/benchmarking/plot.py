"""Times as a picture: first the numbers, then the drawing, without touching matplotlib's global state."""

from __future__ import annotations

import io
from typing import NamedTuple

from normkit.benchmarking.results import Measurements
from normkit.errors import MissingExtraError, message

__all__ = ["Dots", "figure", "svg"]

_ROW = 0.28  # inches: a line of text
_COLORS = ("#c2410c", "#1766c2", "#0a8a9c", "#8a3ffc", "#178a4c", "#9a6b00", "#c21d6b", "#7a7f87")
_MARKERS = "osD^vP*X"


class Dots(NamedTuple):
    """One line per case and memory state; of each peer a number of copies, None where there is none."""

    lines: list[str]
    copies: dict[str, list[float | None]]


def figure(found: Measurements) -> Dots:
    """The numbers of the picture."""
    cases = found.cases()
    several = len({memory for _, memory in cases}) > 1
    copies: dict[str, list[float | None]] = {}
    for peer in found.measured():
        rows = [found.of(case, memory, peer) for case, memory in cases]
        copies[peer] = [None if row is None else row.copies for row in rows]
    return Dots([f"{case}{f', {memory}' if several else ''}" for case, memory in cases], copies)


def svg(dots: Dots) -> str:
    """The picture. Raises MissingExtraError without matplotlib."""
    try:
        import matplotlib
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure
        from matplotlib.ticker import FuncFormatter, NullFormatter
    except ImportError as error:
        must = "pictures need matplotlib, which is not installed"
        raise MissingExtraError(message(must, hint="pip install 'normkit[lab]'")) from error
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "normkit bench", "text.parse_math": False}):
        canvas = Figure(figsize=(9, 1.2 + _ROW * len(dots.lines)), layout="constrained")
        axes = canvas.subplots()
        for place, (peer, copies) in enumerate(dots.copies.items()):
            known = [(value, line) for line, value in enumerate(copies) if value is not None]
            axes.plot(
                [value for value, _ in known], [line for _, line in known], linestyle="none", label=peer,
                marker=_MARKERS[place % len(_MARKERS)], color=_COLORS[place % len(_COLORS)], alpha=0.85,
            )  # fmt: skip
        axes.set_xscale("log")
        axes.set_xlabel("time of a step, in copies of the tensor")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda number, _: f"{number:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_yticks(range(len(dots.lines)), dots.lines)
        axes.set_ylim(len(dots.lines) - 0.5, -0.5)
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        canvas.legend(loc="outside upper center", ncols=4, frameon=False)
        FigureCanvasSVG(canvas)
        buffer = io.StringIO()
        canvas.savefig(buffer, format="svg", metadata={"Date": None})
        return buffer.getvalue()
