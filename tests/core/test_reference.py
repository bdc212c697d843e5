"""The oracle itself is checked: against one-line NumPy, against finite differences, and by NumPy's own rules."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from normkit.core import catalog
from normkit.core.reference import reference

EPS = 2.0**-52


def batch(x, axes):
    return x.mean(axes, keepdims=True), x.var(axes, keepdims=True)


def groups(x):
    v = x.reshape(5, 3, 2, 4, 2)
    mean, var = batch(v, (2, 3, 4))
    return (np.broadcast_to(m, v.shape).reshape(x.shape) for m in (mean, var))


def ghosts(x):
    found = [batch(chunk, (0, 2, 3)) for chunk in (x[:2], x[2:4], x[4:])]
    return (np.concatenate([np.broadcast_to(f[i], (n, *f[i].shape[1:])) for f, n in zip(found, (2, 2, 1), strict=True)])
            for i in (0, 1))  # fmt: skip


# spec, sizes, shape of the input, of gamma as it broadcasts, (mean, var) in one line of NumPy
LINES = {
    "batch": (catalog.BATCH, (), (5, 6, 4, 2), (6, 1, 1), lambda x: batch(x, (0, 2, 3))),
    "batch_2d": (catalog.BATCH, (), (5, 6), (6,), lambda x: batch(x, 0)),
    "ghost": (catalog.GHOST, (("n", 2),), (5, 6, 4, 2), (6, 1, 1), ghosts),
    "renorm": (catalog.RENORM, (), (5, 6, 4, 2), (6, 1, 1), lambda x: batch(x, (0, 2, 3))),
    "instance": (catalog.INSTANCE, (), (5, 6, 4, 2), (6, 1, 1), lambda x: batch(x, (2, 3))),
    "instance_tracked": (catalog.INSTANCE_TRACKED, (), (5, 6, 4, 2), (6, 1, 1), lambda x: batch(x, (2, 3))),
    "group": (catalog.GROUP, (("g", 3),), (5, 6, 4, 2), (6, 1, 1), groups),
    "layer": (catalog.LAYER, (("*c", (4, 2)),), (5, 6, 4, 2), (4, 2), lambda x: batch(x, (2, 3))),
    "layer_2d": (catalog.LAYER_2D, (), (5, 6, 4, 2), (6, 1, 1), lambda x: batch(x, 1)),
    "rms": (catalog.RMS, (("*c", (2,)),), (5, 6, 2), (2,), lambda x: (0 * x, (x**2).mean(-1, keepdims=True))),
    "rms_2d": (catalog.RMS_2D, (), (5, 6, 4, 2), (6, 1, 1), lambda x: (0 * x, (x**2).mean(1, keepdims=True))),
    "rms_1+w": (
        replace(catalog.RMS, gain="1+w"), (("*c", (2,)),), (5, 6, 2), (2,),
        lambda x: (0 * x, (x**2).mean(-1, keepdims=True)),
    ),
}  # fmt: skip


def data(shape, affine, seed=0):
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(shape) + 0.5, rng.standard_normal(affine), rng.standard_normal(affine),
            rng.standard_normal(shape))  # fmt: skip


@pytest.mark.parametrize("entry", LINES)
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_forward_is_one_line_of_numpy(entry, offset):
    spec, sizes, shape, affine, line = LINES[entry]
    x, gamma, beta, _ = data(shape, affine)
    x = x + offset
    mean, var = line(x)
    gain = gamma + 1 if spec.gain == "1+w" else gamma
    want = (x - mean) / np.sqrt(var + spec.eps) * gain + beta
    found = reference(spec, x, gamma, beta, sizes=sizes)
    condition = 1 + (offset * 3 if spec.center else 0)  # slices of two values have a std as small as 1/3
    # NumPy's own sums of 40 values: some tens of half spacings
    np.testing.assert_allclose(found.y, want, rtol=0, atol=40 * EPS * condition * np.abs(want).max())
    assert len(found.moments) == np.unique(np.broadcast_to(var, shape).round(12)).size


@pytest.mark.parametrize("entry", [name for name in LINES if LINES[name][0].tracked])
def test_kept_statistics_are_those_of_numpy(entry):
    spec, sizes, shape, affine, _ = LINES[entry]
    x, *_ = data(shape, affine)
    kept = {t.name: np.random.default_rng(5).uniform(0.5, 2, 6) for t in spec.tracked}
    found = reference(spec, x, sizes=sizes, kept=kept, rate=0.3).kept
    parts = {"ghost": [x[:2], x[2:4], x[4:]], "instance_tracked": [x[i : i + 1] for i in range(5)]}.get(entry, [x])
    flat = [np.moveaxis(part, 1, 0).reshape(6, -1) for part in parts]
    n = np.array([part.shape[1] for part in flat], dtype=float)
    means = np.stack([part.mean(1) for part in flat])
    variances = np.stack([part.var(1) for part in flat])
    want = {
        "mean": (n[:, None] * means).sum(0) / n.sum(),
        "var": (n[:, None] * variances).sum(0) / (n - 1).sum(),
        "std": np.sqrt(variances + spec.eps)[0],
    }
    for name, before in kept.items():
        np.testing.assert_allclose(found[name], 0.7 * before + 0.3 * want[name], rtol=40 * EPS)


def test_plain_batch_keeps_the_unbiased_variance():
    x, *_ = data((7, 3), (3,))
    found = reference(catalog.BATCH, x, rate=1.0).kept
    np.testing.assert_allclose(found["var"], x.var(0, ddof=1), rtol=20 * EPS)
    biased = replace(catalog.BATCH, tracked=tuple(replace(t, bessel=False) for t in catalog.BATCH.tracked))
    found = reference(biased, x, rate=1.0).kept
    np.testing.assert_allclose(found["var"], x.var(0), rtol=20 * EPS)


MODES = [(entry, True) for entry in LINES] + [(entry, False) for entry in LINES if LINES[entry][0].tracked]


@pytest.mark.parametrize(("entry", "training"), MODES)
@pytest.mark.parametrize("extra", ["plain", "weight", "mask"])
def test_gradients_are_finite_differences(entry, training, extra):
    """A central difference at h = 1e-5 is off by h^2/6 of a third derivative plus eps |f| / h: about 1e-9."""
    spec, sizes, shape, affine, _ = LINES[entry]
    x, gamma, beta, dy = data(shape, affine, 1)
    rng = np.random.default_rng(2)
    options = {"sizes": sizes, "training": training, "eps": 0.1}  # eps keeps third derivatives small
    if extra == "weight":
        options["weight"] = rng.uniform(0.5, 2, shape)
    if extra == "mask":
        options["mask"] = rng.random(shape) < 0.8
    if spec.tracked:
        options["kept"] = {t.name: rng.uniform(0.5, 1.5, 6) for t in spec.tracked}
    if spec.renorm and training:  # r and d are constants of the backward pass: clip them, and they are constants
        options |= {"kept": {"mean": np.full(6, -50.0), "std": np.full(6, 0.01)}, "r_max": 2.0, "d_max": 1.5}
    found = reference(spec, x, gamma, beta, dy=dy, **options)
    arguments = {"x": x, "gamma": gamma, "beta": beta}
    for name, gradient in (("x", found.dx), ("gamma", found.dgamma), ("beta", found.dbeta)):
        direction = rng.standard_normal(arguments[name].shape)
        ahead, behind = (
            float(
                (reference(spec, **{**arguments, name: arguments[name] + s * 1e-5 * direction}, **options).y * dy).sum()
            )
            for s in (1, -1)
        )
        slope = float((gradient.reshape(direction.shape) * direction).sum())
        assert slope == pytest.approx((ahead - behind) / 2e-5, rel=1e-6, abs=1e-6)


def test_weights_are_those_of_numpy():
    """np.average and np.cov (reliability weights) know the weighted mean and Kish's unbiased variance."""
    rng = np.random.default_rng(3)
    x, w = rng.standard_normal((9, 2)), rng.uniform(0.1, 3, 9)
    found = reference(catalog.BATCH, x, weight=w[:, None] * np.ones_like(x), rate=1.0)
    np.testing.assert_allclose(found.kept["mean"], np.average(x, axis=0, weights=w), rtol=40 * EPS)
    want = [float(np.cov(x[:, c], aweights=w, ddof=1)) for c in range(2)]
    np.testing.assert_allclose(found.kept["var"], want, rtol=40 * EPS)


