"""The probe sees every call of an activation, says where it is and what norm stands beside it, and changes nothing."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import normkit.torch as nk
from normkit.errors import NormTypeError, NormValueError
from normkit.torch.factory import norm_factory
from normkit.torch.probe import probe

X = torch.randn(6, 8, generator=torch.Generator().manual_seed(0)) * 3
IMAGES = torch.randn(6, 3, 5, 5, generator=torch.Generator().manual_seed(1))


class Calls(nn.Module):
    """Calls a function on its input."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def softplus(x):
    return np.log1p(np.exp(x))


erf = np.vectorize(math.erf)
NUMPY = {
    "relu": lambda x: np.maximum(x, 0),
    "relu6": lambda x: np.clip(x, 0, 6),
    "leaky_relu": lambda x: np.where(x > 0, x, 0.01 * x),
    "elu": lambda x: np.where(x > 0, x, np.expm1(x)),
    "selu": lambda x: 1.0507009873554805 * np.where(x > 0, x, 1.6732632423543772 * np.expm1(x)),
    "gelu": lambda x: x * (1 + erf(x / 2**0.5)) / 2,
    "silu": lambda x: x * sigmoid(x),
    "hardswish": lambda x: x * np.clip(x + 3, 0, 6) / 6,
    "mish": lambda x: x * np.tanh(softplus(x)),
    "softplus": softplus,
    "tanh": np.tanh,
    "sigmoid": sigmoid,
}
FORMS = {
    "relu": [F.relu, torch.relu, torch.relu_, torch.Tensor.relu, torch.Tensor.relu_, nn.ReLU(), nn.ReLU(inplace=True)],
    "relu6": [F.relu6, nn.ReLU6(), nn.ReLU6(inplace=True)],
    "leaky_relu": [F.leaky_relu, nn.LeakyReLU(), lambda x: F.leaky_relu(x, inplace=True)],
    "elu": [F.elu, nn.ELU(inplace=True)],
    "selu": [F.selu, torch.selu, nn.SELU()],
    "gelu": [F.gelu, nn.GELU()],
    "silu": [F.silu, nn.SiLU(inplace=True), lambda x: F.silu(input=x)],
    "hardswish": [F.hardswish, nn.Hardswish(inplace=True)],
    "mish": [F.mish, nn.Mish()],
    "softplus": [F.softplus, nn.Softplus()],
    "tanh": [torch.tanh, F.tanh, torch.Tensor.tanh_, nn.Tanh()],
    "sigmoid": [torch.sigmoid, F.sigmoid, torch.Tensor.sigmoid, nn.Sigmoid()],
}


@pytest.mark.parametrize(("name", "form"), [(name, form) for name, forms in FORMS.items() for form in forms])
def test_every_form_of_a_call_is_seen_with_its_values(name, form):
    given = X.clone()
    (site,) = probe(Calls(form), given)
    assert site.activation == name
    np.testing.assert_array_equal(site.input, X.numpy())  # also where the call overwrites it
    np.testing.assert_allclose(site.output, NUMPY[name](X.double().numpy()), atol=3e-6)
    assert given.equal(X), "what the caller holds is not written to"
    assert site.gamma is None
    assert site.beta is None


def test_what_is_no_activation_of_a_batch_is_left_out():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate = nn.Parameter(torch.zeros(6, 8))

        def forward(self, x):
            return F.softmax(x, -1) * self.gate.sigmoid() * torch.tanh(x.mean())

    assert probe(Gated(), X) == []


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.act = nn.ReLU()
        self.block = nn.Sequential(nn.Linear(8, 8), nn.Tanh())

    def forward(self, x):
        x = self.block(self.act(self.first(x)))
        return F.gelu(self.act(self.first(x)))


def test_a_site_is_named_by_the_module_that_calls_with_numbers_where_it_calls_several_times():
    sites = probe(Net(), X)
    assert [(site.name, site.activation) for site in sites] == [
        ("act 1", "relu"),
        ("block.1", "tanh"),
        ("act 2", "relu"),
        ("Net", "gelu"),
    ]


def test_a_module_that_raises_and_is_caught_does_not_confuse_the_names():
    class Tries(nn.Module):
        def __init__(self):
            super().__init__()
            self.broken = Calls(lambda x: x.no_such_method())

        def forward(self, x):
            try:
                self.broken(x)
            except AttributeError:
                return F.relu(x)

    assert [site.name for site in probe(Tries(), X)] == ["Tries"]


def marked(norm):
    """The norm with parameters that can be told from the first ones."""
    with torch.no_grad():
        norm.weight.copy_(torch.arange(norm.weight.numel(), dtype=torch.float32).reshape(norm.weight.shape))
        if getattr(norm, "bias", None) is not None:
            norm.bias.fill_(0.5)
    return norm


class OwnNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(8))

    def forward(self, x):
        return x * self.weight


NORMS = {
    "torch": lambda: nn.BatchNorm1d(8),
    "layer": lambda: nn.LayerNorm(8),
    "rms": lambda: nn.RMSNorm(8),
    "ours": lambda: nk.GroupNorm(2, 8),
    "renorm": lambda: nk.BatchRenorm1d(8),
    "own": OwnNorm,
    "factory": lambda: norm_factory("batch", "before", None)(8, axis=-1),
}


@pytest.mark.parametrize("norm", NORMS)
def test_gamma_and_beta_of_the_norm_beside_it(norm):
    before = marked(NORMS[norm]())
    beta = getattr(before, "bias", None) is not None
    for model in (nn.Sequential(before, nn.ReLU()), nn.Sequential(nn.ReLU(), before)):
        (site,) = probe(model, X)
        np.testing.assert_array_equal(site.gamma, np.arange(8))
        assert (site.beta is not None) == beta
        assert not beta or (site.beta == 0.5).all()


def test_gamma_of_the_norm_before_wins_and_one_plus_w_is_the_gain():
    first, second = marked(nk.RMSNorm(8, gain="1+w")), marked(nn.LayerNorm(8))
    (site,) = probe(nn.Sequential(first, nn.ReLU(), second), X)
    np.testing.assert_array_equal(site.gamma, 1 + np.arange(8))
    assert site.beta is None


@pytest.mark.parametrize("in_place", [False, True])
def test_a_norm_behind_a_sum_does_not_feed_the_activation(in_place):
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = marked(nn.BatchNorm1d(8))

        def forward(self, x):
            y = self.norm(x)
            if in_place:
                y += x
            else:
                y = y + x
            return F.relu(y, inplace=True)

    (site,) = probe(Residual(), X)
    assert site.gamma is None


def test_norm_act_shows_its_normalized_pre_activation():
    model = nk.NormAct(marked(nk.BatchNorm2d(3)), "silu")
    (site,) = probe(model, IMAGES)
    x = IMAGES.double().numpy()
    normalized = (x - x.mean((0, 2, 3), keepdims=True)) / np.sqrt(x.var((0, 2, 3), keepdims=True) + 1e-5)
    expected = normalized * np.arange(3).reshape(3, 1, 1) + 0.5
    np.testing.assert_allclose(site.input, expected, atol=1e-5)
    np.testing.assert_allclose(site.output, expected * sigmoid(expected), atol=1e-5)
    np.testing.assert_array_equal(site.gamma, [0, 1, 2])
    assert (site.name, site.activation) == ("NormAct", "silu")


