"""Figures as inline SVG or PNG, drawn by matplotlib without touching its global state.

An SVG takes its colours from the page: matplotlib draws in placeholders that become CSS variables, so one picture
serves light and dark pages and print. Its values stand in the attribute `data-points`, where a page's script finds
them: `[x, y, label]` each, in the units of the picture.
"""

from __future__ import annotations

import functools
import html
import io
import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from normkit.experiments.config import Task
from normkit.report.figures import Costs, Depth, Finals, LearningCurves, Pen, Percentiles, RateRange
from normkit.report.look import LIGHT
from normkit.report.words import significant, value

__all__ = ["SLOTS", "Drawable", "depth_png", "draw_depth", "png", "standalone", "svg"]

SLOTS = sum(name.startswith("v") for name in LIGHT)  # further norms start again
# Colours that nothing else uses, to be replaced by the page's.
_PLACEHOLDERS = {name: f"#0{number:x}0203" for number, name in enumerate(LIGHT)}

Drawable = LearningCurves | RateRange | Finals | Costs | Depth | Percentiles
_WIDTH = 5.6  # inches: text is as large as a page's beside another figure, and can be read on a phone
_DPI = 72  # a pixel is a point, the unit of an SVG
_LABEL = 10.5
_LINE_HEIGHT = 13.0  # points between two labels
_DASHES: Any = (0, (4, 1.5))
_DOTS: Any = (0, (1, 3))
_PLAIN = FuncFormatter(lambda number, _position: f"{number:g}")


class _Point(NamedTuple):
    """A value that can be hovered over, in the coordinates of its axes."""

    axes: Axes
    x: float
    y: float
    label: str


class _Drawing(NamedTuple):
    canvas: Figure
    points: list[_Point]
    described: str


class _Colors:
    """The colours of one drawing."""

    def __init__(self, named: dict[str, str]) -> None:
        self.ink, self.soft, self.faint, self.paper = (named[name] for name in ("ink", "soft", "faint", "paper"))
        self._variants = [named[f"v{slot}"] for slot in range(SLOTS)]

    def of(self, pen: Pen) -> str:
        return self._variants[pen.slot % SLOTS]


def svg(figure: Drawable, name: str) -> str:
    """An SVG element; `name` must differ between the figures of one page."""
    drawn = _svg(figure)
    # All figures of a page share one space of ids. The first tag has none, and holds labels.
    head, tag, body = drawn.partition(">")
    body = re.sub(r'\bid="', f'id="{name}-', body)
    return head + tag + re.sub(r'(url\(|href=")#', rf"\1#{name}-", body)


@functools.lru_cache(maxsize=64)  # the figures of a comparison, which the page shows and which become files
def _svg(figure: Drawable) -> str:
    with matplotlib.rc_context({**_style(_PLACEHOLDERS), "svg.hashsalt": "normkit"}):
        drawing = _drawn(figure, _Colors(_PLACEHOLDERS))
        FigureCanvasSVG(drawing.canvas)
        return _inline(drawing)


def png(figure: Drawable) -> bytes:
    """A picture in light colours, 1120 pixels wide."""
    with matplotlib.rc_context(_style(LIGHT)):
        canvas = _drawn(figure, _Colors(LIGHT)).canvas
        FigureCanvasAgg(canvas)
        canvas.patch.set_facecolor(LIGHT["paper"])
        buffer = io.BytesIO()
        canvas.savefig(buffer, format="png", dpi=200)
        return buffer.getvalue()


def draw_depth(figure: Depth, name: str) -> str:
    """Activation statistics over depth as an SVG element; `name` must differ between the figures of one page."""
    return svg(figure, name)


def depth_png(figure: Depth) -> bytes:
    """Activation statistics over depth as a picture."""
    return png(figure)


