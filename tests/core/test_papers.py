"""What the papers prove, holds here: identities, invariances, limits. Exact in float64, so tolerances are roundings."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from normkit.core import activated, algebra, catalog, formula
from normkit.core.plan import plan
from normkit.core.reference import reference

EPS = 2.0**-52
NEAR = 1e-9  # of values of order 1: some hundred roundings, times the condition of dividing by a small deviation
FAR = 1e-3  # what must differ, differs by more


def norm(spec, x, sizes=(), eps=0.0, **options):
    """Normalize by the formulas in float64."""
    p = plan(spec, x.ndim, sizes)
    return formula.normalize(np, spec, p, x, eps=eps, **options)[0]


def gradients(spec, dy, x, sizes=(), eps=0.0, gamma=None, beta=None):
    p = plan(spec, x.ndim, sizes)
    _, moments = formula.normalize(np, spec, p, x, gamma, beta, eps=eps)
    return formula.backward(np, spec, p, dy, x, gamma, beta, moments, eps=eps)


def rows(c):
    return (("*c", (c,)),)


BATCH = partial(norm, catalog.BATCH)
LAYER = partial(norm, catalog.LAYER, sizes=rows(7))
RMS = partial(norm, catalog.RMS, sizes=rows(7))

# Ba, Kiros and Hinton 2016, table 1: norms of a linear map, under changes of weights (6 units, 5 inputs) and data.
# Every normalizer of the catalog, on 12 cases with 4 positions each, so that those over positions have some.
CHANGES = {
    "weights rescaled": lambda w, x: (3.0 * w, x),
    "weights re-centred": lambda w, x: (w + np.arange(1.0, 6.0), x),
    "one unit rescaled": lambda w, x: (np.concatenate([2.5 * w[:1], w[1:]]), x),
    "data rescaled": lambda w, x: (w, 3.0 * x),
    "data re-centred": lambda w, x: (w, x + np.arange(1.0, 6.0)),
    "one case rescaled": lambda w, x: (w, np.concatenate([2.5 * x[:1], x[1:]])),
}
INVARIANT = {
    "batch": "ynyyyn",
    "ghost": "ynyyyn",
    "renorm": "ynyyyn",  # with closed clips, as it begins; with open ones it divides by what it has kept
    "instance": "ynyyyy",  # a case is a case of statistics of its own
    "group": "ynnyny",  # one unit is not a whole group, and re-centred data move units apart
    "layer": "yynyny",
    "rms": "ynnyny",
    "frn": "ynyyny",
    "evonorm_b0": "ynyynn",  # numerator and both deviations have the scale; nothing is centred
    "evonorm_s0": "nnnnnn",  # the sigmoid sees the input itself
    "dyt": "nnnnnn",  # no statistics
    "grn": "nnnnnn",  # the input is added
}
SIZES = {"ghost": (("n", 4),), "group": (("g", 3),), "evonorm_s0": (("g", 3),)}
GAMMA, BETA = np.linspace(0.5, 1.5, 6), np.linspace(-0.2, 0.3, 6)


def of_the_catalog(name, x):
    """Any normalizer on x of shape (cases, units, positions), with gamma, beta and further parameters at work."""
    spec = catalog.CATALOG[name]
    if spec.x == "*n *c":  # over the units of each position
        return of_rows(spec, np.moveaxis(x, 1, -1))
    p = plan(spec, 3, SIZES.get(name, ()))
    if spec.formula == "evonorm_b0":
        instance = plan(catalog.INSTANCE, 3)
        return activated.evonorm_b0(np, spec, p, instance, x, 0.7 * GAMMA, GAMMA, BETA, eps=0.0)[0]
    if spec.formula == "evonorm_s0":
        groups = GAMMA.reshape(3, 2), BETA.reshape(3, 2)
        return activated.evonorm_s0(np, spec, p, x, 0.7 * GAMMA, *groups, eps=0.0)
    if spec.formula == "global_response":
        return activated.global_response(np, p, x, GAMMA, BETA, eps=0.0, channel=1)
    shape = (3, 2) if name == "group" else (6,)
    y = norm(spec, x, SIZES.get(name, ()), gamma=GAMMA.reshape(shape), beta=BETA.reshape(shape))
    return activated.thresholded(np, p, y, 0.1 * GAMMA) if spec.formula == "filter_response" else y


def of_rows(spec, x):
    if spec.formula == "dynamic_tanh":
        return activated.dynamic_tanh(np, x, 0.5, GAMMA, BETA)
    return norm(spec, x, rows(6), gamma=GAMMA, beta=BETA)


@pytest.mark.parametrize("name", catalog.CATALOG)
@pytest.mark.parametrize(("column", "change"), list(enumerate(CHANGES.values())), ids=list(CHANGES))
def test_invariance_matrix(name, column, change):
    """REPRO 5a."""
    rng = np.random.default_rng(0)
    w, x = rng.standard_normal((6, 5)), rng.standard_normal((12, 4, 5))
    (first, second) = (of_the_catalog(name, np.moveaxis(b @ a.T, -1, 1)) for a, b in ((w, x), change(w, x)))
    distance = np.abs(first - second).max()
    if INVARIANT[name][column] == "y":
        assert distance < NEAR
    else:
        assert distance > FAR


# The same for maps: what each forgets about an image.
MAPS = {
    "instance": partial(norm, catalog.INSTANCE),
    "group": partial(norm, catalog.GROUP, sizes=(("g", 3),)),
    "one_group": partial(norm, catalog.GROUP, sizes=(("g", 1),)),
    "batch": BATCH,
}


def scaled(x, where, a=2.5, b=1.5):
    x = x.copy()
    x[where] = a * x[where] + b
    return x


@pytest.mark.parametrize(
    ("name", "where", "holds"),
    [
        ("instance", np.s_[0, 0], True),  # one channel of one image: contrast removal, REPRO 14
        ("instance", np.s_[0], True),
        ("instance", np.s_[:, 0, 0], False),
        ("group", np.s_[0, 0], False),
        ("group", np.s_[0, 0:2], True),  # a whole group of one image
        ("group", np.s_[0], True),
        ("one_group", np.s_[0, 0:2], False),
        ("one_group", np.s_[0], True),
        ("batch", np.s_[0], False),
        ("batch", np.s_[:, 0], True),
    ],
)
def test_invariance_of_maps(name, where, holds):
    x = np.random.default_rng(1).standard_normal((4, 6, 3, 5))
    distance = np.abs(MAPS[name](x) - MAPS[name](scaled(x, where))).max()
    assert distance < NEAR if holds else distance > FAR


# 1. Ioffe and Szegedy 2015.


def test_batch_norm_ignores_the_scale_of_weights():
    """BN((aW)u) = BN(Wu); its gradient by u is the same, by aW it is 1/a; hence <w, dL/dw> = 0 for every unit."""
    rng = np.random.default_rng(2)
    w, u, dy = rng.standard_normal((7, 5)), rng.standard_normal((11, 5)), rng.standard_normal((11, 7))
    a = 3.7
    np.testing.assert_allclose(BATCH(u @ (a * w).T), BATCH(u @ w.T), rtol=0, atol=NEAR)
    g, ga = (gradients(catalog.BATCH, dy, u @ m.T).x for m in (w, a * w))
    np.testing.assert_allclose(ga @ (a * w), g @ w, rtol=0, atol=NEAR)
    np.testing.assert_allclose(ga.T @ u, g.T @ u / a, rtol=0, atol=NEAR)
    np.testing.assert_allclose(np.sum(w * (g.T @ u), axis=1), 0, rtol=0, atol=NEAR)


def test_statistics_of_algorithm_two():
    """E[x] = E_B[mean_B] and Var[x] = m/(m-1) E_B[var_B]: what a cumulative average over batches keeps."""
    rng = np.random.default_rng(3)
    batches = rng.standard_normal((20, 8, 3)) + 2
    kept = None
    for t, x in enumerate(batches):
        kept = reference(catalog.BATCH, x, kept=kept, rate=1 / (t + 1)).kept
    assert kept is not None
    np.testing.assert_allclose(kept["mean"], batches.mean((0, 1)), rtol=0, atol=40 * 4 * EPS)
    np.testing.assert_allclose(kept["var"], 8 / 7 * batches.var(1).mean(0), rtol=0, atol=40 * 4 * EPS)


@pytest.mark.parametrize("rate", [0.5, 0.1, 0.01])
def test_moving_averages_have_a_closed_form(rate):
    """Section 3 of the notes: after T steps (1-keep^T) weighted average + keep^T first value, and debiasing."""
    rng = np.random.default_rng(4)
    batches, first, steps = rng.standard_normal((30, 8, 3)), np.array([5.0, -5.0, 0.0]), 30
    kept = {"mean": first, "var": np.ones(3)}
    for x in batches:
        kept = reference(catalog.BATCH, x, kept=kept, rate=rate).kept
    weights = rate * (1 - rate) ** np.arange(steps - 1, -1, -1)
    want = np.tensordot(weights, batches.mean(1), 1) + algebra.remaining(rate, steps) * first
    np.testing.assert_allclose(kept["mean"], want, rtol=0, atol=4 * steps * 5 * EPS)
    var = catalog.BATCH.tracked[1].debiased(kept["var"], algebra.remaining(rate, steps))
    want = np.tensordot(weights / weights.sum(), batches.var(1, ddof=1), 1)
    np.testing.assert_allclose(var, want, rtol=0, atol=4 * steps * 5 * EPS / (1 - algebra.remaining(rate, steps)))


def test_a_batch_of_two_is_plus_or_minus_one():
    """Section 27: at m = 2 normalized values are exactly +-1, and Bessel's factor is 2."""
    x = np.array([[1.0, -3.0], [2.0, 5.0]])
    assert np.abs(BATCH(x)).tolist() == [[1.0, 1.0], [1.0, 1.0]]
    kept = reference(catalog.BATCH, x, rate=1.0).kept["var"]
    assert kept.tolist() == (2 * x.var(0)).tolist()


