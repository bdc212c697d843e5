"""NK6xx: norms in the wrong place, on the wrong axis, or fed what they should not see."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np

from normkit.checks.evidence import Evidence, Layer
from normkit.checks.findings import Finding, Fix, Severity, share
from normkit.checks.flow import POINTWISE, RESHAPES, Flow, channel_axis, dropout
from normkit.checks.rule import Limits, rule
from normkit.surgery.graph import ACTIVATIONS, ATTENTION, LINEAR, MAPS, Node

__all__: list[str] = []

# By framework: how a layer is made without a bias.
_NO_BIAS = {"torch": "bias=False", "keras": "use_bias=False"}
# Norms that subtract the mean of every channel.
_SUBTRACTING = frozenset(("batch", "ghost", "renorm", "sync", "instance"))
# Norms whose statistics are taken over positions, so that padding is among them.
_OVER_POSITIONS = _SUBTRACTING | {"group"}


@rule("NK601", "a bias that the norm behind it subtracts again", "graph")
def redundant_bias(seen: Evidence, limits: Limits) -> Iterator[Finding]:
    """norm(Wx + b) = norm(Wx), where the norm subtracts the mean of every channel.

    Batch norm and its kin do, instance norm does, group norm with one channel per group does. Layer norm and group norm
    with larger groups do not: they subtract the mean over channels, which is not the bias of each. A bias that is
    subtracted again costs memory and time and gets a gradient of 0 up to rounding; in evaluation it is a shift that
    the kept mean contains. It is redundant only if nothing but the norm reads what the map gives, with nothing but
    changes of shape between; a frozen norm subtracts another mean, so a bias in front of it counts.

    Make the layer with `bias=False`. In a trained model subtract the bias from the kept mean as well.
    Asked for in allennlp#4990.
    """
    flow = Flow.of(seen)
    for layer, node in flow.norms():
        record = layer.record
        subtracts = record.kind in _SUBTRACTING or (record.kind == "group" and record.groups == record.shape[0])
        origin = flow.origin(node, record.axis, RESHAPES) if subtracts and not layer.frozen else None
        if origin is None or origin.node.op not in LINEAR or origin.axis != channel_axis(origin.node):
            continue
        bias = origin.node.state.get("bias")
        if bias is not None and len(flow.graph.readers(bias)) == 1:
            words = f"the bias is subtracted again by the {_name(layer)} behind it"
            values: dict[str, float | int | str | None] = {"norm": layer.path, "parameters": record.shape[0]}
            yield Finding("info", origin.node.path, words, values, Fix(_NO_BIAS[seen.framework]))


@rule("NK602", "a norm behind a norm", "graph")
def doubled(seen: Evidence, limits: Limits) -> Iterator[Finding]:
    """A norm whose input is what another norm over the same axes gives, and nothing else reads.

    The input has mean 0 and variance 1 but for gamma and beta. Where these are one per statistic (batch, instance) the
    second norm takes them out again; layer and RMS norm keep the ratios of the first gamma, at the cost of another
    norm. Often one is left over from a merge, or a block begins with the norm that the one before ends with.
    """
    flow = Flow.of(seen)
    for layer, node in flow.norms():
        origin = flow.origin(node, layer.record.axis, RESHAPES)
        first = None if origin is None else flow.layers.get(origin.node.path)
        if origin is None or first is None or first.path == layer.path:
            continue
        where = _over(first), _over(layer)
        if where[0] == where[1] and origin.axis == layer.record.axis % len(origin.node.shape or (1,)):
            per_channel = layer.record.kind in _SUBTRACTING
            severity: Severity = "warning" if per_channel and not layer.frozen else "info"
            words = f"normalizes what the {_name(first)} at {first.path} gives, over the same axes"
            fix = Fix(f'{seen.name} = normkit.remove({seen.name}, "{layer.path}")')
            values: dict[str, float | int | str | None] = {"first": first.path}
            yield Finding(severity, layer.path, words, values, fix if seen.framework == "torch" else None)


@rule("NK603", "a norm is missing", "graph", limits={"share": 0.75, "maps": 4})
def missing(seen: Evidence, limits: Limits) -> Iterator[Finding]:
    """One convolution without a norm among convolutions that all have one.

    Asked only where at least `share` of at least `maps` convolutions are followed by a norm before the next map, the
    last ones not counted. Then only of a convolution that feeds one activation and through it one convolution that has
    its norm: not of heads, not of branches that end in a sum or a product, and not where there is one position per
    sample (squeeze and excitation). It may be meant; where it is not, activations grow with every such layer.
    """
    flow = Flow.of(seen)
    kinds = itertools.groupby(sorted(filter(_is_convolution, flow.graph.nodes), key=_op), _op)
    for kind, group in kinds:
        maps = [node for node in group if _positions(node) > 1 and any(flow.meets(node, _is_map))]
        normed = {node.id for node in maps if _normed(flow, node)}
        if len(maps) < limits["maps"] or len(normed) < limits["share"] * len(maps):
            continue
        for node in maps:
            following = None if node.id in normed else _next_map(flow, node)
            if following is not None and following.id in normed:
                words = f"no norm behind this {kind}; {len(normed)} of {len(maps)} have one"
                values = {"normalized": len(normed), "maps": len(maps)}
                fix = Fix(f'{seen.name} = normkit.insert({seen.name}, "batch", x, after=["{node.path}"])')
                yield Finding("info", node.path, words, values, fix if seen.framework == "torch" else None)


@rule("NK604", "dropout in front of batch norm", "graph", uses=("calls", "trained calls"), limits={"ratio": 1.1})
def dropout_in_front(seen: Evidence, limits: Limits) -> Iterator[Finding]:
    """Dropout in training scales what it keeps by 1 / (1 - p): the mean stays, the variance grows.

    A batch norm behind it keeps the grown variance and divides by it in evaluation, where nothing is dropped. Seen in
    the graph: a dropout with p > 0 from which a way leads to a batch norm with no other norm between. Where the
    variance was measured with and without dropout, nothing is said unless they differ by more than `ratio` in the
    median channel; NK106 judges how much it does.

    Put dropout behind the last batch norm, or use a norm without kept statistics (Li et al., arXiv:1801.05134).
    """
    flow = Flow.of(seen)
    reached = dict[str, list[Node]]()
    for node in flow.graph.nodes:
        if dropout(node):
            for norm in flow.meets(node, flow.is_norm):
                reached.setdefault(norm.path, []).append(node)
    for path, nodes in reached.items():
        layer = flow.layers.get(path)
        if layer is None or not (layer.tracks and layer.over_samples) or layer.frozen:
            continue
        ratio = _shifted(seen, path)
        if ratio is None or not 1 / limits["ratio"] <= ratio <= limits["ratio"]:
            first = nodes[-1]
            words = f"{first.op} {f'at {first.path} ' if first.path else ''}in front of it"
            words += "" if ratio is None else f" changes its variance by the factor {ratio:.2g} in training"
            values = {"dropout": first.path, "p": dropout(first), "ratio": ratio}
            yield Finding("info", path, words, values)


@rule("NK605", "a norm over the wrong axis", "graph")
def layout(seen: Evidence, limits: Limits) -> Iterator[Finding]:
    """The channels of a norm are not those of the map in front of it, or of the convolution behind it.

    `LayerNorm(W)` on images (N, C, H, W) normalizes along the width; `BatchNorm1d(C)` on (N, L, C) with L = C takes
    positions for channels. Frameworks see a length that fits, and say nothing. The map whose output the norm gets, or
    the convolution that gets its output, with only what works value by value between, tells where the channels are. It
    may be meant where lengths differ (features of a spectrogram): then it is a note. In sequences convolutions mix
    positions and linear maps channels, or the other way round, so that only a length that fits both tells a slip.

    Use normkit.torch.LayerNorm2d, or move the axes (ConvNeXt#112, pytorch#71366, #71465).
    """
    flow = Flow.of(seen)
    said = set[str]()
    for layer, node in flow.norms():
        if layer.path in said or len(layer.record.shape) != 1 or node.shape is None:
            continue
        own = layer.record.axis % len(node.shape)
        axis, beside = _channels_beside(flow, node, own)
        if axis is None or beside is None or axis == own:
            continue
        shape, over = node.shape, " x ".join(map(str, node.shape))
        alike, square = shape[axis] == shape[own], own - 1 not in (0, axis) and shape[own - 1] == shape[own]
        image = _is_convolution(beside) and len(shape) > 3
        if not image and not (alike and beside.op == "linear" and len(shape) == 3 and layer.over_samples):
            continue
        said.add(layer.path)
        severity: Severity = "warning" if alike or square or layer.over_samples else "info"
        words = f"normalizes axis {own} of {over} as channels; those of {beside.op} are on axis {axis}"
        swapped = seen.framework == "torch" and layer.record.kind == "layer" and axis == 1
        fix = Fix(f"normkit.torch.LayerNorm2d({shape[axis]})") if swapped else None
        yield Finding(severity, layer.path, words, {"axis": own, "channels": axis}, fix)


@rule("NK606", "padding in the statistics", "layers", "calls", limits={"share": 0.1})
def padding(seen: Evidence, limits: Limits) -> Iterator[Finding]:
    """Sequences of unequal length are padded, and the padding is averaged with the data.

    Mean and variance then depend on how much padding a batch happens to have: on the longest sequence in it, and on
    bucketing, which is different in evaluation. Seen as runs at one end of the sequences, of several lengths, in which
    no channel changes; said if they are more than `share` of the positions.

    The layers of normkit take a mask: `norm(x, mask=mask)` (pytorch#70529, #81985).
    """
    for layer in seen.layers:
        calls = seen.calls.get(layer.path, ())
        positions = [int(np.prod([call.shape[0], *_others(call.shape, layer)])) for call in calls]
        if layer.record.kind not in _OVER_POSITIONS or layer.frozen or not sum(positions):
            continue
        padded = float(np.average([call.padded for call in calls], weights=positions))
        if padded > limits["share"]:
            words = f"{share(padded)} of the positions in its statistics are padding"
            line = "norm(x, mask=mask), with normkit's layers"
            yield Finding("warning", layer.path, words, {"share": padded}, Fix(line))


def _name(layer: Layer) -> str:
    return layer.record.words.partition(" of ")[0]


def _over(layer: Layer) -> tuple[object, ...]:
    """What a norm takes its statistics over: norms with the same do the same."""
    record = layer.record
    if layer.over_samples:
        return ("samples", record.axis)
    if record.kind in ("layer", "rms"):
        return ("features", record.axis, record.shape)
    return (record.kind, record.axis, record.groups)


def _others(shape: tuple[int, ...], layer: Layer) -> list[int]:
    """The lengths of all axes but the first and that of the channels."""
    axis = layer.record.axis % len(shape)
    return [length for at, length in enumerate(shape) if at not in (0, axis)]


def _op(node: Node) -> str:
    return node.op


def _is_map(node: Node) -> bool:
    return node.op in MAPS


def _is_convolution(node: Node) -> bool:
    return node.op in ("conv1d", "conv2d", "conv3d")


def _positions(node: Node) -> int:
    axis = channel_axis(node)
    return 0 if axis is None else int(np.prod([n for at, n in enumerate(node.shape or ()) if at not in (0, axis)]))


def _normed(flow: Flow, node: Node) -> bool:
    """Whether the first thing on some way from here is a norm, and on none a map."""
    kinds = [flow.is_norm(stop) for stop in flow.meets(node, lambda one: _ends(flow, one))]
    return any(kinds) and all(kinds)


def _ends(flow: Flow, node: Node) -> bool:
    return flow.is_norm(node) or node.op in MAPS | ATTENTION | {"output", "unknown"}


def _next_map(flow: Flow, node: Node) -> Node | None:
    """The map behind a map, an activation and nothing else that has two inputs or two readers."""
    activated = False
    while True:
        readers = flow.graph.consumers(node)
        if len(readers) != 1 or len(readers[0].inputs) != 1:
            return None
        node = readers[0]
        if _is_convolution(node):
            return node if activated else None
        if node.op not in POINTWISE and dropout(node) is None:
            return None
        activated = activated or node.op in ACTIVATIONS


def _shifted(seen: Evidence, path: str) -> float | None:
    """The factor by which dropout changes the variance of a norm's input, in the median channel; None if not known."""
    plain, dropped = seen.population.get(path), seen.trained_population.get(path)
    if plain is None or dropped is None:
        return None
    eps = seen.by_path[path].record.eps
    return float(np.median((dropped.var + eps) / (plain.var + eps)))


def _channels_beside(flow: Flow, node: Node, own: int) -> tuple[int | None, Node | None]:
    """The axis of the norm on which the map in front of it, or else the convolution behind it, has its channels."""
    through = POINTWISE | {"dropout", "dropout1d", "dropout2d", "dropout3d"}
    origin = flow.origin(node, own, through, alone=False)
    if origin is not None and origin.node.op in LINEAR:
        return channel_axis(origin.node), origin.node  # nothing between moves an axis
    for reader in flow.meets(node, lambda one: one.op not in through or len(one.inputs) > 1):
        if _is_convolution(reader) and len(reader.shape or ()) == len(node.shape or ()):
            return channel_axis(reader), reader
    return None, None
