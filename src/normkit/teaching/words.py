"""A walk in words and tables: the sections that terminal, notebook and page show."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from normkit.core.algebra import remaining
from normkit.tables import Table
from normkit.teaching.cells import Frame, letter
from normkit.teaching.forms import FORMS, formula_of
from normkit.teaching.walk import Statistic, Walk

__all__ = ["Section", "number", "sections", "title"]

Array = np.ndarray[Any, Any]

_SPELLED = 8  # values of a statistic that is written out, at most
_ROWS, _BLOCKS, _CELLS = 8, 8, 8  # of a table, at most: more cannot be followed with a pencil
_STATISTICS = 16
_WRITTEN = 2  # channels whose evaluation is written out
_SAID = 0.01  # share of the first values below which they are forgotten
_EXACT = 1e-9  # relative: a number this close to its two decimals is that


@dataclass(frozen=True)
class Section:
    """One step: a heading, sentences, and a table; `grid` says that its cells are letters."""

    heading: str
    words: tuple[str, ...]
    table: Table | None = None
    grid: bool = False


def number(value: float | None) -> str:
    """A number as one would write it, rounded to two decimals; what has fewer is written with fewer.

    >>> number(3.0), number(3.5), number(-1.0690449), number(1.603), number(0.00123), number(-0.0)
    ('3', '3.5', '-1.07', '1.60', '0.00123', '0')
    """
    if value is None:
        return "-"
    near = round(value, 2) + 0.0  # no -0
    if abs(value - near) <= _EXACT * max(1.0, abs(value)):
        return f"{near:.10g}"
    return f"{value:.2f}" if 0.005 <= abs(value) < 1e5 else f"{value:.3g}"


def title(walk: Walk) -> str:
    """What is walked through, and its formula."""
    return f"{walk.subject.title}\n{formula_of(walk.subject.spec)}, eps = {walk.subject.eps:g}"


def sections(walk: Walk) -> list[Section]:
    """All of them, in the order in which one would compute."""
    found = [_shared(walk), _moments(walk), _normalized(walk)] if walk.statistics else [_normalized(walk)]
    if walk.kept:
        found.append(_averages(walk))
    return [*found, _evaluation(walk), _undone(walk)]


def _shared(walk: Walk) -> Section:
    frame, count = walk.frame, len(walk.statistics)
    sizes = sorted({len(s.values) for s in walk.statistics})
    behind = f"m = {sizes[-1]} values" if len(sizes) == 1 else f"m = {sizes[0]} to {sizes[-1]} values"
    what = "a mean and a variance" if walk.subject.spec.center else "a mean square"
    words = [f"Values with the same letter share {what}: {count} letter{'s' if count > 1 else ''}, {behind} each."]
    product = _product(walk)
    if product is not None:
        words.append(product)
    letters = frame.cube(np.vectorize(letter, otypes=[object])(walk.shares))
    rows, blocks, cells = _shown(frame)
    table = [(frame.rows[r], *(" ".join(letters[r, b, :cells]) for b in range(blocks))) for r in range(rows)]
    headings = ("", *(frame.blocks[:blocks] if frame.blocks != ("",) else (" ".join(frame.cells[:cells]),)))
    if frame.blocks == ("",):  # one column per feature, so that letters stand under their names
        headings = ("", *frame.cells[:cells])
        table = [(frame.rows[r], *letters[r, 0, :cells]) for r in range(rows)]
    words += _left_out(frame)
    return Section("Which values share a statistic", tuple(words), Table(headings, table, words=len(headings)), True)


def _product(walk: Walk) -> str | None:
    """How m follows from the lengths of the axes."""
    spec, shape = walk.subject.spec, walk.x.shape
    over = set(spec.over_names)
    if over == {"n", "*s"}:
        lengths = " * ".join(map(str, (shape[0], *shape[2:])))
        if spec.axes[0] == ("m", "n"):
            return "A statistic is taken over one group of samples; for images over N*H*W values with N of the group."
        if len(shape) > 2:
            return f"m is the samples times the positions, {lengths}: for images N*H*W, not N."
        return (
            "In a table m is the number of samples, N; for images (N, C, H, W) it is N*H*W, one statistic per channel."
        )
    if over == {"*s"}:
        return f"m is the number of positions, {' * '.join(map(str, shape[2:]))}: for images H*W, whatever the batch."
    if over == {"k", "*s"}:
        groups = len(walk.statistics) // shape[0]
        lengths = " * ".join(map(str, (shape[1] // groups, *shape[2:])))
        return f"m is the channels of a group times the positions, {lengths}: for images C/G*H*W, whatever the batch."
    return None


def _moments(walk: Walk) -> Section:
    spec, statistics = walk.subject.spec, walk.statistics
    words = list(_spelled(statistics[0])) if len(statistics[0].values) <= _SPELLED else []
    corrected = statistics[0].r is not None
    if corrected:
        r_max, d_max = walk.subject.clips
        words.append(
            f"r = std / kept std, between 1/{number(r_max)} and {number(r_max)}; d = (mean - kept mean) / kept std, "
            f"between -{number(d_max)} and {number(d_max)}. At the start of a training r_max = 1 and d_max = 0: "
            "batch norm."
        )
    headings = ["", "of", "values", *(["mean"] if spec.center else [])]
    headings += [*(("variance", "std") if spec.center else ("mean square", "rms")), *(["r", "d"] if corrected else [])]
    rows = []
    for s in statistics[:_STATISTICS]:
        own = [number(s.mean)] if spec.center else []
        own += [number(s.var), number(s.std), *([number(s.r), number(s.d)] if corrected else [])]
        rows.append((s.letter, s.where, str(len(s.values)), *own))
    under, root = ("variance", "std") if spec.center else ("mean square", "rms")
    words.append(f"{root} = sqrt({under} + eps)")
    if spec.formula in FORMS and FORMS[spec.formula].remark:
        words.append(FORMS[spec.formula].remark)
    if any(s.var == 0 for s in statistics):
        words.append(f"Where the {under} is 0, eps alone keeps the division possible.")
    if len(statistics) > _STATISTICS:
        words.append(f"The first {_STATISTICS} of {len(statistics)}.")
    return Section("Mean and variance" if spec.center else "The mean square", tuple(words), Table(headings, rows, 2))


def _spelled(s: Statistic) -> Sequence[str]:
    m = len(s.values)

    def signed(value: float) -> str:
        return f"({number(value)})" if value < 0 else number(value)

    sum_of = " + ".join(map(signed, s.values))
    squares = " + ".join(f"{signed(v - (s.mean or 0.0))}^2" for v in s.values)
    if s.mean is None:
        return [f"{s.letter}, {s.where}: mean square = ({squares}) / {m} = {number(s.var)}"]
    return [
        f"{s.letter}, {s.where}: mean = ({sum_of}) / {m} = {number(s.mean)}",
        f"variance = ({squares}) / {m} = {number(s.var)}, the squared distances from the mean",
    ]


def _normalized(walk: Walk) -> Section:
    words = [f"{step.name} = {step.formula}" for step in walk.steps[1:]]
    subject = walk.subject
    plain = subject.gamma is None and subject.beta is None
    more = "".join(f", {name} = {number(value)}" for name, value in subject.spec.others)
    if plain:
        beta = ", beta = 0" if "beta" in words[-1] else ""
        words[-1] += f"; a new layer has gamma = {number(subject.spec.first_gain)}{beta}{more}"
    else:
        values = (("gamma", subject.gamma), ("beta", subject.beta), *subject.others.items())
        more = "" if subject.others else more
        words[-1] += "; " + ", ".join(f"{name} = {_listed(own)}" for name, own in values if own is not None) + more
    if not walk.statistics:
        words.insert(0, "No statistic is taken: every value is looked at alone.")
    if walk.steps[1].name == "normalized":
        s, first = walk.statistics[0], float(walk.x.flat[0])
        top = number(first) if s.mean is None else _difference(first, s.mean)
        example = f"{top} / {number(s.std)} = {number(float(walk.steps[1].values.flat[0]))}"
        words.insert(1, f"the first value, of {s.letter}: {example}")
    return Section(
        "Normalized, scaled and shifted" if subject.spec.formula not in FORMS else "The output",
        tuple(words),
        _beside(walk.frame, [(step.name, step.values) for step in walk.steps]),
    )


def _averages(walk: Walk) -> Section:
    weight = walk.subject.weight()
    names = {"mean": "mean", "var": "variance", "std": "std"}
    channels = _channels(walk)
    words = [f"running = {number(1 - weight)} * running + {number(weight)} * batch"]
    words += [_bessel(walk) for kept in walk.kept if kept.bessel]
    headings = [""]
    for kept in walk.kept:
        name = names[kept.name]
        headings += [f"{name} before", "of the batch", "after"]
    rows = [
        (channel, *(number(float(v.flat[i])) for kept in walk.kept for v in (kept.before, kept.batch, kept.after)))
        for i, channel in enumerate(channels[:_STATISTICS])
    ]
    return Section("Running values, kept for evaluation", tuple(words), Table(headings, rows))


def _bessel(walk: Walk) -> str:
    m = len(walk.statistics[0].values)
    groups = " pooled over its groups," if walk.subject.spec.axes[0] == ("m", "n") else ""
    return f"The variance is kept{groups} as the unbiased one, m/(m-1) = {number(m / (m - 1))} times that of the batch."


def _evaluation(walk: Walk) -> Section:
    training = walk.steps[-1].values[: len(walk.evaluation)]
    name = walk.frame.rows[0] or "the first row"
    if walk.frame.rows[0] == "":
        training = walk.steps[-1].values
    row = walk.x[: len(walk.evaluation)]
    table = _beside(walk.frame, [("x", row), ("in training", training), ("in evaluation", walk.evaluation)])
    if not walk.kept:
        table = _beside(walk.frame, [("x", row), ("in training and in evaluation", training)])
        over = "n" in walk.subject.spec.over_names
        words = (
            "Nothing is kept: evaluation takes the statistics of its batch, as training does, so a sample depends on "
            "the others there too."
            if over
            else "The same as in training: its statistics are its own, nothing is kept, no other sample takes part."
        )
        return Section(f"{name}, in evaluation".capitalize(), (words,), table)
    left, subject = walk.subject.left(), walk.subject
    words = "Evaluation normalizes by the running values, not by the batch, so that a sample has one answer. "
    spelled = _evaluated(walk)
    if left > _SAID:
        steps = subject.count + 1
        after = f"After {steps} step{'s' if steps > 1 else ''}"
        needed = next(n for n in range(1, 100_000) if remaining(subject.rate or 1.0, n) <= _SAID)
        first = " and ".join(f"{number(kept.first)}" for kept in walk.kept)
        words += (
            f"{after} {100 * left:.0f} % of them are still the first values, {first}, so the answer is wrong: it takes "
            f"{needed} steps until less than 1 % is left of those, or normkit.recalibrate(model, data)."
        )
    else:
        words += "They are averages over many batches, of which this one was a small part."
        if subject.rate is None or subject.debiased:
            words = words.replace(
                "over many batches, of which this one was a small part", "without a first value in it"
            )
    return Section(f"{name}, in evaluation".capitalize(), (words, *spelled), table)


def _evaluated(walk: Walk) -> list[str]:
    """How the first values of the first channels come about, where gamma and beta have no part in it."""
    after = {kept.name: kept.after for kept in walk.kept}
    if "mean" not in after or walk.subject.gamma is not None or walk.subject.beta is not None:
        return []
    found = []
    for channel, name in enumerate(_channels(walk)[:_WRITTEN]):
        at = (0, channel, *(0 for _ in walk.x.shape[2:]))
        std = (
            number(float(after["std"][channel]))
            if "std" in after
            else f"sqrt({number(float(after['var'][channel]))} + eps)"
        )
        top = _difference(float(walk.x[at]), float(after["mean"][channel]))
        found.append(f"{name}: {top} / {std} = {number(float(walk.evaluation[at]))}")
    return found


def _undone(walk: Walk) -> Section:
    heading = "The gamma and beta that undo it"
    undo, spec = walk.undo, walk.subject.spec
    if undo is None:
        return Section(heading, (FORMS[spec.formula].undo,))
    statistic = "std / r" if spec.renorm else "std" if spec.center else "rms"
    shift = "mean - d * std / r" if spec.renorm else "mean"
    less = " - 1" if spec.gain == "1+w" else ""
    formula = f"gamma = {statistic}{less}, beta = {shift if spec.center else '0'}"
    words = [f"{formula}: the network can have its input back, so normalizing takes nothing from what it can express."]
    if undo.reached.all():
        words.append("They give back every value of the batch.")
    else:
        share = int(undo.reached.sum())
        owner = sorted({walk.statistics[int(i)].letter for i in np.unique(walk.shares[undo.reached])})
        words = [
            f"{formula}, of {_span(owner)}: these give back {share} of the {undo.reached.size} values. The others have "
            "statistics of their own, while gamma and beta are the same for all: how they differ in size is gone."
        ]
    channels = _channels(walk)
    columns = [("gamma", undo.gamma)] + ([("beta", undo.beta)] if spec.center else [])
    rows = [
        (channel, *(number(float(values.flat[i])) for _, values in columns))
        for i, channel in enumerate(channels[:_STATISTICS])
    ]
    return Section(heading, tuple(words), Table(("", *(name for name, _ in columns)), rows))


def _span(letters: Sequence[str]) -> str:
    return " and ".join(letters) if len(letters) < 3 else f"{letters[0]} to {letters[-1]}"


def _channels(walk: Walk) -> Sequence[str]:
    """Names of what gamma, beta and running values have one value for."""
    frame, spec = walk.frame, walk.subject.spec
    return frame.cells if "*c" in spec.affine_names else frame.numbered[1]


def _beside(frame: Frame, arrays: Sequence[tuple[str, Array]]) -> Table:
    """Arrays side by side; the first heading of each is its name, the first row names the columns."""
    rows, blocks, cells = _shown(frame)
    cubes = []
    for _, values in arrays:
        down = frame.lengths[0] if values.shape == frame.shape else len(values)
        order = np.transpose(values, frame.order)
        cubes.append(order.reshape(down, frame.lengths[1], frame.lengths[2]))
    rows = min(rows, len(cubes[0]))
    table = frame.lengths[2] == 1  # its columns are the blocks
    columns = frame.blocks[:blocks] if table else frame.cells[:cells]
    headings, lines = [""], [["", *columns * len(arrays)]]
    for name, _ in arrays:
        headings += [name, *[""] * (len(columns) - 1)]
    for r, b in itertools.product(range(rows), range(1 if table else blocks)):
        name = frame.rows[r] if table else " ".join(filter(None, (frame.rows[r], frame.blocks[b])))
        lines.append([name])
        for cube in cubes:
            own = cube[r, :blocks, 0] if table else cube[r, b, :cells]
            lines[-1] += [number(float(value)) for value in own]
    return Table(headings, lines)


def _shown(frame: Frame) -> tuple[int, int, int]:
    return min(frame.lengths[0], _ROWS), min(frame.lengths[1], _BLOCKS), min(frame.lengths[2], _CELLS)


def _left_out(frame: Frame) -> list[str]:
    shown = _shown(frame)
    if shown == frame.lengths:
        return []
    return [f"Shown are the first {' x '.join(map(str, shown))} of {' x '.join(map(str, frame.lengths))} values."]


def _difference(value: float, less: float) -> str:
    return f"({number(value)} {'+' if less < 0 else '-'} {number(abs(less))})"


def _listed(values: Array) -> str:
    flat = [number(float(v)) for v in values.flat]
    return flat[0] if len(set(flat)) == 1 else f"{' '.join(flat[:_BLOCKS])}{' ...' if len(flat) > _BLOCKS else ''}"
