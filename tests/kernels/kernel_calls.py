"""Compiled kernels called as they are, on guarded memory, and an oracle that knows nothing of their geometries.

Every array that a kernel sees lies in the middle of a larger one, at an odd place: what it reads beside its values is
NaN, and what it writes there is found. The oracle is PyTorch in float64, by the statistic and the gamma that each value
belongs to, its gradients by autograd.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import pytest
import torch

from normkit.core import catalog
from normkit.core.plan import plan
from normkit.kernels import instruction_sets
from normkit.kernels.native import ACTIVATIONS, TYPES, available, evaluation, geometry
from normkit.torch.functional import ACTIVATIONS as FUNCTIONS

SETS = instruction_sets()
WIDTHS = {"baseline": 4, "avx2": 8, "avx512": 16}
EPS32 = 2.0**-23
OUTPUT = {"float32": 2.0**-24, "bfloat16": 2.0**-8}  # half a spacing, of the magnitude: the last rounding
# Roundings of float32 on the way, in units of eps times the largest magnitude that is added: a lane adds up to 1024
# values one by one (32 roundings of half a spacing, if they walk at random); about ten operations a value follow.
# E[x^2] - E[x]^2 needs thousands at the offsets used here.
ROOM = 24
GUARD = 37  # odd, so that no vector is aligned
SPECS = {
    "batch": catalog.BATCH,
    "ghost": catalog.GHOST,
    "instance": catalog.INSTANCE,
    "group": catalog.GROUP,
    "layer": catalog.LAYER,
    "layer_2d": catalog.LAYER_2D,
    "rms": catalog.RMS,
    "rms_2d": catalog.RMS_2D,
}

needs_kernels = pytest.mark.skipif(not SETS, reason="the package was installed without compiled kernels")


def to_bits(values: np.ndarray, kind: str) -> np.ndarray:
    """Values in the type, ready to lie in memory; bfloat16 as its bits."""
    t = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))
    return t.numpy() if kind == "float32" else t.bfloat16().view(torch.int16).numpy()


def from_bits(memory: np.ndarray, kind: str) -> np.ndarray:
    t = torch.from_numpy(memory)
    return (t if kind == "float32" else t.view(torch.bfloat16)).double().numpy()


class Guarded:
    """An array between guards of NaN."""

    def __init__(self, values: np.ndarray, kind: str = "float32", shift: int = 0):
        before = GUARD + shift
        whole = np.full(values.size + before + GUARD, np.nan, dtype=np.float32)
        whole[before : before + values.size] = np.asarray(values, dtype=np.float32).ravel()
        self.memory, self.kind, self.place = to_bits(whole, kind), kind, slice(before, before + values.size)
        self.before = self.memory.copy()

    @property
    def address(self) -> int:
        return self.memory[self.place].ctypes.data

    @property
    def values(self) -> np.ndarray:
        return from_bits(self.memory[self.place], self.kind)

    @property
    def bits(self) -> bytes:
        return self.memory[self.place].tobytes()

    def check(self, label: str) -> None:
        inside = self.memory.copy()
        inside[self.place] = self.before[self.place]
        assert inside.tobytes() == self.before.tobytes(), f"{label}: something was written beside the array"


@dataclass(frozen=True)
class Case:
    """A normalizer and an input; `given` normalizes by statistics that are given, one per channel."""

    name: str
    shape: tuple[int, ...]
    layout: str = "contiguous"
    size: int = 0  # of groups, or of the members of a ghost batch
    given: bool = False

    def __str__(self) -> str:
        size = f"-{self.size}" if self.size else ""
        shape = "x".join(map(str, self.shape))
        return f"{self.name}{size}-{shape}{'-last' if self.layout != 'contiguous' else ''}{'-given' * self.given}"

    @property
    def spec(self):
        return SPECS[self.name]

    @cached_property
    def numbers(self) -> tuple[int, ...]:
        if self.given:
            return evaluation(self.shape, self.layout)
        sizes = {
            "group": (("g", self.size),),
            "ghost": (("n", self.size),),
            "layer": (("*c", self.shape[1:]),),
            "rms": (("*c", self.shape[1:]),),
        }.get(self.name, ())
        found = geometry(self.spec.name, plan(self.spec, len(self.shape), sizes), self.shape, self.layout)
        assert not isinstance(found, str), f"{self}: {found}"
        return found.numbers

    @cached_property
    def ids(self) -> tuple[np.ndarray, np.ndarray]:
        """The statistic and the entry of gamma of every value, in the order of memory."""
        shape = self.shape
        flat = (shape[0], shape[1] if len(shape) > 1 else 1, int(np.prod(shape[2:])))
        n, c, s = np.ogrid[: flat[0], : flat[1], : flat[2]]
        channels, positions = flat[1], flat[2]
        if self.given or self.name == "batch":
            stat = c
        elif self.name == "ghost":
            stat = (n // self.size) * channels + c
        elif self.name == "instance":
            stat = n * channels + c
        elif self.name == "group":
            stat = n * self.size + c // (channels // self.size)
        elif self.name in ("layer", "rms"):
            stat = n
        else:
            stat = n * positions + s
        entry = c * positions + s if self.name in ("layer", "rms") else c
        arrays = [np.broadcast_to(a, flat) for a in (stat, entry)]
        if self.layout != "contiguous":
            arrays = [np.moveaxis(a, 1, -1) for a in arrays]
        return arrays[0].ravel().copy(), arrays[1].ravel().copy()


@dataclass
class Inputs:
    """What a call is given, in float64 that holds values of the type."""

    x: np.ndarray
    dy: np.ndarray
    residual: np.ndarray | None
    gamma: np.ndarray | None
    beta: np.ndarray | None
    activation: str | None = None
    eps: float = 1e-5
    mean: np.ndarray | None = None
    var: np.ndarray | None = None


def inputs(case: Case, kind: str, *, seed=0, activation=None, residual=False, affine=True, offset=0.0) -> Inputs:
    rng = np.random.default_rng(seed)
    size, entries = int(np.prod(case.shape)), int(case.ids[1].max()) + 1

    def typed(values):
        return from_bits(to_bits(values, kind), kind)

    def single(values):
        return values.astype(np.float32).astype(np.float64)

    center = case.spec.center
    return Inputs(
        x=typed(rng.normal(size=size) * 1.5 + offset),
        dy=typed(rng.normal(size=size)),
        residual=typed(rng.normal(size=size)) if residual else None,
        gamma=single(rng.uniform(0.5, 1.5, entries)) if affine else None,
        beta=single(rng.normal(size=entries)) if affine and center else None,
        activation=activation,
        mean=single(rng.normal(size=entries) + offset) if case.given else None,
        var=single(rng.uniform(0.5, 2.0, entries)) if case.given else None,
    )


@dataclass
class Outputs:
    y: np.ndarray
    mean: np.ndarray | None
    var: np.ndarray
    dx: np.ndarray
    dresidual: np.ndarray | None
    dgamma: np.ndarray | None
    dbeta: np.ndarray | None
    bits: tuple[bytes, ...] = ()
    scale: dict[str, float] = field(default_factory=dict)


def call(case: Case, i: Inputs, kind: str, which: str, *, threads: int = 1, shift: int = 0) -> Outputs:
    """Forward and backward, with guards around every array."""
    native, place = available(), SETS.index(which)
    center = case.spec.center
    count = int(case.ids[0].max()) + 1
    empty = np.full(i.x.size, np.nan)
    arrays: dict[str, Guarded | None] = {
        name: None if value is None else Guarded(value, kind, shift)
        for name, value in {
            "x": i.x,
            "dy": i.dy,
            "residual": i.residual,
            "y": empty,
            "dx": empty,
            "dresidual": empty if i.residual is not None and i.activation is not None else None,
        }.items()
    }
    nothing = np.full(count, np.nan)
    arrays |= {
        name: None if value is None else Guarded(value)
        for name, value in {
            "gamma": i.gamma,
            "beta": i.beta,
            "dgamma": None if i.gamma is None else np.full(i.gamma.size, np.nan),
            "dbeta": None if i.beta is None else np.full(i.beta.size, np.nan),
            "var": i.var if case.given else nothing,
            "mean": (i.mean if case.given else nothing) if center else None,
            "rest": nothing if center and not case.given else None,
        }.items()
    }

    def at(*names):
        return [0 if arrays[name] is None else arrays[name].address for name in names]

    act = ACTIVATIONS[i.activation]
    arrays["none"] = None
    rest = (i.eps, center, case.given, TYPES[kind], act, threads)
    native.forward(
        place, case.numbers, *at("x", "residual", "gamma", "beta", "y", "none", "var", "mean", "rest"), *rest
    )
    # Without an activation the gradient goes through the sum as it is, and the kernel is not told of the residual.
    summed = "residual" if i.activation is not None else "none"
    names = ("dy", "x", summed, "gamma", "beta", "dx", "dresidual", "dgamma", "dbeta", "none", "var", "mean", "rest")
    native.backward(place, case.numbers, *at(*names), *rest)
    for name, array in arrays.items():
        if array is not None:
            array.check(f"{case}, {which}, {kind}: {name}")
    values = {name: None if array is None else array.values for name, array in arrays.items()}
    mean = values["mean"]
    written = ("y", "dx", "dresidual", "dgamma", "dbeta", "none", "var", "mean", "rest")
    return Outputs(
        y=values["y"],
        mean=mean + values["rest"] if mean is not None and values["rest"] is not None else mean,
        var=values["var"],
        dx=values["dx"],
        dresidual=values["dresidual"],
        dgamma=values["dgamma"],
        dbeta=values["dbeta"],
        bits=tuple(arrays[name].bits for name in written if arrays[name] is not None),
    )


def oracle(case: Case, i: Inputs) -> Outputs:
    """In float64. `scale` says how large the terms are that are added to form each result."""
    stat, entry = (torch.from_numpy(a) for a in case.ids)
    count = int(stat.max()) + 1

    def leaf(values):
        return None if values is None else torch.from_numpy(values).clone().requires_grad_()

    x, residual, gamma, beta = map(leaf, (i.x, i.residual, i.gamma, i.beta))
    number = torch.zeros(count, dtype=torch.float64).index_add(0, stat, torch.ones_like(x))

    def average(values):
        return torch.zeros(count, dtype=torch.float64).index_add(0, stat, values) / number

    if case.given:
        mean, var = torch.from_numpy(i.mean), torch.from_numpy(i.var)
    else:
        mean = average(x) if case.spec.center else torch.zeros(count, dtype=torch.float64)
        var = average((x - mean[stat]) ** 2)
    rstd = (var + i.eps) ** -0.5
    normalized = (x - mean[stat]) * rstd[stat]
    z = normalized if gamma is None else normalized * gamma[entry]
    z = z if beta is None else z + beta[entry]
    z = z if residual is None else z + residual
    y = z if i.activation is None else FUNCTIONS[i.activation](z)
    wanted = {"dx": x, "dresidual": residual, "dgamma": gamma, "dbeta": beta}
    wanted = {name: t for name, t in wanted.items() if t is not None}
    found = dict(zip(wanted, torch.autograd.grad(y, list(wanted.values()), torch.from_numpy(i.dy)), strict=True))
    found = {
        name: found[name].detach().numpy() if name in found else None for name in ("dx", "dresidual", "dgamma", "dbeta")
    }
    gain = rstd[stat] if gamma is None else rstd[stat] * gamma[entry]
    per_entry = np.bincount(case.ids[1], minlength=1).max()
    worst = float(np.abs(i.dy).max())
    top = float(normalized.detach().abs().max())
    sizes = {
        "y": float(z.detach().abs().max()),
        # The last two terms are sums of gains times gradients, of which each may be as large as the largest.
        "dx": float(gain.detach().abs().max()) * worst * (1 + top),
        "dresidual": worst,
        "dgamma": worst * top * per_entry**0.5,
        "dbeta": worst * per_entry**0.5,
    }
    return Outputs(y=y.detach().numpy(), mean=mean.detach().numpy(), var=var.detach().numpy(), scale=sizes, **found)


def check(case: Case, i: Inputs, kind: str, *sets: str, **how) -> None:
    """Compare everything that the kernels of some instruction sets give with the oracle."""
    expected = oracle(case, i)
    for which in sets:
        compare(case, i, kind, which, call(case, i, kind, which, **how), expected)


def compare(case: Case, i: Inputs, kind: str, which: str, got: Outputs, expected: Outputs) -> None:
    label = f"{case}, {which}, {kind}, {i.activation}"
    if not case.given:
        top = np.abs(i.x).max()
        np.testing.assert_allclose(
            got.var, expected.var, rtol=ROOM * EPS32, atol=(4 * EPS32 * 1.5) ** 2 * 4, err_msg=label
        )
        if case.spec.center:
            # A lane adds 64 deviations from a guess, which may be off by most of a deviation: its sum grows to 64 of
            # them, and so do the roundings, half a unit each. Bfloat16's few digits make them lean to one side.
            allowed = EPS32 * EPS32 * top + 8 * EPS32 * 1.5
            np.testing.assert_allclose(got.mean, expected.mean, rtol=0, atol=allowed, err_msg=label)
    for name in ("y", "dx", "dresidual", "dgamma", "dbeta"):
        actual, right = getattr(got, name), getattr(expected, name)
        if actual is None:
            continue
        last = OUTPUT["float32" if name in ("dgamma", "dbeta") else kind]
        allowed = last * np.abs(right).max() + ROOM * EPS32 * expected.scale[name]
        np.testing.assert_allclose(actual, right, rtol=0, atol=allowed, err_msg=f"{label}: {name}")
