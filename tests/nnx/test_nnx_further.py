"""Filter response norm, EvoNorm, dynamic tanh and global response norm in NNX, against their oracle in float64."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from nnx_required import jax, jnp, nnx

import normkit.nnx as nk
from normkit.core import catalog
from normkit.core.activated_reference import activated_reference
from normkit.errors import NormValueError
from normkit.testing.precision import rounded, tolerance

RNG = np.random.default_rng(5)
SHAPE = (3, 4, 2, 6)
X, DY = (rounded(RNG.standard_normal(SHAPE) + 0.3, "float32") for _ in range(2))
MASK = RNG.random(SHAPE[:-1]) < 0.6
MASK[:, 0] = True  # every sample has a real position


def last(spec):
    """The entry of the catalog with the channels last."""
    affine = "(g k)" if "(g k)" in spec.x else "c"
    return replace(spec, x=f"n *s {affine}") if spec.x.startswith("n ") else spec


ROWS = (("*c", (6,)),)
BIASED = tuple(replace(t, bessel=False) for t in catalog.EVONORM_B0.tracked)  # as Flax keeps it
# layer, what it claims to compute, static sizes
LAYERS = {
    "frn": (nk.FilterResponseNorm, last(catalog.FRN), ()),
    "evonorm_b0": (
        lambda n, **k: nk.EvoNormB0(n, momentum=0.75, rngs=nnx.Rngs(0), **k),
        last(replace(catalog.EVONORM_B0, tracked=BIASED)),
        (),
    ),
    "evonorm_s0": (lambda n, **k: nk.EvoNormS0(n, 3, **k), last(catalog.EVONORM_S0), (("g", 3),)),
    "dyt": (nk.DynamicTanh, catalog.DYNAMIC_TANH, ROWS),
    "grn": (nk.GlobalResponseNorm, last(catalog.GLOBAL_RESPONSE), ()),
}
NAMES = {"scale": "gamma", "bias": "beta"}


def made(name, **options):
    """A layer with parameters unlike their first values, and these."""
    make, spec, _ = LAYERS[name]
    layer = make(6, **options)
    rng = np.random.default_rng(1)
    values = {}
    for key in ("scale", "bias", *(other for other, _ in spec.others)):
        variable = getattr(layer, key)
        values[NAMES.get(key, key)] = rounded(rng.uniform(0.3, 1.2, variable[...].shape), "float32")
        variable[...] = jnp.asarray(values[NAMES.get(key, key)], jnp.float32)
    return layer, values


def expected(name, values, **options):
    _, spec, sizes = LAYERS[name]
    others = {other: values[other] for other, _ in spec.others}
    return activated_reference(spec, X, values["gamma"], values["beta"], others=others, sizes=sizes, **options)


@pytest.mark.parametrize("name", LAYERS)
def test_outputs_and_every_slope(name):
    layer, values = made(name)
    graph, params, rest = nnx.split(layer, nnx.Param, ...)
    masked = {} if name == "dyt" else {"mask": jnp.asarray(MASK)}

    @jax.jit
    def step(params, x):
        def forward(params, x):
            return nnx.merge(graph, params, rest, copy=True)(x, **masked)

        y, pull = jax.vjp(forward, params, x)
        return y, *pull(jnp.asarray(DY, jnp.float32))

    y, slopes, dx = step(params, jnp.asarray(X, jnp.float32))
    mask = np.broadcast_to(MASK[..., None], SHAPE) if masked else None
    want = expected(name, values, dy=DY, mask=mask)
    found = {NAMES.get(key, key): slopes[key][...] for key in slopes}
    pairs = {"y": (y, want.y), "dx": (dx, want.dx), "gamma": (found["gamma"], want.dgamma)}
    pairs |= {"beta": (found["beta"], want.dbeta), **{key: (found[key], slope) for key, slope in want.dothers.items()}}
    for key, (mine, oracle) in pairs.items():
        # sums of up to 144 terms of order 1, each right to a few float32 roundings
        allowed = tolerance(max(1.0, np.abs(oracle).max()), terms=24.0, output="float32", accumulator="float32")
        np.testing.assert_allclose(np.reshape(mine, oracle.shape), oracle, rtol=0, atol=allowed, err_msg=key)


@pytest.mark.parametrize("name", LAYERS)
def test_channels_on_axis_1(name):
    options = {} if name != "evonorm_b0" else {"use_running_average": True}
    (one, _), (other, _) = made(name, **options), made(name, axis=1, **options)
    y = other(jnp.moveaxis(jnp.asarray(X, jnp.float32), -1, 1))
    np.testing.assert_allclose(jnp.moveaxis(y, 1, -1), one(jnp.asarray(X, jnp.float32)), atol=1e-5)


def test_the_variance_of_evonorm_b0():
    """Of real positions only; a batch with NaN does not enter; evaluation with the batch's own is training."""
    layer, _ = made("evonorm_b0")
    x, mask = jnp.asarray(X, jnp.float32), jnp.asarray(MASK)
    trained = layer(x, mask=mask)
    want = X[MASK].var(0)
    np.testing.assert_allclose(layer.var[...], 0.75 + 0.25 * want, rtol=1e-6)
    before = np.asarray(layer.var[...])
    layer(x.at[0, 0, 0, 0].set(jnp.nan))
    np.testing.assert_array_equal(layer.var[...], before)
    layer.var[...] = jnp.asarray(want, jnp.float32)
    layer.eval()
    np.testing.assert_allclose(layer(x, mask=mask), trained, atol=1e-5)
    assert not hasattr(layer, "mean")


BAD = {
    "positions": (lambda: nk.FilterResponseNorm(6)(jnp.ones((2, 6))), r"must have positions.*learn_epsilon=True"),
    "instances": (lambda: nk.EvoNormB0(6, rngs=nnx.Rngs(0))(jnp.ones((2, 6))), "each instance has a variance"),
    "groups": (lambda: nk.EvoNormS0(6, 4), "divisible by `groups`; got 6 and 4"),
    "samples": (lambda: nk.GlobalResponseNorm(6, axis=0)(jnp.ones((6, 2))), "the samples must be on axis 0"),
    "features": (lambda: nk.DynamicTanh(5)(jnp.ones((2, 6))), "must have 5 features on axis 1"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_meant_is_refused(case):
    call, text = BAD[case]
    with pytest.raises(NormValueError, match=text):
        call()
    y = nk.FilterResponseNorm(6, learn_epsilon=True)(jnp.ones((2, 6)))
    np.testing.assert_allclose(y, 1 / np.sqrt(1 + 1e-4 + 1e-6), rtol=1e-6)
