"""The oracle of the further formulas is checked: one line of NumPy each, finite differences, and the layers' slopes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import normkit.torch as nk
from normkit.core import catalog
from normkit.core.activated_reference import activated_reference
from normkit.errors import NormValueError

EPS = 2.0**-52
SHAPE = (5, 6, 4, 2)
RNG = np.random.default_rng(0)
X, DY = RNG.standard_normal(SHAPE) + 0.5, RNG.standard_normal(SHAPE)
GROUPS = (("g", 3),)
ROWS = (("*c", (2,)),)


def column(values):
    return np.reshape(values, (-1, 1, 1))


def frn(x, eps, gamma, beta, tau):
    return np.maximum(x / np.sqrt((x**2).mean((2, 3), keepdims=True) + eps) * gamma + beta, tau)


def b0(x, eps, gamma, beta, v):
    batch, alone = x.var((0, 2, 3), keepdims=True), x.var((2, 3), keepdims=True)
    return x / np.maximum(np.sqrt(batch + eps), v * x + np.sqrt(alone + eps)) * gamma + beta


def s0(x, eps, gamma, beta, v):
    var = x.reshape(5, 3, 2, 4, 2).var((2, 3, 4)).repeat(2, axis=1)[..., None, None]
    return x / (1 + np.exp(-v * x)) / np.sqrt(var + eps) * gamma + beta


def tanh(x, _, gamma, beta, alpha):
    return gamma.ravel() * np.tanh(alpha * x) + beta.ravel()


def grn(x, eps, gamma, beta):
    g = np.sqrt((x**2).sum((2, 3), keepdims=True))
    return gamma * (x * (g / (g.mean(1, keepdims=True) + eps))) + beta + x


# spec, sizes, values of gamma, one line of NumPy
LINES = {
    "frn": (catalog.FRN, (), 6, frn),
    "evonorm_b0": (catalog.EVONORM_B0, (), 6, b0),
    "evonorm_s0": (catalog.EVONORM_S0, GROUPS, 6, s0),
    "dyt": (catalog.DYNAMIC_TANH, ROWS, 2, tanh),
    "grn": (catalog.GLOBAL_RESPONSE, (), 6, grn),
}


def parameters(name, seed=1):
    spec, _, n, _ = LINES[name]
    rng = np.random.default_rng(seed)
    others = {other: rng.uniform(0.3, 1.2, 1 if other == "alpha" else n) for other, _ in spec.others}
    return {"gamma": rng.uniform(-1.5, 1.5, n), "beta": rng.standard_normal(n), **others}


def found(name, x, values, **options):
    spec, sizes, *_ = LINES[name]
    others = {other: values[other] for other, _ in spec.others}
    return activated_reference(spec, x, values["gamma"], values["beta"], others=others, sizes=sizes, **options)


def test_there_is_a_line_for_every_formula_of_the_catalog():
    assert set(LINES) == set(catalog.CATALOG) - set(catalog.STANDARD)


@pytest.mark.parametrize("name", LINES)
def test_forward_is_one_line_of_numpy(name):
    spec, _, _, line = LINES[name]
    values = parameters(name)
    want = line(X, spec.eps, *map(column, values.values()))
    # NumPy's own sums of 40 values: some tens of half spacings
    np.testing.assert_allclose(found(name, X, values).y, want, rtol=0, atol=40 * EPS * np.abs(want).max())


@pytest.mark.parametrize("name", LINES)
@pytest.mark.parametrize("extra", ["plain", "weight", "mask", "evaluation"])
def test_gradients_are_finite_differences(name, extra):
    """A central difference at h = 1e-5 is off by h^2/6 of a third derivative plus eps |f| / h: about 1e-9."""
    rng = np.random.default_rng(2)
    options = {"eps": 0.1}  # keeps third derivatives small
    if extra == "weight":
        options["weight"] = rng.uniform(0.5, 2, SHAPE)
    if extra == "mask":
        options["mask"] = rng.random(SHAPE) < 0.8
    if extra == "evaluation":
        options |= {"training": False, "kept": {"var": rng.uniform(0.5, 1.5, 6)}}
    values = {"x": X, **parameters(name)}
    spec = LINES[name][0]

    def at(some):
        some = dict(some)
        return found(name, some.pop("x"), some, **options)

    got = found(name, X, parameters(name), dy=DY, **options)
    slopes = {"x": got.dx, "gamma": got.dgamma, "beta": got.dbeta, **got.dothers}
    assert set(slopes) == {"x", "gamma", "beta", *(other for other, _ in spec.others)}
    for key, slope in slopes.items():
        direction = rng.standard_normal(values[key].shape)
        ahead, behind = (
            float((at({**values, key: values[key] + sign * 1e-5 * direction}).y * DY).sum()) for sign in (1, -1)
        )
        along = float((slope.reshape(direction.shape) * direction).sum())
        assert along == pytest.approx((ahead - behind) / 2e-5, rel=1e-6, abs=1e-6)


def test_first_values_are_those_of_the_catalog():
    for name, (spec, sizes, n, line) in LINES.items():
        first = [spec.first_gain, 0.0, *(value for _, value in spec.others)]
        want = line(X, spec.eps, *(column(np.full(n, value)) if i < 2 else value for i, value in enumerate(first)))
        y = activated_reference(spec, X, sizes=sizes).y
        np.testing.assert_allclose(y, want, rtol=0, atol=40 * EPS * np.abs(want).max(), err_msg=name)
    assert np.array_equal(activated_reference(catalog.GLOBAL_RESPONSE, X).y, X)  # begins as the identity


def test_kept_variance():
    """Unbiased, as of batch norm; masked values are left out."""
    mask = RNG.random(SHAPE) < 0.7
    after = activated_reference(catalog.EVONORM_B0, X, mask=mask, rate=0.25).kept["var"]
    want = [0.75 + 0.25 * X[:, c][mask[:, c]].var(ddof=1) for c in range(6)]
    np.testing.assert_allclose(after, want, rtol=40 * EPS)


def test_other_formulas_are_refused():
    with pytest.raises(NormValueError, match=r"the formula must be one of .*; got standard"):
        activated_reference(catalog.BATCH, X)


LAYERS = {
    "frn": lambda: nk.FilterResponseNorm(6),
    "evonorm_b0": lambda: nk.EvoNormB0(6),
    "evonorm_s0": lambda: nk.EvoNormS0(6, 3),
    "dyt": lambda: nk.DynamicTanh(2),
    "grn": lambda: nk.GlobalResponseNorm(6, channels_last=False),
}


@pytest.mark.parametrize("name", LAYERS)
def test_every_slope_of_the_layers(name):
    """Those of tau, v and alpha too, which the conformance suite does not see."""
    values = parameters(name)
    layer = LAYERS[name]().double()
    named = {"weight": "gamma", "bias": "beta"}
    with torch.no_grad():
        for key, parameter in layer.named_parameters():
            parameter.copy_(torch.from_numpy(values[named.get(key, key)]))
    layer(torch.from_numpy(X)).backward(torch.from_numpy(DY))
    want = found(name, X, values, dy=DY)
    slopes = {"gamma": want.dgamma, "beta": want.dbeta, **want.dothers}
    assert {named.get(key, key) for key, _ in layer.named_parameters()} == set(slopes)
    for key, parameter in layer.named_parameters():
        expected = slopes[named.get(key, key)].reshape(-1)
        # a sum of 240 terms of order 1
        np.testing.assert_allclose(
            parameter.grad, expected, rtol=0, atol=240 * 4 * EPS * max(1, np.abs(expected).max())
        )


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_learned_eps_is_added_by_its_magnitude(sign):
    layer = nk.FilterResponseNorm(6, learn_eps=True).double()
    with torch.no_grad():
        layer.learned_eps.fill_(sign * 0.3)
    x = torch.from_numpy(X)
    want = activated_reference(catalog.FRN, X, eps=0.3 + 1e-6, dy=DY)
    y = layer(x)
    np.testing.assert_allclose(y.detach(), want.y, rtol=0, atol=40 * EPS * np.abs(want.y).max())
    y.backward(torch.from_numpy(DY))
    ahead, behind = (activated_reference(catalog.FRN, X, eps=0.3 + 1e-6 + s * 1e-5).y for s in (1, -1))
    slope = float(((ahead - behind) * DY).sum()) / 2e-5
    assert float(layer.learned_eps.grad) == pytest.approx(sign * slope, rel=1e-6)
