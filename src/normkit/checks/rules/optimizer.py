"""NK7xx: what the optimizer does to gamma and beta."""

from __future__ import annotations

from collections.abc import Iterator

from normkit.checks.evidence import Evidence, Layer
from normkit.checks.findings import Finding, Fix, number
from normkit.checks.rule import Limits, rule

__all__: list[str] = []

# By framework: how an optimizer is made for the parameters that a model has now.
_ANEW = {"torch": "torch.optim.SGD({model}.parameters(), ...)", "keras": "{model}.compile(...)"}


@rule("NK701", "weight decay on norm parameters", "layers", "optimizer")
def decayed(seen: Evidence, limits: Limits) -> Iterator[Finding]:
    """Weight decay pulls gamma and beta to 0 as it does weights.

    A norm makes the size of the weights in front of it irrelevant, so decay of these acts on the learning rate; decay
    of gamma shrinks what the layer gives. Recipes differ in whether that helps: measure it, and decide on purpose. Said
    once where all norms are decayed; where only some are, the others show that it was not meant. The gain 1 + w of
    Gemma's RMS norm, which decay pulls to 1, is left out.
    """
    decays = {path: group.weight_decay for group in seen.groups for path in group.paths if group.weight_decay > 0}
    held = {path for group in seen.groups for path in group.paths}
    layers = [layer for layer in seen.layers if held.intersection(_pulled(seen, layer))]
    affected = [layer for layer in layers if not decays.keys().isdisjoint(_pulled(seen, layer))]
    if not affected:
        return
    line = f"normkit.param_groups({seen.name}, weight_decay={number(max(decays.values()))})"
    if seen.framework == "keras":
        line = f'{seen.name}.optimizer.exclude_from_weight_decay({line}[-1]["params"])  # before the first step'
    fix = Fix(line)
    if len(affected) == len(layers):
        words = f"weight decay on gamma or beta of all {len(layers)} norms"
        yield Finding("info", "", words, {"layers": len(layers), "weight_decay": max(decays.values())}, fix)
        return
    for layer in affected:
        decay = max(decays[path] for path in _pulled(seen, layer) if path in decays)
        words = f"weight decay on gamma or beta, unlike {len(layers) - len(affected)} of {len(layers)} norms"
        yield Finding("info", layer.path, words, {"weight_decay": decay}, fix)


@rule("NK702", "norm parameters that no optimizer holds", "layers", "optimizer", limits={"trained": 0.5})
def not_held(seen: Evidence, limits: Limits) -> Iterator[Finding]:
    """Gamma and beta get gradients, and no group of the optimizer holds them: they stay what they are.

    An optimizer keeps the parameters that it was made with. A verb that returns a new model leaves it with those of the
    old one, an inserted norm is unknown to it; then it also holds parameters that the model has not, or nothing of the
    model at all. Without such a sign it is a mistake only if at least the share `trained` of the other parameters that
    get gradients is held: a backbone that stays as it is, because the optimizer was given the head alone, is meant to.

    Give `optimizer=` to the verb that changed the model, or make the optimizer afterwards. Several optimizers are given
    as a list.
    """
    held = {path for group in seen.groups for path in group.paths}
    foreign = sum(group.foreign for group in seen.groups)
    wanted = {path for path, trained in seen.parameters.items() if trained}
    own = {path for layer in seen.layers for path in _trained(seen, layer)}
    again = Fix(_ANEW[seen.framework].format(model=seen.name))
    if wanted and foreign and not held:
        words = f"the optimizer holds none of the parameters of this model, but {foreign} of another"
        yield Finding("error", "", words, {"foreign": foreign}, again)
        return
    others = wanted - own
    left = wanted - held
    stale = bool(foreign) and left <= own
    if not stale and len(others & held) < limits["trained"] * len(others):
        return
    for layer in seen.layers:
        lost = [path for path in _trained(seen, layer) if path in left]
        if lost:
            words = "gamma and beta are held by no optimizer" if len(lost) > 1 else f"{lost[0]} is held by no optimizer"
            words += f"; it holds {foreign} parameters that the model has not" if stale else ""
            yield Finding("error" if stale else "warning", layer.path, words, {"foreign": foreign}, again)


def _trained(seen: Evidence, layer: Layer) -> list[str]:
    """The parameters of a norm that get gradients."""
    return [path for path in layer.parameters.values() if seen.parameters.get(path, False)]


def _pulled(seen: Evidence, layer: Layer) -> list[str]:
    """Those of them that decay moves away from what a norm starts with."""
    gamma = layer.parameters.get("gamma") if layer.record.gain == "1+w" else None
    return [path for path in _trained(seen, layer) if path != gamma]
