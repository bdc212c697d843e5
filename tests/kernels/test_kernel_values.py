"""The compiled kernels against float64, on every instruction set of this machine: shapes, types, values."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_calls import (
    ACTIVATIONS,
    EPS32,
    FUNCTIONS,
    SETS,
    WIDTHS,
    Case,
    Guarded,
    call,
    check,
    from_bits,
    inputs,
    needs_kernels,
    oracle,
    to_bits,
)

from normkit.kernels.native import TYPES, available

pytestmark = needs_kernels
every_set = pytest.mark.parametrize("which", SETS)
KINDS = ("float32", "bfloat16")
every_kind = pytest.mark.parametrize("kind", KINDS)
LAST = "channels_last"


def lengths(which: str) -> list[int]:
    w = WIDTHS[which]
    return sorted({1, 3, 7, 16, w - 1, w, w + 1, 2 * w + 1})


def cases(n: int) -> list[Case]:
    """Every normalizer in every layout, with runs (or rows of the matrix) of length n."""
    return [
        Case("batch", (3, 4, n)),
        Case("batch", (5, n, 1, 2), LAST),
        Case("batch", (6, n)),
        Case("ghost", (6, 3, n), size=3),
        Case("ghost", (6, n, 2, 1), LAST, size=2),
        Case("instance", (2, 5, n, 1)),
        Case("instance", (2, n, 3, 1), LAST),
        Case("group", (2, 6, n), size=3),
        Case("group", (2, 2 * n, 3, 1), LAST, size=2),
        Case("layer", (5, n)),
        Case("layer_2d", (2, n, 3, 1), LAST),
        Case("rms", (5, n)),
        Case("rms_2d", (2, n, 3, 1), LAST),
        Case("batch", (3, 4, n), given=True),
        Case("batch", (3, n, 2, 2), LAST, given=True),
        Case("batch", (6, n), given=True),
    ]


@every_kind
@every_set
def test_lengths_around_a_vector(which, kind):
    """Odd places, guards of NaN on both sides, all activations in turn."""
    for k, case in enumerate(case for n in lengths(which) for case in cases(n)):
        activation = (*ACTIVATIONS,)[k % len(ACTIVATIONS)]
        i = inputs(case, kind, seed=k, activation=activation, residual=k % 3 == 0, affine=k % 5 != 0)
        check(case, i, kind, which, threads=1 + k % 3, shift=k % 4)


# Each path of the kernels (csrc/kernels.cpp): patches of runs below 128, bundles below 1024, blocks of 4096, 256 runs
# summed in float, blocks of 32768 values of a matrix, tiles of 4 vectors.
BOUNDARIES = [
    *(Case("batch", (2, 9, s)) for s in (127, 128, 129)),
    *(Case("batch", (2, 3, s)) for s in (767, 768, 1023, 1024, 1025)),
    *(Case("batch", (n, 33, 130)) for n in (2, 32)),
    *(Case("batch", (n, 3, 2)) for n in (255, 256, 257)),
    *(Case("batch", (n, 2, 1500)) for n in (2, 3)),
    *(Case("ghost", (4, 5, s), size=2) for s in (49, 196, 1100)),
    *(Case("instance", (2, 3, s)) for s in (127, 128, 1023, 1024, 4095, 4096, 4097)),
    *(Case("group", (2, 4, s), size=2) for s in (40, 2047, 2048, 2049, 4097)),
    *(Case("layer", (3, s)) for s in (4095, 4096, 4097, 8193)),
    *(Case("layer", (n, 9)) for n in (63, 64, 65, 129)),
    *(Case("rms", (3, s)) for s in (4096, 4097)),
    *(Case("batch", (n, 64)) for n in (511, 512, 513, 1025)),
    *(Case("batch", (n, 5)) for n in (1023, 1024, 1025, 2047, 2048, 4096, 20000)),
    *(Case("batch", (3, c, 1, 3), LAST) for c in (15, 31, 32, 33, 63, 64, 65, 129)),
    *(Case("group", (2, 64, 20, 30), LAST, size=8) for _ in (0,)),
    *(Case("instance", (3, 40, 30, 30), LAST) for _ in (0,)),
    *(Case("batch", (2, 3, s), given=True) for s in (127, 1023, 4097)),
]


@every_kind
def test_boundaries_between_paths(kind):
    for k, case in enumerate(BOUNDARIES):
        i = inputs(case, kind, seed=k, activation=(None, "relu", "silu")[k % 3], residual=k % 2 == 0)
        check(case, i, kind, *SETS, threads=1 + k % 2)


PATHS = [
    Case("batch", (2, 3, 19)),
    Case("batch", (2, 3, 130)),
    Case("instance", (2, 3, 1030)),
    Case("group", (2, 4, 21), size=2),
    Case("layer", (4, 37)),
    Case("batch", (3, 37, 2, 1), LAST),
    Case("group", (2, 6, 3, 2), LAST, size=3),
    Case("batch", (2, 3, 130), given=True),
    Case("batch", (3, 37, 2, 1), LAST, given=True),
]


def test_every_activation_on_every_path():
    for k, (case, activation, residual, kind) in enumerate(itertools.product(PATHS, ACTIVATIONS, (False, True), KINDS)):
        check(case, inputs(case, kind, seed=k, activation=activation, residual=residual), kind, *SETS)


@every_kind
def test_far_from_zero(kind):
    """DESIGN.md section 5: mean / std up to 1e4 in float32, and to where bfloat16 still tells values apart."""
    offset = 1.5e4 if kind == "float32" else 1.5 * 0.1 * 2**7
    for case in [*PATHS, Case("batch", (300, 70)), Case("batch", (40, 5, 300)), Case("layer", (3, 9000))]:
        if case.given:
            continue
        check(case, inputs(case, kind, activation="relu", offset=offset), kind, *SETS)


@every_set
def test_an_unsound_variance_would_be_found(which):
    """The broken twin: E[x^2] - E[x]^2 in float32 on what the test above passes."""
    case = Case("layer", (4, 37))
    i = inputs(case, "float32", offset=1.5e4)
    x = i.x.astype(np.float32).reshape(case.shape)
    naive = (x * x).mean(1) - x.mean(1) ** 2
    right = oracle(case, i).var
    assert np.abs(naive - right).max() > 1e3 * np.abs(call(case, i, "float32", which).var - right).max()


GRID = np.unique(
    np.concatenate([
        np.linspace(-12, 12, 4801),
        [-3, 3, 0, 6, -0.0],  # kinks, where the derivative is a convention
        [s * v for v in (20, 50, 87, 88, 88.5, 89, 100, 1e4, 1e10, 1e15, 1e20, 1e30, 3e38) for s in (-1, 1)],
        [s * 10.0**-k for k in (3, 6, 9, 20, 38) for s in (-1, 1)],
    ]).astype(np.float32)
)  # fmt: skip


def activated(which, activation, z, kind="float32", columns=False):
    """act(z) and act'(z) of a kernel: by statistics 0 and 1 and eps 0, the normalized value is z itself."""
    case = Case("batch", (z.size, 1), given=True) if columns else Case("batch", (1, 1, z.size), given=True)
    i = inputs(case, kind, activation=activation, affine=False)
    i.x, i.dy = z.astype(np.float64), np.ones(z.size)
    i.mean, i.var, i.eps = np.zeros(1), np.ones(1), 0.0
    got = call(case, i, kind, which)
    return got.y, got.dx


