"""Norm layers from PyTorch to Flax NNX and back."""

import numpy as np
import pytest
import torch
from trained_layers import LAYERS, moved, named, trained

pytest.importorskip("flax")

from flax import nnx

import normkit
import normkit.torch
from normkit import nnx as ours
from normkit.core.schedule import RenormSchedule
from normkit.errors import NormError
from normkit.nnx.porting import read


@pytest.mark.parametrize(("layer", "shape"), LAYERS, ids=named)
def test_there_and_back(layer, shape):
    layer = trained(layer, shape)
    x = 2 + 3 * torch.randn(shape)
    expected = layer(x).detach().numpy()
    there = normkit.port(layer, to="nnx")
    there.eval()
    np.testing.assert_allclose(there(moved(x.numpy(), layer)), moved(expected, layer), rtol=1e-5, atol=1e-5)
    back = normkit.port(there, to="torch").eval()
    np.testing.assert_allclose(back(x).detach().numpy(), expected, rtol=1e-5, atol=1e-5)


def test_a_model_of_flax_receives_the_values():
    layer = trained(torch.nn.BatchNorm2d(6), (8, 6, 3, 3))

    class Net(nnx.Module):
        def __init__(self):
            self.norm = nnx.BatchNorm(6, momentum=0.9, epsilon=1e-5, rngs=nnx.Rngs(0))

        def __call__(self, x):
            return self.norm(x)

    model = normkit.port(torch.nn.Sequential(layer), to=Net())
    model.eval()
    x = torch.randn(8, 6, 3, 3)
    expected = np.moveaxis(layer(x).detach().numpy(), 1, -1)
    np.testing.assert_allclose(model(np.moveaxis(x.numpy(), 1, -1)), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("layer", "options", "said"),
    [
        (torch.nn.LayerNorm((3, 6)), {}, "over several axes cannot be ported to NNX"),
        (torch.nn.GroupNorm(3, 6), {"axis": 1}, "must have its channels last"),
        (torch.nn.BatchNorm1d(3, track_running_stats=False), {}, "must keep statistics to be ported"),
        (torch.nn.InstanceNorm1d(3, track_running_stats=True), {}, "must not keep statistics to be ported"),
    ],
)
def test_what_nnx_has_no_place_for(layer, options, said):
    with pytest.raises(NormError, match=said):
        normkit.port(layer, to="nnx", **options)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (normkit.torch.RMSNorm(6, gain="1+w"), (8, 6)),
        (normkit.torch.RMSNorm2d(6, gain="1+w"), (2, 6, 3, 3)),
        (normkit.torch.LayerNorm2d(6), (2, 6, 3, 3)),
    ],
    ids=named,
)
def test_gains_and_channels_on_axis_one_are_translated(layer, shape):
    torch.nn.init.uniform_(layer.weight, 0.5, 1.5)
    x = 2 + 3 * torch.randn(shape)
    # Half a digit more than float32 has: sums over 6 channels.
    np.testing.assert_allclose(
        normkit.port(layer, to="nnx")(x.numpy()), layer(x).detach().numpy(), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (ours.RMSNorm(3, reduction_axes=1, feature_axes=1, rngs=nnx.Rngs(0)), (2, 3, 4)),
        (nnx.LayerNorm(3, reduction_axes=(1,), feature_axes=(1,), rngs=nnx.Rngs(0)), (2, 3, 4)),
        (ours.InstanceNorm(3, feature_axes=1, rngs=nnx.Rngs(0)), (2, 3, 4)),
        (ours.GroupNorm(4, num_groups=2, use_scale=False, use_bias=False, rngs=nnx.Rngs(0)), (2, 4)),
        (ours.GroupNorm(4, num_groups=2, use_scale=False, rngs=nnx.Rngs(0)), (2, 4)),
    ],
    ids=named,
)
def test_layers_of_nnx_with_options_of_their_own(layer, shape):
    for name in ("scale", "bias"):
        variable = getattr(layer, name, None)
        if variable is not None and variable.get_value() is not None:
            variable.set_value(variable.get_value() * 0 + np.linspace(0.5, 1.5, variable.shape[0], dtype="float32"))
    x = np.random.default_rng(0).normal(2, 3, shape).astype("float32")
    there = normkit.port(layer, to="torch")
    np.testing.assert_allclose(there(torch.from_numpy(x)).detach(), layer(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("layer", "said"),
    [
        (ours.LayerNorm(5, reduction_axes=(1, 2), rngs=nnx.Rngs(0)), r"reduction_axes=\(1, 2\), feature_axes=-1"),
        (ours.RMSNorm(3, reduction_axes=1, rngs=nnx.Rngs(0)), "reduction_axes=1, feature_axes=-1"),
        (ours.GroupNorm(4, num_groups=2, reduction_axes=(-1,), rngs=nnx.Rngs(0)), r"reduction_axes=\(-1,\)"),
        (ours.BatchNorm(4, axis=2, rngs=nnx.Rngs(0)), "axis=2"),
    ],
    ids=named,
)
def test_other_axes_are_refused(layer, said):
    with pytest.raises(NormError, match=said):
        normkit.port(layer, to="torch")


def test_conventions_are_carried_over():
    debiased = ours.BatchNorm(3, debiased=True, nonfinite="update", rngs=nnx.Rngs(0))
    debiased(np.random.default_rng(0).normal(2, 3, (8, 3)).astype("float32"))
    mine, again = read(debiased), read(normkit.port(debiased, to="nnx"))
    assert (again.debiased, again.nonfinite, again.count) == (True, "update", 1)
    np.testing.assert_array_equal(mine.kept["mean"], again.kept["mean"])
    schedule = RenormSchedule.for_steps(100)
    there = normkit.port(normkit.torch.BatchRenorm1d(3, schedule=schedule), to="nnx")
    assert there.schedule == schedule
    assert normkit.port(there, to="torch").schedule == schedule
