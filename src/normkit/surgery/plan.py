"""What a verb does to a model, edit by edit: printed before it happens, reported afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from normkit.surgery.graph import How
from normkit.tables import Result, Table

__all__ = ["OLD_OPTIMIZER", "Edit", "Report"]

# A note for verbs that were given no optimizer.
OLD_OPTIMIZER = "an optimizer made before holds the old parameters: give it as `optimizer`"

_HEADINGS = ("layer", "is", "becomes", "why")
_SEEN = {
    "dynamo": "the whole forward pass was traced (Dynamo)",
    "export": "the whole forward pass was traced (torch.export)",
    "jaxpr": "the whole forward pass was traced (JAX)",
    "functional": "every call of the model is known",
    "modules": "the forward pass could not be traced; the order of layers is known within nn.Sequential only",
}


@dataclass(frozen=True)
class Edit:
    """One layer, and what becomes of it.

    Attributes:
        path: of the layer.
        old: what it is.
        new: what it becomes; None where it stays as it is.
        reason: how the rest makes up for it, or why it stays.
        into: paths of the parameters that change.
    """

    path: str
    old: str
    new: str | None
    reason: str
    into: tuple[str, ...] = ()


@dataclass(frozen=True)
class Report(Result):
    """What was done to a model, or would be.

    Attributes:
        verb: `fold`, ...
        model: name of the model's class.
        how: how the flow of data was seen: `dynamo`, `export`, `jaxpr`, `functional` or `modules`; None where a verb
            looks at layers alone.
        edits: one or more entries per layer that the verb looks at, in the order of the calls.
        notes: what else there is to know.
        difference: largest change of the outputs on the example, relative to the largest output, in the type of the
            model; None before it is done.
    """

    verb: str
    model: str
    how: How | None
    edits: tuple[Edit, ...]
    notes: tuple[str, ...] = ()
    difference: float | None = None

    @property
    def done(self) -> tuple[Edit, ...]:
        """The edits that change something."""
        return tuple(edit for edit in self.edits if edit.new is not None)

    @property
    def kept(self) -> tuple[Edit, ...]:
        """What stays as it is, with the reason."""
        return tuple(edit for edit in self.edits if edit.new is None)

    @property
    def reasons(self) -> str:
        """The first reasons why layers stay as they are, for an error."""
        return "; ".join(f"{edit.path}: {edit.reason}" for edit in self.kept[:3]) or f"{self.model} without any"

    def table(self) -> Table:
        """One row per edit, below what is to be said of all."""
        rows = [(edit.path, edit.old, edit.new or "stays", edit.reason) for edit in self.edits]
        return Table(_HEADINGS, rows, words=len(_HEADINGS), title="\n".join(self._lines()))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    def _lines(self) -> Iterator[str]:
        seen = "" if self.how is None else f"; {_SEEN[self.how]}"
        yield f"{self.verb} {self.model}: {len(self.done)} edits, {len(self.kept)} refused{seen}"
        yield from self.notes
        if self.difference is not None:
            yield f"outputs on the example change by {self.difference:.1e} of the largest"
