"""A comparison in words: sentences, tables, JSON. Everything is computed from what was measured."""

from __future__ import annotations

import json
import math
import re
import textwrap
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from normkit.experiments.analysis import Difference, Group, VariantSummary
from normkit.experiments.config import MODELS, Task

if TYPE_CHECKING:
    from normkit.experiments.comparison import Comparison

__all__ = [
    "Table",
    "by_batch_size",
    "caveats",
    "final_name",
    "finding",
    "following",
    "interval",
    "number",
    "percent",
    "recommended",
    "sentences",
    "setting",
    "significant",
    "table",
    "target",
    "text",
    "to_json",
    "validation_name",
    "value",
]

_WIDTH = 120  # characters of a line in the terminal
_ENOUGH = 5  # seeds: fewer are a screening
_UNKNOWN = "-"


class Table(NamedTuple):
    """Text, row by row. The first column names the variant; `keys` name the columns for whoever explains them."""

    title: str
    keys: tuple[str, ...]
    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def sentences(comparison: Comparison) -> list[str]:
    """What came out: one sentence per setting, then how far they carry and what to do next."""
    said = [_titled(comparison, group) for group in comparison.groups]
    command = following(comparison)
    return [*said, *caveats(comparison), *([f"Next: {command}"] if command else [])]


def text(comparison: Comparison) -> str:
    """Tables, sentences and notes for a terminal, without colour, in lines of at most 120 characters."""
    lines: list[str] = []
    tables = [table(comparison, group) for group in comparison.groups]
    for shown in [*tables, *by_batch_size(comparison)]:
        lines += [shown.title, ""] if shown.title else []
        for part in _parts(shown):
            lines += [*part, ""]
    for sentence in sentences(comparison):
        # A command is there to be copied, and stays in one line.
        lines += [sentence] if sentence.startswith("Next: ") else _wrapped(sentence)
    for note in comparison.notes:
        lines += _wrapped(note)
    return "\n".join(lines)


def to_json(comparison: Comparison) -> str:
    """The whole comparison as JSON, strict: nothing in it is NaN or infinite."""
    return json.dumps(comparison.to_dict(), allow_nan=False) + "\n"


# ---- values


def percent(share: float, digits: int = 1) -> str:
    """`0.9512` -> `95.1`; with 0 digits 0.955 keeps its digit."""
    shown = round(100 * share, 6)
    return f"{shown:g}" if digits == 0 else f"{shown:.{digits}f}"


def significant(number: float, digits: int = 3) -> str:
    """`0.012345` -> `0.0123`, `0.5` -> `0.500`, `1234.5` -> `1234`."""
    return f"{number:.0f}" if 10 ** (digits - 1) <= abs(number) < 1e7 else f"{number:#.{digits}g}"


def number(task: Task, value: float) -> str:
    """A value of the metric without its unit: `95.1`, `0.01235`."""
    return percent(value) if task.is_share else significant(value, 4)


def value(task: Task, value: float) -> str:
    """A value of the metric with its unit: `95.1 %`, `0.01235`."""
    return f"{number(task, value)} %" if task.is_share else number(task, value)


def interval(task: Task, variant: VariantSummary) -> tuple[float, float] | None:
    """The 95 % interval of the final metric; that of a share ends where shares do."""
    if variant.interval is None or not task.is_share:
        return variant.interval
    return max(variant.interval[0], 0.0), min(variant.interval[1], 1.0)


def target(task: Task) -> str:
    """The target in words: `95 %`, `loss 0.01`."""
    assert task.target is not None
    return f"{percent(task.target, digits=0)} %" if task.is_share else f"{task.metric} {task.target:g}"


def validation_name(comparison: Comparison) -> str:
    """What the metric is measured on while training: `validation accuracy`, of a loop `reported rmse`."""
    return f"{'reported' if comparison.config.run else 'validation'} {comparison.task.metric}"


def final_name(comparison: Comparison) -> str:
    """What it is measured on after training: `test accuracy`, or `last reported rmse` where nothing was tested."""
    if _tested(comparison):
        return f"test {comparison.task.metric}"
    return f"{'last reported' if comparison.config.run else 'validation'} {comparison.task.metric}"