def test_a_mask_leaves_elements_out():
    x, gamma, beta, dy = data((6, 3, 4), (3, 1), 4)
    mask = np.zeros(x.shape, dtype=bool)
    mask[:4, :, :3] = True
    small = reference(catalog.BATCH, x[:4, :, :3], gamma, beta, dy=dy[:4, :, :3])
    found = reference(catalog.BATCH, x, gamma, beta, dy=dy, mask=mask)
    assert np.array_equal(found.y[:4, :, :3], small.y)
    assert np.array_equal(found.dx[:4, :, :3], small.dx)
    assert np.array_equal(found.dgamma, small.dgamma)
    assert np.array_equal(found.kept["var"], small.kept["var"])
    assert not found.y[~mask].any()
    assert not found.dx[~mask].any()


@pytest.mark.parametrize("r_max", [1.0, 1.2, 100.0])
def test_renorm_by_hand(r_max):
    """One channel: everything a line of arithmetic."""
    x = np.array([[1.0], [2.0], [6.0]])
    kept = {"mean": np.array([1.0]), "std": np.array([1.5])}
    std = np.sqrt(14 / 3 + 1e-5)
    r = min(std / 1.5, r_max)
    d = min((3 - 1.0) / 1.5, 0.25)
    found = reference(catalog.RENORM, x, kept=kept, r_max=r_max, d_max=0.25, rate=0.1)
    np.testing.assert_allclose(found.y, (x - 3) / std * r + d, rtol=8 * EPS)
    np.testing.assert_allclose(
        [found.kept["mean"][0], found.kept["std"][0]], [1.2, 1.5 + 0.1 * (std - 1.5)], rtol=8 * EPS
    )
    evaluated = reference(catalog.RENORM, x, kept=kept, training=False)
    np.testing.assert_allclose(evaluated.y, (x - 1) / 1.5, rtol=8 * EPS)


