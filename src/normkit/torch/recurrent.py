"""LSTM and GRU with batch norm (arXiv:1603.09025) or layer norm (arXiv:1607.06450) inside.

Constructors, `forward`, outputs, and names and shapes of weights are those of torch.nn.LSTM and torch.nn.GRU, so
`layer.load_state_dict(lstm.state_dict(), strict=False)` takes over what was learned. They are no subclasses: code that
knows torch's would run them without their norms.

A layer works on packed rows: all samples of the first step, then all of the second, as in a PackedSequence. A tensor is
the case in which all steps have as many. The product with the input is one for all steps, and so is its norm. The
direction backwards is the same loop over sequences that were turned round, each from its own end: the first step of
both directions is the one that begins with `hx`.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from normkit.core import catalog, plan, recurrent
from normkit.core.axes import Sizes
from normkit.core.constraints import Flag, Integer, Real, check
from normkit.core.formula import Moments
from normkit.core.spec import ARGUMENTS, NormSpec
from normkit.errors import NormTypeError, NormValueError, message
from normkit.kernels import registry
from normkit.kernels.native import evaluation, geometry
from normkit.torch import _compiled as compiled
from normkit.torch import _lstm
from normkit.torch._buffers import WideBuffers, keep_rows, recomputing
from normkit.torch._execute import accumulator, needs_plain, normalize
from normkit.torch.layers import Device, _Layer

__all__ = ["BatchNormGRU", "BatchNormLSTM", "LayerNormGRU", "LayerNormLSTM"]

# Statistics differ most over the first steps of a sequence; all later steps are well served by those of the last row.
# The paper's sequences of Penn Treebank are that long.
MAX_STEPS = 100
_ARGUMENTS = {
    **ARGUMENTS,
    "input_size": Integer(1),
    "hidden_size": Integer(1),
    "num_layers": Integer(1),
    "batch_first": Flag(),
    "dropout": Real(0.0, 1.0),
    "bidirectional": Flag(),
    "max_steps": Integer(1),
}
_THEIRS = ("input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout", "bidirectional")
_GATES = {"LSTM": 4, "GRU": 3}
_KEPT = tuple(replace(catalog.BATCH, tracked=tuple(replace(t, bessel=b and t.bessel) for t in catalog.BATCH.tracked))
              for b in (False, True))  # fmt: skip


def _normalized(
    spec: NormSpec, sizes: Sizes, x: Tensor, gamma: Tensor, beta: Tensor | None, eps: float
) -> tuple[Tensor, list[Moments]]:
    key = compiled.signature((id(spec), sizes), x, gamma, beta)
    case = compiled.known(key)
    if case is None:
        compiling = torch.compiler.is_compiling()  # the cache of `plan` cannot be traced
        p = (plan.compile_plan if compiling else plan.plan)(spec, x.dim(), sizes)
        case = None if needs_plain(x, gamma, beta) else compiled.decide(key, spec, p, x, gamma, beta, None, None)
        if case is None:
            y, moments = normalize(spec, p, x, gamma, beta, eps)
            return y.to(x.dtype), moments
    found = compiled.normalize(case, x, gamma, beta, eps, None)
    return found.y.to(x.dtype), found.moments() if spec.tracked else []


@dataclass
class _Norms:
    """The norms of one layer and direction during one call.

    Attributes:
        gammas, betas: by kind: `ih` (W_x x), `hh` (W_h h), `c`.
        sizes: samples at each step, never increasing.
    """

    gammas: dict[str, Tensor]
    betas: dict[str, Tensor | None]
    sizes: list[int]
    eps: float
    spec: ClassVar[NormSpec]

    def all_steps(self, x: Tensor) -> Tensor:
        """Normalize W_x x of all steps."""
        raise NotImplementedError

    def step(self, kind: str, t: int, x: Tensor) -> Tensor:
        """Normalize W_h h or c of one step."""
        raise NotImplementedError

    def finish(self) -> None:
        """Keep what was measured."""

    def loops(self, gates: Tensor) -> bool:
        """Whether the compiled loop may be used, as far as choices by hand go."""
        return registry.tried("native", self.spec.name, gates.dtype, "contiguous", gates.shape)

    def kernels(self) -> _lstm.Kernels:
        """Say how the compiled loop normalizes."""
        raise NotImplementedError

    def statistics(self, gates: Tensor) -> list[Tensor]:
        """Return the statistics for the compiled loop, filled where they are given."""
        raise NotImplementedError

    def take(self, statistics: list[Tensor]) -> None:
        """Take what the compiled loop has measured."""

    def fixed(self) -> _Norms:
        """Return the same, whatever the buffers are later."""
        return self


@functools.cache
def _rows_of(width: int, n: int) -> tuple[int, ...]:
    found = geometry("layer_norm", plan.plan(catalog.LAYER, 2, (("*c", (width,)),)), (n, width), "contiguous")
    assert not isinstance(found, str)
    return found.numbers


@functools.cache
def _columns_of(width: int, n: int) -> tuple[int, ...]:
    return evaluation((n, width), "contiguous")


@dataclass
class _ByLayer(_Norms):
    """Every sample by itself."""

    groups: tuple[int, ...] = ()
    spec = catalog.LAYER

    def kernels(self) -> _lstm.Kernels:
        (gates,), units = self.groups, len(self.gammas["c"])
        numbers = tuple(functools.partial(_rows_of, width) for width in (gates, units))
        return _lstm.Kernels(numbers, True, [False] * len(self.sizes), self.eps)

    def statistics(self, gates: Tensor) -> list[Tensor]:
        return [gates.new_empty(3, len(gates)) for _ in range(2)]

    def all_steps(self, x: Tensor) -> Tensor:
        return self.step("ih", 0, x)

    def step(self, kind: str, t: int, x: Tensor) -> Tensor:  # noqa: ARG002
        gamma, beta = self.gammas[kind], self.betas[kind]
        if kind == "c" or len(self.groups) == 1:
            return self._one(x, gamma, beta)
        betas = itertools.repeat(None) if beta is None else beta.split(self.groups)
        parts = zip(x.split(self.groups, dim=-1), gamma.split(self.groups), betas, strict=False)
        return torch.cat([self._one(part.contiguous(), g, b) for part, g, b in parts], dim=-1)

    def _one(self, x: Tensor, gamma: Tensor, beta: Tensor | None) -> Tensor:
        return _normalized(catalog.LAYER, (("*c", (x.shape[-1],)),), x, gamma, beta, self.eps)[0]


@dataclass
class _ByKept(_Norms):
    """By the running statistics of each step."""

    kept: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    count: Tensor | None = None
    spec = catalog.BATCH

    def given(self) -> list[bool]:
        """Whether the statistics of each step are those kept."""
        return [True] * len(self.sizes)

    def kernels(self) -> _lstm.Kernels:
        numbers = tuple(functools.partial(_columns_of, len(self.gammas[kind])) for kind in ("hh", "c"))
        return _lstm.Kernels(numbers, False, self.given(), self.eps)

    def loops(self, gates: Tensor) -> bool:
        return super().loops(gates) and self.kept["c"]["var"].dtype == torch.float32

    def statistics(self, gates: Tensor) -> list[Tensor]:
        steps, given = len(self.sizes), self.given()
        found = [gates.new_zeros(3, steps, len(self.gammas[kind])) for kind in ("hh", "c")]
        if any(given):  # the last steps
            rows = self._rows(steps, gates.device)[given.index(True) :]
            for kind, values in zip(("hh", "c"), found, strict=True):
                for place, name in enumerate(("var", "mean")):
                    values[place, given.index(True) :] = self.kept[kind][name].index_select(0, rows)
        return found

    def fixed(self) -> _ByKept:
        kept = {kind: {name: t.clone() for name, t in values.items()} for kind, values in self.kept.items()}
        return replace(self, kept=kept, count=None if self.count is None else self.count.clone())

    def all_steps(self, x: Tensor) -> Tensor:
        sizes = torch.tensor(self.sizes, device=x.device)
        return self._at("ih", x, self._rows(sizes.shape[0], x.device).repeat_interleave(sizes))

    def step(self, kind: str, t: int, x: Tensor) -> Tensor:
        return self._at(kind, x, self._rows(t + 1, x.device)[t:])

    def _rows(self, steps: int, device: torch.device) -> Tensor:
        """Return which row serves each step: its own, but after the last that a batch has entered, that one."""
        assert self.count is not None
        return torch.minimum(torch.arange(steps, device=device), ((self.count > 0).sum() - 1).clamp(min=0))

    def _at(self, kind: str, x: Tensor, rows: Tensor) -> Tensor:
        mean, var = (self.kept[kind][name].index_select(0, rows) for name in ("mean", "var"))
        wide = torch.promote_types(mean.dtype, accumulator(x.dtype))
        gamma, beta = self.gammas[kind].to(wide), self.betas[kind]
        beta = None if beta is None else beta.to(wide)
        return recurrent.evaluated_at(torch, x.to(wide), mean, var, gamma, beta, eps=self.eps).to(x.dtype)


@dataclass
class _ByBatch(_ByKept):
    """By the statistics of the batch at each step, which are kept; where one sequence is left, as `_ByKept`."""

    bessel: bool = True
    momentum: float | None = None
    nonfinite: str = "skip"
    seen: dict[str, list[Moments]] = field(default_factory=lambda: {"ih": [], "hh": [], "c": []})

    def fixed(self) -> _ByBatch:
        found = super().fixed() if 1 in self.sizes else self
        assert isinstance(found, _ByBatch)
        return replace(found, seen={"ih": [], "hh": [], "c": []})

    def given(self) -> list[bool]:
        return [n == 1 for n in self.sizes]

    def take(self, statistics: list[Tensor]) -> None:
        steps = sum(n > 1 for n in self.sizes)
        for kind, (var, mean, rest) in zip(("hh", "c"), statistics, strict=True):
            self.seen[kind].append(Moments(mean[:steps] + rest[:steps], var[:steps], None, None))

    def all_steps(self, x: Tensor) -> Tensor:
        runs = [(n, len(list(steps))) for n, steps in itertools.groupby(self.sizes)]
        if len(runs) == 1 and runs[0][0] > 1:
            return self._batches("ih", x, runs[0][0])
        parts, t = [], 0
        for part, (n, steps) in zip(x.split([n * steps for n, steps in runs]), runs, strict=True):
            if n > 1:
                parts.append(self._batches("ih", part, n))
            else:
                rows = self._rows(t + steps, x.device)[t:]
                parts.append(self._at("ih", part, rows))
            t += steps
        return torch.cat(parts)

    def step(self, kind: str, t: int, x: Tensor) -> Tensor:
        return super().step(kind, t, x) if self.sizes[t] == 1 else self._batches(kind, x, self.sizes[t])

    def _batches(self, kind: str, x: Tensor, n: int) -> Tensor:
        """Normalize by groups of n rows: with ghost batches the statistics of many steps are one call."""
        spec, sizes = (catalog.BATCH, ()) if n == x.shape[0] else (catalog.GHOST, (("n", n),))
        y, (moments,) = _normalized(spec, sizes, x, self.gammas[kind], self.betas[kind], self.eps)
        self.seen[kind].append(moments)
        return y

    def finish(self) -> None:
        assert self.count is not None
        if recomputing():
            return
        steps = min(sum(n > 1 for n in self.sizes), len(self.count))
        with torch.no_grad():
            changes = []
            n = torch.tensor(self.sizes[:steps], device=self.count.device, dtype=self.kept["ih"]["var"].dtype)[:, None]
            for kind, kept in self.kept.items():
                mean, var = (
                    torch.cat([getattr(m, name).reshape(-1, kept[name].shape[1]) for m in self.seen[kind]])[:steps]
                    for name in ("mean", "var")
                )
                changes.append((kept, {"mean": mean, "var": var * (n / (n - 1)) if self.bessel else var}))
            spec = _KEPT[self.bessel]
            keep_rows(spec, changes, self.count, steps, momentum=self.momentum, nonfinite=self.nonfinite)


class _NormRNN(WideBuffers, _Layer, nn.RNNBase):
    """What all four have in common."""

    _mode: ClassVar[str]
    _gamma: ClassVar[float]

    def _setup(self, theirs: tuple[Any, ...], proj_size: int, device: Device, dtype: Any, **others: Any) -> None:
        """Validate and construct: `theirs` are the arguments of the parent in torch.nn, named in `_THEIRS`."""
        owner = type(self).__name__
        check(owner, _ARGUMENTS, {**dict(zip(_THEIRS, theirs, strict=True)), **others})
        if proj_size != 0:
            must = f"{owner}: `proj_size` must be 0: a projection of h has no place in the papers' formulas"
            raise NormValueError(message(must, repr(proj_size), "a linear layer behind this one"))
        super().__init__(self._mode, *theirs, device=device, dtype=dtype)
        for name, value in others.items():
            setattr(self, name, value)
        for suffix in self._suffixes():
            for kind, width in self._widths().items():
                for first, name in self._affine(kind).items():
                    value = nn.Parameter(torch.full((width,), first, device=device, dtype=dtype))
                    self.register_parameter(f"{name}_{kind}{suffix}", value)

    def _affine(self, kind: str) -> dict[float, str]:
        """First values and names. The biases of the other norms are `bias_ih` and `bias_hh`."""
        return {self._gamma: "gamma", 0.0: "beta"} if kind == "c" else {self._gamma: "gamma"}

    def _suffixes(self) -> list[str]:
        ends = ("", "_reverse") if self.bidirectional else ("",)
        return [f"_l{layer}{end}" for layer in range(self.num_layers) for end in ends]

    def _widths(self) -> dict[str, int]:
        gates = _GATES[self.mode] * self.hidden_size
        return {"ih": gates, "hh": gates, **({"c": self.hidden_size} if self.mode == "LSTM" else {})}

    def reset_parameters(self) -> None:
        """Return weights to first values as torch.nn has them, gamma and beta to their own."""
        super().reset_parameters()
        for name, value in self.named_parameters():
            if name.startswith(("gamma", "beta")):
                nn.init.constant_(value, self._gamma if name.startswith("gamma") else 0.0)

    def flatten_parameters(self) -> None:
        """Do nothing: it prepares weights for cuDNN's own loops, which have no norms."""

    def _norms(self, suffix: str, sizes: list[int]) -> _Norms:
        raise NotImplementedError

    def _own(self, suffix: str) -> dict[str, dict[str, Any]]:
        """Return gammas and betas by kind."""
        gammas = {kind: getattr(self, f"gamma_{kind}{suffix}") for kind in self._widths()}
        biases = {kind: getattr(self, f"bias_{kind}{suffix}") if self.bias else None for kind in ("ih", "hh")}
        cell = {"c": getattr(self, f"beta_c{suffix}")} if "c" in gammas else {}
        return {"gammas": gammas, "betas": {**biases, **cell}}

    def forward(self, input: Tensor | PackedSequence, hx: Any = None, *, mask: Tensor | None = None) -> tuple[Any, Any]:
        """Run over the sequences; see the class."""
        if mask is not None:
            return self._padded(input, hx, mask)
        self._check_input(input)
        single = isinstance(input, Tensor) and input.dim() == 2
        if isinstance(input, PackedSequence):
            rows, sizes = input.data, input.batch_sizes.tolist()
        else:
            steps = input.unsqueeze(1) if single else input.transpose(0, 1) if self.batch_first else input
            sizes = [steps.shape[1]] * steps.shape[0]
            rows = steps.reshape(-1, steps.shape[2])
        states = self._states(rows, sizes[0], hx, single)
        if isinstance(input, PackedSequence) and input.sorted_indices is not None:
            states = [state.index_select(1, input.sorted_indices) for state in states]
        out, states = self._layers(rows, sizes, states)
        out = out.to(rows.dtype)
        if isinstance(input, PackedSequence):
            if input.unsorted_indices is not None:
                states = [state.index_select(1, input.unsorted_indices) for state in states]
            packed = PackedSequence(out, input.batch_sizes, input.sorted_indices, input.unsorted_indices)
            return packed, self._outer(states)
        out = out.reshape(len(sizes), sizes[0], -1)
        out = out.squeeze(1) if single else out.transpose(0, 1) if self.batch_first else out
        return out, self._outer([state.squeeze(1) for state in states] if single else states)

    def _padded(self, input: Any, hx: Any, mask: Any) -> tuple[Any, Any]:
        owner = type(self).__name__
        if not isinstance(input, Tensor) or input.dim() != 3:
            must = f"{owner}: `mask` must come with a 3D tensor"
            raise NormValueError(message(must, type(input).__name__, "a PackedSequence knows its lengths"))
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != input.shape[:2]:
            got = f"{mask.dtype}, {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
            must = f"{owner}: `mask` must be a boolean tensor of shape {tuple(input.shape[:2])}, True for real data"
            raise NormValueError(message(must, got))
        real = mask if self.batch_first else mask.T
        lengths = real.sum(1)
        first = torch.arange(real.shape[1], device=real.device) < lengths[:, None]
        if not bool((real == first).all()) or not bool((lengths > 0).all()):
            must = (
                f"{owner}: in `mask` the real positions of a sequence must come first, and there must be one at least"
            )
            raise NormValueError(message(must, hint="move padding to the end"))
        packed = pack_padded_sequence(input, lengths.cpu(), self.batch_first, enforce_sorted=False)
        out, states = self(packed, hx)
        return pad_packed_sequence(out, self.batch_first, total_length=real.shape[1])[0], states

    def _check_input(self, input: Any) -> None:
        owner = type(self).__name__
        data = input.data if isinstance(input, PackedSequence) else input
        if not isinstance(data, Tensor) or not data.is_floating_point():
            got = str(data.dtype) if isinstance(data, Tensor) else type(data).__name__
            raise NormTypeError(message(f"{owner}: the input must be a floating point tensor or a PackedSequence", got))
        dims = (2,) if data is not input else (2, 3)
        if data.dim() not in dims or data.shape[-1] != self.input_size or 0 in data.shape[:-1]:
            first = "(N, T" if self.batch_first else "(T, N"
            must = f"{owner}: the input must have shape {first}, {self.input_size}) or (T, {self.input_size}), T > 0"
            raise NormValueError(message(must, tuple(data.shape)))

    def _states(self, rows: Tensor, batch: int, hx: Any, single: bool) -> list[Tensor]:
        """Return the first states, (layers * directions, batch, hidden) each."""
        owner, number = type(self).__name__, 2 if self.mode == "LSTM" else 1
        shape = (len(self._suffixes()), batch, self.hidden_size)
        if hx is None:
            return [rows.new_zeros(shape)] * number
        states = list(hx) if isinstance(hx, tuple | list) else [hx]
        outer = (shape[0], shape[2]) if single else shape
        if len(states) != number or any(not isinstance(s, Tensor) or tuple(s.shape) != outer for s in states):
            must = f"{owner}: `hx` must be {'(h_0, c_0), each' if number == 2 else 'h_0'} of shape {outer}"
            got = [tuple(s.shape) if isinstance(s, Tensor) else type(s).__name__ for s in states]
            raise NormValueError(message(must, ", ".join(map(str, got))))
        return [state.unsqueeze(1) for state in states] if single else states

    def _outer(self, states: Sequence[Tensor]) -> Any:
        return tuple(states) if self.mode == "LSTM" else states[0]

    def _layers(self, x: Tensor, sizes: list[int], states: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        ends: list[list[Tensor]] = []
        turned = _turned(sizes, x.device) if self.bidirectional else None
        directions = 2 if self.bidirectional else 1
        for place, suffix in enumerate(self._suffixes()):
            back = place % directions == 1
            if not back:
                if place and self.dropout:
                    x = nn.functional.dropout(x, self.dropout, self.training)
                outs = []
            out, end = self._direction(
                x.index_select(0, turned) if back and turned is not None else x,
                sizes,
                [state[place] for state in states],
                suffix,
            )
            outs.append(out.index_select(0, turned) if back and turned is not None else out)
            ends.append(end)
            if len(outs) == directions:
                x = outs[0] if directions == 1 else torch.cat(outs, dim=-1)
        return x, [torch.stack(found) for found in zip(*ends, strict=True)]

    def _direction(self, x: Tensor, sizes: list[int], states: list[Tensor], suffix: str) -> tuple[Tensor, list[Tensor]]:
        """Return h of all packed rows, and the last states."""
        norms = self._norms(suffix, sizes)
        of_input = getattr(self, f"weight_ih{suffix}")
        plain = needs_plain(x, of_input) or not _lstm.usable(x, of_input)
        gates = norms.all_steps(x @ of_input.T if plain else _lstm.product(x, of_input))
        weight = getattr(self, f"weight_hh{suffix}")
        found = self._compiled(norms, gates, states, weight) or self._loop(norms, gates, states, weight)
        norms.finish()
        if sizes[-1] == sizes[0]:
            return found[0], [state[-sizes[0] :] for state in found]
        last = _last(sizes, x.device)
        return found[0], [state.index_select(0, last) for state in found]

    def _loop(self, norms: _Norms, gates: Tensor, states: list[Tensor], weight: Tensor) -> list[Tensor]:
        """Return the states of all packed rows."""
        functions = {"activation": torch.tanh, "recurrent_activation": torch.sigmoid}
        weight, found = weight.T, []
        for t, (n, gate) in enumerate(zip(norms.sizes, gates.split(norms.sizes), strict=True)):
            if n < len(states[0]):
                states = [state[:n] for state in states]
            h, *rest = states
            seen = norms.step("hh", t, h @ weight)
            if self.mode == "GRU":
                states = [recurrent.gru_step(gate.chunk(3, 1), seen.chunk(3, 1), h, **functions)]
            else:
                norm = functools.partial(norms.step, "c", t)
                states = list(recurrent.lstm_step((gate + seen).chunk(4, 1), *rest, norm=norm, **functions))
            found.append(states)
        return [torch.cat(parts) for parts in zip(*found, strict=True)]

    def _compiled(
        self, norms: _Norms, gates: Tensor, states: list[Tensor], weight: Tensor
    ) -> tuple[Tensor, Tensor] | None:
        """Return the same where the compiled loop of the LSTM takes it, else None."""
        affine = [values.get(kind) for kind in ("hh", "c") for values in (norms.gammas, norms.betas)]
        there = [t for t in (gates, *states, weight, *affine) if t is not None]
        if self.mode != "LSTM" or not _lstm.COMPILED or torch.compiler.is_compiling() or not norms.loops(gates):
            return None
        if needs_plain(*there) or not _lstm.usable(*there):
            return None
        statistics, fixed = norms.statistics(gates), norms.fixed()

        def again(*tensors: Tensor) -> tuple[Tensor, Tensor]:
            gates, h, c, weight, gamma, beta, gamma_c, beta_c = tensors
            other = replace(fixed, gammas={"hh": gamma, "c": gamma_c}, betas={"hh": beta, "c": beta_c})
            return tuple(self._loop(other, gates, [h, c], weight))  # type: ignore[return-value]

        h, c = states
        kernels = norms.kernels()
        found = _lstm.lstm(gates, h, c, weight, affine, statistics, norms.sizes, kernels, again)
        norms.take(statistics)
        return found


def _lengths(sizes: list[int]) -> list[int]:
    """Return the lengths of packed sequences, from how many there are at each step."""
    fewer = [n - after for n, after in zip(sizes, [*sizes[1:], 0], strict=True)]
    return [t + 1 for t in reversed(range(len(sizes))) for _ in range(fewer[t])]


def _turned(sizes: list[int], device: torch.device) -> Tensor:
    """Return the packed rows of sequences turned round, each from its own end; it is its own inverse."""
    starts, lengths = [0, *itertools.accumulate(sizes)], _lengths(sizes)
    return torch.tensor([starts[lengths[i] - 1 - t] + i for t, n in enumerate(sizes) for i in range(n)], device=device)


def _last(sizes: list[int], device: torch.device) -> Tensor:
    """Return the packed row of the last step of each sequence."""
    starts = [0, *itertools.accumulate(sizes)]
    return torch.tensor([starts[length - 1] + i for i, length in enumerate(_lengths(sizes))], device=device)


class _BatchNormRNN(_NormRNN):
    _gamma = recurrent.GAMMA
    eps: float
    momentum: float | None
    max_steps: int
    bessel: bool
    nonfinite: str

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        max_steps: int = MAX_STEPS,
        momentum: float | None = 0.1,
        eps: float = 1e-5,
        bessel: bool = True,
        nonfinite: str = "skip",
    ) -> None:
        theirs = input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional
        others = {"max_steps": max_steps, "momentum": momentum, "eps": eps, "bessel": bessel, "nonfinite": nonfinite}
        self._setup(theirs, proj_size, device, dtype, **others)
        for suffix in self._suffixes():
            for kind, width in self._widths().items():
                for name in ("mean", "var"):
                    value = torch.empty((max_steps, width), device=device, dtype=dtype)
                    self.register_buffer(f"running_{name}_{kind}{suffix}", value)
            count = torch.zeros(max_steps, dtype=torch.long, device=device)
            self.register_buffer(f"num_batches_tracked{suffix}", count)
        self._widen()
        self.reset_running_stats()

    def reset_running_stats(self) -> None:
        """Return means, variances and counts to their first values."""
        for name, buffer in self._buffers.items():
            if buffer is not None:
                buffer.fill_(1 if name.startswith("running_var") else 0)

    def reset_parameters(self) -> None:
        """Return weights to first values as torch.nn has them, gamma, beta and the statistics to their own."""
        super().reset_parameters()
        self.reset_running_stats()

    def _norms(self, suffix: str, sizes: list[int]) -> _Norms:
        own: dict[str, Any] = self._own(suffix)
        kept = {
            kind: {name: getattr(self, f"running_{name}_{kind}{suffix}") for name in ("mean", "var")}
            for kind in own["gammas"]
        }
        count = getattr(self, f"num_batches_tracked{suffix}")
        if not self.training:
            return _ByKept(**own, sizes=sizes, eps=self.eps, kept=kept, count=count)
        if sizes[0] < 2:
            must = f"{type(self).__name__}: training needs at least 2 sequences"
            raise NormValueError(message(must, sizes[0], "a larger batch, .eval(), or the layer norm of the same kind"))
        how: dict[str, Any] = {"bessel": self.bessel, "momentum": self.momentum, "nonfinite": self.nonfinite}
        return _ByBatch(**own, sizes=sizes, eps=self.eps, kept=kept, count=count, **how)

    def extra_repr(self) -> str:
        """What torch prints of a layer."""
        return f"{super().extra_repr()}, max_steps={self.max_steps}, momentum={self.momentum}, eps={self.eps}"


