"""What is made of probes: medians of numbers written by hand, and predictions against a random walk in NumPy."""

import dataclasses
import math
import statistics

import numpy as np
import pytest

from normkit.experiments.conditions import Conditions
from normkit.experiments.config import MOMENTUM, TrialConfig
from normkit.experiments.results import LayerProbe, Probe, TrialResult
from normkit.studies.probed import Probed, probed, resting_weight, turning

LR, DECAY, STEPS = 0.05, 0.02, 6000
# Of a random walk over a few thousand steps; the prediction leaves out terms of lr * decay / (1 - momentum) = 1 %.
WALKED = 0.05


def walk(momentum, seed=0, size=40):
    """SGD with decay on a loss that does not know the scale of w, with gradients drawn at random: |w|, |g|, angles."""
    rng = np.random.default_rng(seed)
    w, velocity, rows = rng.normal(size=size), np.zeros(size), []
    for _ in range(STEPS):
        norm = np.linalg.norm(w)
        unit = w / norm
        drawn = rng.normal(size=size)
        g = 3 * (drawn - unit * (unit @ drawn)) / norm  # at right angles to w, and the larger the smaller w is
        velocity = momentum * velocity + g + DECAY * w
        w = w - LR * velocity
        rows.append((norm, np.linalg.norm(g), math.acos(unit @ w / np.linalg.norm(w))))
    return np.array(rows)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_weights_rest_and_turn_as_predicted(momentum):
    norm, gradient, angle = walk(momentum)[STEPS // 2 :].T
    rms = math.sqrt(np.mean((norm * gradient) ** 2))
    assert np.mean(norm**4) ** 0.25 == pytest.approx(resting_weight(LR, DECAY, momentum, rms), rel=WALKED)
    assert math.sqrt(np.mean(angle**2)) == pytest.approx(turning(LR, DECAY, momentum), rel=WALKED)


def trial(probes, steps, seed=0, **conditions):
    config = TrialConfig(
        "torch", "mlp", "", "", "batch", LR, 32, "standard", seed, 1, "", "sgd", "", Conditions(**conditions)
    )
    return TrialResult(config, "accuracy", (), (), steps, 1.0, False, 0.9, probes=tuple(probes))


def probe(step, *layers, losses=(1.0, 1.5), loss=2.0, changes=(0.1, 0.4), smoothness=3.0):
    return Probe(step, loss, 1.0, layers, losses, changes, smoothness, ())


def test_probes_of_a_walk_say_that_it_rests():
    """Two hidden layers that are the same walk and a classifier that is none, probed now and then."""
    rows = walk(MOMENTUM)
    other = LayerProbe(0.0, 1.0, 5.0, 70.0, 1.0)
    probes = []
    for step in range(0, STEPS, 20):
        norm, gradient, angle = rows[step].tolist()
        probes.append(probe(step, *[LayerProbe(0.0, 1.0, gradient, norm, angle)] * 2, other))
    found = probed(LR, [trial(probes, STEPS, weight_decay=DECAY)])
    assert found.resting == pytest.approx([1.0], rel=WALKED)
    assert found.turned == pytest.approx([1.0], rel=WALKED)
    assert found.growth == pytest.approx([probes[-1].layers[0].weight / probes[0].layers[0].weight])
    last = rows[rows.shape[0] * 3 // 4][0]
    assert found.drift == pytest.approx([abs(1 - probes[-1].layers[0].weight / last)])


def layer(difference, cosine, weight=1.0):
    return LayerProbe(difference, cosine, 1.0, weight, 0.1)


def test_medians_leave_the_first_layer_out():
    first, second = (
        probe(0, layer(0, 1, 2.0), layer(1, 0.1), layer(2, 0.2), losses=(1.0, 1.5), changes=(0, 4), smoothness=7),
        probe(9, layer(0, 1, 3.0), layer(3, 0.3), layer(8, 0.8), losses=(1.0, 4.0), changes=(0, 6), smoothness=9),
    )
    found = probed(LR, [trial([first, second], 10)])
    assert found == Probed(
        LR,
        difference=(statistics.median([1, 2, 3, 8]),),
        cosine=(statistics.median([0.1, 0.2, 0.3, 0.8]),),
        variation=(statistics.median([0.5 / 2, 3 / 2]),),
        change=(5,),
        smoothness=(8,),
        growth=(math.sqrt((9 + 1) / (4 + 1)),),
        drift=(0,),
    )


def test_where_a_seed_is_lost_nothing_is_known():
    whole = trial([probe(0, layer(0, 1), layer(1, 0.5))], 1)
    assert len(probed(LR, [whole, whole]).cosine) == 2
    assert probed(LR, [whole, dataclasses.replace(whole, diverged=True)]) == Probed(LR)
    dead = trial([probe(0, layer(0, 1), layer(1, math.nan), smoothness=math.nan)], 1)
    assert (probed(LR, [whole, dead]).cosine, probed(LR, [whole, dead]).smoothness) == ((), ())
    assert len(probed(LR, [whole, dead]).difference) == 2
    # Without a gradient weights go down by themselves: there is nothing that they could rest at.
    still = [probe(n, LayerProbe(0.0, math.nan, 0.0, 1.0, 0.0), layer(0, 1), loss=0.0) for n in range(2)]
    found = probed(LR, [trial(still, 2, weight_decay=DECAY)])
    assert (found.resting, found.turned, found.variation, found.growth) == ((), (), (), (1.0,))
    partly = trial([probe(0, layer(0, 1), layer(1, math.nan), layer(1, 0.2), layer(1, 0.4))], 1)
    assert probed(LR, [partly]).cosine == pytest.approx([0.3])