@pytest.mark.parametrize("activation", [a for a in ACTIVATIONS if a])
@every_set
def test_activations_over_a_dense_grid(which, activation):
    for columns in (False, True):
        y, dx = activated(which, activation, GRID, columns=columns)
        z = torch.from_numpy(GRID.astype(np.float64)).requires_grad_()
        right = FUNCTIONS[activation](z)
        (slope,) = torch.autograd.grad(right.sum(), z)
        # Rounding, and 1.5e-7 of the error function (simd.hpp) times z.
        allowed = 4 * EPS32 * np.maximum(1, np.abs(right.detach().numpy()))
        fits = np.abs(GRID) < 5e37  # beyond, z * 6 (hardswish) is no number of float32
        np.testing.assert_array_less(np.abs(y - right.detach().numpy())[fits], allowed[fits])
        finite = np.isfinite(slope.numpy()) & (np.abs(GRID) < 1e12)  # beyond, z^2 and z^3 overflow in float32
        np.testing.assert_array_less(np.abs(dx - slope.numpy())[finite], 20 * EPS32)


@pytest.mark.parametrize("activation", [a for a in ACTIVATIONS if a])
@every_set
def test_activations_at_the_end_of_the_numbers_are_those_of_torch(which, activation):
    """Infinities, NaN, zeros of both signs and the largest numbers, in float32, kind by kind."""
    z = np.array([np.inf, -np.inf, np.nan, 3e38, -3e38, 1e30, -1e30, 1e4, -1e4, 0.0, -0.0], dtype=np.float32)
    y, dx = activated(which, activation, z)
    # PyTorch's gelu is infinite at 3e38 in float32, its own in float64 is 3e38 and so is ours.
    t = torch.from_numpy(z if activation != "gelu" else z.astype(np.float64)).requires_grad_()
    right = FUNCTIONS[activation](t)
    (slope,) = torch.autograd.grad(right.sum(), t)
    same = {"rtol": 4 * EPS32, "atol": 1e-30, "err_msg": activation}
    np.testing.assert_allclose(y, right.detach().double().numpy(), **same)
    # Where z^2 overflows in float32, 0 times infinity is NaN, in PyTorch as here.
    tame = np.abs(z) <= 1e4 if activation.startswith("gelu") else ~np.isnan(z)
    np.testing.assert_allclose(dx[tame], slope.double().numpy()[tame], **same)