# 2. Ioffe 2017.


def renormed(x, kept, r_max, d_max, dy, eps=1e-5):
    p = plan(catalog.RENORM, x.ndim)
    correct = formula.renorm(np, kept, r_max, d_max, lambda value: value)
    y, moments = formula.normalize(np, catalog.RENORM, p, x, eps=eps, correct=correct)
    return y, formula.backward(np, catalog.RENORM, p, dy, x, None, None, moments, eps=eps).x


def test_closed_clips_are_batch_norm():
    """REPRO 2a: r_max = 1, d_max = 0."""
    rng = np.random.default_rng(5)
    x, dy = rng.standard_normal((9, 4)), rng.standard_normal((9, 4))
    kept = {"mean": rng.standard_normal(4), "std": rng.uniform(0.2, 3, 4)}
    y, dx = renormed(x, kept, 1.0, 0.0, dy)
    np.testing.assert_allclose(y, norm(catalog.BATCH, x, eps=1e-5), rtol=0, atol=8 * EPS)
    np.testing.assert_allclose(dx, gradients(catalog.BATCH, dy, x, eps=1e-5).x, rtol=0, atol=8 * EPS)


def test_open_clips_train_as_they_evaluate():
    """REPRO 2a: within the clips the training output is evaluation's, with the statistics before the update."""
    rng = np.random.default_rng(6)
    x = rng.standard_normal((9, 4))
    kept = {"mean": rng.standard_normal(4), "std": rng.uniform(0.2, 3, 4)}
    y, _ = renormed(x, kept, 1e6, 1e6, x)
    evaluated = formula.evaluate(np, catalog.RENORM, plan(catalog.RENORM, 2), x, kept, None, None, eps=1e-5)
    np.testing.assert_allclose(y, evaluated, rtol=0, atol=40 * EPS * np.abs(evaluated).max())
    np.testing.assert_allclose(evaluated, (x - kept["mean"]) / kept["std"], rtol=4 * EPS)


