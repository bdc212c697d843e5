import math

import numpy as np
import pytest

from normkit.experiments.protocol import SiteValues
from normkit.experiments.sites import Sites

RNG = np.random.default_rng(0)


def site(x, output=None, name="act", axis=1, gamma=None, beta=None):
    x = np.asarray(x)
    output = np.maximum(x, 0) if output is None else np.asarray(output)
    return SiteValues(name, "relu", x, output, axis, gamma, beta)


def by_channel(x, axis):
    """The values of each channel, one by one."""
    return [np.take(x, number, axis).astype(np.float64).ravel() for number in range(x.shape[axis])]


@pytest.mark.parametrize(("shape", "axis"), [((20, 4), 1), ((5, 4, 3), 1), ((5, 3, 4), -1), ((3, 4, 5, 6), 1)])
def test_mean_std_and_dead_channels(shape, axis):
    x = (RNG.normal(size=shape) * 3 + 1).astype(np.float32)
    channels = np.moveaxis(x, axis, 0)
    channels[0] = -np.abs(channels[0])  # dead under relu
    channels[1] = 0.25  # constant before it already
    channels[2] += 100  # alive, however far away
    (stats,) = Sites().measure([site(x, axis=axis)])
    assert (stats.name, stats.activation) == ("act", "relu")
    values = by_channel(x, axis)
    assert stats.mean == pytest.approx(np.mean([v.mean() for v in values]), rel=1e-12)
    assert stats.std == pytest.approx(math.sqrt(np.mean([v.var() for v in values])), rel=1e-12)
    assert stats.dead == 0.5
    assert stats.drift is stats.gamma_mean is stats.beta_std is None


def test_std_is_of_what_the_batch_changes():
    """Channels that differ, as biases make them, but say the same for every sample carry no signal."""
    x = np.tile(RNG.normal(size=(1, 50)), (30, 1)) + 1e-3 * RNG.normal(size=(30, 50))
    assert Sites().measure([site(x)])[0].std == pytest.approx(1e-3, rel=0.05)


def test_sums_are_wide():
    """A float32 sum of squares of these loses the deviation altogether."""
    x = np.full((100_000, 1), 3e4, np.float32)
    x[::2] += 1
    (stats,) = Sites().measure([site(x)])
    assert stats.mean == pytest.approx(3e4 + 0.5, abs=1e-6)
    assert stats.std == pytest.approx(0.5, abs=1e-6)


def test_drift_is_in_standard_deviations_of_the_snapshot_before():
    first = RNG.normal(size=(40, 3)) * (1, 2, 4) + (0, 5, -5)
    second = first * 3 + (2, -4, 12)
    sites = Sites()
    assert sites.measure([site(first)])[0].drift is None
    moved = [abs(b.mean() - a.mean()) / a.std() for a, b in zip(first.T, second.T, strict=True)]
    assert sites.measure([site(second)])[0].drift == pytest.approx(np.mean(moved), rel=1e-9)
    assert sites.measure([site(second)])[0].drift == 0, "against the last snapshot, not the first"


def test_drift_belongs_to_the_site_of_that_name():
    a, b = RNG.normal(size=(2, 40, 3))
    sites = Sites()
    sites.measure([site(a, name="a"), site(b, name="b")])
    again = sites.measure([site(b, name="b"), site(a, name="a"), site(a, name="new")])
    assert [stats.drift for stats in again] == [0, 0, None]
    assert sites.measure([site(a[:, :2], name="a")])[0].drift is None, "other channels are another site"


def test_channels_without_a_unit_are_left_out_of_the_drift():
    before = np.array([[1.0, 0.0], [1.0, 2.0]])
    sites = Sites()
    sites.measure([site(before)])
    assert sites.measure([site(before + 3)])[0].drift == 3
    sites = Sites()
    sites.measure([site(before[:, :1])])
    assert sites.measure([site(before[:, :1] + 3)])[0].drift is None


def test_gamma_and_beta():
    gamma, beta = np.array([1, 2, 6], np.float32), np.array([0, 0, -3], np.float32)
    (stats,) = Sites().measure([site(np.ones((4, 3)), gamma=gamma, beta=beta)])
    assert stats[6:] == pytest.approx((3, math.sqrt(14 / 3), -1, math.sqrt(2)))
    (stats,) = Sites().measure([site(np.ones((4, 3)), gamma=gamma)])
    assert stats.beta_mean is stats.beta_std is None


def test_one_value_per_channel_is_not_called_dead():
    assert Sites().measure([site(-np.ones((1, 3)))])[0].dead == 0
    assert Sites().measure([site(-np.ones((2, 3)))])[0].dead == 1


def test_what_is_not_finite_stays_visible():
    x = np.ones((4, 2), np.float32)
    x[0, 0], x[1, 1] = np.nan, np.inf
    (stats,) = Sites().measure([site(x)])
    assert math.isnan(stats.mean)
    assert math.isnan(stats.std)
    assert stats.dead == 0