@every_kind
@every_set
def test_subnormal_numbers_are_not_flushed(which, kind):
    """With statistics 0 and 1 and eps 0 nothing may change: not a bit, on rows and on columns."""
    tiny = 2.0 ** -np.arange(127, 133) if kind == "bfloat16" else 2.0 ** -np.arange(127, 149)
    x = np.concatenate([tiny, -tiny, 3 * tiny[:-2], [0.0, 1.0, 2.0**-126]])
    for columns in (False, True):
        y, dx = activated(which, None, x, kind, columns)
        assert (y == x).all()
        assert (dx == 1).all()
        y, _ = activated(which, "relu", x, kind, columns)
        assert (y == np.maximum(x, 0)).all()
    case = Case("batch", (2, 3, 7))  # a gradient that is subnormal
    i = inputs(case, kind)
    i.dy = i.dy * 2.0**-130
    got = call(case, i, kind, which)
    assert (got.dx != 0).any()
    assert (np.abs(got.dx) < 2.0**-120).all()


@every_set
def test_rounding_to_bfloat16_is_to_nearest_even(which):
    """Halfway cases, the largest numbers, subnormals and NaN: bit for bit what torch's conversion gives."""
    rng = np.random.default_rng(0)
    x = rng.integers(0, 2**16, 4096).astype(np.uint32) << 16
    residual = rng.integers(0, 2**16, 4096).astype(np.uint32) << 16
    x, residual = (torch.from_numpy(a.view(np.float32).copy()) for a in (x, residual))
    case = Case("batch", (1, 1, x.numel()), given=True)
    i = inputs(case, "bfloat16", affine=False)
    i.x, i.residual, i.dy = x.double().numpy(), residual.double().numpy(), np.zeros(x.numel())
    i.mean, i.var, i.eps = np.zeros(1), np.ones(1), 0.0
    right = (x + residual).bfloat16().double().numpy()
    np.testing.assert_array_equal(call(case, i, "bfloat16", which).y, right)


@every_kind
@every_set
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_spoils_its_own_statistic_only(which, kind, bad):
    for case in [*PATHS, Case("batch", (2, 40, 5)), Case("rms", (5, 21))]:
        i = inputs(case, kind, residual=True)
        clean = oracle(case, i)
        i.x[3] = bad
        got = call(case, i, kind, which)
        stat = case.ids[0]
        touched = (np.arange(i.x.size) == 3) if case.given else stat == stat[3]
        assert np.isfinite(got.y[~touched]).all(), str(case)
        assert not np.isfinite(got.y[3]), str(case)
        if not case.given:
            assert not np.isfinite(got.var[stat[3]]), str(case)
            others = np.arange(got.var.size) != stat[3]
            np.testing.assert_allclose(got.var[others], clean.var[others], rtol=16 * EPS32)


