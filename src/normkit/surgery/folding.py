"""The verb `fold`: norms into the linear maps beside them, wherever that is exact."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

from normkit.core.algebra import fold_after, fold_before, scale_shift
from normkit.core.record import NormRecord
from normkit.surgery.graph import LINEAR, Graph, Node
from normkit.surgery.plan import Edit, Report
from normkit.surgery.protocol import Subject, opened
from normkit.surgery.sites import Site

__all__ = ["Change", "Fold", "Opened", "changed", "fold", "planned", "resembling", "settled"]

# Functions that only move values: each value of the outputs is one of the input.
# fmt: off
_MOVES = frozenset((
    "channel_shuffle", "chunk", "clone", "contiguous", "detach", "dropout", "expand", "flatten", "getitem",
    "identity", "movedim", "narrow", "pad", "permute", "pixel_shuffle", "pixel_unshuffle", "reshape",
    "reshape_as", "roll", "select", "slice", "split", "squeeze", "swapaxes", "swapdims", "t", "transpose",
    "unbind", "unflatten", "unsqueeze", "view", "view_as",
))
# fmt: on

# Norms that are functions, and the layers that do the same.
_FUNCTIONS = {
    "batch_norm": "nn.BatchNorm{n}d({channels})",
    "instance_norm": "nn.InstanceNorm{n}d({channels})",
    "layer_norm": "nn.LayerNorm",
    "group_norm": "nn.GroupNorm",
    "rms_norm": "nn.RMSNorm",
}


class Change(NamedTuple):
    """What happens to one linear map: y = scale * map(x) + shift, y = map(scale * x + shift), or its bias goes."""

    side: Literal["output", "input", "bias"]
    weight: str
    bias: str | None  # where it is, or would be made; None where the map has no place for one
    axis: int  # of the weight, which holds these channels
    groups: int  # that share the axis
    scale: np.ndarray
    shift: np.ndarray

    def applied(self, weight: np.ndarray, bias: np.ndarray | None) -> tuple[np.ndarray, np.ndarray | None]:
        """Weight and bias after it, in float64; the bias is None where there was none and none is needed."""
        rule = fold_after if self.side == "output" else fold_before
        new, shifted = rule(weight, bias, self.scale, self.shift, axis=self.axis, groups=self.groups)
        return new, None if bias is None and not np.any(shifted) else shifted


@dataclass(frozen=True)
class Fold:
    """A norm, what becomes of it, and the linear maps that make up for it."""

    site: Site
    leaves: Literal["nothing", "bare", "whole"]  # of the norm: nothing, its part without gamma and beta, all of it
    changes: tuple[Change, ...]

    @property
    def edit(self) -> Edit:
        """For the report."""
        into = tuple(change.weight.rpartition(".")[0] or change.weight for change in self.changes)
        where = f"{'its gamma and beta go ' if self.leaves == 'bare' else ''}into {', '.join(into)}"
        if self.leaves == "whole":
            return Edit(self.changes[0].bias or "", "a bias", "no bias", f"{self.site.path} subtracts it again", into)
        new = "identity" if self.leaves == "nothing" else f"{self.site.kind} without gamma and beta"
        return Edit(self.site.path, str(self.site), new, where, tuple(change.weight for change in self.changes))


class Opened(Subject, Protocol):
    """A model that was looked into: `normkit.<framework>.folding.opened`."""

    graph: Graph
    sites: tuple[Site, ...]

    def run(self, node: Node, values: Mapping[int, Any]) -> Any:
        """Apply the function of a node to other values; None where it cannot be run."""

    def shape(self, state: str) -> tuple[int, ...]:
        """Of a parameter or buffer; of a kernel as (outputs, inputs of a group, *window), transposed (inputs, ...)."""

    def bias_beside(self, weight: str) -> str | None:
        """Path of the bias that belongs to a weight, existing or not; None where there is no place for one."""

    def obstacle(self, norm: str, weight: str) -> str | None:
        """Why the values between two layers must stay as they are: hooks, parametrizations."""

    def settle(self, folds: Sequence[Fold]) -> dict[int, str]:
        """Try the folds on a copy; number and reason of each that changes the outputs."""

    def finish(self, folds: Sequence[Fold], *, inplace: bool, optimizer: Any) -> tuple[Any, float]:
        """The model with these folds, and the relative change of its outputs on the example."""


def fold(
    model: Any,
    example: Any,
    *,
    inplace: bool = False,
    dry_run: bool = False,
    return_report: bool = False,
    optimizer: Any = None,
) -> Any:
    """Fold norms into the linear maps beside them: the same outputs in evaluation mode from fewer operations.

    A norm with kept statistics is y = s x + t per channel, with s = gamma / sqrt(var + eps), t = beta - mean s.

    - Batch norm in evaluation mode, and frozen batch norm, goes into the convolution or linear map before it, W' = s W,
      b' = s b + t, or into those behind it, W' = W s, b' = b + W t (with padding only where t is 0), and becomes an
      identity.
    - gamma and beta of layer, RMS, group and instance norm go into the linear maps behind it, if nothing else reads its
      output; the norm stays, without them.
    - A bias that the norm behind it subtracts again goes away (instance norm; batch norm without kept statistics).

    Between norm and map may lie what only moves values: flatten, permute, reshape, dropout in evaluation mode. Products
    are taken in float64. Who feeds whom is read from the traced forward pass, not from the order of attributes. A norm
    stays, and the report says why, where anything else reads the value in between, a weight is used twice, the norm is
    in training mode or called more than once, or hooks or parametrizations look at what would change. So does a norm
    that is a function (`F.batch_norm`): it would still be called.

    The folds are then tried on a copy of the model in float64 (in its own type where that does not work), on the
    example and on random inputs like it; what changes an output by more than 1e-10 of the largest is left out (1e-6
    where the model computes parts in a narrower type whatever its own is).

    A Keras model is folded for inference, `training=False`, and built anew from the configs of its layers under their
    names. The result is not compiled, and a batch norm that went into a map does not train any more. It is tried in
    float64, on JAX in float32, and may change by 1e-6 or 1.2e-5 of the largest output. A norm that is given a mask
    stays.

    A model of Flax NNX is read as JAX traces it after `model.eval()`, and tried in float32, or float64 where JAX is set
    to it, with the bounds of Keras. What runs in a loop or under `nnx.vmap` stays.

    Args:
        model: a torch.nn.Module or an nnx.Module, usually after `model.eval()`; a Sequential or Functional model of
            Keras.
        example: inputs that the model takes: a tensor or array (N, ...); a dictionary of them, taken by name; a tuple
            or list of them. What is folded is exact for what the model does with it: give one of the shape that is
            used later, with several samples, where the model does other things for other shapes.
        inplace: change the model itself, all of it or nothing. Not for Keras.
        dry_run: return the report of what would be done, and do nothing.
        return_report: return (model, report).
        optimizer: made for this model; its groups and state move to the parameters of the result. PyTorch only: compile
            the result of Keras, make a new nnx.Optimizer.

    Returns:
        A new model; modes, types, devices, hooks, tied weights and `requires_grad` stay. Warns where nothing could be
        folded. With `dry_run` the report.

    Raises:
        NormTypeError: for a compiled or scripted PyTorch model, an example that does not fit it, a subclassed Keras
            model or one with a layer that cannot be made from its config, a model of NNX that JAX cannot trace.
        NormValueError: for lazy layers, a Keras model that is not built, `inplace` with Keras, `optimizer` with Keras
            and NNX.

    Example:
        >>> import normkit, torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()
        >>> print(normkit.fold(model, torch.randn(2, 3, 8, 8)))
        Sequential(
          (0): Conv2d(3, 4, kernel_size=(3, 3), stride=(1, 1))
          (1): Identity()
          (2): ReLU()
        )
    """
    subject: Opened = opened("folding", model, example, frameworks=("torch", "keras", "nnx"))
    subject.check(inplace, optimizer)
    found = planned(subject)
    folds = [one for one in found if isinstance(one, Fold)]
    rejected = subject.settle(folds)
    accepted = [one for number, one in enumerate(folds) if number not in rejected]
    reasons = {id(folds[number]): reason for number, reason in rejected.items()}
    edits = [_edit(one, reasons) for one in found]
    notes = () if optimizer is not None else (subject.without_optimizer,)
    report = Report("fold", type(model).__name__, subject.graph.how, tuple(edits), notes)
    if dry_run:
        return report
    if not report.done and not return_report:
        first = f"{edits[0].path or edits[0].old}: {edits[0].reason}" if edits else "it has no norm"
        warnings.warn(f"nothing was folded; {first}. hint: return_report=True lists all reasons", stacklevel=2)
    result, difference = subject.finish(accepted, inplace=inplace, optimizer=optimizer)
    return (result, replace(report, difference=difference)) if return_report else result


def settled(folds: Sequence[Fold], difference: Callable[[Sequence[Fold]], str | None]) -> dict[int, str]:
    """Number and reason of each fold that changes the outputs: all are tried together, and one by one if that fails.

    `difference` says how the outputs of a model with these folds differ, None where they do not.
    """
    if not folds or difference(folds) is None:
        return {}
    accepted: list[Fold] = []
    rejected = {}
    for number, fold in enumerate(folds):
        reason = difference([*accepted, fold])
        if reason is None:
            accepted.append(fold)
        else:
            rejected[number] = reason
    return rejected


def changed(folds: Sequence[Fold], value: Callable[[str], np.ndarray | None]) -> dict[str, np.ndarray | None]:
    """What the folds make of weights and biases, by path: new values in float64, None for a bias that goes.

    `value` gives what is at a path, in the order of the rules, None where nothing is.
    """
    values: dict[str, np.ndarray | None] = {}

    def now(path: str | None) -> np.ndarray | None:
        return None if path is None else values[path] if path in values else value(path)

    for change in (change for fold in folds for change in fold.changes):
        if change.side == "bias":
            assert change.bias is not None
            values[change.bias] = None
            continue
        weight = now(change.weight)
        assert weight is not None
        values[change.weight], shifted = change.applied(weight, now(change.bias))
        if shifted is not None:
            assert change.bias is not None
            values[change.bias] = shifted
    return values


def resembling(part: Any) -> Any:
    """Like an array: floating point values of its mean and deviation, others of its own in another order."""
    if not isinstance(part, np.ndarray) or not part.size:
        return part
    rng = np.random.default_rng(0)
    if part.dtype.kind == "f":
        return (part.mean() + (part.std() or 1.0) * rng.normal(size=part.shape)).astype(part.dtype)
    return rng.permutation(part.ravel()).reshape(part.shape)


def _edit(one: Fold | Edit, rejected: Mapping[int, str]) -> Edit:
    edit = one.edit if isinstance(one, Fold) else one
    reason = rejected.get(id(one))
    return edit if reason is None else Edit(edit.path, edit.old, None, reason)


def planned(subject: Opened) -> list[Fold | Edit]:
    """The folds of a model, and an edit that changes nothing for each norm that has none. Nothing is tried yet."""
    plan = _Plan(subject)
    for site in sorted(subject.sites, key=lambda site: subject.graph.first_call(site.path)):
        plan.add(site)
    norms = {site.path for site in subject.sites}
    functions = [node for node in subject.graph.nodes if node.op in _FUNCTIONS and node.path not in norms]
    return [*plan.found, *map(_function, functions)]


def _function(node: Node) -> Edit:
    """A norm that is a function stays.

    Its statistics could be set to what changes nothing, and its map changed instead. But the function would still run,
    so nothing would be gained, and the statistics would be lost.
    """
    shape = node.shape or ()
    layer = _FUNCTIONS[node.op].format(n=max(1, len(shape) - 2), channels=shape[1] if len(shape) > 1 else "channels")
    reads = f" with {', '.join(node.state.values())}" if node.state else ""
    why = f"it is a function that this forward calls{reads}, and cannot be taken out: make it a layer, {layer}"
    return Edit(node.path, node.op, None, why)


class _Refused(Exception):  # noqa: N818  # the reason why a norm stays
    pass


@dataclass
class _Plan:
    subject: Opened
    found: list[Fold | Edit] = field(default_factory=list)
    gone: set[int] = field(default_factory=set)  # nodes that are identities by now

    def add(self, site: Site) -> None:
        try:
            node = self._call(site)
            folds = self._constant(site, node) if site.constant else self._affine(site, node)
        except _Refused as reason:
            self.found.append(Edit(site.path, str(site), None, str(reason)))
        else:
            self.found += folds

    def _call(self, site: Site) -> Node:
        calls = self.subject.graph.calls(site.path)
        if not calls:
            raise _Refused("it is not called as a layer on this example")
        if len(calls) > 1:
            raise _Refused(f"it is called {len(calls)} times")
        if len(calls[0].inputs) != 1:
            raise _Refused("it takes more than one input")
        return calls[0]

    def _constant(self, site: Site, node: Node) -> list[Fold]:
        record = site.record
        scale, shift = scale_shift(
            record.gamma_for("w"), record.beta, record.kept["mean"], record.variance(), record.eps
        )
        try:
            changes: tuple[Change, ...] = (self._before(site, node, scale, shift),)
        except _Refused as before:
            try:
                changes = self._behind(site, node, scale, shift)
            except _Refused as behind:
                raise _Refused(f"{before}; {behind}") from None
        self.gone.add(node.id)
        return [Fold(site, "nothing", changes)]

    def _affine(self, site: Site, node: Node) -> list[Fold]:
        record = site.record
        if record.kind in ("batch", "ghost", "renorm") and record.kept:
            raise _Refused("it is in training mode: call model.eval() first")
        folds = []
        size = record.shape
        # With kept statistics the bias is part of what is kept.
        if not record.kept and (record.kind in ("instance", "batch") or record.groups in size):
            try:
                change = self._before(site, node, np.ones(size), np.zeros(size))
            except _Refused:
                pass
            else:
                if change.bias is not None and self.subject.graph.readers(change.bias):
                    folds.append(Fold(site, "whole", (change._replace(side="bias"),)))
        if record.gamma is None and record.beta is None:
            if not folds:
                raise _Refused("it has no gamma and beta, and its statistics are those of the input")
            return folds
        gamma, beta = record.gamma_for("w"), record.beta
        for role in ("gamma", "beta"):
            path = f"{site.path}.{site.names[role]}" if role in site.names else ""
            if path and len(self.subject.graph.readers(path)) > 1:
                raise _Refused(f"its {role} is used elsewhere too")
        scale = np.ones(size) if gamma is None else gamma
        shift = np.zeros(size) if beta is None else beta
        try:
            folds.append(Fold(site, "bare", self._behind(site, node, scale.ravel(), shift.ravel())))
        except _Refused:
            if not folds:
                raise
        return folds

    def _before(self, site: Site, node: Node, scale: np.ndarray, shift: np.ndarray) -> Change:
        graph, path = self.subject.graph, [node]
        while True:
            producers = graph.producers(path[-1])
            if len(producers) != 1:
                raise _Refused(f"{path[-1]} before it has {len(producers)} inputs")
            producer = producers[0]
            if producer.op not in LINEAR:
                self._check_moves(producer, "before")
            readers = len(graph.consumers(producer))
            if readers > 1:
                raise _Refused(f"the output of {producer} before it is read {readers} times")
            if producer.op in LINEAR:
                break
            path.append(producer)
        change = self._change("output", producer)
        self._check_obstacles(site, change)
        channels = self._channels(change)
        values = _laid_out(np.arange(channels), producer.shape, _axis(producer))
        for mover in reversed(path[1:]):
            values = self._moved(mover, values)
        # The channel of the map behind each channel of the norm.
        origin = _constant_along(values, *_own_axes(site.record, len(np.shape(values))))
        if origin is None:
            raise _Refused(f"values between {producer} and the norm change their channel")
        wide = [np.ones(channels), np.zeros(channels)]
        for target, own in zip(wide, (scale, shift), strict=True):
            target[origin] = own
            if not np.array_equal(target[origin], own):
                raise _Refused(f"a channel of {producer} goes to several channels of the norm")
        return self._with(change, *wide)

    def _behind(self, site: Site, node: Node, scale: np.ndarray, shift: np.ndarray) -> tuple[Change, ...]:
        if node.shape is None:
            raise _Refused("its output is not one tensor")
        axes = _own_axes(site.record, len(node.shape))
        start = np.arange(scale.size).reshape([node.shape[axis] for axis in axes])
        changes: list[Change] = []
        waiting = [(node, _laid_out(start, node.shape, *axes))]
        while waiting:
            giver, values = waiting.pop()
            for reader in self.subject.graph.consumers(giver):
                if reader.op in LINEAR:
                    changes.append(self._into(site, giver, reader, values, scale, shift))
                else:
                    self._check_moves(reader, "behind")
                    waiting.append((reader, self._moved(reader, values)))
        if not changes:
            raise _Refused("nothing reads its output")
        return tuple(changes)

    def _into(self, site: Site, giver: Node, reader: Node, values: Any, scale: np.ndarray, shift: np.ndarray) -> Change:
        if reader.inputs != (giver.id,):
            raise _Refused(f"{reader} behind it has a weight that is computed")
        change = self._change("input", reader)
        self._check_obstacles(site, change)
        origin = _constant_along(values, _axis(reader) % np.ndim(values))
        if origin is None:
            raise _Refused(f"values between the norm and {reader} change their channel")
        scale, shift = scale[origin], shift[origin]
        if np.any(shift) and not self._whole_kernels(reader):
            raise _Refused(f"kernels of {reader} behind it reach beyond the input, where the norm shifts nothing")
        return self._with(change, scale, shift)

    def _change(self, side: Literal["output", "input"], node: Node) -> Change:
        graph, weight = self.subject.graph, node.state.get("weight")
        if weight is None:
            raise _Refused(f"the weight of {node} is computed")
        for path in node.state.values():
            if len(graph.readers(path)) > 1:
                raise _Refused(f"{node} has a weight that is used {len(graph.readers(path))} times")
        transposed = node.op.startswith(("conv_transpose", "addmm"))
        axis = int(transposed) if side == "output" else int(not transposed)
        bias = node.state.get("bias") or self.subject.bias_beside(weight)
        nothing = np.empty(0)
        groups = int(node.options.get("groups", 1)) if axis == 1 else 1
        return Change(side, weight, bias, axis, groups, nothing, nothing)

    def _with(self, change: Change, scale: np.ndarray, shift: np.ndarray) -> Change:
        if np.any(shift) and change.bias is None:
            raise _Refused(f"there is no place for a bias beside {change.weight}")
        return change._replace(scale=scale, shift=shift)

    def _channels(self, change: Change) -> int:
        return self.subject.shape(change.weight)[change.axis] * change.groups

    def _check_obstacles(self, site: Site, change: Change) -> None:
        reason = self.subject.obstacle(site.path, change.weight)
        if reason is not None:
            raise _Refused(reason)

    def _check_moves(self, node: Node, where: str) -> None:
        padding = node.op == "pad" and node.options.get("mode", "constant") == "constant"
        active = node.op == "dropout" and node.options.get("training", True)
        if node.op not in _MOVES and node.id not in self.gone:
            raise _Refused(f"{node} is {where} it")
        if padding or active:
            raise _Refused(f"{node} {where} it {'adds zeros' if padding else 'is in training mode'}")

    def _moved(self, node: Node, values: Any) -> Any:
        if node.id in self.gone or node.op in ("dropout", "identity"):
            return values
        moved = self.subject.run(node, {node.inputs[0]: values}) if len(node.inputs) == 1 else None
        if moved is None:
            raise _Refused(f"what {node} does with the channels is not known")
        return moved

    def _whole_kernels(self, node: Node) -> bool:
        """Whether every output reads inside the input: no padding, no kernel that hangs over."""
        kernel = self.subject.shape(node.state["weight"])[2:]
        if node.op.startswith("conv_transpose"):
            return False
        padding = node.options.get("padding", 0)
        if isinstance(padding, str):
            return padding == "valid" or (padding == "same" and all(n == 1 for n in kernel))
        return not np.any(padding)


def _axis(node: Node) -> int:
    """Of the channels, counted from the end: a convolution may come without a batch axis."""
    if node.op in ("linear", "addmm"):
        return -1
    return int(node.options.get("axis", -1 - int(node.op[-2])))


def _own_axes(record: NormRecord, ndim: int) -> tuple[int, ...]:
    """Axes of the input that gamma has."""
    return (1,) if record.axis == 1 else tuple(range(ndim - len(record.shape), ndim))


def _laid_out(numbers: np.ndarray, shape: tuple[int, ...] | None, *axes: int) -> np.ndarray:
    """`numbers` along these axes, repeated along the others."""
    if shape is None:
        raise _Refused("a layer beside it gives more than one tensor")
    own = [axis % len(shape) for axis in axes]
    spread = [length if axis in own else 1 for axis, length in enumerate(shape)]
    return np.broadcast_to(numbers.reshape(spread), shape)


def _constant_along(values: Any, *axes: int) -> np.ndarray | None:
    """The numbers along these axes, where they are the same everywhere else; None where they are not."""
    array = np.asarray(values)
    rows = np.moveaxis(array, axes, range(len(axes))).reshape(np.prod([array.shape[a] for a in axes], dtype=int), -1)
    return rows[:, 0] if rows.size and (rows == rows[:, :1]).all() else None
