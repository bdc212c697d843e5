"""Kept statistics in PyTorch: buffers that stay float32 or wider, and the one place where they are written."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from normkit.core import formula
from normkit.core.formula import Moments
from normkit.core.plan import NormPlan
from normkit.core.spec import NormSpec
from normkit.errors import NormRuntimeError, message

__all__ = ["WideBuffers", "keep", "keep_rows", "recomputing", "watched"]


def keep(
    spec: NormSpec,
    p: NormPlan,
    kept: Mapping[str, Tensor],
    count: Tensor | None,
    moments: Sequence[Moments],
    *,
    momentum: float | None,
    eps: float,
    nonfinite: str,
) -> None:
    """Write the statistics of this batch into the buffers `kept` and add one to `count`.

    `momentum` is the weight of the new batch; None averages all batches equally. Statistics that are not finite change
    nothing, `count` included, unless `nonfinite` is "update". Nothing is written where a backward pass runs this
    forward again (activation checkpointing): the batch has been counted.
    """
    if recomputing():
        return
    with torch.no_grad():
        batch, known = formula.merged(torch, spec, p, moments, eps=eps)
        if known is False:  # an empty batch: PyTorch counts it, and so do we where the count weighs nothing
            if count is not None and momentum is not None:
                _write([(count, count + 1)])
            return
        if count is None or momentum is not None:
            rate: Any = 0.0 if momentum is None else momentum
        else:
            rate = 1.0 / (count + 1).to(torch.float64 if count.device.type != "mps" else torch.float32)
        device = next(iter(kept.values())).device
        if not watched() and known is True and device.type == "cpu":  # a look at the values costs nothing here
            if nonfinite == "skip" and not _all_finite(list(batch.values())):
                return
            new = formula.updated(torch, spec, kept, batch, known, rate)
            _write([(kept[name], value) for name, value in new.items()])
            if count is not None:
                count.add_(1)
            return
        new = formula.updated(torch, spec, kept, batch, known, rate)
        counted = torch.ones((), dtype=torch.bool, device=device) if known is True else known.any()
        if nonfinite == "skip":
            finite = torch.stack([torch.isfinite(value).all() for value in batch.values()]).all()
            new = {name: torch.where(finite, value, kept[name]) for name, value in new.items()}
            counted = counted & finite
        changes = [(kept[name], value) for name, value in new.items()]
        if count is not None:
            changes.append((count, count + counted))
        _write(changes)


def keep_rows(
    spec: NormSpec,
    kept: Sequence[tuple[Mapping[str, Tensor], Mapping[str, Tensor]]],
    count: Tensor,
    rows: int,
    *,
    momentum: float | None,
    nonfinite: str,
) -> None:
    """Write statistics that have a row for each time step, the first `rows` of them, and add one to `count` there.

    `kept` has buffers (max_steps, C) and what this batch was seen to have (rows, C), for each thing that is normalized.
    `momentum` as in :func:`keep`. A row in which anything is not finite changes nothing, unless `nonfinite` is
    "update".
    """
    with torch.no_grad():
        counted = count[:rows]
        known: Any = True
        if nonfinite == "skip" and not _all_finite([value for _, batch in kept for value in batch.values()]):
            known = torch.stack([value.isfinite().all(1) for _, batch in kept for value in batch.values()]).all(0)
        rate: Any = momentum
        if momentum is None:
            rate = 1.0 / (counted + 1).to(next(iter(kept[0][0].values())).dtype)[:, None]
        changes: list[tuple[Tensor, Any]] = [(counted, counted + known)]
        for buffers, batch in kept:
            first = {name: buffer[:rows] for name, buffer in buffers.items()}
            new = formula.updated(torch, spec, first, batch, known if known is True else known[:, None], rate)
            changes += [(first[name], value) for name, value in new.items()]
        _write(changes)


def _all_finite(values: Sequence[Tensor]) -> bool:
    """Whether everything is finite; False where a look at the values costs something or is not allowed."""
    if watched() or values[0].device.type != "cpu":
        return False
    return all(math.isfinite(value.sum(dtype=torch.float64).item()) for value in values)


def watched() -> bool:
    """Whether a compiler or a torch.func transform stands between this code and plain values."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def recomputing() -> bool:
    """Whether this forward runs inside a backward pass. PyTorch has no public name for that; the test is guarded."""
    if torch.compiler.is_compiling():
        return False  # the compiler's own recomputation does not repeat writes
    running = getattr(torch._C, "_current_graph_task_id", None)
    return running is not None and running() != -1


def _write(changes: list[tuple[Tensor, Any]]) -> None:
    if torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active():
        for buffer, value in changes:
            buffer.copy_(value)
        return
    # Inside torch.func transforms. A buffer that is an argument of the transform (functional_call) carries the
    # transform's own wrapper and is written as it is. A captured one may only be written outside, where a value that
    # differs from lane to lane has no single meaning.
    functorch = torch._C._functorch
    inside = [(buffer, value) for buffer, value in changes if functorch.is_functorch_wrapped_tensor(buffer)]
    outside = [
        (buffer, _unwrapped(value)) for buffer, value in changes if not functorch.is_functorch_wrapped_tensor(buffer)
    ]
    for buffer, value in inside:
        buffer.copy_(value)
    if outside:
        from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

        with temporarily_clear_interpreter_stack():
            for buffer, value in outside:
                buffer.copy_(value)


def _unwrapped(value: Tensor) -> Tensor:
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(value):
        if functorch.is_batchedtensor(value):
            must = "statistics kept between calls must have one value, but under `vmap` every lane has its own"
            hint = "call .eval(), use track_running_stats=False, or pass stacked buffers through functional_call"
            raise NormRuntimeError(message(must, hint=hint))
        value = functorch.get_unwrapped(value)
    return value.detach()


class WideBuffers(torch.nn.Module):
    """Keeps the floating point buffers in float32 or wider, whatever the parameters become.

    In half precision an average stops moving: once the change is below half a unit in the last place it is rounded away
    (bfloat16 with momentum 1e-3 stops at 2.0 where the truth is 3.8). So `.half()`, `.bfloat16()` and
    `load_state_dict(assign=True)` leave float32, and `.double()` gives float64.
    """

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        before = {name: b for name, b in self._buffers.items() if b is not None}
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if new is not None and _narrow(new):
                # From the old value, not the narrowed one: no digits are lost on the way.
                wide = torch.promote_types(old.dtype, torch.float32)
                self._buffers[name] = (new if new.is_meta or old.is_meta else old).to(device=new.device, dtype=wide)
        return self

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._widen()

    def _widen(self) -> None:
        for name, buffer in self._buffers.items():
            if buffer is not None and _narrow(buffer):
                self._buffers[name] = buffer.float()


def _narrow(buffer: Tensor) -> bool:
    return buffer.is_floating_point() and torch.finfo(buffer.dtype).bits < 32
