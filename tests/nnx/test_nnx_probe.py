"""The probe of NNX sees every call of an activation, where it is and which norm is beside it, and changes nothing."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
from nnx_required import jax, jnp, nnx

from normkit.errors import NormTypeError
from normkit.nnx.factory import norm_factory
from normkit.nnx.probe import probe

X = np.random.default_rng(0).normal(size=(6, 8)).astype(np.float32) * 3
IMAGES = np.random.default_rng(1).normal(size=(6, 5, 5, 8)).astype(np.float32)
held_gelu = jax.nn.gelu  # under another name, before any probe


class Calls(nnx.Module):
    """Calls a function on its input."""

    def __init__(self, function):
        self.function = function

    def __call__(self, x):
        return self.function(x)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def softplus(x):
    return np.log1p(np.exp(x))


def selu(x):
    return 1.0507009873554805 * np.where(x > 0, x, 1.6732632423543772 * np.expm1(x))


erf = np.vectorize(math.erf)
CASES = {
    "relu": (lambda x: np.maximum(x, 0), [jax.nn.relu, nnx.relu, jax.jit(lambda x: jax.nn.relu(x))]),
    "relu6": (lambda x: np.clip(x, 0, 6), [jax.nn.relu6]),
    "leaky_relu": (lambda x: np.where(x > 0, x, 0.01 * x), [jax.nn.leaky_relu]),
    "elu": (lambda x: np.where(x > 0, x, np.expm1(x)), [jax.nn.elu]),
    "selu": (selu, [jax.nn.selu]),
    "gelu": (lambda x: x * (1 + erf(x / 2**0.5)) / 2, [functools.partial(held_gelu, approximate=False)]),
    "silu": (lambda x: x * sigmoid(x), [jax.nn.silu, jax.nn.swish, nnx.remat(lambda x: nnx.swish(x))]),
    "hardswish": (lambda x: x * np.clip(x + 3, 0, 6) / 6, [jax.nn.hard_swish]),
    "mish": (lambda x: x * np.tanh(softplus(x)), [jax.nn.mish]),
    "softplus": (softplus, [jax.nn.softplus]),
    "tanh": (np.tanh, [jnp.tanh, jax.lax.tanh]),
    "sigmoid": (sigmoid, [jax.nn.sigmoid, jax.lax.logistic]),
}


@pytest.mark.parametrize("name", CASES)
def test_every_form_of_a_call_is_seen_with_its_values(name):
    expected, forms = CASES[name]
    for form in forms:
        (site,) = probe(Calls(form), X)
        assert (site.name, site.activation, site.axis) == ("Calls", name, -1)
        np.testing.assert_array_equal(site.input, X)
        np.testing.assert_allclose(site.output, expected(X.astype(np.float64)), atol=3e-5)
        assert site.gamma is None
        assert site.beta is None


def test_gelu_is_seen_as_one_call_and_left_as_it_was():
    """It is a plain function of tanh and others, and not compiled as the other activations are."""
    code = jax.nn.gelu.__code__
    (site,) = probe(Calls(held_gelu), X)
    assert site.activation == "gelu"
    # 1 + tanh cancels where x is negative: compiled and not, they differ by eps of |x|.
    np.testing.assert_allclose(site.output, jax.nn.gelu(X), rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="no more"):
        probe(Calls(lambda x: fail()), X)
    assert jax.nn.gelu.__code__ is code


def fail():
    raise ValueError("no more")


def test_what_is_no_activation_of_a_batch_is_left_out():
    class Gated(nnx.Module):
        def __init__(self):
            self.gate = nnx.Param(jnp.zeros((6, 8)))

        def __call__(self, x):
            return jax.nn.softmax(x) * jax.nn.sigmoid(self.gate[...]) * jnp.tanh(x.mean())

    assert probe(Gated(), X) == []


class Net(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(8, 8, rngs=rngs)
        self.act = Calls(jax.nn.relu)
        self.block = nnx.Sequential(nnx.Linear(8, 8, rngs=rngs), Calls(jnp.tanh))

    def __call__(self, x):
        x = self.block(self.act(self.first(x)))
        return jax.nn.gelu(self.act(self.first(x)))


def test_a_site_is_named_by_the_module_that_calls_with_numbers_where_it_calls_several_times():
    sites = probe(Net(nnx.Rngs(0)), X)
    assert [(site.name, site.activation) for site in sites] == [
        ("act 1", "relu"),
        ("block.layers.1", "tanh"),
        ("act 2", "relu"),
        ("Net", "gelu"),
    ]


class OwnNorm(nnx.Module):
    def __init__(self):
        self.scale = nnx.Param(jnp.zeros(8))

    def __call__(self, x):
        return x * self.scale


NORMS = {
    "batch": lambda: nnx.BatchNorm(8, rngs=nnx.Rngs(0)),
    "layer": lambda: nnx.LayerNorm(8, rngs=nnx.Rngs(0)),
    "rms": lambda: nnx.RMSNorm(8, rngs=nnx.Rngs(0)),
    "group": lambda: nnx.GroupNorm(8, num_groups=2, rngs=nnx.Rngs(0)),
    "own": OwnNorm,
    "factory": lambda: norm_factory("batch", "before", None)(8),
    "renorm": lambda: norm_factory("renorm", "before", None)(8),
}


def marked(norm):
    """The norm with parameters that can be told from the first ones."""
    norm.scale[...] = jnp.arange(8.0)
    if getattr(norm, "bias", None) is not None:
        norm.bias[...] = jnp.full(8, 0.5)
    return norm


@pytest.mark.parametrize("norm", NORMS)
def test_gamma_and_beta_of_the_norm_beside_it(norm):
    beside = marked(NORMS[norm]())
    beta = getattr(beside, "bias", None) is not None
    for model in (nnx.Sequential(beside, jax.nn.relu), nnx.Sequential(Calls(jax.nn.relu), beside)):
        (site,) = probe(model, X)
        np.testing.assert_array_equal(site.gamma, np.arange(8))
        assert (site.beta is not None) == beta
        assert not beta or (site.beta == 0.5).all()


def test_the_norm_before_wins_and_one_behind_a_sum_is_none():
    class Both(nnx.Module):
        def __init__(self):
            self.first, self.second = marked(NORMS["rms"]()), NORMS["layer"]()

        def __call__(self, x):
            return jax.nn.relu(self.second(jax.nn.relu(self.first(x))) + x)

    first, second = probe(Both(), X)
    np.testing.assert_array_equal(first.gamma, np.arange(8))
    assert first.beta is None
    assert second.gamma is None


@pytest.mark.parametrize("name", ["none", "batch", "instance", "group", "layer"])
@pytest.mark.parametrize("position", ["before", "after"])
def test_axis_of_the_channels(name, position):
    norm = norm_factory(name, position if name != "none" else "before", None)
    for axis, x in ((-1, IMAGES), (1, IMAGES.transpose(0, 3, 1, 2))):
        (site,) = probe(norm(8, jax.nn.silu, axis=axis), x)
        assert (site.name, site.axis) == ("activation", axis)
        assert (site.gamma is None) == (name == "none")


class Restless(nnx.Module):
    """Draws, counts and moves its statistics in every forward pass."""

    def __init__(self, fails=False):
        self.norm, self.drop = nnx.BatchNorm(8, rngs=nnx.Rngs(0)), nnx.Dropout(0.5, rngs=nnx.Rngs(1))
        self.count, self.fails, self.calls = nnx.BatchStat(jnp.zeros(())), fails, 0

    def __call__(self, x):
        self.count[...] += 1
        self.calls += 1
        x = jax.nn.relu(self.drop(self.norm(x)))
        return fail() if self.fails else x


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("train", [False, True])
def test_nothing_changes(train, fails):
    model = Restless(fails)
    model.norm.eval()
    before = nnx.split(nnx.clone(model))
    if fails:
        with pytest.raises(ValueError, match="no more"):
            probe(model, X, train=train)
    else:
        (site,) = probe(model, X, train=train)
        assert (site.input == 0).any() == train  # dropout
        np.testing.assert_allclose(abs(site.input.std()) > 1.1, True)  # not normalized, or scaled by dropout
    after = nnx.split(model)
    assert after[0] == before[0]
    for old, new in zip(jax.tree.leaves(before[1]), jax.tree.leaves(after[1]), strict=True):
        assert (old == new).all()
    assert vars(nnx.Linear)["__call__"].__module__ == "flax.nnx.nn.linear"
    assert not hasattr(Restless.__call__, "__wrapped__"), "and no class is left changed"


def test_training_and_evaluation_are_told_apart():
    model = nnx.Sequential(nnx.BatchNorm(8, rngs=nnx.Rngs(0)), Calls(jax.nn.relu))
    (trained,) = probe(model, X + 5)
    (evaluated,) = probe(model, X + 5, train=False)
    assert abs(trained.input.mean()) < 1e-6
    np.testing.assert_allclose(evaluated.input, X + 5, rtol=1e-4)


class Pair(nnx.Module):
    def __init__(self, rngs):
        self.embedding = nnx.Embed(10, 8, rngs=rngs)
        self.linear = nnx.Linear(8, 8, rngs=rngs)

    def __call__(self, ids, values):
        return jax.nn.relu(self.linear(values) + self.embedding(ids))


def test_inputs_by_name_in_order_and_as_arrays():
    model = Pair(nnx.Rngs(0))
    ids, values = np.arange(6), np.ones((6, 8))
    (by_name,) = probe(model, {"values": jnp.asarray(values), "ids": ids})
    (in_order,) = probe(model, (ids, values))
    np.testing.assert_array_equal(by_name.input, in_order.input)


def test_inputs_that_cannot_be_used():
    with pytest.raises(NormTypeError, match=r"Pair must take the inputs it is given.*'values'\); got 1 without a name"):
        probe(Pair(nnx.Rngs(0)), X)
    with pytest.raises(NormTypeError, match=r"got 2 without a name. hint: give inputs alone, without targets"):
        probe(Calls(jax.nn.relu), (X, X))
    with pytest.raises(TypeError, match="unsupported operand") as raised:
        probe(Calls(lambda x: x + "a"), X)
    assert not isinstance(raised.value, NormTypeError), "the model's own errors stay what they are"
    with pytest.raises(NormTypeError, match="arrays must hold numbers; got dtype <U1"):
        probe(Calls(jax.nn.relu), np.array(["a"]))


def test_loops_of_jax_are_passed_over():
    class Rows(nnx.Module):
        def __call__(self, x):
            return jax.nn.relu(jax.lax.map(lambda row: jax.nn.relu(jnp.outer(row, row)), x))

    assert [site.input.shape for site in probe(Rows(), X)] == [(6, 8, 8)]