@pytest.mark.parametrize(("m", "share"), [(2, 0.5642), (4, 0.7979)])
def test_kept_std_is_the_mean_of_batch_stds(m, share):
    """E[sigma_B] of Gaussian data is 0.564 (m = 2) and 0.798 (m = 4) of sigma; it must not be corrected.

    40 000 channels stand for as many batches: the standard error is below 0.43 / 200, four of them are allowed.
    """
    x = np.random.default_rng(7).standard_normal((m, 40_000))
    p = plan(catalog.RENORM, 2)
    _, moments = formula.normalize(np, catalog.RENORM, p, x, eps=0.0)
    batch, _ = formula.merged(np, catalog.RENORM, p, moments, eps=0.0)
    assert batch["std"].mean() == pytest.approx(share, abs=4 * 0.43 / 200)


# 4 and 5. Group and layer norm.


def test_group_norm_between_layer_and_instance_norm():
    """REPRO 4a: one group is layer norm over (C, H, W), as many groups as channels is instance norm."""
    x = np.random.default_rng(8).standard_normal((4, 6, 3, 5))
    group = partial(norm, catalog.GROUP, x, eps=1e-5)
    layer = norm(catalog.LAYER, x, sizes=(("*c", (6, 3, 5)),), eps=1e-5)
    np.testing.assert_allclose(group(sizes=(("g", 1),)), layer, rtol=0, atol=16 * EPS)
    np.testing.assert_allclose(group(sizes=(("g", 6),)), norm(catalog.INSTANCE, x, eps=1e-5), rtol=0, atol=16 * EPS)