def standalone(svg: str) -> str:
    """An SVG element as a file of its own, in light colours."""
    for name, color in LIGHT.items():
        svg = svg.replace(f"var(--{name})", color)
    svg = re.sub(r" data-points='[^']*'", "", svg, count=1)
    box = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg)
    assert box is not None
    size = f'width="{box[1]}pt" height="{box[2]}pt" font-family="sans-serif"'
    paper = f'<rect width="100%" height="100%" fill="{LIGHT["paper"]}"/>'
    svg = re.sub(r"<svg [^>]*>", lambda match: f"{match[0][:-1]} {size}>{paper}", svg, count=1)
    return f'<?xml version="1.0" encoding="utf-8"?>\n{svg}\n'


def _style(named: dict[str, str]) -> dict[Any, Any]:
    return {
        "svg.fonttype": "none",
        "font.family": "sans-serif",
        "font.size": 11,
        "text.parse_math": False,  # a name with two dollars is no formula
        "text.color": named["ink"],
        "axes.labelcolor": named["soft"],
        "axes.edgecolor": named["faint"],
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.spines.left": False,
        "axes.axisbelow": True,
        "axes.grid": True,
        "axes.unicode_minus": True,
        "grid.color": named["faint"],
        "grid.linewidth": 0.5,
        "grid.alpha": 0.6,
        "xtick.color": named["soft"],
        "ytick.color": named["soft"],
        "xtick.major.size": 0,
        "ytick.major.size": 0,
        "xtick.minor.size": 0,
        "ytick.minor.size": 0,
        "lines.linewidth": 1.7,
        "path.simplify_threshold": 0.0,
    }


def _drawn(figure: Drawable, colors: _Colors) -> _Drawing:
    for kind, paint in _PAINTERS.items():
        if isinstance(figure, kind):
            return paint(figure, colors)
    raise AssertionError(figure)


def _learning_curves(figure: LearningCurves, colors: _Colors) -> _Drawing:
    canvas, (axes,) = _canvas(3.3)
    task, scale = figure.task, _scale(figure.task)
    if task.target is not None:
        axes.axhline(scale * task.target, color=colors.ink, linewidth=0.9, linestyle=_DOTS)
    points: list[_Point] = []
    for line in figure.lines:
        color = colors.of(line.pen)
        low, mean, high = ([scale * number for number in numbers] for numbers in (line.low, line.mean, line.high))
        axes.fill_between(line.steps, low, high, color=color, alpha=0.09, linewidth=0)
        axes.plot(
            line.steps,
            mean,
            color=color,
            linestyle=_dashes(line.pen),
            marker="o",
            markersize=0.1 if len(mean) > 1 else 5,
        )
        for step, *three in zip(line.steps, line.mean, line.low, line.high, strict=True):
            points.append(_Point(axes, step, scale * three[0], f"{line.norm}, step {step:g}: {_ranged(task, *three)}"))
    ends = [step for line in figure.lines for step in (line.steps[0], line.steps[-1])]
    if ends and min(ends) < max(ends):
        axes.set_xlim(min(0, *ends), max(ends))
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.set_xlabel("training steps")
    axes.set_ylabel(_unit(figure))
    _metric_axis(axes, task, [number for line in figure.lines for number in (*line.low, *line.high)])
    _label_ends(
        canvas, axes, [(line.norm, line.pen, line.steps[-1], scale * line.mean[-1]) for line in figure.lines], colors
    )
    return _Drawing(canvas, points, f"{figure.of} against training steps, {_listed(figure)}")