class _LayerNormRNN(_NormRNN):
    _gamma = 1.0
    eps: float

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        eps: float = 1e-5,
    ) -> None:
        theirs = input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional
        self._setup(theirs, proj_size, device, dtype, eps=eps)

    def _norms(self, suffix: str, sizes: list[int]) -> _Norms:
        groups = recurrent.layer_norm_groups(_GATES[self.mode], self.hidden_size)
        return _ByLayer(**self._own(suffix), sizes=sizes, eps=self.eps, groups=groups)

    def extra_repr(self) -> str:
        """What torch prints of a layer."""
        return f"{super().extra_repr()}, eps={self.eps}"


class BatchNormLSTM(_BatchNormRNN):
    """An LSTM with batch normalization inside (arXiv:1603.09025), in the place of torch.nn.LSTM.

    (i, f, g, o) = BN(W_ih x) + b_ih + BN(W_hh h) + b_hh
    c' = sigmoid(f) * c + sigmoid(i) * tanh(g)
    h' = sigmoid(o) * tanh(BN(c') + beta_c)

    The recurrence of c itself is not normalized. Every BN has a gain: gamma_ih, gamma_hh, gamma_c.

    Training: mean and biased variance over the batch, at each time step its own, which then enter the running
    statistics of that step: `running_* = (1 - momentum) * running_* + momentum * batch`. Steps from `max_steps` on use
    their batch and are not kept. Evaluation: the running statistics of the step; after `max_steps`, or after the last
    step that training has seen, those of that last step. A step is counted from where the sequence begins with `hx`,
    in the direction backwards from the sequence's own end.

    Padding stays out of the statistics: give a PackedSequence, or a `mask` in which the real positions come first. A
    step at which one sequence of a longer batch is left has no variance; it uses the running statistics, as evaluation
    does.

    Shapes: input (T, N, F), with `batch_first` (N, T, F), (T, F), or packed; `hx` and the last states as torch.nn.LSTM.
    Weights and their names too, then gamma_ih_l0, gamma_hh_l0 (4 * hidden,), gamma_c_l0, beta_c_l0 (hidden,), and
    running_mean_*_l0, running_var_*_l0 (max_steps, ...) for each BN, in float32 or wider, and num_batches_tracked_l0
    (max_steps,); so for every layer and, with `_reverse`, direction.

    First values: gains 0.1, for with 1 the activations saturate and gradients vanish over time; beta_c and means 0,
    variances 1; the others as in torch.nn. The paper begins with the identity for W_hh, orthogonal W_ih, forget biases
    of 1, and averages statistics after training (`momentum=None` averages as it goes). Where all samples are alike, as
    W_hh h is in a first step without `hx` and pixels are in the corners of images, eps is all the variance there is:
    small differences, as of an `hx` in evaluation, then grow by up to eps^-1/2; the paper gives noise as `hx`.

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, device, dtype: of torch.nn.LSTM.
        proj_size: 0; a projection is refused.
        max_steps: number of steps with statistics of their own, the length of the longest training sequence.
        momentum: weight of a new batch; None averages all batches equally.
        eps: added to the variance.
        bessel: keep the unbiased variance n/(n-1) var.
        nonfinite: "skip" leaves steps with NaN or infinity out of the running statistics, "update" does not look.

    Raises:
        NormValueError, NormTypeError: for arguments and inputs out of range; in training with one sequence.

    >>> layer = BatchNormLSTM(3, 5, max_steps=7)
    >>> out, (h, c) = layer(torch.randn(7, 4, 3))
    >>> out.shape, h.shape
    (torch.Size([7, 4, 5]), torch.Size([1, 4, 5]))
    >>> mask = torch.arange(7)[:, None] < torch.tensor([7, 3, 5, 2])
    >>> out, _ = layer(torch.randn(7, 4, 3), mask=mask)
    >>> bool((out[3:, 1] == 0).all()), layer.num_batches_tracked_l0[:7].tolist()
    (True, [2, 2, 2, 2, 2, 1, 1])
    """

    _mode = "LSTM"


