"""The loop of a normalized LSTM on CPUs in eager mode: compiled norms, and one node of autograd for all steps.

What a time step costs in eager mode is mostly the calling of some thirty operations, not their work. Here a step is
five calls forward and six backward, into memory that is there already: a product, two norms, and all between them in
compiled loops. The gradient of W_h is one product for all steps.

Of what remains most is matrix products. torch.nn.LSTM has its own from oneDNN, while torch.mm asks MKL, which on
processors of other makers is half as fast; so products are asked of oneDNN here too, where PyTorch has it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from normkit.kernels.native import ACTIVATIONS, TYPES, available, instruction_set
from normkit.torch._compiled import threads

__all__ = ["COMPILED", "Kernels", "lstm", "product", "usable"]

_native = available()
COMPILED = _native is not None
_SET = instruction_set()
_KIND, _NONE = TYPES["float32"], ACTIVATIONS[None]
_FLOAT = 4  # bytes
# What torch.compile calls for linear layers on CPUs; torch has no public name for them.
_onednn = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None
_ordered = getattr(torch.ops.mkldnn, "_reorder_linear_weight", None)


def _times(weight: Tensor) -> Callable[[Tensor], Tensor]:
    """Return the function x -> x @ weight.T, to be called more than once."""
    if _onednn is None or _ordered is None or not torch.backends.mkldnn.enabled:
        return weight.t().__rmatmul__
    packed = _ordered(weight)
    return lambda x: _onednn(x, packed, None, "none", [], "")


def _product(x: Tensor, weight: Tensor) -> Tensor:
    """Return x @ weight.T."""
    if _onednn is None or not torch.backends.mkldnn.enabled:
        return x @ weight.t()
    found: Tensor = _onednn(x, weight, None, "none", [], "")
    return found


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        plain = torch.is_grad_enabled()  # whose gradient may be asked for
        dx = dw = None
        if ctx.needs_input_grad[0]:
            dx = dy @ weight if plain else _product(dy, weight.t().contiguous())
        if ctx.needs_input_grad[1]:
            dw = dy.t() @ x if plain else _product(x.t(), dy.t()).t()
        return dx, dw


def product(x: Tensor, weight: Tensor) -> Tensor:
    """Return x @ weight.T for tensors that are `usable`, which nothing but eager autograd may be watching."""
    found: Tensor = _Product.apply(x, weight)
    return found


def usable(*tensors: Tensor) -> bool:
    """Whether `product` takes such tensors, and with the compiled kernels `lstm` too."""
    if torch.is_autocast_enabled("cpu"):
        return False
    return all(t.dtype == torch.float32 and t.device.type == "cpu" and t.is_contiguous() for t in tensors)


@dataclass(frozen=True)
class Kernels:
    """How the loop normalizes.

    Attributes:
        numbers: by kind (0: W_h h, 1: c) and number of samples what the compiled kernel is told of the shape.
        by_row: a statistic belongs to a sample, not to a unit.
        given: by step whether the statistics are given, not taken from the samples.
        eps: added to the variance.
    """

    numbers: Sequence[Callable[[int], tuple[int, ...]]]
    by_row: bool
    given: Sequence[bool]
    eps: float


def lstm(
    gates: Tensor,
    h: Tensor,
    c: Tensor,
    weight: Tensor,
    affine: Sequence[Tensor | None],
    statistics: Sequence[Tensor],
    sizes: Sequence[int],
    kernels: Kernels,
    again: Callable[..., tuple[Tensor, Tensor]],
) -> tuple[Tensor, Tensor]:
    """Return h and c of all packed rows.

    Args:
        gates: norm(W_x x) + b of all packed rows.
        h, c: first states.
        weight: W_h.
        affine: gamma and beta of W_h h, gamma and beta of c.
        statistics: two tensors (3, rows, units) for variance, mean and rest of the mean of W_h h and c, with a row for
            each step or, `by_row`, (3, packed rows). Read where they are given, else written.
        sizes: samples at each step.
        kernels: see there.
        again: the same of the tensors before `statistics`, in plain operations, for second derivatives.
    """
    result: tuple[Tensor, Tensor] = _Loop.apply(gates, h, c, weight, *affine, *statistics, sizes, kernels, again)
    return result


class _Norm:
    """Calls of the compiled kernel for one kind."""

    def __init__(self, kind: int, kernels: Kernels, gamma: Tensor, beta: Tensor | None, statistics: Tensor) -> None:
        self.numbers, self.kernels = kernels.numbers[kind], kernels
        self.affine = gamma.data_ptr(), 0 if beta is None else beta.data_ptr()
        self.places = [part.data_ptr() for part in statistics]
        self.width = _FLOAT if kernels.by_row else _FLOAT * statistics.shape[2]

    def _of_step(self, t: int, row: int) -> tuple[int, int, int]:
        """Addresses of variance, mean and rest."""
        skip = self.width * (row if self.kernels.by_row else t)
        var, mean, rest = (place + skip for place in self.places)
        return var, mean, 0 if self.kernels.given[t] else rest

    def forward(self, t: int, row: int, x: Tensor, residual: int, y: Tensor) -> None:
        _native.forward(
            _SET, self.numbers(len(x)), x.data_ptr(), residual, *self.affine, y.data_ptr(), 0, *self._of_step(t, row),
            self.kernels.eps, True, self.kernels.given[t], _KIND, _NONE, threads(x),
        )  # fmt: skip

    def backward(self, t: int, row: int, dy: Tensor, x: Tensor, dx: Tensor, dgamma: Tensor, dbeta: Tensor) -> None:
        _native.backward(
            _SET, self.numbers(len(x)), dy.data_ptr(), x.data_ptr(), 0, *self.affine, dx.data_ptr(), 0,
            dgamma.data_ptr(), dbeta.data_ptr() if self.affine[1] else 0, 0, *self._of_step(t, row),
            self.kernels.eps, True, self.kernels.given[t], _KIND, _NONE, threads(x),
        )  # fmt: skip


class _Loop(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        gates: Tensor,
        h: Tensor,
        c: Tensor,
        weight: Tensor,
        gamma: Tensor,
        beta: Tensor | None,
        gamma_c: Tensor,
        beta_c: Tensor | None,
        of_state: Tensor,
        of_cell: Tensor,
        sizes: Sequence[int],
        kernels: Kernels,
        again: Callable[..., tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, Tensor]:
        units, first = h.shape[1], (h, c)
        times = _times(weight)
        active, raw = torch.empty_like(gates), []
        cells, shown, out = (gates.new_empty(len(gates), units) for _ in range(3))
        norm = _Norm(0, kernels, gamma, beta, of_state)
        norm_c = _Norm(1, kernels, gamma_c, beta_c, of_cell)
        row, place, step = 0, gates.data_ptr(), _FLOAT * gates.shape[1]
        of_step = zip(*(t.split(sizes) for t in (active, cells, shown, out)), strict=True)
        for t, (z, new, tanh, now) in enumerate(of_step):
            n = sizes[t]
            if n < len(h):
                h, c = h[:n], c[:n]
            a = times(h)
            raw.append(a)
            norm.forward(t, row, a, place + row * step, z)
            kind = _SET, n, units, z.data_ptr()
            _native.cell_state(*kind, c.data_ptr(), new.data_ptr(), threads(z))
            norm_c.forward(t, row, new, 0, tanh)
            _native.cell_output(*kind, tanh.data_ptr(), now.data_ptr(), threads(z))
            h, c = now, new
            row += n
        ctx.save_for_backward(
            gates,
            *first,
            weight,
            gamma,
            beta,
            gamma_c,
            beta_c,
            of_state,
            of_cell,
            active,
            cells,
            shown,
            out,
            *raw,
        )
        ctx.loop = sizes, kernels, again
        ctx.set_materialize_grads(False)
        return out, cells

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dcells: Tensor | None) -> tuple[Tensor | None, ...]:
        gates, h, c, weight, gamma, beta, gamma_c, beta_c, of_state, of_cell, *kept = ctx.saved_tensors
        sizes, kernels, again = ctx.loop
        if torch.is_grad_enabled():
            return (*_twice(again, (gates, h, c, weight, gamma, beta, gamma_c, beta_c), dout, dcells), *(None,) * 5)
        active, cells, shown, out, *raw = kept
        units = h.shape[1]
        norm = _Norm(0, kernels, gamma, beta, of_state)
        norm_c = _Norm(1, kernels, gamma_c, beta_c, of_cell)
        dgates, draw = torch.empty_like(active), torch.empty_like(active)
        dgamma, dbeta = (gates.new_empty(len(sizes), 4 * units) for _ in range(2))
        dgamma_c, dbeta_c = (gates.new_empty(len(sizes), units) for _ in range(2))
        # Rows of sequences that ended before are 0 until the loop, coming from the end, reaches them.
        dh, dc = torch.zeros_like(h), torch.zeros_like(c)
        spare, other = torch.empty_like(h), torch.empty_like(h)
        dh_t, dc_t, a, b = dh[:0], dc[:0], spare, other
        gates_ = active.split(sizes)
        dz, da, cell, tanh = (t.split(sizes) for t in (dgates, draw, cells, shown))
        outer, outer_c = (None if d is None else d.contiguous().split(sizes) for d in (dout, dcells))
        before_ = [c, *(part[:n] for part, n in zip(cell, sizes[1:], strict=False))]
        starts, times = [0, *accumulate(sizes)], _times(weight.t().contiguous())
        for t in reversed(range(len(sizes))):
            n, row = sizes[t], starts[t]
            if n > len(dh_t):
                dh_t, dc_t, a, b = (part[:n] for part in (dh, dc, spare, other))
            z, dz_t, count = gates_[t].data_ptr(), dz[t].data_ptr(), threads(dz[t])
            kind = _SET, n, units
            _native.cell_output_backward(
                *kind, dh_t.data_ptr(), _of(outer, t), z, tanh[t].data_ptr(), dz_t, b.data_ptr(), count
            )
            norm_c.backward(t, row, b, cell[t], a, dgamma_c[t], dbeta_c[t])
            _native.cell_state_backward(
                *kind, dc_t.data_ptr(), a.data_ptr(), _of(outer_c, t), z, before_[t].data_ptr(), dz_t, count
            )
            norm.backward(t, row, dz[t], raw[t], da[t], dgamma[t], dbeta[t])
            dh_t.copy_(times(da[t]))
        before = torch.cat([h, *(part[:n] for part, n in zip(out.split(sizes), sizes[1:], strict=False))])
        return (
            dgates, dh, dc, _product(before.t(), draw.t()).t(), dgamma.sum(0), None if beta is None else dbeta.sum(0),
            dgamma_c.sum(0), None if beta_c is None else dbeta_c.sum(0), *(None,) * 5,
        )  # fmt: skip


def _of(parts: Sequence[Tensor] | None, t: int) -> int:
    return 0 if parts is None else parts[t].data_ptr()


def _twice(
    again: Callable[..., tuple[Tensor, Tensor]],
    inputs: Sequence[Tensor | None],
    dout: Tensor | None,
    dcells: Tensor | None,
) -> list[Tensor | None]:
    """The gradients by plain operations, which can be differentiated again."""
    own = [None if t is None else t.view_as(t) for t in inputs]
    results = [(y, dy) for y, dy in zip(again(*own), (dout, dcells), strict=True) if dy is not None]
    wanted = [t for t in own if t is not None and t.requires_grad]
    found = iter(torch.autograd.grad([y for y, _ in results], wanted, [dy for _, dy in results], create_graph=True))
    return [next(found) if t is not None and t.requires_grad else None for t in own]
