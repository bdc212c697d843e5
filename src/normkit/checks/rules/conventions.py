"""NK8xx: numbers that mean another thing in another framework or type."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator

from normkit.checks.evidence import Evidence, Layer
from normkit.checks.findings import Finding, Fix, Severity, number, share
from normkit.checks.rule import Limits, rule
from normkit.checks.rules.gap import harmful
from normkit.checks.statistics import STALE, stale

__all__: list[str] = []

_FLOAT16_MAX = 65504.0
_EPS = 1e-5  # PyTorch's own, which float16 can hold
_USUAL = 0.1  # weight of a new batch where the layer says nothing


@rule("NK801", "momentum of another framework", "layers", uses=("calls", "gap"), limits={"rate": 0.5})
def momentum(seen: Evidence, limits: Limits) -> Iterator[Finding]:
    """PyTorch's momentum is the weight of the new batch, that of Keras, TensorFlow and Flax the weight of the old.

    0.99 copied to PyTorch keeps next to nothing but the last batch; so does 0.1 copied to Keras. Said where a new batch
    weighs more than `rate`, and where it weighs nothing: momentum 0 in PyTorch, 1 in Keras, so that statistics never
    move. A small weight (0.01, 0.001) is right in PyTorch where TensorFlow had 0.99 and 0.999; NK103 says where it is
    too small for the number of steps. It is an error where the kept statistics are seen not to be those of the data,
    and evaluation not to be as good as training.
    Seen in EfficientNet and Inception ports (transformers#19454, pretrained-models#5).
    """
    for layer in seen.layers:
        rate = layer.record.rate
        if not layer.tracks or layer.frozen or layer.momentum is None or rate is None:
            continue
        if 0 < rate <= limits["rate"]:
            continue
        right = round(1.0 - layer.momentum, 9) if rate > 0 and layer.momentum not in (0.0, 1.0) else _default(seen)
        off = _stale(seen, layer)
        what = "never moves its statistics" if rate == 0 else f"keeps {share(rate)} of the last batch alone"
        words = f"momentum {layer.momentum:.4g} {what}"
        line = f"{seen.at(layer.path)}.momentum = {right:.4g}"
        if off:
            line += f"; normkit.recalibrate({seen.name}, {seen.data_name})"
        fix = Fix(line, "momentum", {"path": layer.path, "value": right})
        cause = f"a momentum of another framework ({layer.momentum:.4g})" if off else None
        severity: Severity = "error" if off and harmful(seen) else "warning"
        yield Finding(severity, layer.path, words, {"momentum": layer.momentum, "rate": rate}, fix, cause, 4.0)


@rule("NK802", "eps", "layers", uses=("calls",), limits={"half": 1e-7, "share": 0.75, "layers": 4})
def eps(seen: Evidence, limits: Limits) -> Iterator[Finding]:
    """An eps that float16 cannot hold, and an eps that is not that of its siblings.

    float16 has nothing between 0 and 6e-8: a layer that adds a smaller eps in that type divides by 0 where its input is
    constant. The norms of the frameworks compute in float32, where it is only small; a class of one's own may not.
    bfloat16 has the exponents of float32. Among at least `layers` norms of one class of which the share `share` has one
    eps, another one is often a default that was forgotten, or lost on loading: 1e-3 of TensorFlow, 1e-12 of BERT
    (torchvision#2169, pytorch/ao#2980).
    """
    families = defaultdict[str, list[Layer]](list)
    for layer in seen.layers:
        families[layer.kind].append(layer)
        half = any(call.dtype == "float16" for call in seen.calls.get(layer.path, ()))
        if half and layer.record.eps < limits["half"]:
            severity: Severity = "warning" if layer.how == "probe" else "info"
            words = f"eps {number(layer.record.eps)} is 0 in float16, the type of its input"
            yield Finding(severity, layer.path, words, {"eps": layer.record.eps}, _set_eps(seen, layer, _EPS))
    for kind, layers in families.items():
        usual, count = Counter(layer.record.eps for layer in layers).most_common(1)[0]
        if len(layers) < limits["layers"] or count < limits["share"] * len(layers):
            continue
        for layer in layers:
            if layer.record.eps != usual:
                words = f"eps {number(layer.record.eps)}; {count} of {len(layers)} {kind} have {number(usual)}"
                values = {"eps": layer.record.eps, "usual": usual}
                yield Finding("info", layer.path, words, values, _set_eps(seen, layer, usual))


@rule("NK803", "a mean far from zero", "layers", "calls", limits={"ratio": 100.0})
def far(seen: Evidence, limits: Limits) -> Iterator[Finding]:
    """|mean| / std of what goes into a norm is larger than `ratio`: digits are lost, and the norm magnifies the rest.

    At 100, float32 has 5 of its 7 digits left, float16 one of three; implementations by E[x^2] - E[x]^2, group norm of
    PyTorch in channels_last among them, lose twice as many. Where it is an input, normalize the data; within a network
    it tells of a layer whose bias ran away. RMS norm, which subtracts no mean, is left out.
    """
    for layer in seen.layers:
        ratio = max((call.ratio for call in seen.calls.get(layer.path, ())), default=0.0)
        if layer.record.kind != "rms" and ratio > limits["ratio"]:
            words = f"|mean| / std of its input is {number(ratio)}"
            yield Finding("warning", layer.path, words, {"ratio": ratio})


@rule("NK804", "close to the end of float16", "layers", "calls", limits={"share": 0.25})
def overflow(seen: Evidence, limits: Limits) -> Iterator[Finding]:
    """float16 ends at 65504: inputs beyond `share` of that are one larger batch away from infinity.

    An infinite input makes a NaN of every statistic that it is in. Compute this part in bfloat16 or float32, or
    normalize earlier.
    """
    for layer in seen.layers:
        half = [call for call in seen.calls.get(layer.path, ()) if call.dtype == "float16"]
        largest = max((call.largest for call in half), default=0.0)
        if not all(call.finite for call in half):
            yield Finding("error", layer.path, "its float16 input is not finite", {"largest": largest})
        elif largest > limits["share"] * _FLOAT16_MAX:
            words = f"its float16 input reaches {number(largest)}; the type ends at {_FLOAT16_MAX:.0f}"
            yield Finding("warning", layer.path, words, {"largest": largest})


def _set_eps(seen: Evidence, layer: Layer, eps: float) -> Fix | None:
    """Where the framework has the layer; a class of one's own may call it otherwise."""
    if layer.how == "probe":
        return None
    name = "eps" if seen.framework == "torch" else "epsilon"
    return Fix(f"{seen.at(layer.path)}.{name} = {eps:g}", "eps", {"path": layer.path, "value": eps})


def _default(seen: Evidence) -> float:
    """The momentum of a new layer, as the framework writes it; Keras' own default is 0.99."""
    return _USUAL if seen.framework == "torch" else 0.99


def _stale(seen: Evidence, layer: Layer) -> bool:
    """Whether its statistics were updated, and are not those of the data."""
    return layer.record.count != 0 and stale(layer, seen.calls.get(layer.path, ()), STALE) > STALE["share"]
