"""What the docstring of a layer says, by topics, read without importing the framework of the layer."""

from __future__ import annotations

import ast
import inspect
import re
from dataclasses import dataclass
from importlib import resources

__all__ = ["Story", "story"]

_TOPICS = {
    "Shapes: ": "shapes",
    "Training: ": "modes",
    "Training and evaluation ": "modes",
    "Evaluation: ": "modes",
    "Evaluation, ": "modes",
    "First values: ": "first",
}
_BEGINS = re.compile(f"(?=\\b(?:{'|'.join(map(re.escape, _TOPICS))}))")
_ENDS = re.compile(r"^(?:Args|Raises|Returns|Example):|^>>> ", re.MULTILINE)
_ROLE = re.compile(r":\w+:`([^`]+)`")


@dataclass(frozen=True)
class Story:
    """The prose of a docstring.

    Attributes:
        what: paragraphs that belong to no other topic, without the summary and the formula.
        shapes: of input, output and parameters.
        modes: what training does, and evaluation.
        first: the first values.
    """

    what: tuple[str, ...]
    shapes: str
    modes: str
    first: str


def story(file: str, name: str) -> Story:
    """The story of a class in a file of the package. Raises KeyError where the file has no such class."""
    tree = ast.parse((resources.files("normkit") / file).read_text(encoding="utf-8"))
    documented = {node.name: ast.get_docstring(node) or "" for node in tree.body if isinstance(node, ast.ClassDef)}
    _, *paragraphs = inspect.cleandoc(_ENDS.split(documented[name])[0]).split("\n\n")  # the first is the summary
    found: dict[str, list[str]] = {topic: [] for topic in ("what", *_TOPICS.values())}
    for paragraph in paragraphs:
        for part in _BEGINS.split(_ROLE.sub(r"`\1`", " ".join(paragraph.split()))):
            begin = next((begin for begin in _TOPICS if part.startswith(begin)), "")
            text = part.removeprefix(begin) if begin.startswith(("Shapes", "First")) else part
            if text.startswith("y = "):  # the formula stands elsewhere, in other names
                text = text.partition(". ")[2]
            if text.strip():
                found[_TOPICS.get(begin, "what")].append(text.strip())
    shapes, modes, first = (" ".join(found[topic]) for topic in ("shapes", "modes", "first"))
    return Story(tuple(found["what"]), _sentence(shapes), modes, _sentence(first))


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]
