"""The verb `port`: norm layers and their statistics from one framework to another."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from normkit.core.constraints import Integer
from normkit.core.record import NormRecord
from normkit.errors import NormTypeError, NormValueError, message
from normkit.frameworks import framework_of
from normkit.surgery.protocol import Porting, porting

__all__ = ["port", "write"]


def port(model: Any, to: Any, *, axis: int | None = None) -> Any:
    """Carry norm layers over to another framework: parameters, kept statistics and every convention they depend on.

    What differs is translated: `momentum` (the weight of a new batch in PyTorch, one minus it in Keras and Flax), eps,
    the variance that is kept (unbiased in PyTorch, biased in Keras and Flax: the layer says which, `bessel`), a kept
    standard deviation (batch renormalization) against a variance, the clips of batch renormalization, a gain of 1 + w,
    the axis of the channels, names and order of the weights. In evaluation both layers give the same outputs, up to
    rounding; a layer of which the other framework has no such counterpart is refused.

    Lost is what evaluation in float32 does not depend on and the other framework has no place for: `debiased` in
    PyTorch and in batch renormalization of Flax, `cast` of RMS norm outside of PyTorch, Keras' `renorm_momentum`, which
    becomes that of the moving statistics.

    Args:
        model: a norm layer, or a model with norm layers, of PyTorch, Keras or Flax NNX. Layers must be built.
        to: `torch`, `keras` or `nnx`; or a model of any framework, which then receives the values.
        axis: of the channels in a new layer, 1 or -1; None keeps the framework's habit, 1 in PyTorch and -1 elsewhere
            (layer and RMS norm keep theirs).

    Returns:
        With a layer and a name, the new layer. With a model and a name, a dictionary from the path of each of its norm
        layers to the new layer. With another model as `to`, that model: its norm layers, in their order (in NNX that of
        the names of their attributes), were given the values of this one's. They must have the same eps and average
        batches alike; all else of them, and its other layers, stay as they are.

    Raises:
        NormTypeError: for what is no model.
        NormValueError: for an unknown framework, a layer that is not built or has no counterpart, two norm layers of
            one path, models whose norm layers do not match; nothing is written then.

    Example:
        >>> import normkit, torch
        >>> layer = torch.nn.BatchNorm2d(8, momentum=0.1)
        >>> normkit.port(layer, to="keras").momentum  # doctest: +SKIP
        0.9
    """
    source = porting(framework_of(model))
    if axis is not None and not (Integer(-1).allows(axis) and axis in (1, -1)):
        raise NormValueError(message("`axis` must be 1 or -1", repr(axis)))
    if not isinstance(to, str):
        if axis is not None:
            raise NormTypeError(message("`axis` must be left out where a model receives the values", axis))
        return _into(source, model, to)
    target = porting(to)
    record = source.read(model)
    if record is not None:
        return _made(target, record, _axis(record, to, axis))
    found = list(_records(source, model))
    if not found:
        raise NormValueError(message("a model must hold norm layers to be ported", type(model).__name__))
    paths = [path for path, _, _ in found]
    twice = sorted({path for path in paths if paths.count(path) > 1})
    if twice:
        must = "norm layers must have paths of their own, which the result is a dictionary of"
        raise NormValueError(message(must, f"several at {', '.join(twice)}", "give the layers different names"))
    return {path: _made(target, record, _axis(record, to, axis)) for path, _, record in found}


def _axis(record: NormRecord, to: str, asked: int | None) -> int:
    if asked is not None:
        return asked
    if record.kind in ("layer", "rms"):
        return record.axis
    return 1 if to == "torch" else -1


def _records(side: Porting, model: Any) -> Iterator[tuple[str, Any, NormRecord]]:
    for path, layer in side.walk(model):
        record = side.read(layer)
        assert record is not None
        yield path, layer, record


def _made(target: Porting, record: NormRecord, axis: int) -> Any:
    if record.frozen:
        must = "a layer must be one that can be trained, to be ported"
        raise NormValueError(message(must, record.words, 'normkit.replace(model, {"frozen": "batch"}) first'))
    layer = target.make(record, axis)
    made = target.read(layer)
    assert made is not None
    if bool(made.kept) != bool(record.kept):
        must = f"{record.words} must {'keep' if made.kept else 'not keep'} statistics to be ported to this framework"
        raise NormValueError(message(must, "evaluation by those of its input" if made.kept else "kept ones"))
    write(target, layer, record)
    return layer


def _into(source: Porting, model: Any, receiver: Any) -> Any:
    target = porting(framework_of(receiver))
    given, wanted = list(_records(source, model)), list(_records(target, receiver))
    if not given or len(given) != len(wanted):
        must = "both models must hold the same number of norm layers, at least one"
        raise NormValueError(message(must, f"{len(given)} and {len(wanted)}"))
    for (path, _, mine), (other, _, theirs) in zip(given, wanted, strict=True):
        _check_alike(path, mine, other, theirs)
    for (_, _, mine), (_, layer, _) in zip(given, wanted, strict=True):
        write(target, layer, mine)
    return receiver


def _check_alike(path: str, mine: NormRecord, other: str, theirs: NormRecord) -> None:
    def facts(record: NormRecord) -> tuple[Any, ...]:
        return record.kind, record.shape, record.groups, record.gamma is None, record.beta is None, bool(record.kept)

    if facts(mine) != facts(theirs):
        must = "norm layers must match in kind, size, parameters and in what they keep, in the order of both models"
        raise NormValueError(message(must, f"{mine.words} ({path}) and {theirs.words} ({other})"))
    if abs(mine.eps - theirs.eps) > 1e-9:
        must = "norm layers must have the same eps, or evaluation differs"
        hint = f"make {other} with eps {mine.eps:g}"
        raise NormValueError(message(must, f"{mine.eps:g} ({path}) and {theirs.eps:g} ({other})", hint))
    if mine.kept and not _average_alike(mine, theirs):
        must = "norm layers must average batches alike, or training goes on in another way"
        momentum = "None" if mine.rate is None else f"{mine.rate:g} in PyTorch, {1 - mine.rate:g} in Keras and Flax"
        hint = f"make {other} with momentum {momentum}" + (", debiased" if mine.debiased else "")
        raise NormValueError(message(must, f"{_averaging(mine)} ({path}) and {_averaging(theirs)} ({other})", hint))


def _average_alike(mine: NormRecord, theirs: NormRecord) -> bool:
    if mine.rate is None or theirs.rate is None or mine.debiased != theirs.debiased:
        return (mine.rate, mine.debiased) == (theirs.rate, theirs.debiased)
    return abs(mine.rate - theirs.rate) <= 1e-9  # one framework keeps it, another one minus it


def _averaging(record: NormRecord) -> str:
    rate = "all batches equally" if record.rate is None else f"a new batch with weight {record.rate:g}"
    return f"{rate}, debiased" if record.debiased else rate


def write(side: Porting, layer: Any, record: NormRecord) -> None:
    """Write parameters and kept statistics into a layer; what it has and the record has not becomes neutral."""
    own = side.read(layer)
    assert own is not None
    gain = own.gain
    neutral = {"gamma": float(gain == "w"), "beta": 0.0}
    values = {
        "gamma": record.gamma_for(gain),
        "beta": record.beta,
        "mean": record.kept.get("mean"),
        "var": record.variance(),
        "std": record.deviation(),
        "count": record.count,
    }
    for role, target in side.targets(layer):
        value = values[role]
        if value is None and role in neutral:
            value = np.full(tuple(target.shape), neutral[role])
        if value is not None:
            side.assign(target, np.asarray(value))