def setting(comparison: Comparison, group: Group) -> str:
    """What tells this group from the others: `batch size 8, inputs max`."""
    parts = []
    if len({other.setting.batch_size for other in comparison.groups}) > 1:
        parts.append(f"batch size {group.setting.batch_size}")
    parts.append(group.setting.conditions)
    return ", ".join(filter(None, [*parts, _inputs(comparison, group)]))


# ---- what came out


def recommended(group: Group, task: Task) -> list[VariantSummary]:
    """The variants better than the baseline in something and worse in nothing, beyond chance.

    The first is the one to show: fewest steps to the target, then the best validation metric.
    """
    found = []
    for variant in group.variants:
        better, worse = _verdict(group, variant, task)
        if better and not worse:
            found.append(variant)
    return sorted(found, key=lambda variant: _order(variant, task))


def finding(comparison: Comparison, group: Group) -> str:
    """One sentence on one setting. A difference is claimed where it survives the correction, and nowhere else."""
    base, task = group.baseline, comparison.task
    able = sorted((v for v in group.variants if v.best_lr is not None), key=lambda v: _order(v, task))
    others = [variant for variant in able if variant is not base]
    if len(group.variants) == 1:
        measured = _measured(comparison, base) if able else _lost(comparison)
        return f"{base.variant.words}: {measured}; nothing to compare it with."
    if not able:
        return f"every variant {_lost(comparison)}: try smaller rates."
    if base.best_lr is None:
        first, lead = others[0], ""
        if len(others) > 1:
            best = "fewest steps" if first.all_reached else f"best {validation_name(comparison)}"
            lead = f"{_norms(others)} did not; {best} with "
        return f"{base.variant.words} {_lost(comparison)}; {lead}{first.variant.words}: {_measured(comparison, first)}."
    if not others:
        kept = f"{base.variant.words}: {_measured(comparison, base)}"
        return f"use {base.norm}: every other variant {_lost(comparison)}; {kept}."
    if all(difference.p is None for difference in group.against_baseline):
        return _undecided(comparison, base, able)
    best_ones = recommended(group, task)
    if best_ones:
        return _recommendation(comparison, group, best_ones)
    return _no_help(comparison, group, others)


def _lost(comparison: Comparison) -> str:
    pruned = " or was pruned" if comparison.config.pruner else ""
    return f"diverged{pruned} at every rate in at least one seed"


def caveats(comparison: Comparison) -> list[str]:
    """How far the result carries."""
    seeds = comparison.config.seeds
    many = f"{seeds} seed{'s are' if seeds > 1 else ' is'}"
    judged = "paired by seed, t interval, corrected after Holm over the whole comparison"
    said = []
    if seeds < 3:
        said.append(
            f"{many} a screening: below 3 seeds no difference can be told from chance, so nothing is recommended."
        )
    elif seeds < _ENOUGH:
        said.append(f"{many} a screening, not proof: named are the differences that survive all the same ({judged}).")
    elif any(group.against_baseline or group.pairs for group in comparison.groups):
        drawn = ", with the choice of test examples counted in" if _counts_examples(comparison) else ""
        said.append(f"{seeds} seeds; differences are {judged}{drawn}.")
    if not _tested(comparison) and comparison.config.run:
        said.append(
            f"no test value was returned: the last report stands for it, so the {comparison.task.metric} that chose "
            "the rate is also the one reported, which flatters every variant."
        )
    if comparison.config.pruner:
        pruned, every = sum(trial.pruned for trial in comparison.trials), len(comparison.trials)
        said.append(
            f"{pruned} of {every} trials were pruned ({comparison.config.pruner}), having fallen behind other rates of "
            "their norm: those rates have lost, and whether they work is not known."
        )
    return said


