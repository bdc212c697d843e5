"""The report: one HTML page that needs nothing else, and every figure as a file."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from normkit.experiments.analysis import Group
from normkit.report import look, words
from normkit.report.figures import Pen, costs, finals, learning_curves, pens, rate_range, variant_depth

if TYPE_CHECKING:
    from normkit.experiments.comparison import Comparison
    from normkit.report.draw import Drawable

__all__ = ["figures_of", "fragment", "load", "page", "pictures", "require"]

_SIZE = 490_000  # bytes of a page
_AROUND = 1_200  # of the heading and explanation of a figure


@dataclass
class _Section:
    """One setting: its sentence, its table, and its drawings by the name of the figure as far as there is room."""

    finding: str
    table: words.Table
    pens: dict[str, Pen]
    beside: str  # the norms of the depth figures, in words
    drawings: dict[str, str] = field(default_factory=dict)


def require() -> None:
    """Raise MissingExtraError where a package that the report needs is not installed."""
    look.require("jinja2", "matplotlib")


def load() -> None:
    """Load what draws, while there is time: a part of a second."""
    from normkit.report import draw  # noqa: F401


def page(comparison: Comparison) -> str:
    """The whole page, under 500 KB, without anything to load."""
    return _rendered("page.html.j2", comparison)


def fragment(comparison: Comparison) -> str:
    """The same as one element, for notebooks."""
    return _rendered("body.html.j2", comparison)


def pictures(comparison: Comparison) -> dict[str, str | bytes]:
    """Every figure as `NAME.svg` and `NAME.png`; with several settings their names follow: `curves-8-max.svg`."""
    require()
    from normkit.report import draw

    files: dict[str, str | bytes] = {}
    for group in comparison.groups:
        for kind, figure in figures_of(comparison, group).items():
            parts = [str(part).replace(", ", "-").replace(" ", "-") for part in group.setting if part]
            name = "-".join([kind, *parts]) if len(comparison.groups) > 1 else kind
            files[f"{name}.svg"] = draw.standalone(draw.svg(figure, name))
            files[f"{name}.png"] = draw.png(figure)
    return files


def _rendered(template: str, comparison: Comparison) -> str:
    require()
    from normkit.report import draw

    page = look.template(template)
    task = comparison.task
    sections = [_section(comparison, group) for group in comparison.groups]
    overview = words.by_batch_size(comparison)
    figures = [figures_of(comparison, group) for group in comparison.groups]

    def rendered() -> str:
        return page.render(
            body="body.html.j2",
            name="normkit compare",
            comparison=comparison,
            config=comparison.config,
            task=task,
            title=f"{comparison.config.subject} on {name}"
            if (name := comparison.data.split(":")[0])
            else comparison.config.subject,
            sections=sections,
            overview=overview,
            keys={key for section in sections for key in section.table.keys},
            caveats=words.caveats(comparison),
            following=words.following(comparison),
            target=words.target(task) if task.target is not None else None,
            tested=all(trial.tested for trial in comparison.trials),
            slots=draw.SLOTS,
            left_out=len(comparison.groups) - len(sections),
            undrawn=sum(map(len, figures)) - sum(len(section.drawings) for section in sections),
            facts=_facts(comparison),
        )

    # The text comes first, of as many settings as there is room for.
    while len(rendered().encode()) > _SIZE and len(sections) > 1:
        del sections[len(sections) // 2 :]
    # What is left of the size goes to drawings: one kind after the other, so that all settings show the first.
    left = _SIZE - len(rendered().encode())
    for kind, number in _drawn_first(figures[: len(sections)]):
        drawing = draw.svg(figures[number][kind], f"{kind}{number}")
        left -= len(drawing.encode()) + _AROUND
        if left < 0:
            break
        sections[number].drawings[kind] = drawing
    return rendered()


def _drawn_first(figures: list[dict[str, Drawable]]) -> Iterable[tuple[str, int]]:
    kinds = dict.fromkeys(kind for found in figures for kind in found)
    return [(kind, number) for kind in kinds for number, found in enumerate(figures) if kind in found]


def _section(comparison: Comparison, group: Group) -> _Section:
    beside = [norm for norm in (group.baseline.norm, _beside(comparison, group)) if norm]
    return _Section(
        words.finding(comparison, group), words.table(comparison, group, whole=True), pens(group), " and ".join(beside)
    )


def figures_of(comparison: Comparison, group: Group) -> dict[str, Drawable]:
    """By name, in the order in which a page shows them; those with nothing to draw are left out."""
    task, beside = comparison.task, _beside(comparison, group)
    validation, final = words.validation_name(comparison), words.final_name(comparison)
    figures: dict[str, Drawable] = {
        "curves": learning_curves(group, task, validation),
        "rates": rate_range(group, task, validation),
        "final": finals(group, task, final),
        "costs": costs(group),
        "depth-before": variant_depth(group, beside, last=False),
        "depth-after": variant_depth(group, beside, last=True),
    }
    return {name: figure for name, figure in figures.items() if figure.lines}


def _beside(comparison: Comparison, group: Group) -> str | None:
    """Whose activations stand beside the baseline's: batch norm's, else the recommended variant's, else the first."""
    shown = [variant for variant in group.variants if variant.snapshots and variant is not group.baseline]
    best = [variant for variant in words.recommended(group, comparison.task) if variant in shown]
    batch = [variant for variant in shown if variant.norm == "batch"]
    return next((variant.norm for variant in [*batch, *best, *shown]), None)


def _facts(comparison: Comparison) -> list[tuple[str, str]]:
    """How the comparison was made, as far as it is known."""
    config, known = comparison.config, comparison.environment

    def listed(values: Iterable[Any] | None) -> str:
        return ", ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in values or ())

    counted = f"{len(comparison.trials)}"
    if "started" in known:
        kept = len(comparison.trials) - known["started"]
        run = f"{known['started']} of them run now and {kept}" if known["started"] else "all"
        counted += f", {run} kept from before" if kept else ""
    if "seconds" in known:
        counted += f", in {known['seconds']:.0f} s"
    machine = [
        f"{known[name]} {name if known[name] != 1 else name[:-1]}" for name in ("cores", "workers") if known.get(name)
    ]
    machine += [known["system"]] if known.get("system") else []
    machine += list(known.get("instruction_sets", ()))[:1]  # the widest
    facts = {
        "Command": known.get("command") or "normkit.compare(...)",
        "Data": comparison.data,
        "Loop" if config.run else "Model": config.subject,
        "Framework": config.framework if not config.run else "",
        "Loss": known.get("loss"),
        "Optimizer": known.get("optimizer"),
        "Judged by": f"{comparison.task.metric}, {'more' if comparison.task.goal == 'max' else 'less'} is better",
        "Norms": listed(config.norms),
        "Learning rates": listed(config.lrs),
        "Batch sizes": listed(config.batch_sizes),
        "Inputs": listed(config.inputs),
        "Conditions": "; ".join(str(conditions) or "as usual" for conditions in config.conditions)
        if any(conditions.changes() for conditions in config.conditions)
        else "",
        "Seeds": f"{config.seeds} (0 to {config.seeds - 1})" if config.seeds > 1 else "1 (0)",
        "Epochs": f"{config.epochs}",
        "Trials": counted,
        "Storage": known.get("storage"),
        "Machine": ", ".join(machine),
        "Versions": ", ".join(f"{name} {version}" for name, version in known.get("versions", {}).items()),
    }
    return [(name, str(value)) for name, value in facts.items() if value]