def _rate_range(figure: RateRange, colors: _Colors) -> _Drawing:
    lanes = len(figure.lines)
    canvas, (axes, foot) = _canvas(2.5 + 0.2 * lanes, heights=(2.1, 0.2 * lanes))
    task, scale = figure.task, _scale(figure.task)
    if task.chance is not None:
        axes.axhline(scale * task.chance, color=colors.ink, linewidth=0.9, linestyle=_DOTS)
    points = []
    for lane, line in enumerate(figure.lines):
        color = colors.of(line.pen)
        # Where a seed diverged there is no mean: None becomes NaN, a gap in the line instead of a bridge.
        mean, low, high = (np.array(numbers, dtype=float) for numbers in (line.mean, line.low, line.high))
        axes.fill_between(line.lrs, scale * low, scale * high, color=color, alpha=0.07, linewidth=0)
        axes.plot(line.lrs, scale * mean, color=color, linestyle=_dashes(line.pen), marker="o", markersize=3.2)
        usable = [lane if usable else math.nan for usable in line.usable]
        foot.plot(line.lrs, usable, color=color, linewidth=3, marker="o", markersize=5, solid_capstyle="round")
        for lr, lost, pruned, works in zip(line.lrs, line.diverged, line.pruned, line.usable, strict=True):
            if not works:
                marker = "x" if lost else "o"
                foot.plot([lr], [lane], marker, color=color, markersize=4.5, markeredgewidth=1.3, fillstyle="none")
            ends = ((lost, "diverged"), (pruned, "pruned"))
            said = ", ".join(f"{number} of its seeds {what}" for number, what in ends if number)
            said = said or ("works" if works else "trained, but did not learn")
            points.append(_Point(foot, lr, lane, f"{line.norm}, rate {lr:g}: {said}"))
        for lr, *three in zip(line.lrs, mean, low, high, strict=True):
            points.append(_Point(axes, lr, scale * three[0], f"{line.norm}, rate {lr:g}: {_ranged(task, *three)}"))
    axes.set_xscale("log")
    axes.set_ylabel(_unit(figure))
    axes.tick_params(labelbottom=False)
    shown = [n for line in figure.lines for numbers in (line.low, line.high) for n in numbers if n is not None]
    _metric_axis(axes, task, shown)
    rates = sorted({lr for line in figure.lines for lr in line.lrs})
    foot.xaxis.set_major_locator(FixedLocator(rates[:: math.ceil(len(rates) / 8)]))
    foot.xaxis.set_minor_locator(NullLocator())
    foot.xaxis.set_major_formatter(_PLAIN)
    if len(rates) == 1:
        foot.set_xlim(rates[0] / 2, rates[0] * 2)
    foot.set_xlabel("learning rate")
    foot.grid(axis="y", visible=False)
    _rows(foot, [line.norm for line in figure.lines], [colors.of(line.pen) for line in figure.lines])
    return _Drawing(canvas, points, f"{figure.of} against the learning rate, {_listed(figure)}")


def _finals(figure: Finals, colors: _Colors) -> _Drawing:
    canvas, (axes,) = _canvas(0.75 + 0.3 * len(figure.lines))
    task, scale = figure.task, _scale(figure.task)
    points = []
    for lane, line in enumerate(figure.lines):
        color = colors.of(line.pen)
        if line.mean is None:
            axes.text(0.01, lane, "diverged", transform=axes.get_yaxis_transform(), color=colors.soft, va="center")
            continue
        if line.norm == figure.baseline:
            axes.axvline(scale * line.mean, color=colors.ink, linewidth=0.9, linestyle=_DOTS)
        label = f"{line.norm}: {value(task, line.mean)}"
        if line.low is not None and line.high is not None:
            axes.plot([scale * line.low, scale * line.high], [lane, lane], color=color, linewidth=2.2)
            label += f" (95 % interval {value(task, line.low)} to {value(task, line.high)})"
        axes.plot(
            [scale * seed for seed in line.seeds], [lane] * len(line.seeds), "o", color=color, alpha=0.35, markersize=4
        )
        axes.plot([scale * line.mean], [lane], "o", color=color, markersize=7, markeredgecolor=colors.paper)
        points += [
            _Point(axes, scale * seed, lane, f"{line.norm}, seed {number}: {value(task, seed)}")
            for number, seed in enumerate(line.seeds)
        ]
        points.append(_Point(axes, scale * line.mean, lane, label))
    axes.set_xlabel(_unit(figure))
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.grid(axis="y", visible=False)
    _rows(axes, [line.norm for line in figure.lines], [colors.of(line.pen) for line in figure.lines])
    return _Drawing(canvas, points, f"{figure.of} with 95 % intervals, {_listed(figure)}")