class BatchNormGRU(_BatchNormRNN):
    """A GRU with batch normalization inside, after arXiv:1603.09025, in the place of torch.nn.GRU.

    (r, z, n) = BN(W_ih x) + b_ih,  (r_h, z_h, n_h) = BN(W_hh h) + b_hh
    n' = tanh(n + sigmoid(r + r_h) * n_h)
    h' = (1 - sigmoid(z + z_h)) * n' + sigmoid(z + z_h) * h

    The paper has the LSTM only; this is its rule: the products are normalized, the recurrence of h is not. There is no
    cell to normalize on its way to the output. Everything else, steps, padding, statistics and first values, is as in
    :class:`BatchNormLSTM`, without gamma_c and beta_c.

    Shapes: as torch.nn.GRU, and its weights; gamma_ih_l0, gamma_hh_l0 (3 * hidden,), running_mean_*_l0 and
    running_var_*_l0 (max_steps, 3 * hidden), num_batches_tracked_l0 (max_steps,).

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, device, dtype: of torch.nn.GRU.
        proj_size: 0.
        max_steps, momentum, eps, bessel, nonfinite: as :class:`BatchNormLSTM`.

    Raises:
        NormValueError, NormTypeError: as :class:`BatchNormLSTM`.

    >>> out, h = BatchNormGRU(3, 5)(torch.randn(7, 4, 3))
    >>> out.shape, h.shape
    (torch.Size([7, 4, 5]), torch.Size([1, 4, 5]))
    """

    _mode = "GRU"


