"""Figures as inline SVG, drawn by matplotlib without touching its global state.

Colours come from the page: matplotlib draws in placeholders that become CSS variables, so one picture serves light and
dark pages and print.
"""

from __future__ import annotations

import io
import math
import re
from typing import Any

import matplotlib
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from normkit.report.figures import Curve, LearningCurves, Rate, RateRange

__all__ = ["SLOTS", "draw_learning_curves", "draw_rate_range"]

SLOTS = 8  # colours in the style sheet; further norms start again
# A matplotlib colour that nothing else uses -> what the page puts in its place.
_INK = {"#010101": "var(--ink)", "#020202": "var(--faint)", "#030303": "var(--paper)"}
_VARIANT = {f"#0400{slot:02x}": f"var(--v{slot})" for slot in range(SLOTS)}
_INK_COLOR, _FAINT_COLOR, _PAPER_COLOR = _INK
_VARIANT_COLORS = tuple(_VARIANT)
_SIZE = (6.4, 3.9)  # inches; text is sized so that it can be read where this is as wide as a phone
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 11.5,
    "text.color": _INK_COLOR,
    "axes.labelcolor": _INK_COLOR,
    "axes.edgecolor": _FAINT_COLOR,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": _FAINT_COLOR,
    "grid.linewidth": 0.5,
    "grid.alpha": 0.5,
    "xtick.color": _INK_COLOR,
    "ytick.color": _INK_COLOR,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "path.simplify_threshold": 0.0,
}


def draw_learning_curves(figure: LearningCurves, name: str) -> str:
    """An SVG element; `name` must differ between the figures of one page."""
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):
        canvas = Figure(figsize=_SIZE, layout="constrained")
        axes = canvas.add_subplot()
        axes.axhline(100 * figure.target, color=_INK_COLOR, linewidth=0.8, linestyle=(0, (2, 3)))
        for curve in figure.curves:
            color, dash = _pen(curve)
            low, mean, high = ([100 * value for value in values] for values in (curve.low, curve.mean, curve.high))
            axes.fill_between(curve.steps, low, high, color=color, alpha=0.09, linewidth=0)
            axes.plot(curve.steps, mean, color=color, linestyle=dash, linewidth=1.7)
        axes.set_xlabel("training steps")
        axes.set_ylabel("validation accuracy, %")
        axes.set_ylim(0, 101)
        axes.set_xlim(0, max((curve.steps[-1] for curve in figure.curves), default=1))
        axes.xaxis.set_major_locator(MaxNLocator(7, integer=True))
        described = f"Validation accuracy against training steps for {len(figure.curves)} variants"
        return _svg(canvas, name, described)


def draw_rate_range(figure: RateRange, name: str) -> str:
    """An SVG element; crosses at the foot mark rates at which a seed diverged."""
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):
        canvas = Figure(figsize=_SIZE, layout="constrained")
        axes = canvas.add_subplot()
        axes.set_xscale("log")
        axes.axhline(100 * figure.chance, color=_INK_COLOR, linewidth=0.8, linestyle=(0, (2, 3)))
        lanes = max(len(figure.rates), 1)
        for lane, rate in enumerate(figure.rates):
            color, dash = _pen(rate)
            # Where a seed diverged there is no mean: NaN leaves a gap in the line instead of bridging it.
            mean, low, high = (
                [math.nan if value is None else 100 * value for value in values]
                for values in (rate.mean, rate.low, rate.high)
            )
            axes.fill_between(rate.lrs, low, high, color=color, alpha=0.07, linewidth=0)
            axes.plot(rate.lrs, mean, color=color, linestyle=dash, linewidth=1.7, marker="o", markersize=3.2)
            lost = [lr for lr, count in zip(rate.lrs, rate.diverged, strict=True) if count]
            # One lane per variant below the axis of accuracy, or the crosses of all variants would hide each other.
            axes.plot(lost, [-4 - 16 * lane / lanes] * len(lost), "x", color=color, markersize=5, markeredgewidth=1.5)
        lrs_shown = sorted({lr for rate in figure.rates for lr in rate.lrs})
        axes.xaxis.set_major_locator(FixedLocator(lrs_shown))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _position: f"{value:g}"))
        axes.set_xlabel("learning rate")
        axes.set_ylabel("validation accuracy, %")
        axes.yaxis.set_major_locator(FixedLocator([0, 20, 40, 60, 80, 100]))
        if any(any(rate.diverged) for rate in figure.rates):
            axes.set_ylim(-22, 101)
            axes.text(0.01, -12, "diverged", transform=axes.get_yaxis_transform(), verticalalignment="center")
        else:
            axes.set_ylim(0, 101)
        described = f"Validation accuracy over the last epoch against the rate for {len(figure.rates)} variants"
        return _svg(canvas, name, described)


def _pen(drawn: Curve | Rate) -> tuple[str, Any]:
    """The colour stands for the norm, a dashed line for its place after the activation."""
    return _VARIANT_COLORS[drawn.slot % SLOTS], (0, (4, 1.5)) if drawn.dashed else "-"


def _svg(canvas: Figure, name: str, described: str) -> str:
    FigureCanvasSVG(canvas)
    canvas.patch.set_visible(False)
    for axes in canvas.axes:
        axes.patch.set_visible(False)
    buffer = io.StringIO()
    canvas.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    for color, variable in {**_INK, **_VARIANT}.items():
        svg = svg.replace(color, variable)
    svg = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", svg)  # the family comes from the page
    # All figures of a page share one space of ids.
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'(url\(|href=")#', rf"\1#{name}-", svg)
    svg = re.sub(r' (width|height)="[\d.]+pt"', "", svg, count=2)
    # Hundredths of a point are enough, in drawings; labels are text and stay.
    svg = re.sub(r'\b(d|x|y|transform)="[^"]+"', lambda match: re.sub(r"(\.\d\d)\d+", r"\1", match[0]), svg)
    svg = re.sub(r">\s+<", "><", svg)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{described}" ', 1).strip()
