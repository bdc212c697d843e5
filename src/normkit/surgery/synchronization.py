"""The verbs `sync` and `unsync`: statistics of one process's batch, or of the batches of all."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol

from normkit.core.constraints import Constraint, Flag, check
from normkit.errors import NormTypeError, NormValueError, message
from normkit.frameworks import framework_of
from normkit.surgery.plan import Edit
from normkit.surgery.protocol import Subject, opened
from normkit.surgery.replacement import finished

__all__ = ["Opened", "sync", "unsync"]

_ARGUMENTS: dict[str, Constraint] = {name: Flag() for name in ("inplace", "dry_run", "return_report")}
# What does the same elsewhere.
_ELSEWHERE = {
    "keras": "make the layers with `synchronized=True`; on JAX the batch of sharded arrays is the whole one already",
    "nnx": "make the layers with `axis_name=` for nnx.pmap; the batch of sharded arrays is the whole one already",
}


class Opened(Subject, Protocol):
    """A model that was looked into: `normkit.<framework>.synchronization.opened`."""

    def layers(self, *, synchronized: bool) -> Iterable[tuple[str, str]]:
        """Path and class of every batch norm, or of the synchronized ones alone."""

    def synchronize(self, path: str, process_group: Any) -> tuple[str, str]:
        """Plan it. Returns class and reason; NormValueError says why a layer stays."""

    def separate(self, path: str) -> tuple[str, str]:
        """Plan it. Returns class and reason; NormValueError says why a layer stays."""

    def finish(self, *, inplace: bool, optimizer: Any) -> tuple[Any, float | None]:
        """The model with what was planned, and the relative change of its outputs on the example in evaluation."""


def sync(
    model: Any,
    *,
    process_group: Any = None,
    inplace: bool = False,
    dry_run: bool = False,
    return_report: bool = False,
    optimizer: Any = None,
) -> Any:
    """Make every batch norm take its statistics over the batches of all processes, in training.

    Each of them becomes a :class:`normkit.torch.SyncBatchNorm`, which runs on any device and takes batches of unequal
    sizes: the training of several processes is that of one with the whole batch. Evaluation stays the same to the last
    bit. Parameters, buffers, hooks, modes, options and what is frozen (`normkit.freeze`) stay as they are; the number
    of axes that a layer takes is checked as before. Wrap the result in DistributedDataParallel.

    Layers stay whose class has a forward of its own: `torch.nn.SyncBatchNorm.convert_sync_batchnorm` drops that without
    a word. So do ghost batch norms and renorms, which are made to do without large batches. The report says so.

    Args:
        model: a torch.nn.Module.
        process_group: of torch.distributed; None for all processes, or for the one that a layer has.
        inplace: change the model itself, all of it or nothing.
        dry_run: return the report of what would be done, and do nothing.
        return_report: return (model, report).
        optimizer: made for this model; its groups and state move to the parameters of the result.

    Returns:
        A new model, in the modes it had. With `dry_run` the report.

    Raises:
        NormTypeError: for what is no PyTorch model, and another kind of `process_group`.
        NormValueError: where there is nothing to synchronize; for lazy layers.

    Example:
        >>> import normkit, torch
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
        >>> normkit.sync(model)[1]
        SyncBatchNorm(8, eps=1e-05, momentum=0.1, affine=True, bias=True, track_running_stats=True)
        >>> type(normkit.unsync(normkit.sync(model))[1])
        <class 'torch.nn.modules.batchnorm.BatchNorm2d'>
    """
    flags = {"inplace": inplace, "dry_run": dry_run, "return_report": return_report}
    check("sync", _ARGUMENTS, flags)
    subject = _opened(model, None)

    def change(path: str) -> tuple[str, str]:
        return subject.synchronize(path, process_group)

    edits = [_edit(path, kind, change) for path, kind in subject.layers(synchronized=False)]
    return finished("sync", "synchronized", model, subject, edits, **flags, optimizer=optimizer)


def unsync(
    model: Any,
    *,
    example: Any = None,
    inplace: bool = False,
    dry_run: bool = False,
    return_report: bool = False,
    optimizer: Any = None,
) -> Any:
    """Undo `normkit.sync`: every synchronized batch norm takes its statistics over its own batch again.

    What `normkit.sync` turned becomes what it was, with the check of the number of axes. A layer that was made
    synchronized fits any number of axes: an `example` says which batch norm stands there. Those of torch.nn become
    torch.nn's, ours become ours; evaluation stays the same to the last bit, and everything else as in `normkit.sync`.

    Args:
        model: a torch.nn.Module.
        example: inputs that the model takes, for layers that `normkit.sync` did not turn.
        inplace: change the model itself, all of it or nothing.
        dry_run: return the report of what would be done, and do nothing.
        return_report: return (model, report).
        optimizer: made for this model; its groups and state move to the parameters of the result.

    Returns:
        A new model, in the modes it had. With `dry_run` the report.

    Raises:
        NormTypeError: for what is no PyTorch model, an example that does not fit it.
        NormValueError: where no norm is synchronized, or an example is needed.

    Example:
        >>> import normkit, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.SyncBatchNorm(8))
        >>> normkit.unsync(model, example=torch.randn(4, 3))[1]
        BatchNorm1d(8, eps=1e-05, momentum=0.1, affine=True, bias=True, track_running_stats=True)
    """
    flags = {"inplace": inplace, "dry_run": dry_run, "return_report": return_report}
    check("unsync", _ARGUMENTS, flags)
    subject = _opened(model, example)
    edits = [_edit(path, kind, subject.separate) for path, kind in subject.layers(synchronized=True)]
    return finished("unsync", "taken apart from other processes", model, subject, edits, **flags, optimizer=optimizer)


def _opened(model: Any, example: Any) -> Opened:
    framework = framework_of(model)
    if framework in _ELSEWHERE:
        must = "`model` must be a torch.nn.Module"
        raise NormTypeError(message(must, f"a model of {framework}", _ELSEWHERE[framework]))
    subject: Opened = opened("synchronization", model, example)
    return subject


def _edit(path: str, kind: str, change: Callable[[str], tuple[str, str]]) -> Edit:
    try:
        new, why = change(path)
    except NormValueError as reason:
        return Edit(path, kind, None, str(reason))
    return Edit(path, kind, new, why)
