"""Norm layers from PyTorch to Flax NNX and back."""

import numpy as np
import pytest
import torch
from trained_layers import LAYERS, named, trained

pytest.importorskip("flax")

from flax import nnx

import normkit
import normkit.torch
from normkit.errors import NormError


def moved(x, layer):
    """To channels last; layer and RMS norm stay."""
    return x if type(layer).__name__ in ("LayerNorm", "RMSNorm") else np.moveaxis(x, 1, -1)


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
            self.norm = nnx.BatchNorm(6, epsilon=1e-5, rngs=nnx.Rngs(0))

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
        (normkit.torch.RMSNorm(6, gain="1+w"), {}, "must be folded into w"),
    ],
)
def test_what_nnx_has_no_place_for(layer, options, said):
    with pytest.raises(NormError, match=said):
        normkit.port(layer, to="nnx", **options)
