"""NK3xx: layers in another mode than the model needs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from enum import IntEnum

from normkit.checks.evidence import Evidence, Layer
from normkit.checks.findings import Finding, Fix, Severity, share
from normkit.checks.rule import Limits, rule

# By these evaluation in half precision differs from batch to batch: some spacings of the type.
_NARROW = {"float16": 0.01, "bfloat16": 0.08}


class _Before(IntEnum):
    """What of the parameters that a layer's input depends on is trained. Of several the largest counts."""

    NOTHING = 0  # there are none
    FROZEN = 1
    UNKNOWN = 2
    TRAINED = 3


@rule("NK301", "frozen layers whose statistics move", "layers", uses=("graph", "step"), frameworks=("torch",))
def frozen_but_moving(seen: Evidence, _: Limits) -> Iterator[Finding]:
    """`requires_grad_(False)` freezes parameters. Kept statistics are none, and go on moving in training mode.

    So a frozen backbone drifts away from what it was trained to give, and what was cached of its features, or trained
    behind them, no longer fits (pytorch#86590, #66073). Meant are layers that keep statistics in training mode while
    their own gamma and beta, and all parameters that their input depends on, are frozen; of a model in evaluation mode,
    those of which training mode would make that. Where a training step was taken, the statistics were seen to move.

    A warning, if nothing at all is trained, or if the flow of data is not known and parameters are taken in the order
    in which they are registered. Freeze the layers before training; if it is too late, load the old statistics again.
    """
    before = _before(seen)
    trains = any(seen.parameters.values())
    if not trains and not seen.training:
        return
    moving = [
        layer
        for layer in seen.layers
        if layer.tracks and not layer.frozen and (seen.step is None or layer.path in seen.step.moved)
    ]
    known = {layer.path: before.get(layer.path, _Before.UNKNOWN) for layer in moving}
    found = [layer for layer in moving if layer.trained is False and _frozen(seen, layer, known[layer.path])]
    if not found:
        return
    # Without gamma and beta a norm behind frozen weights may stand in a part that was never trained, unless others say.
    found = [
        layer for layer in moving if layer in found or (layer.trained is None and known[layer.path] is _Before.FROZEN)
    ]
    parts = _parts(seen, [layer.path for layer in found])
    places = [seen.at(part) for part in parts]
    line = f"normkit.freeze({places[0]})"
    if len(places) > 1:
        line = f"for part in ({', '.join(places)}): normkit.freeze(part)"
    for layer in found:
        sure = trains and known[layer.path] is _Before.FROZEN
        severity: Severity = "error" if sure else "warning"
        fix = Fix(line, verb="freeze", arguments={"path": layer.path}, safe=True)
        words = "statistics move in training, although the layer and all before it are frozen"
        evidence = {"layers": len(found), "seen to move": "no step was taken" if seen.step is None else "yes"}
        yield Finding(severity, layer.path, words, evidence, fix, "the statistics of the frozen part drift", 2.0)


@rule("NK302", "evaluation mode while gamma and beta train", "layers", frameworks=("torch",))
def evaluating_while_trained(seen: Evidence, _: Limits) -> Iterator[Finding]:
    """A batch norm in evaluation mode inside a model in training mode is an affine map with constants.

    That is a way to train with small batches, if the constants are those of the data. Often it is what `.eval()` before
    validation left behind (Lightning#20177, #20216): then statistics no longer follow the weights. Gamma and beta that
    go on training say that it may not be meant.
    """
    for layer in seen.layers:
        if layer.how == "class" and layer.frozen and layer.tracks and layer.trained:
            place = seen.at(layer.path)
            fix = Fix(f"{seen.name}.train()", others=(f"normkit.freeze({place})",))
            words = "normalizes by kept statistics in training, while its gamma and beta are trained"
            yield Finding("info", layer.path, words, {}, fix)


@rule("NK303", "evaluation by the statistics of the batch", "layers", uses=("dependence",))
def batch_statistics_in_evaluation(seen: Evidence, _: Limits) -> Iterator[Finding]:
    """A batch norm that keeps no statistics, or stays in training mode, evaluates a sample by its neighbours.

    `track_running_stats=False` is common advice against a gap between training and evaluation (Lightning#14085). It
    hides the gap, and makes results depend on size, order and mixture of the evaluation batches. It is a warning and no
    error, since it is an option of the layer that has its uses (batches that are one domain each, generators), and
    right wherever batches are as in training; that outputs do change is NK304. An error is a layer that stays in
    training mode whatever `model.eval()` says: nobody asks for that, and evaluation moves what it keeps.
    """
    for layer in seen.layers:
        left = layer.training and not layer.stuck and seen.training is False
        if layer.stuck and layer.tracks:
            severity: Severity = "error"
            words = "stays in training mode when the model is put in evaluation mode"
            if seen.framework == "keras":
                words = "is called with training=True in evaluation, too"
        elif layer.by_batch:
            severity, words = "warning", "keeps no statistics, so that evaluation takes those of its batch"
        elif layer.tracks and left:
            severity, words = "warning", "is in training mode while the model is in evaluation mode"
        else:
            continue
        measured = None if seen.dependence is None else seen.dependence.change
        yield Finding(severity, layer.path, words, {"change of a sample alone": measured}, _evaluating(seen, layer))