@pytest.mark.parametrize("name", ["instance", "group", "one_group"])
def test_batch_composition_does_not_matter(name):
    """REPRO 4a: bit by bit."""
    x = np.random.default_rng(9).standard_normal((4, 6, 3, 5))
    whole = MAPS[name](x)
    for i in range(4):
        assert np.array_equal(MAPS[name](x[i : i + 1])[0], whole[i])
        assert np.array_equal(MAPS[name](x[[i, 0, 3, 1, 2]])[0], whole[i])


# 12. Ghost batch norm.


@pytest.mark.parametrize("size", [2, 3, 8])
def test_ghost_batches_are_batches(size):
    """REPRO 12: batch norm of each chunk, concatenated; one chunk is batch norm. Gradients included."""
    rng = np.random.default_rng(10)
    x, dy = rng.standard_normal((8, 4, 3)), rng.standard_normal((8, 4, 3))
    gamma, beta = rng.standard_normal(4), rng.standard_normal(4)
    chunks = [slice(i, i + size) for i in range(0, 8, size)]
    ghost = gradients(catalog.GHOST, dy, x, (("n", size),), 1e-5, gamma, beta)
    plain = [gradients(catalog.BATCH, dy[c], x[c], (), 1e-5, gamma, beta) for c in chunks]
    y = norm(catalog.GHOST, x, (("n", size),), 1e-5, gamma=gamma, beta=beta)
    want = np.concatenate([norm(catalog.BATCH, x[c], (), 1e-5, gamma=gamma, beta=beta) for c in chunks])
    np.testing.assert_allclose(y, want, rtol=0, atol=16 * EPS * np.abs(want).max())
    np.testing.assert_allclose(ghost.x, np.concatenate([g.x for g in plain]), rtol=0, atol=200 * EPS)
    np.testing.assert_allclose(ghost.gamma, sum(g.gamma for g in plain), rtol=0, atol=200 * EPS)
    np.testing.assert_allclose(ghost.beta, sum(g.beta for g in plain), rtol=0, atol=200 * EPS)


def test_ghost_batches_update_once():
    """Ours: kept += rate (average of the ghosts - kept). The paper: K updates in turn. The closed forms differ."""
    rng = np.random.default_rng(11)
    x, rate = rng.standard_normal((8, 3)), 0.3
    means = x.reshape(4, 2, 3).mean(1)
    first = np.ones(3)
    kept = {"mean": first, "var": np.ones(3)}
    found = reference(catalog.GHOST, x, sizes=(("n", 2),), kept=kept, rate=rate).kept
    once = (1 - rate) * first + rate * means.mean(0)
    in_turn = (1 - rate) ** 4 * first + sum((1 - rate) ** (3 - i) * rate * means[i] for i in range(4))
    np.testing.assert_allclose(found["mean"], once, rtol=0, atol=16 * EPS)
    assert np.abs(once - in_turn).max() > FAR
    # Variances are pooled without the spread between ghosts, with Bessel's factor of each: n/(n-1) = 2.
    pooled = 2 * x.reshape(4, 2, 3).var(1).mean(0)
    np.testing.assert_allclose(found["var"], (1 - rate) + rate * pooled, rtol=0, atol=16 * EPS)


# 15. RMS norm.


def test_rms_norm_is_layer_norm_of_centred_data():
    """REPRO 15."""
    rng = np.random.default_rng(12)
    x = rng.standard_normal((6, 7))
    x -= x.mean(1, keepdims=True)
    np.testing.assert_allclose(RMS(x), LAYER(x), rtol=0, atol=16 * EPS)
    assert np.abs(RMS(x + 1) - LAYER(x + 1)).max() > FAR
    assert np.abs(RMS(3.5 * x) - RMS(x)).max() < NEAR
    assert np.abs(RMS(x + 1) - RMS(x)).max() > FAR


