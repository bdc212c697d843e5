"""The formulas give the same in every namespace; the conformance suite compares them with the oracle."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from normkit.core import catalog, formula
from normkit.core.plan import plan, view_shape
from normkit.core.reference import reference
from normkit.testing.formulas import ENTRIES

EPS = 2.0**-52


def case(entry, seed=0, *, weighted=False):
    """Return (spec, plan, x, gamma, beta, dy, weight) in float64."""
    spec, sizes, (shape, *_) = ENTRIES[entry]
    rng = np.random.default_rng(seed)
    p = plan(spec, len(shape), sizes(shape))
    at, affine = 0, []
    for split, n in zip(p.view, shape, strict=True):
        affine += [n] * (at in p.affine)
        at += len(split)
    x, dy = rng.standard_normal(shape) + 0.5, rng.standard_normal(shape)
    weight = rng.uniform(0.5, 2, (shape[0], 1, *shape[2:])) if weighted else None
    return spec, p, x, rng.standard_normal(affine), rng.standard_normal(affine), dy, weight


POSITIONS = ["batch", "ghost", "renorm", "instance", "instance_tracked", "group", "one_group"]
CASES = [(entry, False) for entry in ENTRIES] + [(entry, True) for entry in POSITIONS]


@pytest.mark.parametrize(("entry", "weighted"), CASES)
def test_the_closed_form_is_autograd(entry, weighted):
    spec, p, *arrays = case(entry, weighted=weighted)
    tensors = [None if a is None else torch.from_numpy(a) for a in arrays]
    x, gamma, beta, dy, weight = tensors
    leaves = [t.requires_grad_() for t in (x, gamma, beta)]
    y, moments = formula.normalize(torch, spec, p, x, gamma, beta, eps=1e-5, weight=weight)
    want = torch.autograd.grad(y, leaves, dy)
    with torch.no_grad():
        found = formula.backward(torch, spec, p, dy, x, gamma, beta, moments, eps=1e-5, weight=weight)
    for a, b in zip(found, want, strict=True):
        # terms of order 5 (dy gamma / std), a few tens added
        torch.testing.assert_close(a, b, rtol=0, atol=200 * EPS * 5)


@pytest.mark.parametrize(("entry", "weighted"), CASES)
def test_namespaces_agree(entry, weighted):
    spec, p, *arrays = case(entry, weighted=weighted)
    tensors = [None if a is None else torch.from_numpy(a) for a in arrays]
    results = []
    for xp, (x, gamma, beta, dy, weight) in ((np, arrays), (torch, tensors)):
        y, moments = formula.normalize(xp, spec, p, x, gamma, beta, eps=1e-5, weight=weight)
        g = formula.backward(xp, spec, p, dy, x, gamma, beta, moments, eps=1e-5, weight=weight)
        kept = formula.merged(xp, spec, p, moments, eps=1e-5)[0] if spec.tracked else {}
        results.append([np.asarray(value) for value in (y, *g, *kept.values())])
    for a, b in zip(*results, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=200 * EPS * max(1, np.abs(b).max()))


def test_without_gamma_and_beta():
    spec, p, x, _, _, dy, _ = case("group")
    y, moments = formula.normalize(np, spec, p, x, eps=1e-5)
    g = formula.backward(np, spec, p, dy, x, None, None, moments, eps=1e-5)
    want = reference(spec, x, sizes=(("g", 3),), eps=1e-5, dy=dy)
    np.testing.assert_allclose(y, want.y, rtol=0, atol=50 * EPS)
    np.testing.assert_allclose(g.x, want.dx, rtol=0, atol=200 * EPS)
    assert g.gamma is None
    assert g.beta is None


def test_weights_of_one_broadcast_to_all_channels():
    """A weight has a channel axis of length 1: the number of values behind a statistic counts its channels."""
    spec, p, x, gamma, beta, _, _ = case("group")
    ones = np.ones((x.shape[0], 1, *x.shape[2:]))
    plain, (m,) = formula.normalize(np, spec, p, x, gamma, beta, eps=1e-5)
    weighted, (w,) = formula.normalize(np, spec, p, x, gamma, beta, eps=1e-5, weight=ones)
    np.testing.assert_allclose(weighted, plain, rtol=0, atol=50 * EPS)
    assert not m.weighted
    assert w.weighted
    assert np.all(w.total == m.total)
    np.testing.assert_allclose(w.effective, m.effective, rtol=4 * EPS)


def test_kept_values_without_any_value():
    spec, p, x, *_ = case("batch")
    _, moments = formula.normalize(np, spec, p, x[:0], eps=1e-5)
    assert formula.merged(np, spec, p, moments, eps=1e-5) == ({}, False)
    kept = {"mean": np.ones(6), "var": np.ones(6)}
    assert formula.updated(np, spec, kept, {}, False, 0.1) == kept


def test_kept_values_where_some_statistics_are_unknown():
    kept = {"mean": np.zeros(3), "var": np.ones(3)}
    batch = {"mean": np.array([1.0, np.nan, 2.0]), "var": np.full(3, 3.0)}
    found = formula.updated(np, catalog.BATCH, kept, batch, np.array([True, False, True]), 0.5)
    assert found["mean"].tolist() == [0.5, 0.0, 1.0]
    assert found["var"].tolist() == [2.0, 1.0, 2.0]


def test_inverse_std_and_gained():
    spec = replace(catalog.RMS, gain="1+w")
    p = plan(spec, 2, (("*c", (5,)),))
    rng = np.random.default_rng(0)
    x, gamma = rng.standard_normal((3, 5)), rng.standard_normal(5)
    rstd = formula.inverse_std(np, spec, p, x, eps=0.1)
    np.testing.assert_allclose(rstd, 1 / np.sqrt((x**2).mean(1, keepdims=True) + 0.1), rtol=8 * EPS)
    np.testing.assert_allclose(formula.gained(np, spec, p, x, gamma), x * (1 + gamma), rtol=2 * EPS)
    assert formula.gained(np, spec, p, x, None) is x
    whole, _ = formula.normalize(np, spec, p, x, gamma, eps=0.1)
    np.testing.assert_allclose(formula.gained(np, spec, p, x * rstd, gamma), whole, rtol=8 * EPS)


@pytest.mark.parametrize("offset", [1e3, 1e6, 1e9])
def test_centring_twice_keeps_the_digits(offset):
    """A mean rounded once is off by eps |mean|; the second centring takes that out of the deviations.

    Data are multiples of 1/64 near `offset`, exact in float32 as long as their sum needs no more than its digits.
    """
    rng = np.random.default_rng(0)
    grid = max(1 / 64, offset * 2.0**-20)
    x = (np.rint(rng.standard_normal((4096, 1)) * 64) * grid + offset).astype(np.float32)
    p = plan(catalog.BATCH, 2)
    y, moments = formula.normalize(np, catalog.BATCH, p, x, eps=0.0)
    exact = x.astype(np.float64)
    want = (exact - exact.mean()) / exact.std()
    assert y.dtype == np.float32
    assert np.abs(y - want).max() <= 8 * 2.0**-23 * np.abs(want).max()
    # The backward pass starts from the rounded mean that was saved, and keeps the digits likewise.
    dy = rng.standard_normal(x.shape).astype(np.float32)
    g = formula.backward(np, catalog.BATCH, p, dy, x, None, None, moments, eps=0.0)
    slope = dy - dy.mean() - want * (dy * want).mean()
    assert np.abs(g.x * exact.std() - slope).max() <= 8 * 2.0**-23 * np.abs(dy).max()


def test_views_of_split_axes_read_lengths_where_they_run():
    p = plan(catalog.GHOST, 3, (("n", 4),))
    for n in (4, 8, 12):
        assert view_shape(p, (n, 2, 3)) == (n // 4, 4, 2, 3)