@rule(
    "NK304",
    "evaluation of a sample depends on its batch",
    "layers",
    "dependence",
    uses=("calls",),
    limits={"change": 1e-4},
)
def depends_on_the_batch(seen: Evidence, limits: Limits) -> Iterator[Finding]:
    """A sample was evaluated alone and in its batch: max|f(x)[i] - f(x[i:i+1])| over the largest output.

    Beyond rounding (`change`; in half precision 0.01, in bfloat16 0.08) these should be one. An error where a norm
    takes the statistics of the batch in evaluation; worth to know where none does: then a function over the batch axis,
    or a norm that is called as a function with `training=True`, is to be looked for.
    """
    found = seen.dependence
    assert found is not None
    types = {call.dtype for calls in seen.calls.values() for call in calls}
    limit = max([limits["change"], *(_NARROW[name] for name in types & _NARROW.keys())])
    if not found.change > limit:
        return
    words = f"the output of a sample changes by {share(found.change)} of the largest if its batch does"
    evidence = {"change": found.change, "norms of the batch": len(found.suspects)}
    if not found.suspects:
        yield Finding("info", "", f"{words}; no norm layer does that", evidence)
        return
    first = seen.by_path[found.suspects[0]]
    yield Finding("error", first.path, words, evidence, _evaluating(seen, first))


@rule("NK305", "training=False that has no effect", "layers", "step", frameworks=("keras",))
def inference_overridden(seen: Evidence, _: Limits) -> Iterator[Finding]:
    """`base(x, training=False)` was to keep the statistics of a pretrained base while the rest of a model trains.

    In a Functional model of Keras 3 `fit` calls the model with `training=True`, and that takes the place of what single
    calls say (functional.py, `operation_fn`). So statistics move, unless `trainable` is False as well; guides that
    unfreeze the base for fine-tuning count on the opposite (keras#20285). Where a training step was taken, they were
    seen to move. `normkit.freeze` holds statistics, gamma and beta of the norms, and leaves the weights to be trained.
    """
    assert seen.step is not None
    moving = [layer for layer in seen.layers if layer.inferring and layer.path in seen.step.moved]
    for layer in moving:
        part = layer.path.rpartition("/")[0]
        words = "statistics move in training, although it is called with training=False"
        yield Finding("warning", layer.path, words, {"layers": len(moving)}, Fix(f"normkit.freeze({seen.at(part)})"))


def _before(seen: Evidence) -> dict[str, _Before]:
    """By path of a layer, from the flow of data."""
    found: dict[str, _Before] = {}
    if seen.graph is None:
        return found
    given: dict[int, _Before] = {}  # of what a node gives
    for node in seen.graph.nodes:  # in the order of the calls: inputs come first
        own = [seen.parameters[path] for path in node.state.values() if path in seen.parameters]
        inputs = max((given.get(number, _Before.UNKNOWN) for number in node.inputs), default=_Before.NOTHING)
        if node.op == "unknown":
            inputs = max(inputs, _Before.UNKNOWN)
        if node.path in seen.by_path:
            found[node.path] = max(inputs, found.get(node.path, _Before.NOTHING))
        held = _Before.TRAINED if any(own) else _Before.FROZEN if own else _Before.NOTHING
        given[node.id] = max(inputs, held)
    return found


def _frozen(seen: Evidence, layer: Layer, before: _Before) -> bool:
    """Whether all before a layer is, by the order in which parameters are registered if nothing else is known."""
    if before is not _Before.UNKNOWN:
        return before is _Before.FROZEN
    paths = list(seen.parameters)
    own = next((place for place, path in enumerate(paths) if path.rpartition(".")[0] == layer.path), 0)
    return own > 0 and not any(seen.parameters[path] for path in paths[:own])


def _parts(seen: Evidence, paths: Sequence[str]) -> list[str]:
    """The largest parts of a model that hold these layers and no norm that is trained."""
    common = paths[0].split(".")
    for path in paths[1:]:
        parts = path.split(".")
        same = [a == b for a, b in zip(common, parts, strict=False)]
        common = common[: same.index(False) if False in same else len(same)]
    trained = [layer.path for layer in seen.layers if layer.trained]
    found = []
    for path in paths:
        parts = path.split(".")
        for length in range(len(common), len(parts) + 1):
            part = ".".join(parts[:length])
            if not any(_inside(other, part) for other in trained):
                break
        found.append(part)
    return list(dict.fromkeys(found))


def _inside(path: str, part: str) -> bool:
    return not part or path == part or path.startswith(f"{part}.")


def _evaluating(seen: Evidence, layer: Layer) -> Fix:
    """What makes a layer evaluate by statistics of its own."""
    if layer.tracks and seen.framework == "keras":
        return Fix(f"{layer.path.rpartition('/')[2]}(x)  # without training=True, in {seen.model}.call")
    if layer.tracks:
        return Fix(f"{seen.at(layer.path)}.eval()" if layer.stuck else f"{seen.name}.eval()")
    size = layer.record.shape[0]
    return Fix(
        f"{layer.kind}({size}, track_running_stats=True)",
        others=(f'normkit.replace({seen.name}, {{"{layer.path}": "group"}})',),
    )