def _costs(figure: Costs, colors: _Colors) -> _Drawing:
    panels = [
        ("ms per step", [(line.milliseconds, line.time_ratio) for line in figure.lines]),
        ("memory, MB", [(line.megabytes, line.memory_ratio) for line in figure.lines]),
    ]
    panels = [(title, bars) for title, bars in panels if any(amount is not None for amount, _ in bars)]
    canvas, every = _canvas(0.75 + 0.3 * len(figure.lines), columns=len(panels))
    points = []
    for axes, (title, bars) in zip(every, panels, strict=True):
        longest = max(amount for amount, _ in bars if amount is not None)
        for lane, (line, (amount, ratio)) in enumerate(zip(figure.lines, bars, strict=True)):
            if amount is None:
                continue
            axes.barh(lane, amount, height=0.55, color=colors.of(line.pen), alpha=0.85, linewidth=0)
            axes.text(amount + 0.03 * longest, lane, significant(amount), va="center", fontsize=_LABEL)
            times = "" if ratio is None or line.norm == figure.baseline else f", {ratio:.2f} times {figure.baseline}"
            points.append(
                _Point(axes, amount, lane, f"{line.norm}: {significant(amount)} {title.replace('memory, ', '')}{times}")
            )
        axes.set_xlim(0, 1.25 * longest or 1)
        axes.set_xlabel(title)
        axes.xaxis.set_major_locator(MaxNLocator(3))
        axes.grid(axis="y", visible=False)
        _rows(axes, [line.norm for line in figure.lines], [colors.of(line.pen) for line in figure.lines])
        if axes is not every[0]:
            axes.set_yticklabels([])
    return _Drawing(canvas, points, f"{' and '.join(title for title, _ in panels)}, {_listed(figure)}")


def _depth(figure: Depth, colors: _Colors) -> _Drawing:
    canvas, (top, bottom) = _canvas(3.9, heights=(2, 1))
    points = []
    for line in figure.lines:
        color, calls = colors.of(line.pen), range(1, len(line.sites) + 1)
        marker = {"color": color, "linestyle": _dashes(line.pen), "marker": "o", "markersize": 3.2}
        top.plot(calls, _finite(line.std), **marker)
        bottom.plot(calls, _finite(100 * share for share in line.dead), **marker)
        for call, site, mean, std, dead in zip(calls, line.sites, line.mean, line.std, line.dead, strict=True):
            numbers = f"std {significant(std)}, mean {significant(mean)}, {100 * dead:.0f} % dead"
            for axes, height in ((top, std), (bottom, 100 * dead)):
                points.append(_Point(axes, call, height, f"{line.label}, {site}: {numbers}"))
    _log_where_wide(top, [std for line in figure.lines for std in line.std])
    top.set_ylabel("standard deviation")
    top.tick_params(labelbottom=False)
    bottom.set_ylabel("dead, %")
    bottom.set_ylim(-4, 104)
    bottom.yaxis.set_major_locator(FixedLocator([0, 50, 100]))
    bottom.set_xlabel("activation, in the order of their calls")
    sites = max((len(line.sites) for line in figure.lines), default=1)
    bottom.set_xlim(0.7, sites + 0.3)
    bottom.xaxis.set_major_locator(MaxNLocator(min(12, sites), integer=True))
    lasts = [(line.label, line.pen, len(line.sites), line.std[-1]) for line in figure.lines]
    _label_ends(canvas, top, lasts, colors)
    return _Drawing(
        canvas, points, f"Standard deviation and share dead of the activations' inputs over depth, {_listed(figure)}"
    )