def following(comparison: Comparison) -> str | None:
    """The command to run next, where there is an obvious one."""
    config, command = comparison.config, comparison.environment.get("command")
    if config.run is None and (config.model in MODELS or config.data == "digits"):
        framework = "" if config.framework == "torch" else f" --framework {config.framework}"
        return f"normkit compare mymodel.py:build --data my.npz{framework}"
    if command and config.seeds < _ENOUGH:
        return re.sub(r" --seeds[ =]\d+", "", command) + " --seeds 10"
    return None


def _titled(comparison: Comparison, group: Group) -> str:
    title = setting(comparison, group)
    return f"{title}: {finding(comparison, group)}" if title else finding(comparison, group)


def _recommendation(comparison: Comparison, group: Group, best_ones: list[VariantSummary]) -> str:
    best, *rest = best_ones
    base, metric = group.baseline, f"final {comparison.task.metric}"
    steps, ends = (group.difference(best.norm, quantity) for quantity in ("steps", "final"))
    parts = []
    if steps:
        chance = "" if steps.claimed else ", not distinguishable"
        beside = f"{base.variant.words}: {_steps(base)}{_few(base)}{chance}"
        parts.append(f"{_after(comparison.task, best)} ({beside})")
    parts += _spared(best, base, sooner=bool(steps and steps.claimed))
    parts.append(_rates(best, base))
    chance = "" if ends and ends.claimed else ", not distinguishable"
    parts.append(f"{metric} {_final(comparison, best)} against {_final(comparison, base)}{chance}")
    if not steps:
        parts = [parts.pop(), *parts]
    alike: list[VariantSummary] = []
    above: list[VariantSummary] = []
    below: list[VariantSummary] = []
    for other in rest:
        lead = comparison.task.sign * _claimed(group, other, best)
        (above if lead > 0 else below if lead < 0 else alike).append(other)
    if alike:
        parts.append(f"{_norms([best, *alike])} not distinguishable in {metric}")
    if above:
        parts.append(f"{_norms(above)} better than {base.variant.words} too, with a better {metric} than {best.norm}")
    if below:
        parts.append(f"{_norms(below)} better than {base.variant.words} too, with a worse {metric} than {best.norm}")
    return f"{best.variant.words}: {'; '.join([*parts, *_worse(comparison, group)])}."


def _no_help(comparison: Comparison, group: Group, others: list[VariantSummary]) -> str:
    """Nobody is better without being worse in something else."""
    task, base = comparison.task, group.baseline
    mixed = [variant for variant in others if all(_verdict(group, variant, task))]
    name = base.variant.words
    if mixed:
        head = f"no clear choice: {_norms(mixed)} better than {name} in one thing and worse in another"
    elif (seeds := comparison.config.seeds) < _ENOUGH:
        # So few seeds miss even large differences: that nothing was found is no advice.
        head = f"no recommendation: nothing beats {name} beyond chance with {seeds} seeds"
    else:
        head = f"use {base.norm}: nothing beats {name} beyond chance"
    parts = [head]
    if task.target is not None:
        spread = _span([_steps(other) for other in others])  # `others` come by their steps
        parts.append(f"{_after(task, base)} (the others: {spread})")
    by_final = sorted(others, key=lambda other: other.mean_final or 0.0)
    spread = _span([_final(comparison, other) for other in by_final])
    parts.append(f"final {task.metric} {_final(comparison, base)} (the others: {spread})")
    return "; ".join([*parts, *_worse(comparison, group)]) + "."


def _undecided(comparison: Comparison, base: VariantSummary, able: Sequence[VariantSummary]) -> str:
    """Too few seeds for a difference: what was measured, and no advice. `able` begins with the best."""
    task, first = comparison.task, able[0]
    other = base if first is not base else able[1]
    beside = other.variant.words if first is not base else f"next {other.variant.words}"
    if first.all_reached:
        shown = f"{_after(task, first)} with {first.variant.words}, the fewest ({beside}: {_steps(other)}{_few(other)})"
    else:
        shown = f"best {validation_name(comparison)} {_metric(comparison, first.mean_validation)} with "
        shown += f"{first.variant.words} ({beside}: {_metric(comparison, other.mean_validation)})"
    ends = f"final {task.metric} {_final(comparison, first)} ({other.variant.words}: {_final(comparison, other)})"
    rates = _rates(first, base) if first is not base else _rates(first)
    return f"as measured, {shown}; {rates}; {ends}."