def test_eps_is_inside_the_root():
    """Section 27: the paper's code adds eps outside; at tiny inputs the two differ."""
    x = np.full((1, 4), 1e-4)
    found = norm(catalog.RMS, x, sizes=rows(4), eps=1e-6)
    np.testing.assert_allclose(found, 1e-4 / np.sqrt(1e-8 + 1e-6), rtol=4 * EPS)
    assert np.abs(found - 1e-4 / (1e-4 + 1e-6)).max() > 0.5


def test_one_plus_w_is_a_shifted_gain():
    rng = np.random.default_rng(13)
    x, gamma = rng.standard_normal((6, 7)), rng.standard_normal(7)
    shifted = norm(replace(catalog.RMS, gain="1+w"), x, rows(7), gamma=gamma - 1)
    np.testing.assert_allclose(shifted, RMS(x, gamma=gamma), rtol=0, atol=16 * EPS * np.abs(shifted).max())


# 20 and 21, and deviations seen in public code (section 27). Others of these: `r` of batch renormalization inverted
# (test_renorm_by_hand, of the oracle), its deviation mixed with the variance (test_kept_std_is_the_mean_of_batch_stds),
# Bessel's factor (test_a_batch_of_two_is_plus_or_minus_one), eps outside of the root (test_eps_is_inside_the_root),
# ghosts that update in turn or once (test_ghost_batches_update_once), a first variance of 0
# (test_entries_of_the_catalog).


def test_bessel_counts_positions():
    """The weight norm code takes N/(N-1), of samples alone; m is N H W (algorithm 2)."""
    x = np.random.default_rng(14).standard_normal((3, 2, 4, 5))
    kept = reference(catalog.BATCH, x, rate=1.0).kept["var"]
    np.testing.assert_allclose(kept, x.var((0, 2, 3)) * 60 / 59, rtol=40 * EPS)
    assert np.abs(kept - x.var((0, 2, 3)) * 3 / 2).min() > 0.1


def test_instances_are_divided_by_the_biased_variance():
    """The switchable norm code takes the unbiased one, which at 2 positions gives 1/sqrt(2) in place of 1."""
    x = np.array([[[1.0, 3.0], [5.0, -1.0]]])
    np.testing.assert_allclose(norm(catalog.INSTANCE, x), [[[-1.0, 1.0], [1.0, -1.0]]], rtol=4 * EPS)


def test_eps_of_the_further_normalizers_is_that_of_the_papers():
    """Timm has 1e-5 for filter response norm and 1e-3 for EvoNorm-B0: seen where the data are small."""
    assert (catalog.FRN.eps, catalog.EVONORM_B0.eps, catalog.EVONORM_S0.eps) == (1e-6, 1e-5, 1e-5)
    x = np.full((1, 1, 4), 1e-3)  # the mean square is 1e-6
    frn = norm(catalog.FRN, x, eps=catalog.FRN.eps)
    np.testing.assert_allclose(frn, np.sqrt(0.5), rtol=4 * EPS)
    assert np.abs(frn - norm(catalog.FRN, x, eps=1e-5)).min() > 0.3


def test_public_notes_on_evonorm_s0_that_are_wrong():
    """Some take sigmoid(x / std), some the variance in place of its root."""
    x = 2 * np.random.default_rng(15).standard_normal((2, 6, 5))
    ones, zeros = np.ones((3, 2)), np.zeros((3, 2))
    p = plan(catalog.EVONORM_S0, 3, (("g", 3),))
    y = activated.evonorm_s0(np, catalog.EVONORM_S0, p, x, np.ones(6), ones, zeros, eps=1e-5)
    var = x.reshape(2, 3, 2, 5).var((2, 3)).repeat(2, 1)[..., None] + 1e-5
    std = np.sqrt(var)
    np.testing.assert_allclose(y, x / (1 + np.exp(-x)) / std, rtol=0, atol=NEAR)
    for wrong in (x / (1 + np.exp(-x / std)) / std, x / (1 + np.exp(-x)) / var):
        assert np.abs(y - wrong).max() > 0.1