def _percentiles(figure: Percentiles, colors: _Colors) -> _Drawing:
    canvas, panels = _canvas(3.9, heights=(1, 1))
    points = []
    for axes, where, lines in zip(panels, ("first activation", "last activation"), figure, strict=True):
        for line in lines:
            color = colors.of(line.pen)
            low, middle, high = (_finite(numbers) for numbers in (line.low, line.middle, line.high))
            axes.fill_between(line.steps, low, high, color=color, alpha=0.15, linewidth=0)
            axes.plot(line.steps, middle, color=color, linestyle=_dashes(line.pen), marker="o", markersize=3.2)
            for step, *three in zip(line.steps, line.low, line.middle, line.high, strict=True):
                numbers = " to ".join(significant(number) for number in three)
                points.append(_Point(axes, step, three[1], f"{line.norm}, {where}, step {step}: {numbers}"))
        axes.set_ylabel(where)
    top, bottom = panels
    top.tick_params(labelbottom=False)
    bottom.set_xlabel("training steps")
    bottom.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    _label_ends(canvas, bottom, [(b.norm, b.pen, b.steps[-1], b.middle[-1]) for b in figure.last], colors)
    said = "Percentiles 15, 50 and 85 of what enters one unit, over training"
    return _Drawing(canvas, points, f"{said}, {_listed(figure)}")


_PAINTERS: dict[type, Callable[[Any, _Colors], _Drawing]] = {
    LearningCurves: _learning_curves,
    RateRange: _rate_range,
    Finals: _finals,
    Costs: _costs,
    Depth: _depth,
    Percentiles: _percentiles,
}


def _canvas(height: float, *, heights: Sequence[float] = (1,), columns: int = 1) -> tuple[Figure, list[Axes]]:
    """Axes in one column or in one row."""
    canvas = Figure(figsize=(_WIDTH, height), dpi=_DPI, layout="constrained")
    grid = canvas.subplots(len(heights), columns, sharex="col", squeeze=False, height_ratios=heights)
    return canvas, list(grid.flat)


def _metric_axis(axes: Axes, task: Task, numbers: Sequence[float]) -> None:
    """From 0 to 100 % for shares; other metrics as they come, logarithmic where they span decades."""
    if task.is_share:
        axes.set_ylim(0, 101)
        axes.yaxis.set_major_locator(FixedLocator([0, 20, 40, 60, 80, 100]))
    else:
        _log_where_wide(axes, numbers)


def _log_where_wide(axes: Axes, numbers: Iterable[float]) -> None:
    known = [number for number in numbers if math.isfinite(number)]
    if not known or min(known) < 0:
        return
    positive = [number for number in known if number > 0]
    if positive and max(positive) > 30 * min(positive):
        axes.set_yscale("log", nonpositive="mask")
        axes.yaxis.set_major_formatter(_PLAIN)
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        axes.set_ylim(0, 1.05 * max(known) or 1)


def _rows(axes: Axes, names: Sequence[str], colors: Sequence[str]) -> None:
    """One row per variant from the top, named in its colour."""
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    for tick, color in zip(axes.get_yticklabels(), colors, strict=True):
        tick.set_color(color)


def _label_ends(canvas: Figure, axes: Axes, ends: Sequence[tuple[str, Pen, float, float]], colors: _Colors) -> None:
    """Name every line at its right end, apart from each other, a hair line leading there."""
    ends = [end for end in ends if math.isfinite(end[3])]
    room = 24 + 6.2 * max((len(end[0]) for end in ends), default=0)
    width, height = canvas.get_size_inches() * _DPI
    canvas.get_layout_engine().set(rect=(0, 0, 1 - min(room, 0.4 * width) / width, 1))  # type: ignore[union-attr,call-arg]
    canvas.draw_without_rendering()
    canvas.set_layout_engine("none")
    placed = [axes.transData.transform(end[2:]) for end in ends]
    box = axes.get_window_extent()
    heights = _apart([y for _, y in placed], _LINE_HEIGHT, box.y0, box.y1)
    for (name, pen, *_), (x, y), at in zip(ends, placed, heights, strict=True):
        color, right = colors.of(pen), box.x1
        path = [(x + 3, y), (right + 4, y), (right + 14, at)] if x < right - 1 else [(right + 3, y), (right + 14, at)]
        xs, ys = zip(*path, strict=True)
        canvas.add_artist(
            Line2D([x / width for x in xs], [y / height for y in ys], color=color, linewidth=0.7, alpha=0.6)
        )
        canvas.text((right + 17) / width, at / height, name, color=color, fontsize=_LABEL, va="center")