def _measured(comparison: Comparison, variant: VariantSummary) -> str:
    """A variant on its own."""
    task = comparison.task
    steps = [_after(task, variant)] if task.target is not None else []
    return ", ".join([*steps, f"final {task.metric} {_final(comparison, variant)}", _rates(variant)])


def _worse(comparison: Comparison, group: Group) -> list[str]:
    """Who is worse than the baseline beyond chance, and in what; who could not be trained."""
    named = {"final": f"final {comparison.task.metric}", "steps": "steps"}
    found = []
    for variant in group.variants:
        against = _verdict(group, variant, comparison.task)[1]
        if against:
            found.append(f"{variant.norm} ({', '.join(named[difference.quantity] for difference in against)})")
    parts = [f"worse beyond chance than {group.baseline.variant.words}: {', '.join(found)}"] if found else []
    lost = [variant for variant in group.variants if variant.best_lr is None]
    return [*parts, f"{_norms(lost)} {_lost(comparison)}"] if lost else parts


def _verdict(group: Group, variant: VariantSummary, task: Task) -> tuple[list[Difference], list[Difference]]:
    """The surviving differences against the baseline: in favour of the variant, against it."""
    claimed = [d for d in group.against_baseline if d.first == variant.norm and d.claimed]
    better = [difference for difference in claimed if _advantage(difference, task) > 0]
    return better, [difference for difference in claimed if difference not in better]


def _advantage(difference: Difference, task: Task) -> float:
    """Above 0 where the first of both is the better one."""
    return -math.log(difference.value) if difference.quantity == "steps" else task.sign * difference.value


def _order(variant: VariantSummary, task: Task) -> tuple[float, float]:
    """Fewest steps first, then the best validation metric."""
    best = task.sign * variant.mean_validation if variant.mean_validation is not None else -math.inf
    return variant.mean_steps if variant.mean_steps is not None else math.inf, -best


def _spared(best: VariantSummary, base: VariantSummary, *, sooner: bool) -> list[str]:
    """The seconds to the target, where the steps to it differ beyond chance, and what a step costs."""
    ratio = best.seconds_per_step / base.seconds_per_step if best.seconds_per_step and base.seconds_per_step else 1.0
    percentage = round(100 * abs(ratio - 1))
    cost = f"a step costs {percentage} % {'more' if ratio > 1 else 'less'}" if percentage else ""
    if ratio >= 2:
        cost = f"a step costs {ratio:.1f} times as much"
    if not sooner or best.mean_seconds is None or base.mean_seconds is None:
        return [cost] if cost else []
    spared = f"{_seconds(best.mean_seconds)} s instead of {_seconds(base.mean_seconds)} s"
    link = " although" if (best.mean_seconds < base.mean_seconds) == (ratio > 1) else ", as"
    return [f"{spared}{link} {cost}" if cost else spared]


def _ended(comparison: Comparison) -> str:
    """What a variant is finally judged by, in a word or two."""
    if _tested(comparison):
        return "test"
    return "last report" if comparison.config.run else "at the end"


def _tested(comparison: Comparison) -> bool:
    return all(trial.tested for trial in comparison.trials)


def _counts_examples(comparison: Comparison) -> bool:
    return all(trial.examples for trial in comparison.trials if not trial.diverged)


# ---- tables


