"""The verbs `replace` and `remove`: norms become other norms, or go."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np

from normkit.core.algebra import usual_groups
from normkit.core.catalog import find
from normkit.core.constraints import Constraint, Flag, Integer, Optional, check
from normkit.core.record import NormRecord
from normkit.core.schedule import RenormSchedule
from normkit.errors import NormTypeError, NormValueError, message
from normkit.frameworks import is_layer
from normkit.surgery.plan import Edit, Report
from normkit.surgery.protocol import Subject, opened
from normkit.surgery.sites import Site, named

__all__ = ["Opened", "finished", "remove", "replace", "turned"]

_KEEPING = ("batch", "ghost", "renorm")  # kept statistics of one mean and variance per channel
_FROZEN = "frozen"  # batch norm as constants: no normalizer of its own, so not in the catalog
_RATE = 0.1  # PyTorch's momentum, for norms made of one that kept nothing
_VIRTUAL_BATCH_SIZE = 16
_ARGUMENTS: dict[str, Constraint] = {
    "groups": Optional(Integer(1)),
    **{name: Flag() for name in ("accelerated", "inplace", "dry_run", "return_report")},
}


class Opened(Subject, Protocol):
    """A model that was looked into: `normkit.<framework>.replacement.opened`."""

    sites: tuple[Site, ...]

    def layer(self, path: str) -> Any:
        """The layer itself."""

    def obstacle(self, path: str) -> str | None:
        """Why a layer cannot be replaced."""

    def ndim(self, path: str) -> int | None:
        """Number of axes of what a layer is called with on the example; None where that is not known."""

    def make(self, path: str, record: NormRecord) -> str:
        """Make the layer with these values for a path. Returns its name; NormValueError where there is none."""

    def take(self, path: str, layer: Any) -> str:
        """Take a layer that the user made, or an identity (None). Returns its name."""

    def counterpart(self, site: Site) -> str:
        """Make our layer of the same numbers. Raises NormValueError where there is none."""

    def finish(self, *, inplace: bool, optimizer: Any) -> tuple[Any, float | None]:
        """The model with what was made, and the relative change of its outputs on the example in evaluation."""


def replace(
    model: Any,
    norms: Mapping[Any, str | Callable[[NormRecord], Any]] | None = None,
    *,
    accelerated: bool = False,
    example: Any = None,
    groups: int | None = None,
    inplace: bool = False,
    dry_run: bool = False,
    return_report: bool = False,
    optimizer: Any = None,
) -> Any:
    """Turn norms of a model into other norms, with everything carried over that both have.

    gamma, beta and eps go over to every normalizer. The statistics that batch norm, ghost batch norm and batch
    renormalization keep go over between these three: evaluation gives the same numbers. Any other pair computes
    something different; with an `example` the report says by how much the outputs change. A norm that keeps statistics
    where the old one did not starts them at mean 0 and variance 1: train it, or `normkit.recalibrate` it.

    `frozen` is batch norm whose gamma, beta and statistics are constants (:class:`normkit.torch.FrozenBatchNorm2d`), of
    images: what keeps statistics can become that, with the same numbers in evaluation, and a frozen batch norm any
    other norm. It is no normalizer of the catalog, so `normkit.insert` and `normkit.compare` do not know it.

    In PyTorch parameters that the new layer has too stay the same objects, as do hooks. Of Keras, Sequential and
    Functional models are built anew, as their layers are wired for good. In NNX the new layer is frozen, and trains
    or evaluates, as the old one did; subclasses with a `__call__` of their own are passed over.

    Args:
        model: a torch.nn.Module, a Sequential or Functional model of Keras, or an nnx.Module.
        norms: what becomes what. Keys: a short name of the catalog or `frozen`, the class of a layer, the path of a
            layer, a function of (path, layer); a path counts before a class or function, these before a short name.
            Values: a short name, other than those with a formula of their own (frn, evonorm_b0, evonorm_s0, dyt, grn),
            or a function from the layer's :class:`normkit.core.record.NormRecord` to a new layer,
            whose own values then count.
        accelerated: in place of `norms`: the own classes of torch.nn, Keras or Flax, and RMS and layer norms of PyTorch
            that a probe recognizes, become ours, with the same numbers and parameters. Other subclasses stay.
        example: inputs that the model takes, to measure the change.
        groups: of new group norms; None takes at most 32, that divide the channels.
        inplace: change the model itself, all of it or nothing. Not in Keras.
        dry_run: return the report of what would be done, and do nothing.
        return_report: return (model, report).
        optimizer: made for this model; its groups and state move to the parameters of the result. PyTorch only: make a
            new one elsewhere.

    Returns:
        A new model, in the modes it had. With `dry_run` the report.

    Raises:
        NormTypeError: for another model, a subclassed Keras model, keys and values of another type.
        NormValueError: for unknown names, keys that mean no norm of the model, where no norm can be replaced, a Keras
            model that is not built, `inplace` with Keras, `optimizer` with Keras or NNX.

    Example:
        >>> import normkit, torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        >>> normkit.replace(model, {"batch": "group"}, groups=4)[1]
        GroupNorm(4, 8, eps=1e-05, affine=True, bias=True)
    """
    flags = {"accelerated": accelerated, "inplace": inplace, "dry_run": dry_run, "return_report": return_report}
    check("replace", _ARGUMENTS, {"groups": groups, **flags})
    if (norms is None) == (not accelerated):
        must = "either `norms` or `accelerated=True` must be given"
        raise NormTypeError(message(must, "both" if accelerated else "neither", '{"batch": "group"}'))
    if norms is not None and not isinstance(norms, Mapping):
        raise NormTypeError(message("`norms` must be a mapping", repr(norms), '{"batch": "group"}'))
    for new in (norms or {}).values():
        if isinstance(new, str):
            if new != _FROZEN and find(new).formula != "standard":
                must = f"{new}, which has a formula of its own, must be made by a function"
                raise NormValueError(message(must, repr(new), "lambda record: normkit.torch.DynamicTanh(record.shape)"))
        elif isinstance(new, type) or is_layer(new) or not callable(new):
            must = "values of `norms` must be short names, or functions from a record to a layer"
            raise NormTypeError(message(must, repr(new)))
    subject: Opened = opened("replacement", model, example, frameworks=("torch", "keras", "nnx"))
    subject.check(inplace, optimizer)
    chosen = {site.path: None for site in subject.sites} if norms is None else _named(subject, "norms", norms)

    def change(site: Site) -> tuple[str, str]:
        if norms is None:
            return subject.counterpart(site), "the same numbers"
        new = norms[chosen[site.path]]
        if not isinstance(new, str):
            return subject.take(site.path, new(site.record)), "made by a function, with its own values"
        record = turned(site.record, new, groups=groups, ndim=subject.ndim(site.path))
        return subject.make(site.path, record), _carried(site.record, record)

    edits = [_edit(subject, site, change) for site in subject.sites if site.path in chosen]
    options = {"inplace": inplace, "dry_run": dry_run, "return_report": return_report, "optimizer": optimizer}
    return finished("replace", "replaced", model, subject, edits, **options)


def remove(
    model: Any,
    which: Any,
    *,
    example: Any = None,
    inplace: bool = False,
    dry_run: bool = False,
    return_report: bool = False,
    optimizer: Any = None,
) -> Any:
    """Take norms out of a model: each becomes an identity, under its path.

    One that `insert` put into a PyTorch model goes altogether.

    The outputs change; with an `example` the report says by how much. `normkit.fold` takes norms out and keeps the
    outputs, where that is possible.

    Args:
        model: a torch.nn.Module, a Sequential or Functional model of Keras, or an nnx.Module.
        which: short names of the catalog, classes, paths and functions of (path, layer), one or a list of them.
        example: inputs that the model takes, to measure the change.
        inplace: change the model itself, all of it or nothing. Not in Keras.
        dry_run: return the report of what would be done, and do nothing.
        return_report: return (model, report).
        optimizer: made for this model; its groups and state move to the parameters of the result. PyTorch only: make a
            new one elsewhere.

    Returns:
        A new model, in the modes it had. With `dry_run` the report.

    Raises:
        NormTypeError: for another model, a subclassed Keras model, entries of another type.
        NormValueError: for entries that mean no norm of the model, a Keras model that is not built, `inplace`
            with Keras, `optimizer` with Keras or NNX.

    Example:
        >>> import normkit, torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        >>> normkit.remove(model, "batch")[1]
        Identity()
    """
    flags = {"inplace": inplace, "dry_run": dry_run, "return_report": return_report}
    check("remove", _ARGUMENTS, flags)
    subject: Opened = opened("replacement", model, example, frameworks=("torch", "keras", "nnx"))
    subject.check(inplace, optimizer)
    chosen = _named(subject, "which", which)

    def change(site: Site) -> tuple[str, str]:
        return subject.take(site.path, None), "taken out"

    edits = [_edit(subject, site, change) for site in subject.sites if site.path in chosen]
    return finished("remove", "removed", model, subject, edits, **flags, optimizer=optimizer)


def turned(record: NormRecord, kind: str, *, groups: int | None = None, ndim: int | None = None) -> NormRecord:
    """The record of a norm of this kind with all that it can take from another. Shapes: as `record`.

    Args:
        record: of the old norm.
        kind: short name of the new one, or `frozen`.
        groups: of group norm, None for the usual number.
        ndim: number of axes of its inputs, None where it is not known.

    Raises NormValueError where such a norm cannot stand there.
    """
    if len(record.shape) > 1 and kind not in ("layer", "rms"):
        must = f"{kind} norm needs one axis of channels"
        raise NormValueError(message(must, f"{record.words}"))
    if kind == "instance" and ndim == 2:
        raise NormValueError(message("instance norm needs axes besides batch and channels", "inputs (N, C)"))
    gain = record.gain if kind == "rms" else "w"
    gamma = record.gamma_for(gain)
    beta = None if kind == "rms" else record.beta
    if record.kind == "rms" and kind != "rms" and gamma is not None:
        beta = np.zeros(record.shape)
    channels = record.shape[0]
    frozen = kind == _FROZEN
    if frozen:
        if not record.kept:
            hint = "normkit.freeze, which fixes gamma and beta"
            raise NormValueError(message("a frozen norm must have been one with kept statistics", record.words, hint))
        kind = "batch"
    kept: Mapping[str, Any] = {}
    if kind in _KEEPING:
        kept = record.kept or {"mean": np.zeros(channels), "var": np.ones(channels)}
    if kind == "group" and groups is None:
        groups = record.groups if record.kind == "group" else usual_groups(channels, spatial=ndim != 2)
    if kind == "group" and channels % (groups or 1):
        raise NormValueError(message("`groups` must divide the channels", f"{groups} and {channels}"))
    axis, spatial = record.axis, record.spatial
    if ndim == 2:  # both places of the channels are one
        axis = -1 if kind in ("layer", "rms") else 1
    elif axis == 1 and ndim is not None and ndim <= 5:
        spatial = ndim - 2
    return dataclasses.replace(
        record,
        kind=kind,
        axis=axis,
        spatial=spatial,
        groups=groups if kind == "group" else None,
        virtual_batch_size=(record.virtual_batch_size or _VIRTUAL_BATCH_SIZE) if kind == "ghost" else None,
        rate=record.rate if record.kept and not record.frozen else _RATE,
        clips=(record.clips or RenormSchedule()) if kind == "renorm" else None,
        gain=gain,
        gamma=gamma,
        beta=beta,
        kept=kept,
        count=record.count if record.kept and kept else None,
        frozen=frozen,
    )


def _carried(old: NormRecord, new: NormRecord) -> str:
    """What went over, in words."""
    kept = [name for name in ("gamma", "beta") if getattr(old, name) is not None and getattr(new, name) is not None]
    words = f"{', '.join([*kept, 'eps'])} carried over"
    if new.beta is None and old.beta is not None and np.any(old.beta):
        words += ", beta is lost"
    if new.kept:
        words += (
            f", statistics too{', all as constants' if new.frozen else ''}"
            if old.kept
            else "; its statistics start at 0 and 1: train or recalibrate it"
        )
    elif old.kept:
        words += "; no statistics are kept any more"
    alike = old.kind == new.kind or (old.kept and new.kept)
    return words if alike else f"{words}; it computes something else"


def _named(subject: Opened, argument: str, keys: Any) -> dict[str, Any]:
    layers = {site.path: subject.layer(site.path) for site in subject.sites}
    return named(argument, keys, layers, {site.path: site.record.name for site in subject.sites})


def _edit(subject: Opened, site: Site, change: Callable[[Site], tuple[str, str]]) -> Edit:
    reason = subject.obstacle(site.path)
    if reason is not None:
        return Edit(site.path, str(site), None, reason)
    try:
        new, why = change(site)
    except NormValueError as error:
        return Edit(site.path, str(site), None, str(error))
    return Edit(site.path, str(site), new, why)


class _Finishing(Subject, Protocol):
    def finish(self, *, inplace: bool, optimizer: Any) -> tuple[Any, float | None]: ...


def finished(
    verb: str,
    done: str,
    model: Any,
    subject: _Finishing,
    edits: list[Edit],
    *,
    inplace: bool,
    dry_run: bool,
    return_report: bool,
    optimizer: Any,
) -> Any:
    """What a verb returns once its edits are planned; `done` is its participle, for an error where there is nothing."""
    notes = (subject.without_optimizer,) if optimizer is None else ()
    report = Report(verb, type(model).__name__, None, tuple(edits), notes)
    if dry_run:
        return report
    if not report.done:
        must = f"`model` must have a norm that can be {done}"
        raise NormValueError(message(must, report.reasons))
    result, difference = subject.finish(inplace=inplace, optimizer=optimizer)
    return (result, dataclasses.replace(report, difference=difference)) if return_report else result