def _apart(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """The wanted heights, moved as far as labels need: in their order, `gap` apart, between low and high."""
    order = sorted(range(len(wanted)), key=lambda n: wanted[n])
    result, floor = list(wanted), -math.inf
    for n in order:
        result[n] = floor = max(wanted[n], floor + gap)
    ceiling = max(high, low + gap * (len(wanted) - 1))
    for n in reversed(order):
        result[n] = ceiling = min(result[n], ceiling)
        ceiling -= gap
    return result


def _dashes(pen: Pen) -> Any:
    return _DASHES if pen.dashed else "-"


def _scale(task: Task) -> float:
    return 100 if task.is_share else 1


def _unit(figure: LearningCurves | RateRange | Finals) -> str:
    of = figure.of if len(figure.of) < 40 else f"{figure.of[:38]}…"
    return f"{of}, %" if figure.task.is_share else of


def _ranged(task: Task, mean: float, low: float, high: float) -> str:
    """`95.3 % (94.1 % to 96.0 %)`."""
    return value(task, mean) if low == high else f"{value(task, mean)} ({value(task, low)} to {value(task, high)})"


def _listed(figure: Drawable) -> str:
    names = [line.label if isinstance(figure, Depth) else line.norm for line in figure.lines]  # type: ignore[union-attr]
    return ", ".join(names)


def _finite(numbers: Iterable[float]) -> list[float]:
    return [number if math.isfinite(number) else math.nan for number in numbers]


def _inline(drawing: _Drawing) -> str:
    """What matplotlib writes, without what a page gives or does not need."""
    canvas = drawing.canvas
    canvas.patch.set_visible(False)
    for axes in canvas.axes:
        axes.patch.set_visible(False)
    canvas.draw_without_rendering()
    canvas.set_layout_engine("none")  # or the layout would move once more
    buffer = io.StringIO()
    canvas.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    for variable, color in _PLACEHOLDERS.items():
        svg = svg.replace(color, f"var(--{variable})")
    svg = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", svg)  # the family comes from the page
    svg = re.sub(r' (width|height)="[\d.]+pt"', "", svg, count=2)
    # Hundredths of a point are enough, in drawings; labels are text and stay.
    svg = re.sub(r'\b(d|x|y|transform)="[^"]+"', lambda match: re.sub(r"(\.\d\d)\d+", r"\1", match[0]), svg)
    svg = re.sub(r">\s+<", "><", svg)
    described = html.escape(drawing.described[0].upper() + drawing.described[1:])
    points = html.escape(json.dumps(_located(drawing), separators=(",", ":"), ensure_ascii=False), quote=False)
    points = points.replace("'", "&#39;")
    return svg.replace("<svg ", f'<svg role="img" aria-label="{described}" data-points=\'{points}\' ', 1).strip()


def _located(drawing: _Drawing) -> list[tuple[float, float, str]]:
    """The points in the units of the picture, from its upper left corner; those that are not drawn are left out."""
    height = drawing.canvas.get_size_inches()[1] * _DPI
    located = []
    for axes, x, y, label in drawing.points:
        across, up = axes.transData.transform((x, y)) if math.isfinite(y) else (math.nan, math.nan)
        if axes.get_window_extent().padded(2).contains(across, up):
            located.append((round(float(across), 1), round(float(height - up), 1), label))
    return located
