"""Synchronized batch norm by the halves of the compiled kernels: statistics alone, and normalizing by given ones.

Forward the processes exchange a count, a mean and a variance a channel, and merge them. Backward they add up the
gradient and that times the normalized input. What is saved in between is what batch norm of one process saves.

Another way makes other exchanges, so what decides has to be the same in every process. Types, devices and a choice made
by hand are; layouts, sizes and masks need not be (a process may have no padding to mask). So an input in a layout that
the kernels do not walk is copied, of a masked one the real positions are, a process without data takes part, and rules
that name a layout or a size do not count.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from normkit.core import algebra
from normkit.core.formula import Moments
from normkit.core.plan import NormPlan, kept_shape, plan
from normkit.core.spec import NormSpec
from normkit.kernels import registry
from normkit.torch import _compiled as compiled
from normkit.torch._layout import layout_of
from normkit.torch._processes import normalize_together

__all__ = ["normalize", "takes", "tried"]

_ANY_SIZE = (1, sys.maxsize)  # the shape of an input that is below no number of values a rule may name


def tried(spec: NormSpec, dtype: torch.dtype) -> bool:
    """Whether these may run, as far as choices and rules go."""
    return registry.tried("native", spec.name, dtype, None, _ANY_SIZE)


def takes(spec: NormSpec, x: Tensor, gamma: Tensor | None, beta: Tensor | None, residual: Tensor | None) -> bool:
    """Whether these run. Raises NormValueError where they were chosen by hand and do not cover the input."""
    if not tried(spec, x.dtype):
        return False
    reason = compiled.covers_shared(x, gamma, beta, residual)
    if reason:
        registry.refused("native", reason)
    return not reason


def normalize(
    spec: NormSpec,
    p: NormPlan,
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
    *,
    real: Tensor | None,
    activation: str | None,
    residual: Tensor | None,
    group: Any,
) -> tuple[Tensor, list[Moments]]:
    """Return act(norm(x) + residual) in the type of x by the statistics of the inputs of all processes, and these.

    `real` is a mask (N, 1, *S); other positions give 0. Every process has to call this, and the backward pass of its
    outputs; sizes may differ.
    """
    shape = kept_shape(p, tuple(x.shape))
    whole, at = x, None if real is None else real.squeeze(1)
    if at is not None:  # as a matrix of the real positions
        x, p = x.movedim(1, -1)[at], plan(spec, 2, ())
        residual = None if residual is None else residual.movedim(1, -1)[at]
    elif layout_of(x) is None:
        x = x.contiguous()
    case = compiled.decide_shared(spec, p, x, gamma, beta, activation)
    statistics, total = _merged(case, x.detach(), group)
    y: Tensor = _Synchronized.apply(x, residual, gamma, beta, statistics, total, case, eps, group)
    if at is not None:
        rows, y = y, torch.zeros_like(whole)
        y.movedim(1, -1)[at] = rows
    var, mean, rest = (part.reshape(shape) for part in statistics)
    counts = torch.full_like(var, total)
    return y, [Moments(mean + rest, var, counts, counts, weighted=True)]


def _merged(case: compiled.Case, x: Tensor, group: Any) -> tuple[Tensor, float]:
    """Variance, mean and rest of the mean over all processes, of shape (3, C), and the number of values behind each."""
    channels = x.shape[1]
    mine = torch.zeros((3, channels), dtype=torch.float64)
    if x.numel():
        var, mean, rest = compiled.statistics_of(case, x).double()
        mine = torch.stack([torch.full_like(mean, x.numel() // channels), mean + rest, var])
    every = mine.new_empty((dist.get_world_size(group), *mine.shape))
    dist.all_gather(list(every), mine, group=group)  # in the same order everywhere, so the same to the last bit
    counts = every[:, 0, 0].tolist()
    if not any(counts):
        return mine.float(), 0.0
    with np.errstate(invalid="ignore"):  # an input that is not finite is no reason to warn: its statistics are not kept
        whole = algebra.merge(counts, list(every[:, 1].numpy()), list(every[:, 2].numpy()))
    mean, var = torch.from_numpy(whole.mean), torch.from_numpy(whole.var)
    high = mean.float()
    return torch.stack([var.float(), high, (mean - high).float()]), sum(counts)


class _Synchronized(torch.autograd.Function):
    """By statistics that every process's input is a part of."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        gamma: Tensor | None,
        beta: Tensor | None,
        statistics: Tensor,
        total: float,
        case: compiled.Case,
        eps: float,
        group: Any,
    ) -> Tensor:
        ctx.save_for_backward(x, residual if case.act else None, gamma, beta, statistics)
        ctx.normalizer = total, case, eps, group, residual is not None
        ctx.set_materialize_grads(False)
        if not x.numel():
            return torch.empty_like(x)
        return compiled.Part.of(case, x, residual, gamma, beta, statistics, eps).normalize()

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return (None,) * 9
        x, residual, gamma, beta, statistics = ctx.saved_tensors
        total, case, eps, group, summed = ctx.normalizer
        if torch.is_grad_enabled():

            def again(x: Tensor, gamma: Tensor | None, beta: Tensor | None) -> Tensor:
                return normalize_together(case.spec, case.plan, x, gamma, beta, eps, weight=None, group=group)[0]

            needs = ctx.needs_input_grad[:4]
            return *compiled.twice(needs, again, dy, x, residual, gamma, beta, case, summed), *(None,) * 5
        for_x, for_residual, for_gamma, for_beta, *_ = ctx.needs_input_grad
        dy, for_residual = compiled.like(dy, x), summed and for_residual
        part = compiled.Part.of(case, x, residual, gamma, beta, statistics, eps)
        own = torch.zeros((2, x.shape[1]))
        if x.numel() and (for_x or for_gamma or for_beta):
            own = part.sums(dy)
        averages = own.double()
        if for_x:  # what a process gives depends on what every one puts in
            dist.all_reduce(averages, group=group)
        averages = (averages / max(total, 1.0)).float()
        dx = torch.empty_like(x) if for_x else None
        dresidual = dy if for_residual else None  # it goes through the sum as it is
        behind = for_residual and bool(case.act)
        if x.numel() and (for_x or behind):
            dx, before = part.gradient(dy, averages, for_x=for_x, for_residual=behind)
            dresidual = before if behind else dresidual
        dgamma = own[1].to(gamma.dtype) if gamma is not None and for_gamma else None
        dbeta = own[0].to(beta.dtype) if beta is not None and for_beta else None
        return dx, dresidual, dgamma, dbeta, *(None,) * 5