def table(comparison: Comparison, group: Group, *, whole: bool = False) -> Table:
    """One row per variant, in the order in which they were given; a column where something is known for any of them.

    `whole` adds what the page has room for: memory and the gap between evaluation and training mode.
    """
    task = comparison.task
    unit = "%" if task.is_share else task.metric
    to = f"to {target(task)}" if task.target is not None else ""
    columns: list[tuple[str, str, Callable[[VariantSummary], str]]] = [
        ("norm", "norm", lambda v: v.norm),
        ("rate", "best rate", lambda v: _none_whole(v) if v.best_lr is None else f"{v.best_lr:g}"),
        ("steps", f"steps {to}", _steps_cell),
        ("seconds", f"seconds {to}", lambda v: _UNKNOWN if v.mean_seconds is None else _seconds(v.mean_seconds)),
        ("step", "ms per step", lambda v: _scaled(v.seconds_per_step, 1000)),
        ("rates", "rates up to", _largest),
        (
            "validation",
            f"{'reported' if comparison.config.run else 'validation'} {unit}",
            lambda v: _metric(comparison, v.mean_validation),
        ),
        ("final", f"{_ended(comparison)} {unit}", lambda v: _final_cell(task, v)),
    ]
    if whole:
        columns += [
            ("memory", "memory, MB", lambda v: _scaled(v.peak_memory, 1e-6)),
            ("gap", f"evaluation - training {unit}", lambda v: _gap_cell(task, v)),
        ]
    known = [
        (key, heading, cells)
        for key, heading, cell in columns
        for cells in [[cell(variant) for variant in group.variants]]
        if any(shown != _UNKNOWN for shown in cells)
    ]
    keys, headings, cells = zip(*known, strict=True)
    return Table(setting(comparison, group), keys, headings, tuple(zip(*cells, strict=True)))


def _none_whole(variant: VariantSummary) -> str:
    return "pruned" if any(rate.pruned for rate in variant.rates) else "diverged"


def by_batch_size(comparison: Comparison) -> list[Table]:
    """Where there are several batch sizes: the final metric and the steps to the target, a column per batch size."""
    by_inputs: dict[str, list[Group]] = {}
    for group in comparison.groups:
        rest = ", ".join(filter(None, [group.setting.conditions, _inputs(comparison, group)]))
        by_inputs.setdefault(rest, []).append(group)
    task, tables = comparison.task, []
    unit = ", %" if task.is_share else ""
    shown: list[tuple[str, Callable[[VariantSummary], str]]] = [
        (f"{final_name(comparison)}{unit}", lambda v: _final(comparison, v))
    ]
    if task.target is not None:
        shown.append((f"steps to {target(task)}", _steps))
    for inputs, groups in by_inputs.items():
        if len(groups) == 1:
            continue
        for what, cell in shown:
            title = f"{what}, by batch size" + (f" ({inputs})" if inputs else "")
            sizes = tuple(str(group.setting.batch_size) for group in groups)
            rows = [
                (variants[0].norm, *(_none_whole(v) if v.best_lr is None else cell(v) for v in variants))
                for variants in zip(*(group.variants for group in groups), strict=True)
            ]
            tables.append(Table(title, ("norm", *sizes), ("norm", *sizes), tuple(rows)))
    return tables


def _inputs(comparison: Comparison, group: Group) -> str:
    several = len({other.setting.inputs for other in comparison.groups}) > 1
    return f"inputs {group.setting.inputs}" if several else ""


def _metric(comparison: Comparison, value: float | None) -> str:
    return _UNKNOWN if value is None else number(comparison.task, value)


def _final(comparison: Comparison, variant: VariantSummary) -> str:
    return _metric(comparison, variant.mean_final)


def _final_cell(task: Task, variant: VariantSummary) -> str:
    if variant.mean_final is None:
        return _UNKNOWN
    shown = number(task, variant.mean_final)
    if (ends := interval(task, variant)) is not None:
        return f"{shown} [{number(task, ends[0])}, {number(task, ends[1])}]"
    return shown if variant.final_deviation is None else f"{shown} ± {number(task, variant.final_deviation)}"


def _gap_cell(task: Task, variant: VariantSummary) -> str:
    if variant.gap_metric is None:
        return _UNKNOWN
    shown = number(task, abs(variant.gap_metric))
    sign = "" if float(shown) == 0 else "+" if variant.gap_metric > 0 else "-"
    return sign + shown


def _steps_cell(variant: VariantSummary) -> str:
    hits = variant.steps_to_target
    if not hits:
        return _UNKNOWN
    return (
        _steps(variant)
        if variant.all_reached
        else f"{_steps(variant)} ({len(hits) - hits.count(None)} of {len(hits)} did)"
    )


