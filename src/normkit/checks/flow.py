"""Questions about who feeds whom, with the norms known: what reads a value, and where its channels come from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from normkit.checks.evidence import Evidence, Layer
from normkit.surgery.graph import ACTIVATIONS, LINEAR, NORMS, Graph, Node

__all__ = ["POINTWISE", "RESHAPES", "Flow", "Origin", "channel_axis", "dropout"]

# Functions that give every value as it was; with the next ones, in another shape or order.
_SAME = frozenset(("clone", "contiguous", "detach", "identity"))
# fmt: off
RESHAPES = _SAME | {
    "flatten", "movedim", "permute", "reshape", "reshape_as", "squeeze", "swapaxes", "swapdims", "transpose",
    "unflatten", "unsqueeze", "view", "view_as",
}
# Functions after which every channel stands on the axis that it stood on.
POINTWISE = _SAME | ACTIVATIONS | frozenset((
    "add", "clamp", "mul", "sub", "truediv",
    *(f"{kind}_pool{n}d" for kind in ("avg", "max", "adaptive_avg", "adaptive_max") for n in (1, 2, 3)),
))
# fmt: on
_SWAPS = frozenset(("swapaxes", "swapdims", "transpose"))


class Origin(NamedTuple):
    """A node, and the axis of its output that is meant, counted from the front."""

    node: Node
    axis: int


@dataclass(frozen=True)
class Flow:
    """A graph, and the norms in it."""

    graph: Graph
    layers: Mapping[str, Layer]

    @classmethod
    def of(cls, seen: Evidence) -> Flow:
        """That of a model whose graph was seen."""
        assert seen.graph is not None
        return cls(seen.graph, seen.by_path)

    def norms(self) -> Iterator[tuple[Layer, Node]]:
        """Every call of a norm layer."""
        for node in self.graph.nodes:
            if node.path in self.layers and node.op not in ("input", "output"):
                yield self.layers[node.path], node

    def is_norm(self, node: Node) -> bool:
        """Whether a node belongs to a norm, or normalizes as a function."""
        return node.op in NORMS or node.path in self.layers or node.id in self._own

    @cached_property
    def _own(self) -> frozenset[int]:
        """Nodes that read the parameters of norms."""
        owners = {node.id: {path.rpartition(".")[0] for path in node.state.values()} for node in self.graph.nodes}
        return frozenset(number for number, paths in owners.items() if paths & self.layers.keys())

    def origin(self, node: Node, axis: int, through: frozenset[str], *, alone: bool = True) -> Origin | None:
        """Where the values that a node reads come from: a linear map or norm, with nothing but `through` between.

        Args:
            node: that reads.
            axis: of its input; the result has the axis on which the same values stand there.
            through: functions, besides dropout of nothing.
            alone: whether nothing else may read the values on the way.

        Returns None where the way is not a single line, or the axis is not known any more.
        """
        given = self._only(node)
        if given is None or given.shape is None:
            return None
        at: int | None = axis % len(given.shape)
        while given is not None and at is not None:
            if alone and len(self.graph.consumers(given)) > 1:
                return None
            if given.op in LINEAR or self.is_norm(given):
                return Origin(given, at)
            if given.op not in through and dropout(given) != 0.0:
                return None
            before = self._only(given) if given.op not in ("add", "mul") else self._first(given)
            at = None if before is None else _before(given, before, at)
            given = before
        return None

    def meets(self, node: Node, stops: Callable[[Node], bool]) -> Iterator[Node]:
        """The nodes at which ways from a node stop, each once; a way goes on through everything else."""
        waiting, seen = [node], {node.id}
        while waiting:
            for reader in self.graph.consumers(waiting.pop()):
                if reader.id in seen:
                    continue
                seen.add(reader.id)
                if stops(reader):
                    yield reader
                else:
                    waiting.append(reader)

    def _only(self, node: Node) -> Node | None:
        producers = self.graph.producers(node)
        return producers[0] if len(producers) == 1 else None

    def _first(self, node: Node) -> Node | None:
        """Of several inputs one that has the shape of the output."""
        return next((one for one in self.graph.producers(node) if one.shape == node.shape), None)


def dropout(node: Node) -> float | None:
    """The share that a dropout drops in training, 1 where it is not known; None for another function."""
    if "dropout" not in node.op:
        return None
    p = node.options.get("p", 1.0)
    return float(p) if isinstance(p, int | float) else 1.0


def channel_axis(node: Node) -> int | None:
    """The axis of the channels that a linear map gives, counted from the front; None where the shape is not known."""
    if node.shape is None or node.op not in LINEAR:
        return None
    axis = -1 if node.op in ("linear", "addmm") else int(node.options.get("axis", -1 - int(node.op[-2])))
    return axis % len(node.shape)


def _before(node: Node, given: Node, axis: int) -> int | None:
    """The axis of the input on which the values of an axis of the output stand; None where they are mixed."""
    new, old = node.shape, given.shape
    if new is None or old is None:
        return None
    if node.op in _SWAPS:
        pair = [_axis(node.options.get(key), len(old)) for key in ("1", "2")]
        return None if None in pair else pair[1 - pair.index(axis)] if axis in pair else axis
    if node.op == "permute":
        order = node.options.get("1")
        axes = order if isinstance(order, tuple | list) else [node.options.get(str(n + 1)) for n in range(len(old))]
        return _axis(axes[axis], len(old)) if len(axes) == len(old) else None
    if node.op == "movedim":
        return None
    if node.op in RESHAPES - _SAME:
        if new[: axis + 1] == old[: axis + 1]:
            return axis
        from_end = len(new) - axis
        return len(old) - from_end if new[-from_end:] == old[-from_end:] and from_end <= len(old) else None
    return axis if len(new) == len(old) else None


def _axis(value: Any, ndim: int) -> int | None:
    return value % ndim if isinstance(value, int) else None