class LayerNormLSTM(_LayerNormRNN):
    """An LSTM with layer normalization inside (arXiv:1607.06450), in the place of torch.nn.LSTM.

    (i, f, g, o) = LN(W_ih x) + b_ih + LN(W_hh h) + b_hh
    c' = sigmoid(f) * c + sigmoid(i) * tanh(g)
    h' = sigmoid(o) * tanh(LN(c') + beta_c)

    LN is over all 4 * hidden values of a sample at a step, and over the hidden values of c'. Every LN has a gain:
    gamma_ih, gamma_hh, gamma_c. Training and evaluation are the same, dropout aside, and no sample depends on others.

    This is the paper's form. Practice often differs in two ways that are not followed: each gate is normalized by
    itself, after the products were added (TensorFlow's LayerNormBasicLSTMCell), and the normalized c' is what the next
    step begins with (the same, and the examples of PyTorch), where the paper leaves the recurrence of c alone.

    Shapes: as torch.nn.LSTM, and so are the weights and their names; then gamma_ih_l0, gamma_hh_l0 (4 * hidden,),
    gamma_c_l0, beta_c_l0 (hidden,) for every layer and, with `_reverse`, direction. First values: gains 1, beta_c 0,
    the others as in torch.nn. `mask` is as in :class:`BatchNormLSTM`.

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, device, dtype: of torch.nn.LSTM.
        proj_size: 0; a projection is refused.
        eps: added to the variance; the paper's formula has none.

    Raises:
        NormValueError, NormTypeError: for arguments and inputs out of range.

    >>> out, (h, c) = LayerNormLSTM(3, 5, batch_first=True)(torch.randn(4, 7, 3))
    >>> out.shape, h.shape
    (torch.Size([4, 7, 5]), torch.Size([1, 4, 5]))
    """

    _mode = "LSTM"


