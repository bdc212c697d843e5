"""The steps of `normkit.show` as one HTML page that needs nothing else, and as an element for notebooks."""

from __future__ import annotations

from collections.abc import Sequence

from normkit.report import grids, look
from normkit.teaching import words
from normkit.teaching.steps import Steps

__all__ = ["fragment", "page"]

_BODY = "steps.html.j2"


def page(steps: Steps) -> str:
    """The whole page, without anything to load."""
    return _rendered("page.html.j2", steps)


def fragment(steps: Steps) -> str:
    """The same as one element."""
    return _rendered(_BODY, steps)


def _rendered(template: str, steps: Steps) -> str:
    heading, formula = words.title(steps.walk).split("\n")
    text: str = look.template(template).render(
        body=_BODY,
        name="normkit",
        title=heading,
        formula=formula,
        data=steps.data,
        reading=steps.reading,
        sections=words.sections(steps.walk),
        grid=grids.element(steps.walk),
        spans=_spans,
    )
    return text


def _spans(headings: Sequence[str]) -> list[tuple[str, int]]:
    """Headings with the number of columns that they stand above: those behind the first that are empty join."""
    found = [(headings[0], 1)]
    for heading in headings[1:]:
        if heading or len(found) == 1:
            found.append((heading, 1))
        else:
            found[-1] = found[-1][0], found[-1][1] + 1
    return found