def _steps(variant: VariantSummary) -> str:
    return f"{variant.mean_steps:.0f}" if variant.mean_steps is not None else f"> {variant.budget}"


def _after(task: Task, variant: VariantSummary) -> str:
    """`95 % after 28 steps`, `95 % after > 174 steps, 2 of 5 seeds got there`."""
    return f"{target(task)} after {_steps(variant)} steps{_few(variant)}"


def _few(variant: VariantSummary) -> str:
    hits = variant.steps_to_target
    return "" if variant.all_reached else f", {len(hits) - hits.count(None)} of {len(hits)} seeds got there"


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f}" if seconds < 10 else f"{seconds:.0f}"


def _scaled(value: float | None, factor: float) -> str:
    return _UNKNOWN if value is None else significant(factor * value)


def _largest(variant: VariantSummary) -> str:
    """The largest usable rate; `≥` where no larger one was tried."""
    if variant.largest_lr is None:
        return "no rate"
    return f"{'≥ ' if variant.largest_lr == variant.rates[-1].lr else ''}{variant.largest_lr:g}"


def _rates(variant: VariantSummary, base: VariantSummary | None = None) -> str:
    """Which rates work, beside the baseline's."""
    shown = "no rate was usable" if variant.largest_lr is None else f"rates up to {variant.largest_lr:g} work"
    if base is None:
        return shown
    if base.largest_lr == variant.largest_lr:
        return f"{shown}, as with {base.variant.words}"
    return f"{shown} ({base.variant.words}: {'no rate' if base.largest_lr is None else f'{base.largest_lr:g}'})"


def _norms(variants: Sequence[VariantSummary]) -> str:
    return ", ".join(variant.norm for variant in variants)


def _claimed(group: Group, first: VariantSummary, second: VariantSummary) -> float:
    """The surviving difference first - second in the final metric, 0 where there is none."""
    for pair in group.pairs:
        if pair.claimed and {pair.first, pair.second} == {first.norm, second.norm}:
            return pair.value if pair.first == first.norm else -pair.value
    return 0.0


def _span(shown: Sequence[str]) -> str:
    return shown[0] if shown[0] == shown[-1] else f"{shown[0]} to {shown[-1]}"


# ---- lines


def _wrapped(sentence: str) -> list[str]:
    return textwrap.wrap(sentence, _WIDTH, break_on_hyphens=False, break_long_words=False)


def _parts(shown: Table) -> Iterator[list[str]]:
    """The table aligned; where it is too wide, in several parts that repeat the first column."""
    columns = list(zip(shown.headings, *shown.rows, strict=True))
    first, rest = columns[0], columns[1:]
    while rest:
        fits = max(1, max(n for n in range(len(rest) + 1) if _width([first, *rest[:n]]) <= _WIDTH or n == 0))
        yield _aligned([first, *rest[:fits]])
        rest = rest[fits:]


def _heading(column: Sequence[str]) -> list[str]:
    """In several lines where it is wider than what stands under it."""
    words = [min(len(word), 24) for word in column[0].split()]
    return textwrap.wrap(column[0], max([8, *words, *map(len, column[1:])]))


def _width(columns: Sequence[Sequence[str]]) -> int:
    return sum(max(map(len, [*_heading(column), *column[1:]])) + 2 for column in columns) - 2


def _aligned(columns: Sequence[Sequence[str]]) -> list[str]:
    headings = [_heading(column) for column in columns]
    height = max(map(len, headings))
    filled = []
    for number, (column, heading) in enumerate(zip(columns, headings, strict=True)):
        cells = [*heading, *[""] * (height - len(heading)), *column[1:]]
        width = max(map(len, cells))
        filled.append([cell.ljust(width) if number == 0 else cell.rjust(width) for cell in cells])
    lines = ["  ".join(row).rstrip() for row in zip(*filled, strict=True)]
    return [*lines[:height], "─" * max(map(len, lines)), *lines[height:]]
