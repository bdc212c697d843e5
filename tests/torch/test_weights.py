"""Weight norm and weight standardization: the papers' formulas, what the papers claim of them, and life with them."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.utils import parametrizations, parametrize

import normkit
import normkit.torch as nk
from normkit.errors import NormError
from normkit.torch.sites import sites

G = torch.Generator().manual_seed(0)
# A chain of some ten roundings, of values of order 1.
NEAR = {torch.float64: 1e-14, torch.float32: 2e-6, torch.bfloat16: 2**-7}

# Layer, and an input for it.
MAPS = {
    "linear": (lambda: nn.Linear(6, 4), (5, 6)),
    "1d": (lambda: nn.Conv1d(3, 4, 3), (2, 3, 7)),
    "2d": (lambda: nn.Conv2d(4, 6, (3, 2), groups=2), (2, 4, 5, 5)),
    "3d": (lambda: nn.Conv3d(2, 3, 2), (2, 2, 3, 3, 3)),
    "transposed 1d": (lambda: nn.ConvTranspose1d(3, 4, 3), (2, 3, 7)),
    "transposed 2d": (lambda: nn.ConvTranspose2d(6, 4, (3, 2), groups=2), (2, 6, 5, 5)),
    "transposed 3d": (lambda: nn.ConvTranspose3d(4, 4, 2, groups=4), (2, 4, 3, 3, 3)),
}
NORMS = {
    "norm": nk.weight_norm,
    "standardization": nk.weight_standardization,
    "scaled": nk.scaled_weight_standardization,
}


def drawn(layer, dtype=torch.float64):
    """The layer with weights away from zero, so that centring matters."""
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=G) + 0.5)
    return layer.to(dtype)


def units(layer, weight):
    """Weights output by output, from the definition of the map: output o of group b sees the inputs of group b."""
    groups = getattr(layer, "groups", 1)
    outputs = getattr(layer, "out_channels", None) or layer.out_features
    if not getattr(layer, "transposed", False):
        return [weight[o] for o in range(outputs)]
    inside, inputs = outputs // groups, layer.in_channels // groups
    return [weight[o // inside * inputs : (o // inside + 1) * inputs, o % inside] for o in range(outputs)]


def array(tensor):
    return tensor.detach().double().numpy().copy()


def oracle(name, v, gain=1.0):
    """One unit, in float64."""
    v = np.asarray(v, np.float64)
    if name == "norm":
        return gain * v / np.linalg.norm(v)
    centred = v - np.average(v)
    unit = centred / np.sqrt(np.mean(centred**2) + 1e-6)
    return unit if name == "standardization" else unit * gain / np.sqrt(v.size)


@pytest.mark.parametrize("dtype", NEAR, ids=str)
@pytest.mark.parametrize("layer", MAPS)
@pytest.mark.parametrize("name", NORMS)
def test_every_unit_follows_the_formula(name, layer, dtype):
    made, _ = MAPS[layer]
    layer = drawn(made(), dtype)
    NORMS[name](layer)
    gain = getattr(layer.parametrizations.weight[0], "gain", None)
    gain = layer.parametrizations.weight.original0 if name == "norm" else gain
    if gain is not None:
        nn.init.uniform_(gain, 0.5, 1.5)
    behind = layer.parametrizations.weight
    v = units(layer, array(behind.original1 if name == "norm" else behind.original))
    gains = np.ones(len(v)) if gain is None else array(gain).ravel()
    expected = [oracle(name, *both) for both in zip(v, gains, strict=True)]
    assert layer.weight.dtype == dtype
    np.testing.assert_allclose(
        np.stack(units(layer, array(layer.weight))), np.stack(expected), rtol=0, atol=4 * NEAR[dtype]
    )


@pytest.mark.parametrize("layer", MAPS)
def test_weight_norm_begins_with_the_weights_that_were_there(layer):
    made, shape = MAPS[layer]
    layer = drawn(made())
    x, before = torch.randn(shape, generator=G, dtype=torch.float64), copy.deepcopy(layer)
    torch.testing.assert_close(nk.weight_norm(layer)(x), before(x), rtol=1e-13, atol=1e-13)
    layer.weight = 2 * before.weight  # assigned, it is taken apart anew
    torch.testing.assert_close(layer.weight, 2 * before.weight, rtol=1e-14, atol=0)


@pytest.mark.parametrize("dim", [0, 1, -1, None])
def test_state_and_numbers_are_those_of_torch(dim):
    ours, theirs = (drawn(nn.Conv2d(3, 4, 2), torch.float32) for _ in range(2))
    nk.weight_norm(ours, dim=dim)
    parametrizations.weight_norm(theirs, dim=dim if dim is None or dim >= 0 else dim + 4)
    with torch.no_grad():
        theirs.parametrizations.weight.original0.mul_(1.5)
    ours.load_state_dict(theirs.state_dict())
    assert {n: p.shape for n, p in ours.named_parameters()} == {n: p.shape for n, p in theirs.named_parameters()}
    torch.testing.assert_close(ours.weight, theirs.weight, rtol=4e-7, atol=0)  # some roundings each


@pytest.mark.parametrize("layer", ["linear", "2d", "transposed 2d"])
@pytest.mark.parametrize("name", NORMS)
def test_gradients_by_finite_differences(name, layer):
    made, _ = MAPS[layer]
    layer = NORMS[name](drawn(made()))
    norm = layer.parametrizations.weight[0]
    given = [p.detach().clone().requires_grad_() for p in layer.parametrizations.weight.parameters(recurse=False)]
    if name == "scaled":
        given.append(norm.gain.detach().clone().requires_grad_())

    def computed(*tensors):
        if name != "scaled":
            return norm(*tensors)
        return torch.func.functional_call(norm, {"gain": tensors[1]}, (tensors[0],))

    assert gradcheck(computed, given)
    if layer.weight.numel() < 30:
        assert gradgradcheck(computed, given)


def test_gradient_of_weight_norm_as_published():
    """REPRO 18: dL/dg = <dL/dw, v> / |v|, dL/dv = g / |v| dL/dw - g dL/dg / |v|^2 v, at right angles to v."""
    layer = nk.weight_norm(drawn(nn.Linear(5, 3, bias=False)))
    g, v = (p for p in layer.parametrizations.weight.parameters())
    with torch.no_grad():
        g.mul_(1.7)
    dw = torch.randn(3, 5, generator=G, dtype=torch.float64)
    dg, dv = torch.autograd.grad(layer.weight, (g, v), dw)
    for k in range(3):
        size, along = v[k].norm(), dw[k] @ v[k] / v[k].norm()
        torch.testing.assert_close(dg[k, 0], along)
        torch.testing.assert_close(dv[k], g[k] / size * dw[k] - g[k] * along / size**2 * v[k])
        assert abs(dv[k] @ v[k]) < 1e-13


def test_directions_only_grow():
    """REPRO 18: under plain gradient descent |v| never falls, in 200 steps."""
    torch.manual_seed(0)
    model = nn.Sequential(nk.weight_norm(nn.Linear(4, 8)), nn.Tanh(), nk.weight_norm(nn.Linear(8, 1))).double()
    x = torch.randn(32, 4, dtype=torch.float64)
    y = x.prod(dim=1, keepdim=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    lengths = []
    for _ in range(200):
        lengths.append([layer.parametrizations.weight.original1.norm(dim=1).detach() for layer in (model[0], model[2])])
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
    for layer in zip(*lengths, strict=True):
        steps = torch.stack(layer).diff(dim=0)
        assert steps.min() >= -1e-15  # a rounding
        assert (steps > 1e-9).any()


def test_standardized_weights_forget_scale_and_shift():
    layer = nk.weight_standardization(drawn(nn.Conv2d(3, 4, 3)), eps=0.0)
    before = layer.weight.detach().clone()
    with torch.no_grad():
        layer.parametrizations.weight.original.mul_(3.0).add_(1e4)
    # 1e4 of a deviation of 3 costs as many spacings of float64.
    torch.testing.assert_close(layer.weight, before, rtol=0, atol=1e-11)


# Data-dependent initialization.


def network(dtype=torch.float32):
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(),
        nn.Conv2d(8, 6, 3, groups=2), nn.ReLU(),
        nn.ConvTranspose2d(6, 8, 3, stride=2, groups=2), nn.Tanh(),
        nn.Flatten(), nn.Linear(8 * 9 * 9, 5),
    )  # fmt: skip
    for layer in model:
        if hasattr(layer, "weight"):
            nn.init.normal_(layer.weight, std=0.05)
            nk.weight_norm(layer)
    return model.to(dtype)


def test_after_initialization_all_preactivations_have_mean_0_and_variance_1():
    """REPRO 18, to 1e-5 in float32."""
    model, x = network(), 3 * torch.randn(16, 3, 8, 8, generator=G) + 1
    directions = [m.parametrizations.weight.original1.clone() for m in model if parametrize.is_parametrized(m)]
    assert nk.initialize_weight_norm(model, x) is model
    values = x
    for layer in model:
        values = layer(values)
        if parametrize.is_parametrized(layer):
            channels = values.movedim(1, -1).flatten(0, -2).double()
            assert channels.mean(dim=0).abs().max() < 1e-5
            assert (channels.std(dim=0, correction=0) - 1).abs().max() < 1e-5
            assert torch.equal(layer.parametrizations.weight.original1, directions.pop(0))
    assert not any(module._forward_hooks for module in model.modules())


def test_initialization_as_published():
    """One layer: g <- g / std, b <- -mean / std, of what g and b = 0 gave."""
    layer, x = nk.weight_norm(drawn(nn.Linear(4, 3))), torch.randn(50, 4, generator=G, dtype=torch.float64)
    nn.init.zeros_(layer.bias)
    first = array(layer(x))
    g = array(layer.parametrizations.weight.original0).ravel()
    nk.initialize_weight_norm(layer, x)
    for k in range(3):
        std = np.sqrt(((first[:, k] - first[:, k].mean()) ** 2).sum() / 50)
        np.testing.assert_allclose(layer.parametrizations.weight.original0[k].item(), g[k] / std, rtol=1e-13)
        np.testing.assert_allclose(layer.bias[k].item(), -first[:, k].mean() / std, rtol=1e-12)


def test_without_a_bias_the_mean_stays():
    layer = nk.weight_norm(drawn(nn.Conv1d(2, 3, 2, bias=False)))
    x = torch.randn(9, 2, 6, generator=G, dtype=torch.float64) + 1
    before = layer(x)
    after = nk.initialize_weight_norm(layer, x)(x)
    std, mean = (getattr(before, name)(dim=(0, 2)) for name in ("std", "mean"))
    torch.testing.assert_close(after.std(dim=(0, 2), correction=0), torch.ones_like(std))
    torch.testing.assert_close(after.mean(dim=(0, 2)), mean / before.std(dim=(0, 2), correction=0))
    assert mean.abs().min() > 0.1


def test_initialization_leaves_buffers_modes_and_random_numbers():
    model = nn.Sequential(nk.weight_norm(nn.Linear(3, 4)), nn.BatchNorm1d(4), nn.Dropout())
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    nk.initialize_weight_norm(model, torch.randn(8, 3, generator=G))
    assert torch.equal(torch.rand(1), expected)
    assert all(torch.equal(b, buffers[name]) for name, b in model.named_buffers())
    assert model.training


class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.other = (nk.weight_norm(nn.Linear(3, 4)) for _ in range(2))

    def forward(self, x):
        return self.used(x)


def dead(layer):
    nn.init.zeros_(layer.parametrizations.weight.original0[2:3])
    return layer


REFUSED = {
    "no such layer": (lambda: nn.Linear(3, 4), "must have weight normalized linear maps or convolutions; got none"),
    "not called": (Unused, "every weight normalized map must be called by the model; got none of other"),
    "dim": (lambda: nk.weight_norm(nn.Linear(3, 4), dim=1), "must be those of its outputs; got dim=1. hint: weight_no"),
    "whole": (lambda: nk.weight_norm(nn.Linear(3, 4), dim=None), "must be those of its outputs; got dim=None"),
    "dead": (lambda: dead(nk.weight_norm(nn.Linear(3, 4, bias=False))), "be finite; got 1 of 4 channels that are not"),
    "two": (lambda: stacked(), "must have no parametrization but weight norm; got weight, bias"),
}


class Doubled(nn.Module):
    def forward(self, x):
        return 2 * x


def stacked():
    layer = nk.weight_norm(nn.Linear(3, 4))
    parametrize.register_parametrization(layer, "bias", Doubled())
    return layer


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_initialized_is_left_as_it_was(case):
    made, words = REFUSED[case]
    model = made()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(NormError, match=words):
        nk.initialize_weight_norm(model, torch.randn(7, 3, generator=G))
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert not any(module._forward_hooks for module in model.modules())


def test_a_model_that_fails_half_way_is_left_as_it_was():
    model = nn.Sequential(nk.weight_norm(nn.Linear(3, 4)), nk.weight_norm(nn.Linear(5, 4)))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        nk.initialize_weight_norm(model, torch.randn(7, 3, generator=G))
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


# Life with them.


@pytest.mark.parametrize("name", NORMS)
def test_copies_states_training_and_removal(name):
    layer = NORMS[name](drawn(nn.Conv2d(3, 4, 3), torch.float32))
    x = torch.randn(2, 3, 5, 5, generator=G)
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(x), layer(x))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    layer(x).square().mean().backward()
    optimizer.step()
    changed = {key for key, value in layer.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == before.keys(), "all of it is trained"
    assert torch.equal(twin(x), twin(x)), "and the copy is not"
    assert all(torch.equal(value, before[key]) for key, value in twin.state_dict().items())
    twin.load_state_dict(layer.state_dict())
    y = layer(x)
    assert torch.equal(twin(x), y)
    parametrize.remove_parametrizations(layer, "weight")
    assert type(layer) is nn.Conv2d
    assert sorted(layer.state_dict()) == ["bias", "weight"]
    assert isinstance(layer.weight, nn.Parameter)
    assert torch.equal(layer(x), y)


@pytest.mark.parametrize("layer", ["2d", "transposed 2d"])
@pytest.mark.parametrize("name", NORMS)
def test_compiled_in_one_graph(name, layer):
    torch.compiler.reset()  # of which layers were compiled before
    made, shape = MAPS[layer]
    layer = NORMS[name](drawn(made(), torch.float32))
    x = torch.randn(shape, generator=G)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    y, found = layer(x), compiled(x)
    torch.testing.assert_close(found, y, rtol=0, atol=1e-5)  # sums of some dozen terms in another order
    parameters = tuple(layer.parameters())
    for mine, its in zip(*(torch.autograd.grad(out.square().mean(), parameters) for out in (y, found)), strict=True):
        torch.testing.assert_close(its, mine, rtol=1e-4, atol=1e-5)


def test_param_groups_decay_directions_and_leave_gains_alone():
    model = nn.ModuleDict(
        {
            "norm": nk.weight_norm(nn.Linear(3, 4)),
            "theirs": parametrizations.weight_norm(nn.Linear(3, 4)),
            "standard": nk.weight_standardization(nn.Conv2d(3, 4, 1)),
            "scaled": nk.scaled_weight_standardization(nn.Conv2d(3, 4, 1)),
            "skip": nk.SkipInit(),
            "bias": stacked(),
            "layer": parametrized_norm(),
        }
    )
    with pytest.warns(FutureWarning, match="weight_norm"):
        model["old"] = nn.utils.weight_norm(nn.Linear(3, 4))
    names = {id(p): name for name, p in model.named_parameters()}
    for biases in (False, True):
        decayed, kept = (
            {names[id(p)] for p in group["params"]} for group in normkit.param_groups(model, 0.1, biases=biases)
        )
        bias = {
            "norm.bias",
            "theirs.bias",
            "standard.bias",
            "scaled.bias",
            "old.bias",
            "bias.parametrizations.bias.original",
        }
        gains = {
            "norm.parametrizations.weight.original0",
            "theirs.parametrizations.weight.original0",
            "bias.parametrizations.weight.original0",
            "scaled.parametrizations.weight.0.gain",
            "skip.alpha",
            "old.weight_g",
            "layer.bias",
            "layer.parametrizations.weight.original",
        }
        directions = {
            "norm.parametrizations.weight.original1",
            "theirs.parametrizations.weight.original1",
            "bias.parametrizations.weight.original1",
            "standard.parametrizations.weight.original",
            "scaled.parametrizations.weight.original",
            "old.weight_v",
        }
        assert kept == (gains if biases else gains | bias)
        assert decayed == (directions | bias if biases else directions)


def parametrized_norm():
    layer = nn.LayerNorm(4)
    parametrize.register_parametrization(layer, "weight", Doubled())
    return layer


@pytest.mark.parametrize("name", NORMS)
def test_fold_keeps_off_until_the_weights_are_plain(name):
    model = nn.Sequential(NORMS[name](nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4), nn.ReLU()).eval()
    x = torch.randn(2, 3, 6, 6, generator=G)
    with pytest.warns(UserWarning, match="nothing was folded; 1: the weight of conv2d at 0 is computed"):
        assert torch.equal(normkit.fold(model, x)(x), model(x))
    parametrize.remove_parametrizations(model[0], "weight")
    folded = normkit.fold(model, x)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    torch.testing.assert_close(folded(x), model(x), rtol=0, atol=1e-5)


def test_verbs_see_no_norm_in_a_parametrization():
    model = nn.Sequential(nk.weight_norm(nn.Linear(3, 4)), nk.scaled_weight_standardization(nn.Linear(4, 4)))
    assert [site.path for site in sites(model)] == []
    assert normkit.check(model, torch.randn(16, 3, generator=G)).findings == ()


WRONG = {
    "module": (lambda: nk.weight_norm(3), "`module` must be a torch.nn.Module; got int"),
    "name": (lambda: nk.weight_norm(nn.Linear(2, 3), "w"), "parameter of Linear; got 'w'. hint: it has weight, bias"),
    "none": (lambda: nk.weight_norm(nn.ReLU()), "parameter of ReLU; got 'weight'. hint: it has no parameters"),
    "lazy": (lambda: nk.weight_norm(nn.LazyLinear(3)), "layers must know the size of their input"),
    "twice": (
        lambda: nk.weight_standardization(nk.weight_norm(nn.Linear(2, 3))),
        "weights must not be normalized already; got `weight` of ParametrizedLinear. hint: remove_parametrizations",
    ),
    "axis": (lambda: nk.weight_norm(nn.Linear(2, 3), dim=2), r"`dim` must be an axis of the weights; got 2, shape \(3"),
    "dim": (lambda: nk.WeightNorm(0.5), "WeightNorm: `dim` must be None or a whole number"),
    "groups": (lambda: nk.WeightStandardization(1, groups=0), "`groups` must be a whole number of at least 1; got 0"),
    "grouped": (lambda: nk.WeightNorm(0, groups=2), "`dim` must be 1 with `groups`, as in transposed .*; got 0"),
    "divide": (
        lambda: nk.ScaledWeightStandardization((3, 4, 1), 1, groups=2),
        r"`groups` must divide the inputs; got 2, shape \(3, 4, 1\)",
    ),
    "zero": (
        lambda: nk.weight_norm(nn.Linear(2, 2).requires_grad_(False).apply(lambda m: m.weight[0].zero_())),
        "every unit must have a weight that is not 0, for a direction; got 1 of 2 units without",
    ),
    "one": (lambda: nk.weight_standardization(nn.Conv2d(4, 4, 1, groups=4)), "at least two weights; got 1, shape"),
    "integers": (
        lambda: nk.weight_norm(nn.ParameterDict({"weight": nn.Parameter(torch.ones(2, 2, dtype=torch.long), False)})),
        "WeightNorm: weights must be floating point; got torch.int64",
    ),
    "eps": (lambda: nk.weight_standardization(nn.Linear(2, 3), eps=-1), "`eps` must be a finite number of at least 0"),
    "gamma": (lambda: nk.ScaledWeightStandardization((2, 3), gamma=0.0), "`gamma` must be a finite number above 0"),
    "gain": (lambda: nk.ScaledWeightStandardization((2, 3), gain=1), "`gain` must be True or False; got 1"),
    "activation": (
        lambda: nk.scaled_weight_standardization(nn.Linear(2, 3), activation="rleu"),
        "`activation` must be known; got 'rleu'. hint: did you mean relu",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments(case):
    make, words = WRONG[case]
    with pytest.raises(NormError, match=words):
        make()


def test_on_the_meta_device_and_without_gradients():
    layer = nk.weight_norm(nn.Linear(3, 4, device="meta"))
    assert layer.weight.shape == (4, 3)
    frozen = nk.scaled_weight_standardization(nn.Linear(3, 4).requires_grad_(False), gain=False)
    assert not frozen.weight.requires_grad
    assert "gain=False" in repr(frozen)