def test_a_last_group_of_one_value_joins_the_one_before():
    x = np.arange(5.0).reshape(5, 1)
    found = reference(catalog.GHOST, x, sizes=(("n", 2),))
    assert found.moments == {(0, 0): (0.5, 0.25), (1, 0): (3.0, 2 / 3)}
    spatial = reference(catalog.GHOST, x.reshape(5, 1, 1) + np.zeros((1, 1, 2)), sizes=(("n", 2),))
    assert len(spatial.moments) == 3


def test_nothing_to_normalize():
    for spec, sizes in ((catalog.BATCH, ()), (catalog.GROUP, (("g", 3),)), (catalog.GHOST, (("n", 2),))):
        empty = np.zeros((0, 6, 2))
        found = reference(spec, empty, dy=empty, sizes=sizes, kept={"mean": np.ones(6), "var": np.full(6, 2.0)})
        assert found.y.shape == (0, 6, 2)
        assert not found.dgamma.any()
        assert not found.kept or found.kept["var"].tolist() == [2.0] * 6


@pytest.mark.parametrize("spec", [catalog.BATCH, catalog.RENORM, catalog.INSTANCE_TRACKED], ids=lambda s: s.name)
def test_a_mask_that_leaves_one_value_leaves_what_is_kept(spec):
    """Without a mask a single value is refused; behind a mask it is simply not enough to learn from."""
    x, *_ = data((2, 3, 4), (3,))
    mask = np.zeros(x.shape, dtype=bool)
    mask[0, :, 1] = True
    found = reference(spec, x, mask=mask).kept
    for t in spec.tracked:
        np.testing.assert_array_equal(found[t.name], np.full(3, t.init))
