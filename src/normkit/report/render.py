"""The report: one HTML page that needs nothing else."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, NamedTuple

from normkit.errors import MissingExtraError, message
from normkit.experiments.analysis import Group
from normkit.experiments.config import MOMENTUM
from normkit.report import words
from normkit.report.figures import learning_curves, rate_range, slots

if TYPE_CHECKING:
    from normkit.experiments.verb import Comparison

__all__ = ["fragment", "page", "require"]

_SIZE = 490_000  # bytes of a page, as far as drawings go
_AROUND = 4_000  # of the captions and legends around the drawings of one setting


class _Legend(NamedTuple):
    slot: int
    dashed: bool


class _Section(NamedTuple):
    """One setting: its table and its drawings, which are None where there is no room left."""

    title: str
    headings: words.Row
    rows: list[tuple[_Legend, words.Row]]
    curves: str | None
    rates: str | None


def require() -> None:
    """Raise MissingExtraError where a package that the report needs is not installed."""
    for name in ("jinja2", "matplotlib"):
        try:
            importlib.import_module(name)
        except ImportError as error:
            must = f"the report needs {name}, which is not installed"
            raise MissingExtraError(message(must, hint="pip install 'normkit[lab]'")) from error


def page(comparison: Comparison) -> str:
    """The whole page, under 500 KB, without anything to load."""
    return _rendered("page.html.j2", comparison)


def fragment(comparison: Comparison) -> str:
    """The same as one element, for notebooks."""
    return _rendered("body.html.j2", comparison)


def _rendered(template: str, comparison: Comparison) -> str:
    require()
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("normkit.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    *found, screening = words.sentences(comparison)
    sections = [_section(comparison, group) for group in comparison.groups]

    def rendered() -> str:
        return environment.get_template(template).render(
            comparison=comparison,
            config=comparison.config,
            found=[sentence.replace(" %", "\u00a0%") for sentence in found],
            screening=screening,
            sections=sections,
            target=words.percent(comparison.config.target, digits=0),
            undrawn=sum(section.curves is None for section in sections),
            facts=_facts(comparison),
        )

    # The text comes first; what is left of the size goes to drawings, setting by setting.
    left = _SIZE - len(rendered().encode())
    for number, group in enumerate(comparison.groups):
        curves, rates = _drawn(comparison, group, number)
        left -= len(curves) + len(rates) + _AROUND
        if left < 0:
            break
        sections[number] = sections[number]._replace(curves=curves, rates=rates)
    return rendered()


def _section(comparison: Comparison, group: Group) -> _Section:
    from normkit.report.draw import SLOTS

    numbers = slots(group)
    variants = [variant.variant for variant in group.variants]
    legend = [_Legend(numbers[variant.name] % SLOTS, variant.position == "after") for variant in variants]
    rows = list(zip(legend, words.table(group), strict=True))
    return _Section(words.setting(comparison, group), words.headings(comparison), rows, None, None)


def _drawn(comparison: Comparison, group: Group, number: int) -> tuple[str, str]:
    from normkit.report.draw import draw_learning_curves, draw_rate_range

    return (
        draw_learning_curves(learning_curves(group, comparison.config.target), f"curves{number}"),
        draw_rate_range(rate_range(group, comparison.classes), f"rates{number}"),
    )


def _facts(comparison: Comparison) -> list[tuple[str, str]]:
    config, environment = comparison.config, comparison.environment

    def listed(values: Any) -> str:
        return ", ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in values)

    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    machine = [f"{environment['cores']} cores", f"{environment['workers']} workers", environment["system"]]
    machine += environment["instruction_sets"][:1]  # the widest
    return [
        ("Command", environment["command"] or "normkit.compare(...)"),
        ("Data", comparison.data),
        ("Model", f"{config.model}, He initialization"),
        ("Training", f"{config.framework}, SGD with momentum {MOMENTUM}, constant rate, mean cross entropy"),
        ("Norms", listed(config.norms)),
        ("Learning rates", listed(config.lrs)),
        ("Batch sizes", listed(config.batch_sizes)),
        ("Inputs", listed(config.inputs)),
        ("Seeds", listed(range(config.seeds))),
        ("Epochs", f"{config.epochs}"),
        ("Trials", f"{len(comparison.trials)} in {environment['seconds']:.0f} s"),
        ("Machine", ", ".join(machine)),
        ("Versions", versions),
    ]
