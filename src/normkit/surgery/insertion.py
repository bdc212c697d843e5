"""The verb `insert`: norms behind the linear maps of a model, wherever an activation follows."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, Protocol

import numpy as np

from normkit.core.algebra import Pooled, unbiased
from normkit.core.catalog import find
from normkit.core.constraints import Constraint, Flag, OneOf, check
from normkit.core.record import NormRecord
from normkit.errors import NormTypeError, NormValueError, message
from normkit.frameworks import is_layer
from normkit.surgery.graph import ACTIVATIONS, ATTENTION, LINEAR, MAPS, NORMS, Graph, Node
from normkit.surgery.plan import Edit, Report
from normkit.surgery.protocol import Subject, opened
from normkit.surgery.sites import Site, named

__all__ = [
    "Opened",
    "Place",
    "as_identity",
    "check_identity",
    "check_place",
    "insert",
    "planned",
    "subtracts",
    "without_bias",
]

# A value per channel that is added to all of x is subtracted again by their statistics.
_SUBTRACTING = ("batch", "ghost", "renorm", "instance")

# What a linear map's output can meet, and why there is then no place for a norm. In the order of their weight.
_REASONS = {
    "norm": "{} normalizes its output already",
    "attention": "its output goes into attention ({})",
    "unknown": "what reads its output could not be seen",
    "activation": "",
    "gate": "{} makes it a gate of other values",
    "linear": "no activation stands between it and {}",
    "output": "no activation follows",
}
_ARGUMENTS: dict[str, Constraint] = {
    "placement": OneOf(("before", "after")),
    "init": OneOf(("fresh", "identity")),
    **{name: Flag() for name in ("except_last", "inplace", "dry_run", "return_report")},
}


@dataclass(frozen=True)
class Place:
    """Where a norm goes: to the output or the input of a layer.

    Attributes:
        path: of the layer.
        side: `output`, or `input`.
        shape: of the values on the example.
        axis: of their channels, 1 or -1.
        bias: path of the layer's bias, None where it has none or the norm goes elsewhere.
        why: which activation it is for.
    """

    path: str
    side: Literal["output", "input"]
    shape: tuple[int, ...]
    axis: int
    bias: str | None
    why: str


class Opened(Subject, Protocol):
    """A model that was looked into: `normkit.<framework>.insertion.opened`."""

    graph: Graph
    sites: tuple[Site, ...]

    def layers(self) -> dict[str, Any]:
        """Every layer by its first path."""

    def holds_layers(self, path: str) -> bool:
        """Whether a layer has others inside."""

    def obstacle(self, path: str) -> str | None:
        """Why no norm can be put at a layer."""

    def prepared(self, place: Place) -> Edit:
        """Make the norm for a place. Raises NormValueError where it has nothing to normalize over there."""

    def finish(
        self, places: Sequence[Place], *, identity: bool, data: Any, inplace: bool, optimizer: Any
    ) -> tuple[Any, float]:
        """The model with norms at these places, and the relative change of its outputs on the example in evaluation.

        With `identity` by the statistics of `data`, or of the example where that is None, and checked.
        """


def insert(
    model: Any,
    norm: str | Callable[..., Any],
    example: Any,
    *,
    after: Any = None,
    placement: Literal["before", "after"] = "before",
    except_last: bool = True,
    init: Literal["fresh", "identity"] = "fresh",
    data: Any = None,
    inplace: bool = False,
    dry_run: bool = False,
    return_report: bool = False,
    optimizer: Any = None,
) -> Any:
    """Put norms between the linear maps of a model and their activations.

    act(map(x)) becomes act(norm(map(x))), or norm(act(map(x))) with `placement="after"`.

    Every convolution and linear map gets one whose output meets an activation, by whatever functions: the traced
    forward pass tells, `F.relu` and `x.relu()` included. These do not, and the report says why: the last ones, with no
    linear map behind them (`except_last`); projections of attention; gates; what another linear map or a norm reads
    first; layers that are called more than once, since one norm would see two distributions.

    The layer itself takes the norm as its child `norm` and stays the same object, so paths, weights, hooks and
    `isinstance` stay; a `state_dict` only gains the norm's entries. Its hooks see the normalized output. Behind an
    activation that is a function, the norm goes to the input of the one layer that reads it. Convolutions have their
    channels on axis 1, linear maps on the last. The new parameters need gradients where the layer's weight does. A
    bias that batch, ghost or instance norm or renorm subtracts again goes away; where statistics are kept their mean
    makes up for it.

    A Keras model is built anew from the configs of its layers under their names, with the same weights, and is not
    compiled. Norms are layers of it, `conv_norm` behind `conv`; an activation inside a layer comes behind the norm as
    `conv_activation`. A norm takes the type and `trainable` of its layer. What a mask hides, norms with
    statistics over positions give as 0, with `init="identity"` too.

    Args:
        model: a torch.nn.Module, or a Sequential or Functional model of Keras, nested ones included.
        norm: short name in the catalog, but for frn, evonorm_b0 and evonorm_s0, which would have to take the place of
            the activation; or a function from the number of channels to a layer. Where there are more axes than two it
            is also given `axis=-1` in PyTorch if they are last, in Keras `axis=1` if they are not.
        example: inputs that the model takes: a tensor or array (N, ...); a dictionary of them, taken by name; a tuple
            or list of them.
        after: the maps, a list of classes, paths and functions of (path, layer); a path names a layer whatever follows.
        placement: `before` the activation or `after` it.
        except_last: leave out maps that no other linear map follows.
        init: `fresh` norms start at gamma 1 and beta 0. `identity` takes the statistics of the example and starts at
            gamma = sqrt(var + eps), beta = mean: in evaluation nothing changes, which is tried on the example. For
            norms with kept statistics.
        data: with `init="identity"` the statistics are those of all this instead of the example's: an array, a loader
            or a list of batches, as in `normkit.recalibrate`; merged in float64, however it is cut.
        inplace: change the model itself, all of it or nothing. Not for Keras.
        dry_run: return the report of what would be done, and do nothing.
        return_report: return (model, report).
        optimizer: made for this model; its groups and state move to the parameters of the result. Not for Keras:
            compile the result.

    Returns:
        A new model, in the modes it had. With `dry_run` the report.

    Raises:
        NormTypeError: for another model, a compiled or scripted one, a subclassed Keras model or one with a layer that
            cannot be made from its config, an example that does not fit, a layer or class as `norm`.
        NormValueError: for an unknown norm, where no place is found, `init="identity"` for other norms or where it
            does change the outputs, `data` without it, a Keras model that is not built, `inplace` or
            `optimizer` with Keras.

    Example:
        >>> import normkit, torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))
        >>> print(normkit.insert(model, "batch", torch.randn(2, 3, 8, 8)))
        Sequential(
          (0): Conv2dWithNorm(
            3, 4, kernel_size=(3, 3), stride=(1, 1), bias=False
            (norm): BatchNorm2d(4, eps=1e-05, momentum=0.1, affine=True, bias=True, track_running_stats=True)
          )
          (1): ReLU()
          (2): Flatten(start_dim=1, end_dim=-1)
          (3): Linear(in_features=144, out_features=10, bias=True)
        )
    """
    given = {"placement": placement, "init": init, "except_last": except_last, "inplace": inplace}
    check("insert", _ARGUMENTS, {**given, "dry_run": dry_run, "return_report": return_report})
    if not isinstance(norm, str) and (isinstance(norm, type) or is_layer(norm) or not callable(norm)):
        must = "`norm` must be a short name, or a function from the number of channels to a layer"
        raise NormTypeError(message(must, repr(norm), "lambda channels: MyNorm(channels)"))
    if isinstance(norm, str) and find(norm).activates:
        must = f"insert puts a norm in front of an activation, whose place {norm} would have to take"
        hint = "write the model with its layer where norm and activation stand"
        raise NormValueError(message(must, repr(norm), hint))
    if data is not None and init != "identity":
        must = "`data` must be left out unless statistics are taken"
        raise NormValueError(message(must, f"data, and init={init!r}", 'init="identity"'))
    subject: Opened = opened("insertion", model, norm, example, frameworks=("torch", "keras"))
    subject.check(inplace, optimizer)
    found = planned(subject, after, placement, except_last)
    places = [one for one, _ in found if one is not None]
    edits = tuple(edit for _, edit in found)
    notes = (subject.without_optimizer,) if optimizer is None else ()
    report = Report("insert", type(model).__name__, subject.graph.how, edits, notes)
    if dry_run:
        return report
    if not places:
        must = "`model` must have a linear map that a norm can follow"
        raise NormValueError(
            message(must, report.reasons, "dry_run=True gives all reasons, after=[path] names a layer")
        )
    options = {"identity": init == "identity", "data": data, "inplace": inplace, "optimizer": optimizer}
    result, change = subject.finish(places, **options)
    return (result, dataclasses.replace(report, difference=change)) if return_report else result


def planned(
    subject: Opened, after: Any, placement: Literal["before", "after"], except_last: bool
) -> list[tuple[Place | None, Edit]]:
    """A place and its edit for each norm, None and the reason for each map that gets none. Nothing is changed yet."""
    plan = _Plan(subject, placement, except_last)
    graph = subject.graph
    layers = subject.layers()
    if after is None:
        for node in graph.nodes:
            if node.op in LINEAR:
                plan.add(node.path, named=False)
    else:
        chosen = named("after", after, layers, {})
        for path in sorted(chosen, key=graph.first_call):
            plan.add(path, named=chosen[path] == path)
    return plan.found


def check_place(record: NormRecord | None, place: Place) -> None:
    """Raise NormValueError where a norm has nothing to normalize over."""
    values = np.prod(place.shape[1:]) // place.shape[place.axis]
    if record is not None and record.kind == "instance" and values == 1:
        raise NormValueError("instance norm has a single value to normalize there")


def subtracts(record: NormRecord | None, place: Place) -> bool:
    """Whether a norm takes out again what a bias in front of it adds."""
    own = record is not None and (record.axis == place.axis or len(place.shape) == 2)
    return record is not None and own and record.kind in _SUBTRACTING


def check_identity(record: NormRecord | None, kind: str) -> None:
    """Raise NormValueError for a norm, of a class named `kind`, that cannot give in evaluation what comes in."""
    if record is None or not record.kept or record.gamma is None or record.beta is None:
        must = '`init="identity"` needs norms with kept statistics, gamma and beta'
        raise NormValueError(message(must, kind, "batch, ghost or renorm"))


def as_identity(record: NormRecord, found: Pooled) -> NormRecord:
    """The record of a norm that has seen these values, and in evaluation gives them as they come in."""
    var = unbiased(found.var, found.count) if record.bessel and found.count > 1 else found.var
    std = np.sqrt(var + record.eps)
    kept = {"mean": found.mean} | ({"std": std} if "std" in record.kept else {"var": var})
    # Where the weight of a batch follows from their number, a first one would else replace all that was kept.
    counts = record.count is not None and (record.rate is None or record.debiased)
    return dataclasses.replace(record, gamma=std, beta=found.mean, kept=kept, count=1 if counts else record.count)


def without_bias(record: NormRecord, bias: np.ndarray) -> NormRecord:
    """The record of a norm whose inputs have lost a bias that it subtracts: what is kept of them moves by it."""
    if not record.kept:
        return record
    return dataclasses.replace(record, kept={**record.kept, "mean": record.kept["mean"] - bias})


class _Refused(Exception):  # noqa: N818  # the reason why a layer gets no norm
    pass


@dataclass
class _Plan:
    subject: Opened
    placement: Literal["before", "after"]
    except_last: bool
    found: list[tuple[Place | None, Edit]] = field(default_factory=list)
    seen: set[str] = field(default_factory=set)
    taken: dict[tuple[str, str], str] = field(default_factory=dict)  # layer and side -> the map its norm is for

    def add(self, path: str, *, named: bool) -> None:
        """Plan the norm of one map; `named` by the user, it gets one whatever follows."""
        if path in self.seen:
            return
        self.seen.add(path)
        try:
            place = self._place(path, named)
            edit = self.subject.prepared(place)
        except (_Refused, NormValueError) as reason:
            layer = type(self.subject.layers()[path]).__name__
            self.found.append((None, Edit(path, layer, None, str(reason))))
        else:
            self.found.append((place, edit))
            self.taken[place.path, place.side] = path

    def _place(self, path: str, named: bool) -> Place:
        node, given = self._only_call(path)
        shape, axis = self._channels(node, given)
        followers = self._followers(given)
        first = next((kind for kind in _REASONS if kind in followers), "output")
        if self.except_last and not named and first != "norm" and not self._reaches_map(given):
            raise _Refused("no linear map follows it: it gives an output of the model")
        if first != "activation" and not (named and self.placement == "before"):
            raise _Refused(_REASONS[first].format(followers[first][0] if first in followers else ""))
        why = f"before {followers[first][0]}" if first == "activation" else "asked for by its path"
        if self.placement == "before":
            self._check_free(path)
            return Place(path, "output", shape, axis, node.state.get("bias"), why)
        return self._behind(followers["activation"], shape, axis)

    def _behind(self, activations: list[Node], shape: tuple[int, ...], axis: int) -> Place:
        if len(activations) > 1:
            raise _Refused(f"{len(activations)} activations read its output")
        act = activations[0]
        if act.shape is None or len(act.shape) != len(shape) or act.shape[axis] != shape[axis]:
            raise _Refused(f"its channels are moved before {act}")
        if act.layer and len(self.subject.graph.calls(act.path)) == 1:
            self._check_free(act.path)
            return Place(act.path, "output", act.shape, axis, None, f"after {act}")
        readers = self.subject.graph.consumers(act)
        if len(readers) != 1:
            raise _Refused(f"{act} is no layer of its own, and its output is read {len(readers)} times")
        reader = readers[0]
        if not reader.layer or reader.inputs != (act.id,) or len(self.subject.graph.calls(reader.path)) != 1:
            raise _Refused(f"neither {act} nor {reader} that reads it is a layer of its own")
        self._check_free(reader.path, "input")
        return Place(reader.path, "input", act.shape, axis, None, f"after {act}")

    def _only_call(self, path: str) -> tuple[Node, Node]:
        """The linear map that a layer is, and what the layer gives: it may pad and reshape as well."""
        graph = self.subject.graph
        own = [node for node in graph.nodes if node.path == path and node.op not in ("input", "output")]
        maps = [node for node in own if node.op in LINEAR]
        if self.subject.holds_layers(path):
            raise _Refused(self.subject.obstacle(path) or "it calls the linear map as a function, not as a layer")
        if not own:
            raise _Refused("it is not called on this example")
        if not maps:
            raise _Refused("it is neither a convolution nor a linear map")
        if len(maps) > 1:
            raise _Refused(f"it is called {len(maps)} times: one norm would see several distributions")
        inside = {node.id for node in own}
        given = [node for node in own if any(reader.id not in inside for reader in graph.consumers(node))]
        if len(given) != 1:
            raise _Refused(f"it has {len(given)} outputs")
        return maps[0], given[0]

    def _check_free(self, path: str, side: str = "output") -> None:
        if (path, side) in self.taken:
            raise _Refused(f"the norm that {self.taken[path, side]} gets stands behind the same activation")
        reason = self.subject.obstacle(path)
        if reason is not None:
            raise _Refused(reason)

    def _channels(self, node: Node, given: Node) -> tuple[tuple[int, ...], int]:
        linear = node.op in ("linear", "addmm")
        axis, shape = -1 if linear else int(node.options.get("axis", 1)), given.shape
        if shape is None or len(shape) < 2 or (not linear and len(shape) != 2 + int(node.op[-2])):
            raise _Refused("the example has no batch axis there")
        if node.shape is None or node.shape[axis] != shape[axis]:
            raise _Refused("it moves its channels")
        return shape, axis

    def _reaches_map(self, node: Node) -> bool:
        return any(self._kind(other) in ("linear", "unknown") for other in self._behind_it(node))

    def _behind_it(self, node: Node) -> list[Node]:
        """Everything that depends on a node."""
        found, waiting = dict[int, Node](), [node]
        while waiting:
            for reader in self.subject.graph.consumers(waiting.pop()):
                if reader.id not in found:
                    found[reader.id] = reader
                    waiting.append(reader)
        return list(found.values())

    def _followers(self, node: Node) -> dict[str, list[Node]]:
        """What the output meets first, on every way: by kind."""
        found, waiting, seen = dict[str, list[Node]](), [node], {node.id}
        while waiting:
            for reader in self.subject.graph.consumers(waiting.pop()):
                if reader.id in seen:
                    continue
                seen.add(reader.id)
                kind = self._kind(reader)
                if kind is None:  # it moves, adds, multiplies, pools
                    waiting.append(reader)
                else:
                    found.setdefault(kind, []).append(reader)
        return found

    def _kind(self, node: Node) -> str | None:
        owners = {path.rpartition(".")[0] for path in node.state.values()}
        if node.path in self._norms or owners & self._norms or node.op in NORMS:
            return "norm"
        if node.op in ("output", "unknown"):
            return node.op
        if node.op in MAPS:
            return "linear"
        if node.op in ATTENTION:
            return None if node.op == "softmax" and self._gives_outputs(node) else "attention"
        if node.op not in ACTIVATIONS:
            return None
        return "gate" if node.op in ("sigmoid", "hardsigmoid") and self._gates(node) else "activation"

    def _gives_outputs(self, node: Node) -> bool:
        """Whether it makes outputs of the model and nothing else."""
        readers = self.subject.graph.consumers(node)
        return bool(readers) and all(reader.op == "output" for reader in readers)

    def _gates(self, node: Node) -> bool:
        """Whether it weighs values that are not its own input, as x * sigmoid(x) does."""
        readers = self.subject.graph.consumers(node)
        return any(reader.op == "mul" and not set(reader.inputs) & set(node.inputs) for reader in readers)

    @cached_property
    def _norms(self) -> frozenset[str]:
        return frozenset(site.path for site in self.subject.sites)