class LayerNormGRU(_LayerNormRNN):
    """A GRU with layer normalization inside (arXiv:1607.06450), in the place of torch.nn.GRU.

    (r, z, n) = LN(W_ih x) + b_ih,  (r_h, z_h, n_h) = LN(W_hh h) + b_hh
    n' = tanh(n + sigmoid(r + r_h) * n_h)
    h' = (1 - sigmoid(z + z_h)) * n' + sigmoid(z + z_h) * h

    As in the paper's supplement, LN takes the gates r and z of a sample together and the candidate n by itself;
    practice often takes all 3 * hidden values together. As in PyTorch, and not in the paper, z weighs the old state.
    The recurrence of h is not normalized. Everything else is as in :class:`LayerNormLSTM`, without gamma_c and beta_c.

    Shapes: as torch.nn.GRU, and its weights; gamma_ih_l0, gamma_hh_l0 (3 * hidden,).

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, device, dtype: of torch.nn.GRU.
        proj_size: 0.
        eps: added to the variance; the paper's formula has none.

    Raises:
        NormValueError, NormTypeError: for arguments and inputs out of range.

    >>> out, h = LayerNormGRU(3, 5)(torch.randn(7, 4, 3))
    >>> out.shape, h.shape
    (torch.Size([7, 4, 5]), torch.Size([1, 4, 5]))
    """

    _mode = "GRU"
