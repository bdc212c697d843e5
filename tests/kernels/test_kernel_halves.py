"""The halves of batch norm, on every instruction set: parts of a batch that share statistics and sums are the whole."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from kernel_calls import (
    ACTIVATIONS,
    EPS32,
    SETS,
    TYPES,
    Case,
    Guarded,
    Inputs,
    Outputs,
    available,
    call,
    compare,
    inputs,
    needs_kernels,
    oracle,
)

pytestmark = needs_kernels
every_set = pytest.mark.parametrize("which", SETS)
every_kind = pytest.mark.parametrize("kind", ["float32", "bfloat16"])
LAST = "channels_last"
# Patches of short runs, rows, a part of one run, columns in tiles and with a rest, columns in several pieces.
CASES = [
    Case("batch", (5, 9, 7)),
    Case("batch", (5, 3, 260)),
    Case("batch", (2, 37, 19)),
    Case("batch", (5, 70, 3, 2), LAST),
    Case("batch", (2049, 5)),
]


class Part:
    """Some samples of a batch, in guarded memory, and what the kernels give for them."""

    def __init__(self, case: Case, i: Inputs, kind: str, which: str, threads: int):
        channels = case.shape[1]
        self.numbers, self.count = case.numbers, i.x.size // channels
        self.native, self.place = available(), SETS.index(which)
        self.label = f"{case}, {which}, {kind}"
        self.eps, self.kind, self.activation, self.threads = i.eps, TYPES[kind], ACTIVATIONS[i.activation], threads
        empty, nothing = np.full(i.x.size, np.nan), np.full(channels, np.nan)
        large = {"x": i.x, "dy": i.dy, "residual": i.residual, "y": empty, "dx": empty}
        if i.residual is not None and i.activation is not None:
            large["dresidual"] = empty
        small = {"gamma": i.gamma, "beta": i.beta}
        small |= dict.fromkeys(("var", "mean", "rest", "dgamma", "dbeta", "average_g", "average_gx"), nothing)
        self.arrays = {name: Guarded(values, kind) for name, values in large.items() if values is not None}
        self.arrays |= {name: Guarded(values) for name, values in small.items() if values is not None}

    def at(self, *names: str) -> list[int]:
        return [self.arrays[name].address if name in self.arrays else 0 for name in names]

    def give(self, **values: np.ndarray) -> None:
        for name, value in values.items():
            self.arrays[name] = Guarded(value)

    def _call(self, run, *arguments) -> None:
        run(self.place, self.numbers, *arguments)
        for name, array in self.arrays.items():
            array.check(f"{self.label}: {name}")

    def find(self) -> None:
        how = 0.0, True, False, self.kind, 0, self.threads
        self._call(self.native.forward, *self.at("x", "", "", "", "", "", "var", "mean", "rest"), *how)

    def normalize(self) -> None:
        names = "x", "residual", "gamma", "beta", "y", "", "var", "mean", "rest"
        how = self.eps, True, True, self.kind, self.activation, self.threads
        self._call(self.native.forward, *self.at(*names), *how)

    def sum(self) -> None:
        before = ("dy", "x", "residual" if self.activation else "", "gamma", "beta", "", "")
        how = self.eps, True, True, self.kind, self.activation, self.threads
        self._call(self.native.backward, *self.at(*before, "dgamma", "dbeta", "", "var", "mean", "rest"), *how)

    def differentiate(self) -> None:
        before = ("dy", "x", "residual" if self.activation else "", "gamma", "beta", "dx", "dresidual")
        how = self.eps, self.kind, self.activation, self.threads
        names = *before, "average_g", "average_gx", "var", "mean", "rest"
        self._call(self.native.gradient, *self.at(*names), *how)

    def values(self, name: str) -> np.ndarray:
        return self.arrays[name].values


def together(parts: list[Part]) -> Outputs:
    """Forward and backward of parts that know of each other what `find` and `sum` say."""
    for part in parts:
        part.find()
    n = np.array([part.count for part in parts], dtype=np.float64)[:, None]
    means = np.stack([part.values("mean") + part.values("rest") for part in parts])
    mean = (n * means).sum(0) / n.sum()
    var = (n * (np.stack([part.values("var") for part in parts]) + (means - mean) ** 2)).sum(0) / n.sum()
    high = mean.astype(np.float32).astype(np.float64)
    for part in parts:
        part.give(mean=high, rest=mean - high, var=var)
        part.normalize()
        part.sum()
    sums = {name: np.sum([part.values(name) for part in parts], axis=0) for name in ("dgamma", "dbeta")}
    for part in parts:
        part.give(average_g=sums["dbeta"] / n.sum(), average_gx=sums["dgamma"] / n.sum())
        part.differentiate()

    def joined(name: str) -> np.ndarray | None:
        return np.concatenate([part.values(name) for part in parts]) if name in parts[0].arrays else None

    large = {name: joined(name) for name in ("y", "dx", "dresidual")}
    return Outputs(mean=mean, var=var, **large, **sums)


def cut(case: Case, i: Inputs, sizes: list[int], *how) -> list[Part]:
    each, end, parts = i.x.size // case.shape[0], 0, []
    for size in sizes:
        start, end = end, end + size * each
        some = {name: getattr(i, name) for name in ("x", "dy", "residual")}
        some = {name: None if value is None else value[start:end] for name, value in some.items()}
        parts.append(Part(replace(case, shape=(size, *case.shape[1:])), replace(i, **some), *how))
    return parts


def variants():
    for k, (case, (activation, residual)) in enumerate(
        itertools.product(CASES, [(None, False), ("silu", True), ("relu", False), (None, True)])
    ):
        yield k, case, {"activation": activation, "residual": residual, "affine": k % 3 != 2}


@every_kind
@every_set
def test_uneven_parts_are_the_whole(which, kind):
    for k, case, options in variants():
        i = inputs(case, kind, seed=k, **options)
        n, expected = case.shape[0], oracle(case, i)
        for sizes in ([n], [1, n - 1]):
            got = together(cut(case, i, sizes, kind, which, 1 + k % 3))
            for name in ("dgamma", "dbeta"):  # asked for without a gamma too, where the oracle has none
                if getattr(expected, name) is None:
                    setattr(got, name, None)
            compare(case, i, kind, which, got, expected)


@every_kind
@every_set
def test_what_a_half_finds_is_what_the_whole_finds(which, kind):
    for k, case, options in variants():
        i = inputs(case, kind, seed=k, **(options | {"affine": True}))
        whole = call(case, i, kind, which)
        (part,) = cut(case, i, [case.shape[0]], kind, which, 1)
        part.find()
        assert np.array_equal(part.values("mean") + part.values("rest"), whole.mean)
        assert np.array_equal(part.values("var"), whole.var)
        part.sum()
        # The same sums, but a whole that keeps costly derivatives adds run by run: some roundings of the largest term.
        allowed = 8 * EPS32 * np.abs(i.dy).max() * (1 + part.count) ** 0.5
        np.testing.assert_allclose(part.values("dgamma"), whole.dgamma, rtol=2 * EPS32, atol=allowed)
        np.testing.assert_allclose(part.values("dbeta"), whole.dbeta, rtol=2 * EPS32, atol=allowed)


@every_set
def test_far_from_zero_the_rest_of_the_mean_keeps_the_digits(which):
    for case in CASES:
        i = inputs(case, "float32", offset=1e4)
        got = together(cut(case, i, [1, case.shape[0] - 1], "float32", which, 2))
        compare(case, i, "float32", which, got, oracle(case, i))
