"""What is kept: debiased and cumulative averages from step 1 on, Bessel's correction, ghost batches with any rest."""

from __future__ import annotations

from dataclasses import replace

import keras
import numpy as np
import pytest

import normkit.keras as nk
from normkit.core import catalog
from normkit.core.reference import reference
from normkit.core.schedule import RenormSchedule
from normkit.core.spec import Tracked
from normkit.testing.keras import call_layer

BACKEND = keras.backend.backend()
RNG = np.random.default_rng(5)
BATCHES = [rng.standard_normal((16, 3)) * 0.01 + 100.0 for rng in map(np.random.default_rng, range(6))]
BATCHES = [x.astype("float32").astype("float64") for x in BATCHES]


def values(variable) -> np.ndarray:
    return np.array(keras.ops.convert_to_numpy(variable), dtype=np.float64)


def kept(layer) -> tuple[np.ndarray, np.ndarray]:
    return values(layer.moving_mean), values(layer.moving_variance)


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.99, 0.9999])
def test_a_debiased_average_is_the_moving_one_without_its_first_value(momentum):
    """To 1e-4 of the variance, with a mean of 1e4 standard deviations and a variance of 1e-4, after every step."""
    layer = nk.BatchNormalization(momentum=momentum, debiased=True)
    mean, var, remaining = np.zeros(3), np.ones(3), 1.0
    for x in BATCHES:
        call_layer(layer, x, training=True)
        mean, var = momentum * mean + (1 - momentum) * x.mean(0), momentum * var + (1 - momentum) * x.var(0)
        remaining *= momentum
        want = (Tracked("mean", 0.0).debiased(mean, remaining), Tracked("var", 1.0).debiased(var, remaining))
        np.testing.assert_allclose(kept(layer)[0], want[0], rtol=5e-7)
        np.testing.assert_allclose(kept(layer)[1], want[1], rtol=1e-4)
    assert int(values(layer.count)) == len(BATCHES)


def test_a_cumulative_average_weighs_all_batches_equally():
    layer = nk.BatchNormalization(momentum=None, bessel=True)
    for steps, x in enumerate(BATCHES, start=1):
        call_layer(layer, x, training=True)
        seen = BATCHES[:steps]
        np.testing.assert_allclose(kept(layer)[0], np.mean([b.mean(0) for b in seen], axis=0), rtol=5e-7)
        np.testing.assert_allclose(kept(layer)[1], np.mean([b.var(0, ddof=1) for b in seen], axis=0), rtol=1e-4)


@pytest.mark.parametrize("options", [{"debiased": True}, {"momentum": None}])
def test_evaluation_is_right_after_one_step(options):
    x = BATCHES[0]
    layer, plain = nk.BatchNormalization(epsilon=1e-8, **options), nk.BatchNormalization(epsilon=1e-8)
    trained, _ = call_layer(layer, x, training=True)
    call_layer(plain, x, training=True)
    # A mean of 1e4 standard deviations is kept to half a unit in its last place, 3e-4 of one.
    np.testing.assert_allclose(call_layer(layer, x)[0], trained, atol=2e-3)
    assert np.max(np.abs(call_layer(plain, x)[0] - trained)) > 50  # .99 of the first mean 0 are left


def test_the_count_exists_only_where_it_is_needed():
    schedule = RenormSchedule.for_steps(100)
    for options, has in (
        ({}, False),
        ({"virtual_batch_size": 4}, False),
        ({"renorm": True}, False),
        ({"momentum": None}, True),
        ({"debiased": True}, True),
        ({"renorm": True, "renorm_schedule": schedule}, True),
        ({"renorm": True, "renorm_schedule": {"r_max": 2.0, "start": 1}}, True),
    ):
        layer = nk.BatchNormalization(**options)
        layer.build((None, 3))
        assert (layer.weights[-1].name == "count") is has
        assert (layer.count is not None) is has


def test_a_batch_that_is_not_finite_is_not_counted():
    layer = nk.BatchNormalization(momentum=None)
    bad = BATCHES[0].copy()
    bad[0, 0] = np.inf
    for x in (BATCHES[0], bad, BATCHES[1]):
        call_layer(layer, x, training=True)
    assert int(values(layer.count)) == 2
    np.testing.assert_allclose(kept(layer)[0], (BATCHES[0].mean(0) + BATCHES[1].mean(0)) / 2, rtol=2e-7)


def test_the_schedule_opens_with_the_updates():
    schedule = RenormSchedule(r_max=1.5, d_max=0.4, start=1, r_end=3, d_end=2)
    layer = nk.BatchNormalization(renorm=True, renorm_schedule=schedule, momentum=0.5, renorm_momentum=0.5)
    state = {"mean": np.zeros(3), "std": np.ones(3)}
    for step in range(5):
        x = 3.0 * RNG.standard_normal((12, 3)) + 1.0
        r_max, d_max = schedule.at(np, step)
        want = reference(catalog.RENORM, x, eps=1e-3, kept=state, rate=0.5, r_max=float(r_max), d_max=float(d_max))
        y, _ = call_layer(layer, x, training=True)
        np.testing.assert_allclose(y, want.y, atol=1e-5)
        state = want.kept
        for name, variables in (("mean", ("moving_mean", "renorm_mean")), ("std", ("moving_stddev", "renorm_stddev"))):
            for variable in variables:
                np.testing.assert_allclose(values(getattr(layer, variable)), state[name], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(kept(layer)[1], state["std"] ** 2 - 1e-3, rtol=1e-5)


@pytest.mark.parametrize("shape", [(10, 3), (9, 3), (9, 2, 3), (3, 3), (8, 2, 3), (1, 3)])
def test_ragged_ghost_batches_in_fit(shape):
    """Groups of 4 in one compiled step; of 9 rows the last has no variance and joins the group before it."""
    x = 2.0 * np.random.default_rng(6).standard_normal(shape) + np.arange(shape[0]).reshape(-1, *(1 for _ in shape[1:]))
    x = x.astype("float32")
    rest = "" if len(shape) == 2 else " s"
    spec = replace(catalog.GHOST, x=f"(m n){rest} c", over=f"n{rest}")
    want = reference(spec, x, sizes=(("n", 4), ("c", 3)), eps=1e-3, rate=0.5).kept
    layer = nk.BatchNormalization(momentum=0.5, virtual_batch_size=4, bessel=True)
    model = keras.Sequential([keras.Input(shape[1:]), layer])
    model.compile(keras.optimizers.SGD(0.0), "mse")
    if BACKEND == "tensorflow":  # a graph that does not know the length of the batch
        import tensorflow as tf

        signature = (tf.TensorSpec((None, *shape[1:])),) * 2
        data = tf.data.Dataset.from_generator(lambda: [(x, x)], output_signature=signature).repeat()
        model.fit(data, steps_per_epoch=1, shuffle=False, verbose=0)
    else:
        model.fit(x, x, batch_size=shape[0], shuffle=False, verbose=0)
    np.testing.assert_allclose(kept(layer)[0], want["mean"], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(kept(layer)[1], want["var"], rtol=1e-5)
