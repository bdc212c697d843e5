"""A comparison in words: sentences, table, JSON. Everything is computed from what was measured."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from normkit.experiments.analysis import Group, VariantSummary

if TYPE_CHECKING:
    from normkit.experiments.verb import Comparison

__all__ = ["Row", "headings", "percent", "screening", "sentences", "setting", "table", "text", "to_json"]


class Row(NamedTuple):
    """One variant in the table, as text."""

    norm: str
    best_lr: str
    steps: str
    seconds: str
    step: str
    rates: str
    validation: str
    test: str


def headings(comparison: Comparison) -> Row:
    """The first line of the table."""
    target = percent(comparison.config.target, digits=0)
    return Row(
        "norm",
        "best rate",
        f"steps to {target} %",
        f"seconds to {target} %",
        "ms per step",
        "rates up to",
        "validation %",
        "test %",
    )


def table(group: Group) -> list[Row]:
    """One row per variant, in the order in which they were given."""
    return [_row(variant) for variant in group.variants]


def sentences(comparison: Comparison) -> list[str]:
    """What came out: one sentence per setting, and one on how far it carries."""
    many = len(comparison.groups) > 1
    said = []
    for group in comparison.groups:
        sentence = _sentence(comparison, group)
        said.append(f"{setting(comparison, group)}: {sentence}" if many else sentence)
    return [*said, screening(comparison)]


def screening(comparison: Comparison) -> str:
    """How far the result carries."""
    seeds = comparison.config.seeds
    counted = "1 seed is" if seeds == 1 else f"{seeds} seeds are"
    if seeds < 5:
        return f"{counted} a screening, not proof: small differences may be chance."
    return f"{counted} behind every mean; differences were not tested for significance."


def setting(comparison: Comparison, group: Group) -> str:
    """What tells this group from the others: `batch size 8, inputs max`."""
    parts = []
    if len(comparison.config.batch_sizes) > 1:
        parts.append(f"batch size {group.setting.batch_size}")
    if len(comparison.config.inputs) > 1:
        parts.append(f"inputs {group.setting.inputs}")
    return ", ".join(parts)


def text(comparison: Comparison) -> str:
    """Tables and sentences for a terminal, without colour."""
    lines: list[str] = []
    for group in comparison.groups:
        title = setting(comparison, group)
        lines += [title, ""] if title else []
        lines += [*_aligned([headings(comparison), *table(group)]), ""]
    return "\n".join([*lines, *sentences(comparison)])


def to_json(comparison: Comparison) -> str:
    """The whole comparison as JSON, strict: nothing in it is NaN or infinite."""
    return json.dumps(comparison.to_dict(), allow_nan=False) + "\n"


def percent(share: float, digits: int = 1) -> str:
    """`0.9512` -> `95.1`; a target such as 0.955 keeps its digit."""
    value = round(100 * share, 6)
    return f"{value:g}" if digits == 0 else f"{value:.{digits}f}"


def _sentence(comparison: Comparison, group: Group) -> str:
    base = group.baseline
    others = [variant for variant in group.variants if variant is not base and variant.best_lr is not None]
    target = f"{percent(comparison.config.target, digits=0)} %"
    if not others:
        alone = f"{base.variant.words}: {target} after {_steps(base)} steps"
        if base.best_lr is None:
            alone = f"{base.variant.words}: every rate diverged for at least one seed"
        return f"{alone}; nothing to compare it with."
    best = min(others, key=_order)
    if base.best_lr is not None and _order(base) <= _order(best):
        return _not_sooner(base, best, max(others, key=lambda other: other.mean_validation or 0.0), target)
    name = base.variant.words
    if base.best_lr is None:
        return (
            f"{best.variant.words}: {target} after {_steps(best)} steps, {_rates(best)}, test accuracy {_test(best)}; "
            f"{name} diverged at every rate for at least one seed."
        )
    if not best.all_reached:
        reach = f"no variant reached {target} with every seed in {best.budget} steps; highest validation accuracy: "
        reach += f"{best.variant.words} with {_mean(best.mean_validation)} ({name}: {_mean(base.mean_validation)})"
    else:
        reach = f"{best.variant.words}: {target} after {_steps(best)} steps ({name}: {_steps(base)})"
    parts = [reach]
    if best.mean_seconds is not None and base.mean_seconds is not None:
        cost = _cost(best, base)
        parts.append(f"{_seconds(best.mean_seconds)} s instead of {_seconds(base.mean_seconds)} s{cost}")
    parts.append(f"{_rates(best)} ({name}: {_largest(base)})")
    parts.append(f"test accuracy {_test(best)} against {_test(base)}")
    return "; ".join(parts) + "."


def _not_sooner(base: VariantSummary, second: VariantSummary, highest: VariantSummary, target: str) -> str:
    """The baseline is the fastest. It is recommended only where it is not beaten in accuracy either."""
    name = base.variant.words
    if base.all_reached:
        reach = f"nothing reached {target} sooner than {name} ({_steps(base)} steps"
        reach += f"; next {second.variant.words}: {_steps(second)})"
    else:
        reach = f"no variant reached {target} with every seed in {base.budget} steps"
    assert highest.mean_validation is not None
    assert base.mean_validation is not None
    if highest.mean_validation > base.mean_validation:
        return (
            f"{reach}; highest validation accuracy: {highest.variant.words} with {_mean(highest.mean_validation)} "
            f"({name}: {_mean(base.mean_validation)}); {_rates(highest)} ({name}: {_largest(base)}); "
            f"test accuracy {_test(highest)} against {_test(base)}."
        )
    return (
        f"{reach}, and none has a higher validation accuracy ({name}: {_mean(base.mean_validation)}; "
        f"next {highest.variant.words}: {_mean(highest.mean_validation)}); "
        f"test accuracy {_test(base)} against {_test(highest)}: use {name}."
    )


def _order(variant: VariantSummary) -> tuple[float, float]:
    """Fewest steps first, then the highest validation accuracy."""
    steps = variant.mean_steps if variant.mean_steps is not None else float("inf")
    return steps, -(variant.mean_validation or 0.0)


def _cost(best: VariantSummary, base: VariantSummary) -> str:
    assert best.seconds_per_step is not None
    assert base.seconds_per_step is not None
    ratio = best.seconds_per_step / base.seconds_per_step
    percentage = round(100 * (ratio - 1))
    if percentage == 0:
        return ""
    faster = best.mean_seconds is not None and base.mean_seconds is not None and best.mean_seconds < base.mean_seconds
    link = " although" if faster == (ratio > 1) else ", as"
    if ratio >= 2:
        return f"{link} a step costs {ratio:.1f} times as much"
    return f"{link} a step costs {abs(percentage)} % {'more' if ratio > 1 else 'less'}"


def _row(variant: VariantSummary) -> Row:
    if variant.best_lr is None:
        return Row(variant.norm, "diverged", *["-"] * 6)
    assert variant.seconds_per_step is not None
    hits = variant.steps_to_target
    partly = "" if variant.all_reached else f" ({len(hits) - hits.count(None)} of {len(hits)} did)"
    seconds = _seconds(variant.mean_seconds) if variant.mean_seconds is not None else "-"
    test = _test(variant)
    if variant.test_deviation is not None:
        test += f" ± {percent(variant.test_deviation)}"
    return Row(
        variant.norm,
        f"{variant.best_lr:g}",
        _steps(variant) + partly,
        seconds,
        f"{1000 * variant.seconds_per_step:.1f}",
        _largest(variant),
        _mean(variant.mean_validation),
        test,
    )


def _steps(variant: VariantSummary) -> str:
    return f"{variant.mean_steps:.0f}" if variant.mean_steps is not None else f"> {variant.budget}"


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f}" if seconds < 10 else f"{seconds:.0f}"


def _largest(variant: VariantSummary) -> str:
    """The largest usable rate; `≥` where no larger one was tried."""
    if variant.largest_lr is None:
        return "no rate"
    return f"{'≥ ' if variant.largest_lr == variant.rates[-1].lr else ''}{variant.largest_lr:g}"


def _rates(variant: VariantSummary) -> str:
    if variant.largest_lr is None:
        return "no rate was usable"
    return f"rates up to {variant.largest_lr:g} work"


def _test(variant: VariantSummary) -> str:
    return _mean(variant.mean_test)


def _mean(share: float | None) -> str:
    return "-" if share is None else percent(share)


def _aligned(rows: Sequence[Row]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if number == 0 else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return [lines[0], "─" * max(map(len, lines)), *lines[1:]]
