"""What is kept between calls, step by step against NumPy in float64: averages, ghost batches, renorm, weights."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from nnx_required import jnp, nnx

import normkit.nnx as nk
from normkit.core import catalog
from normkit.core.reference import reference
from normkit.core.schedule import RenormSchedule


def batches(steps: int, *shape: int, scale: float = 1.0, offset: float = 0.0):
    x = np.random.default_rng(steps).standard_normal((steps, *shape)) * scale + offset
    return x.astype(np.float32)


def moments(x):
    x = np.asarray(x, np.float64)
    return x.mean(0), x.var(0)


run = nnx.jit(lambda layer, x: layer(x))


@pytest.mark.parametrize(("scale", "offset"), [(1.0, 0.0), (1e-3, 0.0), (5.0, 1e3)])
@pytest.mark.parametrize("momentum", [0.99, 0.5, None])
def test_right_from_the_first_step(momentum, scale, offset):
    """Evaluation after any number of steps: weights momentum^(T-t) of the batches; nothing of the first values.

    A variance of 1e-6 against a first value of 1 is where taking it out at the end fails.
    """
    layer = nk.BatchNorm(3, momentum=momentum, debiased=True, epsilon=1e-12, rngs=nnx.Rngs(0))
    seen = []
    for step, x in enumerate(batches(6, 8, 3, scale=scale, offset=offset), 1):
        run(layer, x)
        seen.append(moments(x))
        weights = np.ones(step) if momentum is None else momentum ** np.arange(step - 1.0, -1.0, -1.0)
        mean, var = (np.average([m[k] for m in seen], axis=0, weights=weights) for k in (0, 1))
        np.testing.assert_allclose(layer.mean[...], mean, rtol=1e-5, atol=1e-5 * scale)
        np.testing.assert_allclose(layer.var[...], var, rtol=2e-5)
        assert int(layer.count[...]) == step
        y = layer(x, use_running_average=True)
        want = (x - mean) / np.sqrt(var)
        np.testing.assert_allclose(y, want, rtol=2e-5, atol=2e-5 * (1 + offset / scale * 0.1))


def test_plain_average_keeps_its_first_value():
    """Without `debiased` the average is Flax' own, after one step far from the data."""
    layer = nk.BatchNorm(3, rngs=nnx.Rngs(0))
    (x,) = batches(1, 8, 3, scale=1e-3)
    run(layer, x)
    np.testing.assert_allclose(layer.var[...], 0.99 + 0.01 * moments(x)[1], rtol=1e-6)
    assert not hasattr(layer, "count") or layer.count is None


@pytest.mark.parametrize("momentum", [0.0, 1.0])
def test_limits_of_the_debiased_average(momentum):
    layer = nk.BatchNorm(3, momentum=momentum, debiased=True, rngs=nnx.Rngs(0))
    for x in batches(3, 8, 3):
        run(layer, x)
    mean = moments(x)[0] if momentum == 0.0 else np.zeros(3)
    np.testing.assert_allclose(layer.mean[...], mean, atol=1e-6)


def test_bessel():
    for bessel, factor in ((False, 1.0), (True, 8 / 7)):
        layer = nk.BatchNorm(3, momentum=0.0, bessel=bessel, rngs=nnx.Rngs(0))
        (x,) = batches(1, 8, 3)
        run(layer, x)
        np.testing.assert_allclose(layer.var[...], moments(x)[1] * factor, rtol=1e-6)


@pytest.mark.parametrize("samples", [8, 7, 5, 4, 3])
def test_ghost_batches(samples):
    """Groups of 4 and a short one; a single left over value joins the group before it. One update for all of them."""
    (x,) = batches(1, samples, 3)
    layer = nk.GhostBatchNorm(3, virtual_batch_size=4, momentum=0.9, rngs=nnx.Rngs(0))
    spec = replace(catalog.GHOST, tracked=tuple(replace(t, bessel=False) for t in catalog.GHOST.tracked))
    want = reference(spec, x, sizes=(("n", 4),), eps=1e-5, rate=0.1)
    np.testing.assert_allclose(run(layer, x), want.y, atol=1e-5)
    np.testing.assert_allclose(layer.mean[...], want.kept["mean"], atol=1e-6)
    np.testing.assert_allclose(layer.var[...], want.kept["var"], atol=1e-6)
    plain = nk.BatchNorm(3, rngs=nnx.Rngs(0))
    nnx.update(plain, nnx.state(layer))
    np.testing.assert_array_equal(plain(x, use_running_average=True), layer(x, use_running_average=True))
    if samples > 5:
        assert np.abs(np.asarray(plain(x)) - want.y).max() > 0.1


def test_renorm_follows_its_schedule():
    """Batch norm until `start`, then clips that open; statistics of the standard deviation, against the oracle."""
    schedule = RenormSchedule(r_max=2.0, d_max=1.0, start=2, r_end=6, d_end=4)
    layer = nk.BatchRenorm(3, momentum=0.7, schedule=schedule, rngs=nnx.Rngs(0))
    plain = nk.BatchNorm(3, rngs=nnx.Rngs(0))
    kept = {"mean": np.zeros(3), "std": np.ones(3)}
    spec = replace(catalog.RENORM, x="n *s c")
    for step, x in enumerate(batches(8, 8, 3, scale=3.0, offset=2.0)):
        r_max, d_max = (float(v) for v in schedule.at(np, step))
        want = reference(spec, x, eps=1e-5, kept=kept, rate=0.3, r_max=r_max, d_max=d_max)
        kept = want.kept
        y = run(layer, x)
        np.testing.assert_allclose(y, want.y, atol=1e-5)
        assert bool(np.abs(np.asarray(plain(x)) - y).max() < 1e-5) is (step <= 2)
        for name, value in kept.items():
            np.testing.assert_allclose(getattr(layer, name)[...], value, rtol=1e-5, atol=1e-6)
        assert int(layer.count[...]) == step + 1
    assert not isinstance(layer, nnx.BatchNorm)
    assert set(nnx.state(layer)) == {"scale", "bias", "mean", "std", "count"}


def test_sample_weights_are_proportions():
    (x,) = batches(1, 8, 3)
    weight = np.array([1, 1, 2, 3, 0, 0, 1, 4], np.float32)
    want = np.repeat(x, weight.astype(int), axis=0)
    for factor in (1.0, 1e-30, 1e30):
        layer = nk.BatchNorm(3, momentum=0.0, rngs=nnx.Rngs(0))
        layer(x, sample_weight=weight * np.float32(factor))
        np.testing.assert_allclose(layer.mean[...], moments(want)[0], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(layer.var[...], moments(want)[1], rtol=1e-5)


def test_count_of_batches_that_do_not_count():
    """Neither an empty batch nor one that is masked or not finite is counted."""
    layer = nk.BatchNorm(3, momentum=None, rngs=nnx.Rngs(0))
    (x,) = batches(1, 8, 3)
    layer(x)
    before = nnx.clone(nnx.state(layer))
    layer(x[:0])
    layer(x, mask=np.zeros(8, dtype=bool))
    layer(jnp.full((8, 3), jnp.nan))
    for name in ("mean", "var", "count"):
        np.testing.assert_array_equal(getattr(layer, name)[...], before[name][...])
