"""NK5xx: statistics that are updated more than once per step."""

from __future__ import annotations

from collections.abc import Iterator

from normkit.checks.evidence import Evidence
from normkit.checks.findings import Finding, Fix, number
from normkit.checks.rule import Limits, rule


@rule("NK501", "a batch is counted several times", "layers", "step")
def counted_several_times(seen: Evidence, _: Limits) -> Iterator[Finding]:
    """Activation checkpointing runs the forward pass again inside the backward pass, and averages move again.

    So a momentum of 0.1 acts as 0.19 (pytorch#96136, insightface#2053). The same comes of a second forward pass on the
    same batch. Seen in a training step: more updates than inputs. A warning, since the statistics are those of the data
    all the same, only faster and noisier. Layers that average all batches equally are left out: each batch weighs twice
    there, and the average is what it was. normkit's layers count a batch once under checkpointing.
    """
    step = seen.step
    assert step is not None
    for layer in seen.layers:
        updates, distinct = step.updates.get(layer.path, 0), step.distinct.get(layer.path, 0)
        rate = layer.record.rate
        if not 0 < distinct < updates or not rate:
            continue
        times = updates / distinct
        acts = 1 - (1 - rate) ** times
        inside = step.repeated.get(layer.path, 0)
        why = "the forward pass is run again in the backward pass" if inside else "it is called again on the same input"
        words = f"{number(times)} updates per batch, as {why}: a rate of {number(rate)} acts as {number(acts)}"
        values = {"updates": updates, "inputs": distinct, "calls in the backward pass": inside, "acts as": acts}
        each = 1 - (1 - rate) ** (1 / times)
        momentum = 1 - each if seen.framework == "keras" else each
        slower = f"{seen.at(layer.path)}.momentum = {number(momentum)}"
        fix = Fix(slower, verb="momentum", arguments={"path": layer.path, "value": momentum}, safe=True)
        if inside and seen.framework == "torch":
            fix = Fix(f"normkit.replace({seen.name}, accelerated=True)", others=(slower,))
        yield Finding("warning", layer.path, words, values, fix)


@rule("NK502", "one norm for several distributions", "layers", "step", limits={"spread": 0.5})
def several_distributions(seen: Evidence, limits: Limits) -> Iterator[Finding]:
    """A norm that is called several times in a step keeps one average of all its inputs.

    Real and generated images, both views of a pair, the steps of a recurrence, the levels of a pyramid: in training
    each call is normalized by its own statistics, in evaluation all by the average, which is that of none
    (pytorch#1738, keras#6623). Said if the means of two calls typically lie further apart than `spread` deviations,
    beyond what the choice of samples does. Give each its own norm; gamma and beta may be shared.
    """
    step = seen.step
    assert step is not None
    for layer in seen.layers:
        spread, inputs = step.spread.get(layer.path, 0.0), step.distinct.get(layer.path, 0)
        if not layer.tracks or layer.frozen or not spread > limits["spread"]:
            continue
        words = f"{inputs} calls per step, whose means lie {number(spread)} deviations apart"
        fix = Fix(_own(seen, layer.path, inputs))
        values = {"inputs": inputs, "spread": spread}
        yield Finding("warning", layer.path, words, values, fix, "one norm for several distributions", 2.0)


def _own(seen: Evidence, path: str, inputs: int) -> str:
    """A norm for each input."""
    copies = f"copy.deepcopy({seen.at(path)}) for _ in range({inputs})"
    if seen.framework == "keras":
        return f"[type(norm).from_config(norm.get_config()) for norm in [{seen.at(path)}] * {inputs}]"
    return f"torch.nn.ModuleList({copies})"
