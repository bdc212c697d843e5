"""Batch norm whose statistics are those of the batches of all processes."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from normkit.errors import NormTypeError, message
from normkit.torch import functional
from normkit.torch._processes import shared
from normkit.torch.factory import Anywhere
from normkit.torch.layers import Device, _BatchNorm, _check_dims

__all__ = ["GroupHolder", "SyncBatchNorm", "check_group"]

_THEIRS = nn.modules.batchnorm._BatchNorm


class GroupHolder:
    """Holds a process group: a group cannot be copied, so copies of a layer share it."""

    def __init__(self, group: Any) -> None:
        self.group = group

    def __deepcopy__(self, _: Any) -> GroupHolder:
        return self


def check_group(owner: str, group: Any) -> None:
    """Raise NormTypeError for what is no process group, nor None for all processes."""
    if group is not None and not (dist.is_available() and isinstance(group, dist.ProcessGroup)):
        must = f"{owner}: `process_group` must be a group of torch.distributed, or None for all processes"
        raise NormTypeError(message(must, repr(group), "torch.distributed.new_group(ranks)"))


class _SyncBatchNorm(_BatchNorm):
    """What `SyncBatchNorm` computes, for channels on axis 1."""

    turned_from: type[nn.Module] | None = None
    _process_group: GroupHolder

    def _run(self, input: Tensor, **options: Any) -> Tensor:
        plain = all(value is None for value in options.values())
        if not self.training and plain and not self._fuses:
            return _THEIRS.forward(self, input)  # type: ignore[arg-type]
        _check_dims(self, input)
        group = shared(self._process_group.group) if self.training else None
        return functional.batch_norm(input, **self._arguments(), training=self.training, process_group=group, **options)

    @property
    def _fuses(self) -> bool:
        """Whether an activation and a residual may be handed on: what was torch's evaluates by torch's function."""
        return not (self.turned_from or type(self)).__module__.startswith("torch.")

    def _check_input_dim(self, input: Tensor) -> None:
        _check_dims(self, input)


class SyncBatchNorm(Anywhere, _SyncBatchNorm, _THEIRS):
    """Batch normalization by the statistics of the batches of all processes, on any device.

    y = (x - mean) / sqrt(var + eps) * weight + bias, per channel, as :class:`normkit.torch.BatchNorm2d`.

    Training: mean and biased variance over all values of a channel in the inputs of all processes, whose sizes may
    differ; the running statistics move by these, and are the same in every process. The result is that of one process
    with the whole batch: outputs and gradients of the inputs; the gradients of weight and bias, summed over the
    processes. Every process has to take part, forwards and backwards. Alone, without torch.distributed, and in
    evaluation it is batch norm.

    Shapes: input (N, C, *S) with 0 to 3 axes S, output the same; everything else (C,).

    Arguments, `state_dict` and numbers are those of torch.nn.SyncBatchNorm, which runs on GPUs only. It is no subclass:
    DistributedDataParallel refuses those on CPUs. What `normkit.sync` turned evaluates by the same function as before,
    and takes the same number of axes.

    Args:
        num_features, eps, momentum, affine, track_running_stats, device, dtype, bias, bessel, nonfinite: as batch norm.
        process_group: the processes; None for all.

    Raises:
        NormTypeError: for another kind of `process_group`.
        NormValueError: for inputs that do not fit; alone in training with one value per channel.

    >>> import torch
    >>> layer = SyncBatchNorm(4)
    >>> layer(torch.randn(8, 4, 5, 5)).shape
    torch.Size([8, 4, 5, 5])
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: Any = None,
        device: Device = None,
        dtype: Any = None,
        *,
        bias: bool = True,
        bessel: bool = True,
        nonfinite: str = "skip",
    ) -> None:
        check_group(type(self).__name__, process_group)
        options: dict[str, Any] = {"bias": bias, "bessel": bessel, "nonfinite": nonfinite}
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype, **options)
        self._process_group = GroupHolder(process_group)

    _fuses = _SyncBatchNorm._fuses  # of this class and no other: one that is derived from it may do more

    @property
    def process_group(self) -> Any:
        """The processes whose batches are one; None for all."""
        return self._process_group.group
