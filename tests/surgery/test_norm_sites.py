"""Norm layers are known by their class or by their numbers, never by their name."""

import pytest
import torch
from torch import nn
from trained_layers import LAYERS, named

from normkit.torch.sites import recognize


class Rms(nn.Module):
    """Llama's, which computes in float32 whatever its type."""

    def __init__(self, n, eps=1e-6, plus=0.0):
        super().__init__()
        self.weight, self.variance_epsilon, self.plus = nn.Parameter(torch.ones(n)), eps, plus

    def forward(self, x):
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.variance_epsilon)
        return (self.weight + self.plus) * wide.to(x.dtype)


class Frozen(nn.Module):
    """DETR's: four buffers, and an eps that no attribute tells."""

    def __init__(self, n):
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(n) + 0.5)

    def forward(self, x):
        scale = self.weight * (self.running_var + 1e-3).rsqrt()
        shape = (1, -1, 1, 1)
        return x * scale.reshape(shape) + (self.bias - self.running_mean * scale).reshape(shape)


class ChannelsFirst(nn.LayerNorm):
    """A subclass that computes along another axis than its parent."""

    def forward(self, x):
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class WithActivation(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x).relu()


class MeanSquareOfNothing(Rms):
    """Divides by the mean of absolute values: no formula of the catalog."""

    def forward(self, x):
        return self.weight * x / (x.abs().mean(-1, keepdim=True) + self.variance_epsilon)


@pytest.mark.parametrize(("layer", "shape"), LAYERS, ids=named)
def test_layers_of_torch_and_ours_are_known(layer, shape):
    site = recognize("path", layer.eval())
    assert (site.how, site.path, site.kind) == ("class", "path", type(layer).__name__)
    assert site.constant == bool(site.record.kept)
    assert not recognize("path", layer.train()).constant


@pytest.mark.parametrize(
    ("layer", "kind", "axis", "eps", "gain"),
    [
        (Rms(6), "rms", -1, 1e-6, "w"),
        (Rms(6, eps=1e-3), "rms", -1, 1e-3, "w"),
        (Rms(6, plus=1.0), "rms", -1, 1e-6, "1+w"),
        (Rms(3), "rms", -1, 1e-6, "w"),  # as many channels as the trials have positions
        (Frozen(6), "batch", 1, 1e-3, "w"),
        (ChannelsFirst(6, eps=1e-6), "layer", 1, 1e-6, "w"),
        (ChannelsFirst(2, bias=False), "layer", 1, 1e-5, "w"),
    ],
)
def test_others_are_known_by_their_numbers(layer, kind, axis, eps, gain):
    site = recognize("", layer)
    assert site.how == "probe"
    assert (site.record.kind, site.record.axis, site.record.gain) == (kind, axis, gain)
    assert site.record.eps == pytest.approx(eps)
    assert "by its numbers" in str(site)
    for role, name in site.names.items():
        found = site.record.kept.get(role, getattr(site.record, role, None))
        assert found.tolist() == getattr(layer, name).double().tolist()


@pytest.mark.parametrize(
    "layer",
    [WithActivation(6).eval(), MeanSquareOfNothing(6), nn.PReLU(6), nn.Linear(6, 6), nn.Embedding(6, 6), nn.ReLU()],
    ids=named,
)
def test_what_computes_something_else_is_none(layer):
    assert recognize("", layer) is None


def test_a_forward_of_ones_own_on_a_known_layer_is_not_trusted():
    layer = nn.LayerNorm(6)
    layer.forward = lambda x: x * 2
    assert recognize("", layer) is None


def test_a_probe_changes_nothing():
    layer, random = Rms(6), torch.get_rng_state()
    recognize("", layer)
    assert layer.weight.tolist() == [1.0] * 6
    assert layer.weight.dtype == torch.float32
    assert torch.equal(torch.get_rng_state(), random)
