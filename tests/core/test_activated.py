"""Normalizers with an activation inside: limits and identities from the papers, in float64."""

from __future__ import annotations

from functools import partial

import numpy as np

from normkit.core import activated, catalog, formula
from normkit.core.plan import plan

NEAR = 1e-12  # of values of order 1: some hundred roundings
RNG = np.random.default_rng(0)
X = RNG.standard_normal((5, 6, 4))
V, GAMMA, BETA = (RNG.uniform(0.5, 1.5, 6) for _ in range(3))


def test_sigmoid_far_out():
    z = np.array([-1e4, -3.0, 0.0, 3.0, 1e4])
    np.testing.assert_allclose(activated.sigmoid(np, z), np.exp(-np.logaddexp(0.0, -z)), atol=NEAR)


def test_filter_response_of_one_position_is_its_sign():
    p = plan(catalog.FRN, 3)
    y, _ = formula.normalize(np, catalog.FRN, p, X[..., :1], eps=0.0)
    np.testing.assert_allclose(y, np.sign(X[..., :1]), atol=NEAR)


def test_a_threshold_is_the_larger_of_two():
    tau = np.linspace(-1.0, 1.0, 6)
    y = activated.thresholded(np, plan(catalog.FRN, 3), X, tau)
    np.testing.assert_array_equal(y, np.maximum(X, tau[:, None]))


def test_evonorm_b0_evaluates_as_it_trains_where_the_variance_is_that_of_the_batch():
    p, instance = plan(catalog.EVONORM_B0, 3), plan(catalog.INSTANCE, 3)
    b0 = partial(activated.evonorm_b0, np, catalog.EVONORM_B0, p, instance, X, V, GAMMA, BETA, eps=1e-5)
    trained, moments = b0()
    evaluated, none = b0(kept={"var": X.var((0, 2))})
    np.testing.assert_allclose(evaluated, trained, atol=NEAR)
    np.testing.assert_allclose(moments.var.ravel(), X.var((0, 2)), atol=NEAR)
    assert none is None


def test_evonorm_s0_does_not_see_the_other_samples():
    p = plan(catalog.EVONORM_S0, 3, (("g", 3),))
    y = activated.evonorm_s0(np, catalog.EVONORM_S0, p, X, V, GAMMA, BETA, eps=1e-5)
    alone = activated.evonorm_s0(np, catalog.EVONORM_S0, p, X[:1], V, GAMMA, BETA, eps=1e-5)
    np.testing.assert_allclose(alone, y[:1], atol=NEAR)
    straight = (y - BETA[:, None]) / GAMMA[:, None]  # back to the input, step by step
    std = np.sqrt(X.reshape(5, 3, 8).var(-1) + 1e-5).repeat(2, axis=1)[..., None]
    np.testing.assert_allclose(straight * std * (1 + np.exp(-V[:, None] * X)), X, atol=NEAR)


def test_dynamic_tanh_is_bounded():
    y = activated.dynamic_tanh(np, 100.0 * X, 0.5, GAMMA[:, None], BETA[:, None])
    assert np.all(np.abs(y - BETA[:, None]) <= GAMMA[:, None] + NEAR)
