"""docs/normalizers.md and its picture, made from catalog, docstrings and walks.

`python -m normkit.teaching.pages docs/normalizers.md` writes both.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from normkit.core.catalog import CATALOG
from normkit.files import save
from normkit.teaching.explanations import Explanation, explanation, picture
from normkit.teaching.steps import show

__all__ = ["PICTURED", "drawing", "main", "page"]

PICTURED = ("batch", "layer", "instance", "group")
_TITLES = {
    "batch": "batch norm: each channel, over all samples",
    "layer": "layer norm: each sample, over all of it",
    "instance": "instance norm: each channel of each sample",
    "group": "group norm: groups of channels of each sample",
}
_HEAD = """# The normalizers

Written by `python -m normkit.teaching.pages docs/normalizers.md` from the catalog and the docstrings of the layers;
`normkit explain batch` and `normkit explain batch --numbers` show the same, and `normkit.show(layer, x)` does it with a
layer and a batch of yours. `normkit list` is the list. Gamma is called `weight` in PyTorch and `scale` in NNX, beta
`bias`.

Most of them subtract a mean, divide by a deviation, scale and shift. They differ in whose mean that is:

![Which values share a mean and a variance, in two images of 2 x 2 pixels with four channels](normalizers.svg)

In layer norm of sequences each position has a mean of its own; in layer norm of images here all of an image has one.
"""


def page() -> str:
    """The whole page."""
    found = [explanation(name) for name in CATALOG]
    listed = [f"- [`{one.name}`](#{one.name}) {one.title}: {one.entry.line}" for one in found]
    return "\n".join([_HEAD, *listed, "", *(_section(one) for one in found)])


def drawing() -> str:
    """The picture at the head of the page."""
    from normkit.report.grids import picture as drawn

    return drawn([(_TITLES[name], picture(name)) for name in PICTURED])


def _section(one: Explanation) -> str:
    lines = [f'<a id="{one.name}"></a>', f"## {one.title[:1].upper()}{one.title[1:]} (`{one.name}`)"]
    lines += [f"{_plain(one.entry.line[:1].upper() + one.entry.line[1:])}.", "", "```", one.formula, "```"]
    if one.axes:
        lines += ["Values with the same letter share a statistic:", "```", one.axes, "```"]
    for paragraph in one.story.what:
        lines += [_plain(paragraph), ""]
    lines += [f"- **{topic.capitalize()}**: {_plain(text)}" for topic, text in one.facts()]
    lines += ["", "Pitfalls:", *(f"- {_plain(text)}" for text in one.entry.pitfalls)]
    lines += ["", f"<details><summary>Step by step: <code>normkit explain {one.name} --numbers</code></summary>", ""]
    return "\n".join([*lines, "```", str(show(one.name)), "```", "</details>", ""])


def _plain(text: str) -> str:
    """Prose in Markdown: stars are stars, outside of code."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(part if part.startswith("`") else part.replace("*", r"\*") for part in parts)


def main(arguments: list[str]) -> None:
    """Write the page, and the picture beside it."""
    path = Path(arguments[0] if arguments else "docs/normalizers.md")
    save(path, page())
    save(path.with_suffix(".svg"), drawing())


if __name__ == "__main__":
    main(sys.argv[1:])
