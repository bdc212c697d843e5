"""Hard cases that come out right here and not in Flax, each shown on both against the float64 oracle."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from nnx_required import jax, jnp, nnx

import normkit.nnx as nk
from normkit.core import catalog
from normkit.core.reference import reference

# The entries of the catalog with the features last, and the biased variance, as in Flax.
BIASED = tuple(replace(t, bessel=False) for t in catalog.BATCH.tracked)
LAST = {
    "BatchNorm": replace(catalog.BATCH, x="n *s c", tracked=BIASED),
    "LayerNorm": replace(catalog.LAYER, x="n *s c", over="c", affine="c"),
    "GroupNorm": replace(catalog.GROUP, x="n *s (g k)"),
    "InstanceNorm": replace(catalog.INSTANCE, x="n *s c"),
}
SHAPE = (4, 8, 6)
OPTIONS = {"GroupNorm": {"num_groups": 2}}


def pair(name: str, **options):
    return tuple(getattr(m, name)(6, **OPTIONS.get(name, {}), **options, rngs=nnx.Rngs(0)) for m in (nk, nnx))


def oracle(name: str, x, **more):
    return reference(LAST[name], np.asarray(x, np.float64), sizes=(("g", 2),) if name == "GroupNorm" else (), **more)


def error(actual, expected, where=...) -> float:
    """Return the largest difference; infinite where something is NaN."""
    difference = np.abs(np.asarray(actual, np.float64) - expected)[where]
    return float(np.where(np.isnan(difference), np.inf, difference).max())


def noise(seed: int = 0):
    return np.random.default_rng(seed).standard_normal(SHAPE)


@pytest.mark.parametrize("name", LAST)
def test_large_mean(name):
    """At mean/std = 1e4 float32 still holds three digits of the data; E[x^2] - E[x]^2 holds none."""
    x = (noise() + 1e4).astype(np.float32)
    eps = pair(name)[0].epsilon
    want = oracle(name, x, eps=eps)
    ours, theirs = pair(name)
    assert error(ours(x), want.y) < 1e-5
    assert error(theirs(x), want.y) > 1.0
    if name == "BatchNorm":
        kept = oracle(name, x, eps=eps, rate=1 - 0.99).kept
        assert error(ours.var[...], kept["var"]) < 1e-6
        assert error(theirs.var[...], kept["var"]) > 1e-3


def test_large_mean_has_gradients():
    x = (noise() + 1e4).astype(np.float32)
    dy = noise(1)
    want = oracle("BatchNorm", x, eps=1e-5, dy=dy).dx
    ours, theirs = (jax.grad(lambda x, layer=layer: jnp.sum(nnx.clone(layer)(x) * dy)) for layer in pair("BatchNorm"))
    assert error(ours(x), want) < 1e-5
    assert error(theirs(x), want) > 1.0


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_half_precision_in_evaluation(dtype):
    """Running statistics are not rounded to the half type: a mean of 300.7 would move by half a unit or more."""
    kept = {"mean": np.full(6, 300.7), "var": np.full(6, 0.25)}
    x = jnp.asarray(noise() * 0.5 + 300.7, dtype)
    want = oracle("BatchNorm", x.astype(jnp.float32), eps=1e-5, kept=kept, training=False).y
    ours, theirs = pair("BatchNorm", dtype=dtype, use_running_average=True)
    for layer in (ours, theirs):
        layer.mean[...] = jnp.asarray(kept["mean"], jnp.float32)
        layer.var[...] = jnp.asarray(kept["var"], jnp.float32)
    limit = 0.5 * float(jnp.finfo(dtype).eps) * np.abs(want).max() + 1e-4
    assert ours(x).dtype == dtype
    assert error(ours(x), want) < limit
    assert error(theirs(x), want) > 10 * limit


def test_half_precision_in_training():
    """Values of 3000 overflow float16 once squared; both accumulate in float32. Sums of squares lose digits in Flax."""
    x = jnp.asarray(noise() * 2 + 2000.0, jnp.float16)
    want = oracle("BatchNorm", x.astype(jnp.float32), eps=1e-5)
    ours, theirs = pair("BatchNorm", dtype=jnp.float16)
    limit = 0.5 * float(jnp.finfo(jnp.float16).eps) * np.abs(want.y).max() + 1e-5
    assert error(ours(x), want.y) < limit
    assert error(theirs(x), want.y) > 2 * limit


@pytest.mark.parametrize("name", LAST)
def test_masked(name):
    """Real positions are those of Flax, masked ones 0 and without gradient, whatever stands there."""
    x = noise().astype(np.float32)
    mask = np.ones(SHAPE, dtype=bool)
    mask[:, 5:] = False
    mask[2, 1:] = False
    eps = 1e-5 if name == "BatchNorm" else 1e-6
    dy = noise(1)
    want = oracle(name, x, eps=eps, mask=mask, dy=dy)
    x = np.where(mask, x, np.nan).astype(np.float32)
    given = jnp.asarray(mask)

    def outcome(layer):
        y, pull = jax.vjp(lambda x: nnx.clone(layer)(x, mask=given), x)
        return y, pull(jnp.asarray(dy, jnp.float32))[0]

    ours, theirs = (outcome(layer) for layer in pair(name))
    assert error(ours[0], want.y) < 1e-5
    assert error(ours[1], want.dx) < 1e-4
    assert error(theirs[0], want.y, mask) < 1e-5
    assert error(theirs[0], want.y) == np.inf


@pytest.mark.parametrize("name", LAST)
def test_fully_masked(name):
    """Nothing real: zeros out, statistics as they were. Flax divides by zero and keeps the NaN for good."""
    ours, theirs = pair(name)
    mask = np.zeros(SHAPE, dtype=bool)
    x = noise().astype(np.float32)
    assert not np.any(np.asarray(ours(x, mask=mask)))
    assert np.isnan(np.asarray(theirs(x, mask=mask))).all()
    if name == "BatchNorm":
        assert error(ours.var[...], 1.0) == 0.0
        assert np.isnan(np.asarray(theirs.var[...])).all()


def test_infinite_batch():
    """A batch with infinity comes out non-finite, for a loss scaler to see, and leaves the statistics alone."""
    ours, theirs = pair("BatchNorm")
    lets_in = nk.BatchNorm(6, nonfinite="update", rngs=nnx.Rngs(0))
    x = noise().astype(np.float32)
    x[1, 2, 3] = np.inf
    for layer in (ours, theirs, lets_in):
        assert not np.isfinite(np.asarray(layer(x))).all()
    assert error(ours.mean[...], 0.0) == error(ours.var[...], 1.0) == 0.0
    for layer in (theirs, lets_in):
        assert not np.isfinite(np.asarray(layer.mean[...])).all()


@pytest.mark.parametrize(
    ("axes", "theirs_is_right"), [((1, 2, -1), True), ((0, 1, -1), True), ((1, -1), False), ((-1,), False)]
)
def test_reduction_axes_of_group_norm(axes, theirs_is_right):
    """Statistics are over the axes that are named, and every other axis has its own; Flax can do with one such."""
    x = np.random.default_rng(0).standard_normal((3, 2, 5, 6)).astype(np.float32)
    names = ["n", "h", "w", "(g k)"]
    over = " ".join("k" if axis == -1 else names[axis] for axis in axes)
    spec = replace(catalog.GROUP, x=" ".join(names), over=over)
    want = reference(spec, x, sizes=(("g", 2),), eps=1e-6).y
    ours, theirs = pair("GroupNorm", reduction_axes=axes)
    assert error(ours(x), want) < 1e-5
    assert (error(theirs(x), want) < 1e-5) is theirs_is_right


def test_reduction_axes_that_leave_nothing_out():
    x = noise().astype(np.float32)
    ours, theirs = pair("GroupNorm", reduction_axes=(0, 1, 2))
    want = reference(replace(catalog.GROUP, x="n s (g k)", over="n s k"), x, sizes=(("g", 2),), eps=1e-6).y
    assert error(ours(x), want) < 1e-5
    with pytest.raises(ValueError, match="axis 1 is out of bounds"):
        theirs(x)
