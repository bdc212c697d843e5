"""Who feeds whom in a model, as plain values, whatever framework it was read from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from normkit.tables import Table

__all__ = ["ACTIVATIONS", "ATTENTION", "KNOWN", "LINEAR", "MAPS", "NORMS", "Graph", "How", "Node"]

# The functions that are linear maps. `addmm` has its weight as (inputs, outputs).
LINEAR = frozenset(("linear", "addmm", *(f"{kind}{n}d" for kind in ("conv", "conv_transpose") for n in (1, 2, 3))))

# Functions by what they are to a norm; `activation` is one without such a name that stands where a layer takes its
# activation.
# fmt: off
ACTIVATIONS = frozenset((
    "activation", "celu", "elu", "gelu", "hardsigmoid", "hardswish", "hardtanh", "leaky_relu", "logsigmoid", "mish",
    "prelu", "relu", "relu6", "rrelu", "selu", "sigmoid", "silu", "softplus", "softsign", "tanh", "tanhshrink",
    "threshold",
))
NORMS = frozenset((
    "batch_norm", "group_norm", "instance_norm", "layer_norm", "local_response_norm", "normalize", "rms_norm",
))
MAPS = LINEAR | {"bilinear", "einsum_dense", "gru", "lstm", "multi_head_attention_forward", "rnn_relu", "rnn_tanh"}
ATTENTION = frozenset(("baddbmm", "bmm", "einsum", "matmul", "scaled_dot_product_attention", "softmax"))
# fmt: on
KNOWN = ACTIVATIONS | NORMS | MAPS | ATTENTION

# How a graph was read: from the traced program (two tracers of PyTorch, one of JAX), from the calls that a model keeps
# (Keras), or from the order of layers in plain sequences alone.
How = Literal["dynamo", "export", "jaxpr", "functional", "modules"]
_HEADINGS = ("id", "function", "called in", "inputs", "shape")


@dataclass(frozen=True)
class Node:
    """One call, in the order of the calls.

    Attributes:
        id: its number.
        op: the function by its plain name (`relu`, also for `F.relu_`, `x.relu()` and `nn.ReLU`); the class of a layer
            that calls several functions; `input`, `output`; `unknown` for what lies outside the part that was seen.
        path: of the module that makes the call, "" for the model itself.
        layer: whether this is all that one call of the module at `path` does.
        inputs: numbers of the nodes that feed it.
        shape: of its output on the example, None where it has several outputs.
        state: parameters and buffers it reads, role to path. A shared one goes by its first path.
        options: its other arguments, by name where the function is one whose arguments matter here.
    """

    id: int
    op: str
    path: str = ""
    layer: bool = False
    inputs: tuple[int, ...] = ()
    shape: tuple[int, ...] | None = None
    state: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        if self.op in ("input", "output"):
            return f"the {self.op} of the model"
        if self.op == "unknown":
            return "a part that could not be seen"
        return f"{self.op} at {self.path}" if self.path else self.op


@dataclass(frozen=True)
class Graph:
    """The calls of one forward pass. Nothing is left out: a tensor that is read twice has two consumers."""

    how: How
    nodes: tuple[Node, ...]

    def __getitem__(self, number: int) -> Node:
        return self._by_id[number]

    def __str__(self) -> str:
        return str(self._table())

    def _repr_html_(self) -> str:
        return self._table()._repr_html_()

    def _table(self) -> Table:
        return Table(_HEADINGS, [_row(node) for node in self.nodes], words=len(_HEADINGS))

    def producers(self, node: Node) -> tuple[Node, ...]:
        """The nodes that feed this one."""
        return tuple(self[number] for number in node.inputs)

    def consumers(self, node: Node) -> tuple[Node, ...]:
        """The nodes that read what this one gives; the output of the model is one of them."""
        return self._consumers.get(node.id, ())

    def calls(self, path: str) -> tuple[Node, ...]:
        """The calls of the layer at this path: none, one, or several where it is used again."""
        return tuple(node for node in self.nodes if node.layer and node.path == path)

    def first_call(self, path: str) -> int:
        """The number of the first node of a module, for an order of paths; past all others where it has none."""
        return self._first.get(path, len(self.nodes))

    def readers(self, state: str) -> tuple[Node, ...]:
        """The nodes that read this parameter or buffer."""
        return self._readers.get(state, ())

    @cached_property
    def _by_id(self) -> dict[int, Node]:
        return {node.id: node for node in self.nodes}

    @cached_property
    def _first(self) -> dict[str, int]:
        return {node.path: node.id for node in reversed(self.nodes)}

    @cached_property
    def _consumers(self) -> dict[int, tuple[Node, ...]]:
        return _inverted((number, node) for node in self.nodes for number in node.inputs)

    @cached_property
    def _readers(self) -> dict[str, tuple[Node, ...]]:
        return _inverted((path, node) for node in self.nodes for path in node.state.values())


def _inverted(pairs: Any) -> dict[Any, tuple[Node, ...]]:
    found: dict[Any, dict[int, Node]] = {}
    for key, node in pairs:
        found.setdefault(key, {})[node.id] = node
    return {key: tuple(nodes.values()) for key, nodes in found.items()}


def _row(node: Node) -> tuple[str, ...]:
    inputs = ", ".join(map(str, node.inputs))
    shape = "" if node.shape is None else " x ".join(map(str, node.shape))
    return str(node.id), node.op, node.path, inputs, shape