class Speech(nn.Module):
    """Layer norm over the channels between two transpositions, the activation on (N, C, L)."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv1d(8, 16, 3), nn.LayerNorm(16)

    def forward(self, x):
        return F.gelu(self.norm(self.conv(x).transpose(1, 2)).transpose(1, 2))


SEQUENCES = torch.randn(4, 8, 8)
AXES = {
    "conv1d": (nn.Sequential(nn.Conv1d(8, 16, 3), nn.ReLU()), SEQUENCES, 1),
    "conv1d as long as wide": (nn.Sequential(nn.Conv1d(8, 8, 3, padding=1), nn.ReLU()), SEQUENCES, 1),
    "conv1d, batch norm": (nn.Sequential(nn.Conv1d(8, 6, 3), nn.BatchNorm1d(6), nn.ReLU()), SEQUENCES, 1),
    "linear": (nn.Sequential(nn.Linear(8, 16), nn.ReLU()), SEQUENCES, -1),
    "linear as long as wide": (nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.1), nn.ReLU()), SEQUENCES, -1),
    "linear in chunks": (nn.Sequential(nn.Linear(8, 12), Calls(lambda x: F.silu(x.chunk(2, -1)[0]))), SEQUENCES, -1),
    "our norm, features last": (norm_factory("batch", "before", None)(8, nn.ReLU(), axis=-1), SEQUENCES, -1),
    "our norm, features second": (norm_factory("batch", "before", None)(8, nn.ReLU()), SEQUENCES, 1),
    "layer norm 2d": (nn.Sequential(nk.LayerNorm2d(8), nn.ReLU()), SEQUENCES, 1),
    "transposed": (Speech(), SEQUENCES, 1),
    "nothing before": (nn.ReLU(), SEQUENCES, -1),
    "table": (nn.Sequential(nn.Linear(8, 6), nn.ReLU()), X, 1),
    "images": (nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU()), IMAGES, 1),
    "images, features last": (nn.Sequential(nn.Linear(5, 16), nn.GELU()), IMAGES, -1),
    "images, nothing before": (nn.ReLU(), IMAGES, 1),
    "attention": (nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), SEQUENCES, -1),
}


@pytest.mark.parametrize("case", AXES)
def test_axis_of_the_channels(case):
    model, x, axis = AXES[case]
    assert [site.axis for site in probe(model, x)] == [axis]


def everything(model):
    return {
        "state": {name: value.clone() for name, value in model.state_dict().items()},
        "objects": [id(value) for value in (*model.parameters(), *model.buffers())],
        "modes": [module.training for module in model.modules()],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        "random": (torch.get_rng_state(), np.random.get_state()[1:], random.getstate()),  # noqa: NPY002
    }


class Restless(nn.Module):
    """Draws, counts and moves its buffers in every forward pass."""

    def __init__(self, fails=False):
        super().__init__()
        self.norm, self.drop, self.fails = nn.BatchNorm1d(8), nn.Dropout(0.5), fails
        self.register_buffer("count", torch.zeros(()))
        self.norm.eval()
        self.norm.register_forward_hook(lambda *_: None)

    def forward(self, x):
        self.count = self.count + random.random() + np.random.rand()  # noqa: NPY002
        x = F.relu(self.drop(self.norm(x)))
        if self.fails:
            raise RuntimeError("no more")
        return x


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("train", [False, True])
def test_nothing_changes(train, fails):
    model = Restless(fails)
    before = everything(model)
    if fails:
        with pytest.raises(RuntimeError, match="no more"):
            probe(model, X, train=train)
    else:
        (site,) = probe(model, X, train=train)
        assert (site.input == 0).any() == train  # dropout
        assert (abs(site.input.mean()) < 0.5) or not train
    after = everything(model)
    torch.testing.assert_close(after.pop("state"), before.pop("state"), rtol=0, atol=0)
    torch.testing.assert_close(after["random"][0], before["random"][0], rtol=0, atol=0)
    assert str(after) == str(before)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.relu(X).min() == 0  # and no mode is left on


def test_training_and_evaluation_are_told_apart():
    model = nn.Sequential(nn.BatchNorm1d(8), nn.ReLU())
    (trained,) = probe(model, X + 5)
    (evaluated,) = probe(model, X + 5, train=False)
    assert abs(trained.input.mean()) < 1e-6
    np.testing.assert_allclose(evaluated.input, (X + 5).numpy(), rtol=1e-4)


def test_fast_paths_and_compiled_parts_hide_nothing():
    encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, activation="gelu"), 2, enable_nested_tensor=False
    )
    sites = probe(encoder, SEQUENCES, train=False)
    assert [(site.name, site.activation) for site in sites] == [("layers.0", "gelu"), ("layers.1", "gelu")]
    compiled = torch.compile(nn.Sequential(nn.Linear(8, 4), nn.ReLU()), backend="eager")
    compiled(X)
    assert [site.activation for site in probe(compiled, X)] == ["relu"]


class Odd(nn.Module):
    """A buffer that cannot be written to, and values that cannot be read."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.register_buffer("ones", torch.ones(1).expand(8))

    def forward(self, x):
        return torch.relu(torch.vmap(lambda row: torch.relu(self.linear(row) * self.ones))(x))


def test_transforms_are_passed_over():
    assert [site.axis for site in probe(Odd(), SEQUENCES)] == [-1]


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.linear = nn.Embedding(10, 8), nn.Linear(8, 8)

    def forward(self, ids, values):
        return F.relu(self.linear(values) + self.embedding(ids))


def test_inputs_by_name_in_order_and_as_arrays():
    model = Pair().double()
    ids, values = np.arange(6), np.ones((6, 8), np.float32)[::-1]
    values.flags.writeable = False
    (by_name,) = probe(model, {"values": torch.from_numpy(values.copy()), "ids": torch.from_numpy(ids)})
    (in_order,) = probe(model, (ids, values))
    np.testing.assert_array_equal(by_name.input, in_order.input)
    assert by_name.input.dtype == np.float64


def test_inputs_and_models_that_cannot_be_used():
    with pytest.raises(NormTypeError, match=r"Pair must take the inputs it is given.*'values'\); got 1 without a name"):
        probe(Pair(), X)
    with pytest.raises(NormTypeError, match=r"got 2 without a name. hint: give inputs alone, without targets"):
        probe(nn.ReLU(), (X, X))
    with pytest.raises(TypeError, match="must be Tensor, not int") as raised:
        probe(Calls(lambda x: F.linear(x, 3)), X)
    assert not isinstance(raised.value, NormTypeError), "the model's own errors stay what they are"
    with pytest.raises(NormTypeError, match="arrays must hold numbers; got dtype <U1"):
        probe(nn.ReLU(), np.array(["a"]))
    with pytest.raises(NormValueError, match="weights are there from the start; got LazyLinear at 0"):
        probe(nn.Sequential(nn.LazyLinear(3), nn.ReLU()), X)
