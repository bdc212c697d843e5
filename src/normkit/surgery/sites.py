"""Where the norm layers of a model are, and how each was recognized."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from normkit.core.record import NormRecord

__all__ = ["Site"]


@dataclass(frozen=True)
class Site:
    """One norm layer.

    Attributes:
        path: where it is registered first.
        kind: name of its class.
        record: what it computes, and its values.
        how: `class` for a layer of the framework or ours; `probe` for one that gives, on random inputs with random
            parameters, the numbers of a formula of the catalog.
        names: of its attributes that hold gamma, beta, mean, var.
        constant: whether it normalizes by kept statistics in the mode the model is in.
    """

    path: str
    kind: str
    record: NormRecord
    how: Literal["class", "probe"]
    names: Mapping[str, str]
    constant: bool

    def __str__(self) -> str:
        return self.kind if self.how == "class" else f"{self.kind}, by its numbers a {self.record.words}"
