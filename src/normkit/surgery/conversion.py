"""The verb `port`: norm layers and their statistics from one framework to another."""

from __future__ import annotations

from typing import Any

from normkit.core.record import NormRecord
from normkit.errors import NormTypeError, NormValueError, message
from normkit.frameworks import framework_of
from normkit.surgery.protocol import Porting, porting

__all__ = ["port"]


def port(model: Any, to: Any, *, axis: int | None = None) -> Any:
    """Carry norm layers over to another framework: parameters, kept statistics and every convention they depend on.

    What differs is translated: `momentum` (the weight of a new batch in PyTorch, one minus it in Keras and Flax), eps,
    the variance that is kept (unbiased in PyTorch, biased in Keras and Flax: the layer says which, `bessel`), a kept
    standard deviation (batch renormalization) against a variance, the axis of the channels, names and order of the
    weights. In evaluation both layers give the same outputs, up to rounding.

    Args:
        model: a norm layer, or a model with norm layers, of PyTorch, Keras or Flax NNX. Keras layers must be built.
        to: `torch`, `keras` or `nnx`; or a model of any framework, which then receives the values.
        axis: of the channels in a new layer, 1 or -1; None keeps the framework's habit, 1 in PyTorch and -1 elsewhere
            (layer and RMS norm keep theirs).

    Returns:
        With a layer and a name, the new layer. With a model and a name, a dictionary from the path of each of its norm
        layers to the new layer. With another model as `to`, that model: its norm layers, in their order, were given the
        values of this one's. Its other layers stay as they are.

    Raises:
        NormTypeError: for what is no model.
        NormValueError: for an unknown framework, a layer that has no counterpart, models whose norm layers do not
            match in number, kind or size; nothing is written then.

    Example:
        >>> import normkit, torch
        >>> layer = torch.nn.BatchNorm2d(8, momentum=0.1)
        >>> normkit.port(layer, to="keras").momentum  # doctest: +SKIP
        0.9
    """
    source = porting(framework_of(model))
    if axis not in (None, 1, -1):
        raise NormValueError(message("`axis` must be 1 or -1", repr(axis)))
    if not isinstance(to, str):
        if axis is not None:
            raise NormTypeError(message("`axis` must be left out where a model receives the values", axis))
        return _into(source, model, to)
    target = porting(to)
    record = source.read(model)
    if record is not None:
        return target.make(record, _axis(record, to, axis))
    found = {path: source.read(layer) for path, layer in source.walk(model)}
    if not found:
        raise NormValueError(message("a model must hold norm layers to be ported", type(model).__name__))
    return {path: target.make(r, _axis(r, to, axis)) for path, r in found.items() if r is not None}


def _axis(record: NormRecord, to: str, asked: int | None) -> int:
    if asked is not None:
        return asked
    if record.kind in ("layer", "rms"):
        return record.axis
    return 1 if to == "torch" else -1


def _into(source: Porting, model: Any, receiver: Any) -> Any:
    target = porting(framework_of(receiver))
    given = [(path, layer, source.read(layer)) for path, layer in source.walk(model)]
    wanted = [(path, layer, target.read(layer)) for path, layer in target.walk(receiver)]
    if not given or len(given) != len(wanted):
        must = "both models must hold the same number of norm layers, at least one"
        raise NormValueError(message(must, f"{len(given)} and {len(wanted)}"))
    for (path, _, mine), (other, _, theirs) in zip(given, wanted, strict=True):
        assert mine is not None
        assert theirs is not None
        alike = (mine.kind, mine.shape, mine.groups, mine.gamma is None, mine.beta is None)
        if alike != (theirs.kind, theirs.shape, theirs.groups, theirs.gamma is None, theirs.beta is None):
            must = "norm layers must match in kind, size and parameters, in the order of both models"
            raise NormValueError(message(must, f"{mine.words} ({path}) and {theirs.words} ({other})"))
        if abs(mine.eps - theirs.eps) > 1e-9:
            must = "norm layers must have the same eps, or evaluation differs"
            hint = f"make {other} with eps {mine.eps:g}"
            raise NormValueError(message(must, f"{mine.eps:g} ({path}) and {theirs.eps:g} ({other})", hint))
    for (_, _, mine), (_, layer, _) in zip(given, wanted, strict=True):
        target.write(layer, mine)  # type: ignore[arg-type]
    return receiver