@pytest.mark.parametrize("threads", [1, 2, 3])
@every_set
def test_two_runs_give_identical_bits(which, threads):
    for case in [*PATHS, Case("batch", (300, 70)), Case("layer", (300, 40))]:
        i = inputs(case, "float32", activation="silu", residual=True)
        first = call(case, i, "float32", which, threads=threads)
        assert first.bits == call(case, i, "float32", which, threads=threads).bits, str(case)
        check(case, i, "float32", which, threads=threads)


@every_kind
@every_set
def test_a_sample_does_not_depend_on_the_batch(which, kind):
    """Bit for bit: alone or among others, by one thread or several, wherever statistics are a sample's own or given."""
    for one in [
        Case("instance", (1, 3, 50)),
        Case("instance", (1, 3, 500)),
        Case("instance", (1, 3, 5000)),
        Case("instance", (1, 40, 60, 60), LAST),
        Case("group", (1, 4, 50), size=2),
        Case("group", (1, 40, 60, 60), LAST, size=5),
        Case("layer", (1, 700)),
        Case("layer_2d", (1, 40, 5, 5), LAST),
        Case("rms", (1, 700)),
        Case("batch", (1, 3, 50), given=True),
        Case("batch", (1, 3, 5000), given=True),
        Case("batch", (1, 40, 9, 9), LAST, given=True),
    ]:
        many = Case(one.name, (3, *one.shape[1:]), one.layout, one.size, one.given)
        i = inputs(many, kind, activation="silu", residual=True)
        size = int(np.prod(one.shape))
        alone = inputs(one, kind, activation="silu", residual=True)
        alone.gamma, alone.beta, alone.mean, alone.var = i.gamma, i.beta, i.mean, i.var
        whole = call(many, i, kind, which, threads=2).y
        for sample, threads in ((0, 1), (1, 3), (2, 1)):
            here = slice(sample * size, (sample + 1) * size)
            alone.x, alone.dy, alone.residual = i.x[here], i.dy[here], i.residual[here]
            y = call(one, alone, kind, which, threads=threads).y
            np.testing.assert_array_equal(y, whole[here], err_msg=f"{many}, sample {sample}, {threads} threads")


@st.composite
def drawn(draw):
    n, c = draw(st.integers(1, 6)), draw(st.integers(1, 40))
    s = draw(st.sampled_from([1, 2, 5, 9, 31, 49, 64, 100, 127, 130, 200, 1030]))
    layout = draw(st.sampled_from(["contiguous", LAST]))
    name = draw(st.sampled_from(["batch", "ghost", "instance", "group", "layer", "layer_2d", "rms", "rms_2d"]))
    size = 0
    if name in ("layer", "rms"):
        layout = "contiguous"
    if name in ("layer_2d", "rms_2d"):
        layout = LAST
    if name == "group":
        size = draw(st.sampled_from([g for g in range(1, c + 1) if c % g == 0]))
    if name == "ghost":
        size = draw(st.integers(1, n))
        n -= n % size
    given = name == "batch" and draw(st.booleans())
    shape = (n, c, s, 1) if layout == LAST else (n, c, s)
    return Case(name, shape, layout, size, given)


@settings(max_examples=80, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    case=drawn(),
    kind=st.sampled_from(KINDS),
    which=st.sampled_from(SETS or ["baseline"]),
    activation=st.sampled_from([*ACTIVATIONS]),
    residual=st.booleans(),
    affine=st.booleans(),
    threads=st.integers(1, 3),
    offset=st.sampled_from([0.0, 10.0]),
    seed=st.integers(0, 1000),
)
def test_any_shape(case, kind, which, activation, residual, affine, threads, offset, seed):
    i = inputs(case, kind, seed=seed, activation=activation, residual=residual, affine=affine, offset=offset)
    check(case, i, kind, which, threads=threads)


