"""NK2xx: what a norm layer keeps, read without running it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from normkit.checks.evidence import Evidence
from normkit.checks.findings import Finding, Fix, Severity, number, share
from normkit.checks.rule import Limits, rule
from normkit.checks.rules.gap import recalibration
from normkit.checks.statistics import new, scatter

_KEPT = ("mean", "var", "std")
_NARROW = frozenset(("float16", "bfloat16"))
_MIXED = {
    "torch": "{name}.float()  # and torch.autocast for the speed of half precision",
    "keras": 'keras.config.set_dtype_policy("mixed_float16")  # weights and statistics stay float32',
}


@rule("NK201", "non-finite statistics", "layers")
def non_finite(seen: Evidence, _: Limits) -> Iterator[Finding]:
    """One batch with NaN or infinity makes running averages NaN forever, since every later one is mixed into them.

    A GradScaler that skips the step does not skip this update (pytorch#88474). Recalibrating replaces kept statistics;
    gamma or beta with NaN come from a checkpoint before. Our layers leave such a batch out.
    """
    for layer in seen.layers:
        kept = {name: layer.record.kept[name] for name in _KEPT if name in layer.record.kept}
        bad = [name for name, values in kept.items() if not np.isfinite(values).all()]
        if bad:
            off = float(np.logical_or.reduce([~np.isfinite(values) for values in kept.values()]).mean())
            words = f"NaN or infinity in the kept {' and '.join(bad)} of {share(off)} of the channels"
            cause = "NaN in the kept statistics"
            yield Finding("error", layer.path, words, {"share": off}, recalibration(seen), cause, 10.0)
        own = {"gamma": layer.record.gamma, "beta": layer.record.beta}
        lost = [name for name, values in own.items() if values is not None and not np.isfinite(values).all()]
        if lost:
            yield Finding("error", layer.path, f"NaN or infinity in {' and '.join(lost)}", {"parameters": len(lost)})


@rule("NK202", "broken variance", "layers", uses=("calls",))
def broken_variance(seen: Evidence, _: Limits) -> Iterator[Finding]:
    """A kept variance below 0, or 0 in every channel, was never computed from data.

    It comes from E[x^2] - E[x]^2 in low precision, from extrapolated or subtracted weights, or from a tool that resets
    statistics and then does not reach the layer. In a single channel 0 is a dead channel, see NK204, unless the data
    shows that it is alive.
    """
    for layer in seen.layers:
        kept = layer.record.kept
        spread = kept.get("var", kept.get("std"))
        if spread is None or not np.isfinite(spread).all():
            continue
        negative, zero = np.asarray(spread) < 0, np.asarray(spread) == 0
        found = scatter(seen.calls.get(layer.path, ()), layer.record.eps)
        alive = np.zeros_like(zero) if found is None else found.population.var > layer.record.eps
        wrong = negative | (zero & (alive | zero.all()))
        if wrong.any():
            kind = "negative" if negative.any() else "zero"
            words = f"the kept variance is {kind} in {share(float(wrong.mean()))} of the channels"
            values = {"share": float(wrong.mean()), "least": float(np.min(spread))}
            cause = f"a kept variance that is {kind}"
            yield Finding("error", layer.path, words, values, recalibration(seen), cause, 9.0)


@rule("NK203", "kept statistics in half precision", "layers")
def low_precision(seen: Evidence, _: Limits) -> Iterator[Finding]:
    """A running average in half precision stops moving: an update below half a unit in the last place is lost.

    With bfloat16, 8 bits, that is every update by less than 1/512 of the value: at momentum 0.001 a mean that should
    reach 3.8 stops at 2.0. For a model that is only evaluated it costs precision, no more, and is a note. Keep the
    parameters in float32 and compute in half precision; our layers keep statistics in float32 by themselves.
    """
    for layer in seen.layers:
        narrow = sorted({kind for role, kind in layer.dtypes.items() if role in _KEPT and kind in _NARROW})
        if narrow:
            severity: Severity = "warning" if layer.training and not layer.frozen else "info"
            words = f"statistics are kept in {narrow[0]}"
            fix = Fix(_MIXED[seen.framework].format(name=seen.name))
            yield Finding(severity, layer.path, words, {"type": narrow[0]}, fix)


@rule("NK204", "dead channels", "layers", limits={"share": 0.05, "warning": 0.5})
def dead_channels(seen: Evidence, limits: Limits) -> Iterator[Finding]:
    """A channel with a kept variance below eps hardly varies: what comes out is beta, and noise made large.

    Trained networks have some; they cost time and can be pruned. It is said if more than `share` of the channels are
    dead, a warning beyond `warning`: inputs that are not scaled, a learning rate that killed the activations, or an eps
    too large for the data.
    """
    for layer in seen.layers:
        var = layer.record.variance()
        if var is None or not np.isfinite(var).all() or (var < 0).any() or (var == 0).all():
            continue  # NK201, NK202
        dead = float((var < layer.record.eps).mean())
        if dead > limits["share"]:
            severity: Severity = "warning" if dead > limits["warning"] else "info"
            words = f"{share(dead)} of the channels vary by less than eps ({number(layer.record.eps)})"
            yield Finding(severity, layer.path, words, {"share": dead, "least": float(var.min())})


@rule("NK205", "huge gain", "layers", limits={"gain": 100.0, "warning": 1000.0})
def huge_gain(seen: Evidence, limits: Limits) -> Iterator[Finding]:
    """In evaluation a channel is multiplied by |gamma| / sqrt(var + eps), and so is every error in it.

    Beyond `gain` a note, which small inputs explain as well; beyond `warning` half precision overflows easily, and a
    shift of the data that is nothing at the input decides the output.
    """
    for layer in seen.layers:
        var, std, gamma = layer.record.variance(), layer.record.deviation(), layer.record.gamma_for("w")
        if var is None or std is None or not np.isfinite(std).all() or (var < 0).any() or not (std > 0).all():
            continue  # NK201, NK202
        gain = (1.0 if gamma is None else np.abs(gamma)) / std
        largest = float(np.max(gain))
        if np.isfinite(largest) and largest > limits["gain"]:
            severity: Severity = "warning" if largest > limits["warning"] else "info"
            many = float((gain > limits["gain"]).mean())
            words = f"evaluation multiplies {share(many)} of the channels by over {limits['gain']:g}"
            words += f", one by {number(largest)}"
            yield Finding(severity, layer.path, words, {"gain": largest, "share": many})


@rule("NK206", "gamma is 0", "layers", limits={"gamma": 1e-4, "share": 0.05, "warning": 0.5})
def no_gamma(seen: Evidence, limits: Limits) -> Iterator[Finding]:
    """Where gamma is 0 the output is beta, whatever comes in.

    Sparse gammas are wanted where channels are to be pruned (arXiv:1708.06519), and gamma starts at 0 at the end of
    residual branches (arXiv:1706.02677): nothing is said of new layers. |gamma| below `gamma` in more than `share` of
    the channels is a note, in more than `warning` a warning: weight decay on gamma, a branch that never learned.
    """
    for layer in seen.layers:
        gamma = layer.record.gamma_for("w")
        if gamma is None or not np.isfinite(gamma).all() or _at_start(gamma, new(layer), layer.tracks):
            continue
        none = float((np.abs(gamma) < limits["gamma"]).mean())
        if none > limits["share"]:
            severity: Severity = "warning" if none > limits["warning"] else "info"
            words = f"gamma is 0 in {share(none)} of the channels: what comes out there is beta"
            yield Finding(severity, layer.path, words, {"share": none})


def _at_start(gamma: NDArray[Any], fresh: bool, tracks: bool) -> bool:
    """Whether all of gamma is 0 because nothing was trained yet. A layer without statistics does not tell."""
    return bool((gamma == 0).all()) and (fresh or not tracks)
