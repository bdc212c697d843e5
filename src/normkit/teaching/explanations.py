"""A normalizer explained: formula, picture of its axes, shapes, modes, pitfalls, paper; and the list of all."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from normkit.checks.output import wrapped
from normkit.core.catalog import CATALOG, find
from normkit.core.spec import NormSpec
from normkit.frameworks import FRAMEWORKS
from normkit.tables import Result, Table
from normkit.teaching.entries import ENTRIES, Entry
from normkit.teaching.examples import HOUSEHOLDS, IMAGES
from normkit.teaching.forms import formula_of, title_of
from normkit.teaching.stories import Story, story
from normkit.teaching.subjects import by_name
from normkit.teaching.walk import Walk, walk
from normkit.teaching.words import sections

__all__ = ["Explanation", "Listing", "explanation", "layers", "listing", "paper", "picture"]

_NAMES = {"torch": "PyTorch", "keras": "Keras", "nnx": "NNX"}
_INDENT = "    "


@dataclass(frozen=True)
class Explanation(Result):
    """One normalizer.

    Attributes:
        name: short name in the catalog.
        title: the field's name.
        entry: line, layers and pitfalls.
        formula: in a line.
        axes: which values of a small input share a statistic, in letters; "" for a normalizer without statistics.
        story: what the docstring of its layer says.
        paper: address.
    """

    name: str
    title: str
    entry: Entry
    formula: str
    axes: str
    story: Story
    paper: str

    def facts(self) -> list[tuple[str, str]]:
        """Everything but formula, picture and pitfalls: topic and text."""
        told = [
            ("shapes", self.story.shapes),
            ("training and evaluation", self.story.modes),
            ("first values", self.story.first),
            ("layers", "; ".join(f"{framework} {', '.join(own)}" for framework, own in layers(self.entry).items())),
            ("paper", self.paper),
        ]
        return [(topic, text) for topic, text in told if text]

    def table(self) -> Table:
        """One row per topic."""
        rows = [("formula", self.formula), *self.facts(), *(("pitfall", text) for text in self.entry.pitfalls)]
        return Table(("", ""), rows, words=2, title=f"{self.title}: {self.entry.line}")

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        own = {name: getattr(self, name) for name in ("name", "title", "formula", "axes", "paper")}
        return {**own, **asdict(self.entry), "source": "/".join(self.entry.source), **asdict(self.story)}

    def __str__(self) -> str:
        lines = [f"{self.title} ({self.name}): {self.entry.line}", "", f"{_INDENT}{self.formula}"]
        if self.axes:
            lines += ["", "values with the same letter share a statistic", ""]
            lines += [f"{_INDENT}{line}".rstrip() for line in self.axes.splitlines()]
        for paragraph in self.story.what:
            lines += ["", *wrapped(paragraph)]
        for topic, text in self.facts():
            lines += ["", *wrapped(f"{topic}: {text}", _INDENT)]
        lines += ["", "pitfalls", *(line for text in self.entry.pitfalls for line in wrapped(text, _INDENT, "  - "))]
        return "\n".join([*lines, "", f"with numbers: normkit explain {self.name} --numbers"])


@dataclass(frozen=True)
class Listing(Result):
    """Every normalizer of the catalog."""

    entries: tuple[tuple[str, NormSpec, Entry], ...]

    def table(self) -> Table:
        """One row each."""
        rows = [
            (name, entry.line, *(", ".join(getattr(entry, framework)) or "-" for framework in _NAMES), spec.paper)
            for name, spec, entry in self.entries
        ]
        return Table(("name", "statistics of", *_NAMES.values(), "paper"), rows, words=3 + len(_NAMES))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            name: {
                "title": title_of(spec),
                "line": entry.line,
                "paper": spec.paper,
                **{framework: list(getattr(entry, framework)) for framework in _NAMES},
            }
            for name, spec, entry in self.entries
        }

    def __str__(self) -> str:
        width = max(len(name) for name, *_ in self.entries) + 2
        lines = []
        for name, spec, entry in self.entries:
            own = "; ".join(f"{framework} {_joined(names)}" for framework, names in layers(entry).items())
            lines += [f"{name:{width}}{entry.line}", *wrapped(f"{own}; {spec.paper}", " " * width, " " * width)]
        return "\n".join([*lines, "", "normkit explain NAME tells of one, with --numbers step by step"])


def explanation(name: str) -> Explanation:
    """The entry of the catalog with this short name, explained. Raises NormValueError for an unknown name."""
    spec, entry = find(name), ENTRIES[name]
    return Explanation(
        name, title_of(spec), entry, formula_of(spec), _axes(name, spec), story(*entry.source), paper(spec)
    )


def listing() -> Listing:
    """The whole catalog."""
    return Listing(tuple((name, spec, ENTRIES[name]) for name, spec in CATALOG.items()))


def layers(entry: Entry) -> dict[str, tuple[str, ...]]:
    """Names of the layers by framework, as far as there are any."""
    return {_NAMES[name]: getattr(entry, name) for name in sorted(FRAMEWORKS, key=list(_NAMES).index)
            if getattr(entry, name)}  # fmt: skip


def paper(spec: NormSpec) -> str:
    """Address of the paper."""
    return spec.paper.replace("arXiv:", "https://arxiv.org/abs/")


def picture(name: str) -> Walk:
    """A normalizer on two images of four channels, features of layer norm being all of an image.

    Four images where samples are put into groups, of two by default.
    """
    images = IMAGES.x
    if ("m", "n") in find(name).axes:
        images = np.concatenate([images, images])
    subject = by_name(name, images.shape)
    if "*c" in subject.spec.affine_names:
        subject = replace(subject, sizes=(("*c", images.shape[1:]),))
    return walk(subject, images, ((), IMAGES.labels[1]))


def _axes(name: str, spec: NormSpec) -> str:
    if not spec.over_names:
        return ""
    if spec.axes[0] != ("*n",):
        return str(sections(picture(name))[0].table)
    return str(sections(walk(by_name(name, HOUSEHOLDS.x.shape), HOUSEHOLDS.x))[0].table)


def _joined(names: tuple[str, ...]) -> str:
    """`BatchNorm1d, BatchNorm2d, BatchNorm3d` as `BatchNorm1d/2d/3d`."""
    stem = names[0].removesuffix("1d")
    return f"{names[0]}/2d/3d" if names == tuple(f"{stem}{axes}d" for axes in (1, 2, 3)) else ", ".join(names)