@every_set
def test_outputs_past_the_caches_have_the_same_bits(which):
    """From 16 MB on vectors are written past the caches, if the memory is aligned: rows and columns of a sample are the
    same with less memory, or at an odd place."""
    native, place = available(), SETS.index(which)
    rows, length = 1030, 4096  # 16.9 MB
    x = torch.randn(rows, length, generator=torch.Generator().manual_seed(0))
    dy = x.flip(0).contiguous()
    mean, var = x.mean(0), x.var(0)
    geometries = {
        "rows": (lambda n: (n, 1, length, 0, 1, 0, length, 2), lambda n: [torch.empty(n) for _ in range(3)], False),
        "columns": (lambda n: (1, n, length, 1), lambda n: [var.clone(), mean.clone(), torch.zeros(length)], True),
    }
    for label, (numbers, statistics, given_) in geometries.items():
        found = []
        for n, shift in ((rows, 0), (rows, 1), (rows // 2, 0)):
            y, dx = (torch.empty(n * length + 64) for _ in range(2))
            # From the next multiple of 64 bytes on, and one value behind it.
            y, dx = (t[(-t.data_ptr() % 64) // 4 + shift :][: n * length].view(n, length) for t in (y, dx))
            kept = statistics(n)
            stats = [t.data_ptr() for t in kept]
            rest = (1e-5, True, given_, TYPES["float32"], ACTIVATIONS["relu"], 2)
            native.forward(place, numbers(n), x.data_ptr(), 0, 0, 0, y.data_ptr(), 0, *stats, *rest)
            native.backward(
                place, numbers(n), dy.data_ptr(), x.data_ptr(), 0, 0, 0, dx.data_ptr(), 0, 0, 0, 0, *stats, *rest
            )
            found.append((y[: rows // 2], dx[: rows // 2]))
        for y, dx in found[1:]:
            assert torch.equal(y, found[0][0]), label
            assert torch.equal(dx, found[0][1]), label


@every_kind
@every_set
def test_a_sum_in_front_is_that_of_two_steps(which, kind):
    """x + residual, rounded, is normalized and kept, and its own gradient comes on top."""
    native, place = available(), SETS.index(which)
    for k, n in enumerate(lengths(which)):
        case = Case(("layer", "rms")[k % 2], (5, n))
        i = inputs(case, kind, seed=k, activation=None, residual=True, affine=True)
        total = from_bits(to_bits(np.float32(i.x) + np.float32(i.residual), kind), kind)
        apart = call(case, dataclasses.replace(i, x=total, residual=None), kind, which, threads=1 + k % 3)
        rows, empty = np.zeros(5), np.zeros(i.x.size)
        a = {"x": i.x, "dy": i.dy, "r": i.residual, "total": empty, "y": empty, "dtotal": i.dy[::-1], "dx": empty}
        a = {name: Guarded(value, kind, k % 4) for name, value in a.items()}
        a |= {
            name: Guarded(value) for name, value in {"var": rows, "mean": rows, "rest": rows, "gamma": i.gamma}.items()
        }
        a |= {"beta": Guarded(i.gamma if i.beta is None else i.beta), "dgamma": Guarded(i.gamma * 0)}
        at = {name: array.address for name, array in a.items()} | {"none": 0}
        if not case.spec.center:
            at |= {"mean": 0, "rest": 0, "beta": 0}
        how = (i.eps, case.spec.center, False, TYPES[kind], 0, 1 + k % 3)
        names = "x", "r", "gamma", "beta", "y", "total", "var", "mean", "rest"
        native.forward(place, case.numbers, *(at[name] for name in names), *how)
        names = "dy", "total", "none", "gamma", "beta", "dx", "none", "dgamma", "none", "dtotal", "var", "mean", "rest"
        native.backward(place, case.numbers, *(at[name] for name in names), *how)
        for name, array in a.items():
            array.check(f"{case}, {which}, {kind}: {name}")
        np.testing.assert_array_equal(a["total"].values, total.ravel())
        np.testing.assert_array_equal(a["y"].values, apart.y.ravel())
        # The sum of two gradients, one of them rounded on the way in two steps.
        expected = np.float64(apart.dx.ravel()) + a["dtotal"].values
        step = EPS32 if kind == "float32" else 2.0**-8
        size = np.abs(apart.dx.ravel()) + np.abs(a["dtotal"].values)
        assert (np.abs(a["dx"].values - expected) <= 2 * step * size + 1e-30).all(), f"{case}, {which}, {kind}"
        np.testing.assert_array_equal(a["dgamma"].values, apart.dgamma.ravel())
