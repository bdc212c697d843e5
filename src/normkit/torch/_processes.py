"""Sums over the processes that train together, and the formula run with them."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from normkit.core import formula
from normkit.core.formula import Moments
from normkit.core.plan import NormPlan
from normkit.core.spec import NormSpec

__all__ = ["highest", "normalize_together", "shared"]


def shared(group: Any) -> Any:
    """The group that statistics are taken over, None where this process is alone: no group, or one of a single member.

    `group` None means all processes.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return None
    group = dist.group.WORLD if group is None else group
    return group if dist.get_world_size(group) > 1 else None


def highest(a: Tensor, group: Any) -> Tensor:
    """The highest value of all processes."""
    top = a.clone()
    dist.all_reduce(top, op=dist.ReduceOp.MAX, group=group)
    return top


def normalize_together(
    spec: NormSpec,
    p: NormPlan,
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
    *,
    weight: Tensor | None,
    group: Any,
) -> tuple[Tensor, list[Moments]]:
    """Normalize by the statistics of the inputs of all processes, everything in the type that statistics accumulate in.

    `weight` as in :func:`normkit.core.formula.normalize`, in that type too. Every process has to call this, and the
    backward pass of its outputs; sizes may differ.
    """
    if weight is None:  # so that counts are sums as well
        weight = x.new_ones((x.shape[0], 1, *x.shape[2:]))
    return formula.normalize(_Together(group), spec, p, x, gamma, beta, eps=eps, weight=weight)


class _Together:
    """torch as the formula sees it, but every sum goes over all processes."""

    def __init__(self, group: Any) -> None:
        self._group = group

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def sum(self, a: Tensor, *, axis: Any, keepdims: bool) -> Tensor:
        """Sum over these axes, and over the processes."""
        return _AllSum.apply(torch.sum(a, dim=axis, keepdim=keepdims), self._group)


class _AllSum(torch.autograd.Function):
    """The sum over all processes. So is its gradient: what each of them gives depends on what every one puts in."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, group: Any) -> Tensor:
        ctx.group = group
        total = a.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return _AllSum.apply(dy, ctx.group), None
