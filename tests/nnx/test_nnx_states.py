"""Recalibrating, freezing and grouping in Flax NNX."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
from nnx_required import jax, nnx, optax

import normkit
import normkit.nnx as nk
from normkit.errors import NormError

KINDS = {"flax": nnx.BatchNorm, "ours": nk.BatchNorm, "renorm": nk.BatchRenorm}


class Network(nnx.Module):
    def __init__(self, kind=nnx.BatchNorm):
        rngs = nnx.Rngs(0)
        self.first, self.norm = nnx.Linear(4, 5, rngs=rngs), kind(5, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.last, self.out = nnx.Linear(5, 3, rngs=rngs), kind(3, rngs=rngs)

    def __call__(self, x, mask=None):
        return self.out(self.last(self.drop(nnx.relu(self.norm(self.first(x), mask=mask)))))


def data(samples=300):
    return (5 + 3 * np.random.default_rng(0).normal(size=(samples, 4))).astype(np.float32)


def values(model, kind=nnx.Variable):
    leaves = jax.tree.leaves(nnx.state(model, kind))
    return [
        np.asarray(jax.random.key_data(v) if jax.dtypes.issubdtype(v.dtype, jax.dtypes.prng_key) else v) for v in leaves
    ]


def equal(one, other):
    return len(one) == len(other) and all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def variance(layer):
    return np.asarray(layer.var if hasattr(layer, "var") else np.square(layer.std) - layer.epsilon)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_exact_recalibration_is_one_giant_batch_however_it_is_cut(kind):
    model, x = Network(kind), data()
    rest = values(model, nnx.Param)
    assert normkit.recalibrate(model, [x[:1], x[100:], x[1:100]], exact=True) is model
    hidden = x.astype(np.float64) @ np.asarray(model.first.kernel) + np.asarray(model.first.bias)
    np.testing.assert_allclose(np.asarray(model.norm.mean), hidden.mean(0), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(variance(model.norm), hidden.var(0), rtol=1e-5)
    model.eval()
    y = np.asarray(model(x))
    np.testing.assert_allclose(y.mean(0), 0, atol=1e-5)  # float32 sums of 5 terms
    np.testing.assert_allclose(y.var(0) + model.out.epsilon * y.var(0) / variance(model.out), 1, atol=1e-3)
    assert equal(values(model, nnx.Param), rest)


def test_nothing_else_changes_and_interruptions_change_nothing():
    def broken():
        yield data(50)
        raise KeyboardInterrupt

    model = Network()
    call, before = nnx.BatchNorm.__call__, values(model)
    with pytest.raises(KeyboardInterrupt):
        normkit.recalibrate(model, broken())
    assert equal(values(model), before)
    assert nnx.BatchNorm.__call__ is call
    assert (model.norm.use_running_average, model.drop.deterministic) == (False, False)
    _, report = normkit.recalibrate(model, data(), held_out=data(), return_report=True)
    assert [layer.path for layer in report.layers] == ["norm", "out"]
    report.undo()
    assert equal(values(model), before)


def test_masked_positions_do_not_count():
    model, x = Network(nk.BatchNorm), data(60).reshape(20, 3, 4)
    mask = np.arange(3) < np.random.default_rng(1).integers(1, 4, size=(20, 1))
    normkit.recalibrate(model, [{"x": x, "mask": mask}])
    hidden = np.asarray(model.first(x))[mask].astype(np.float64)
    np.testing.assert_allclose(np.asarray(model.norm.mean), hidden.mean(0), rtol=1e-5, atol=1e-5)


def steps(model, count=10):
    optimizer = nnx.Optimizer(model, optax.adamw(1e-2, weight_decay=0.1), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, x):
        optimizer.update(model, nnx.grad(lambda model: (model(x) ** 2).mean())(model))

    for _ in range(count):
        step(model, optimizer, data(32))


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_ten_steps_of_training_move_nothing(kind):
    model, x = Network(kind), data(32)
    model.norm.mean.set_value(jax.numpy.arange(5.0))
    model.eval()
    expected = np.asarray(model(x))
    assert normkit.freeze(model) is model
    model.train()
    model.drop.deterministic = True
    np.testing.assert_array_equal(np.asarray(model(x)), expected)
    np.testing.assert_array_equal(model.norm(x @ np.ones((4, 5)), False), model.norm(x @ np.ones((4, 5)), True))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), nnx.clone(model)):
        other.train()
        other.drop.deterministic = True
        np.testing.assert_array_equal(np.asarray(other(x)), expected)
        assert isinstance(other.norm, kind)
    layers = [model.norm, model.out]
    before = [values(layer) for layer in layers]
    kernel = np.asarray(model.first.kernel)
    steps(model)
    assert all(equal(values(layer), kept) for layer, kept in zip(layers, before, strict=True))
    assert not np.array_equal(np.asarray(model.first.kernel), kernel)
    with pytest.raises(NormError, match="must hold batch norms with running statistics that are not frozen"):
        normkit.recalibrate(model, x)
    normkit.unfreeze(model)
    assert (type(model.norm), type(model.norm.scale), model.norm.use_running_average) == (kind, nnx.Param, False)
    steps(model, 1)
    assert not equal(values(model.norm), before[0])


def test_gamma_and_beta_train_where_asked():
    model = normkit.freeze(Network(), affine=False)
    kept, gamma = values(model, nnx.BatchStat), np.asarray(model.norm.scale)
    steps(model, 2)
    assert equal(values(model, nnx.BatchStat), kept)
    assert not np.array_equal(np.asarray(model.norm.scale), gamma)


@pytest.mark.parametrize("biases", [False, True])
def test_weight_decay_as_a_mask_of_optax(biases):
    model = Network()
    mask = normkit.param_groups(model, 0.5, biases=biases)
    optimizer = nnx.Optimizer(model, optax.add_decayed_weights(-0.5, mask), wrt=nnx.Param)
    for variable in jax.tree.leaves(nnx.state(model, nnx.Param), is_leaf=lambda v: isinstance(v, nnx.Variable)):
        variable.set_value(jax.numpy.ones_like(variable.get_value()))
    optimizer.update(model, jax.tree.map(jax.numpy.zeros_like, nnx.state(model, nnx.Param)))
    after = nnx.to_flat_state(nnx.state(model, nnx.Param))
    after = {".".join(path): float(value.get_value().mean()) for path, value in after}
    decayed = {"first.kernel", "last.kernel"} | ({"first.bias", "last.bias"} if biases else set())
    assert after == {name: 0.5 if name in decayed else 1.0 for name in after}


def test_another_domain():
    """BN(W (a x + b)) = BN(W x) up to eps, half way with as many samples of the old one."""
    model, x = Network(), data()
    normkit.recalibrate(model, x, exact=True)
    model.eval()
    there, mean = np.asarray(model(x)), np.asarray(model.norm.mean)
    _, report = normkit.adapt(model, 2 * x + 3, exact=True, return_report=True)
    np.testing.assert_allclose(np.asarray(model(2 * x + 3)), there, atol=1e-3)
    assert report.measure == "entropy"
    new = np.asarray(model.norm.mean)
    report.undo()
    normkit.adapt(model, 2 * x + 3, prior=len(x))
    np.testing.assert_allclose(np.asarray(model.norm.mean), (mean + new) / 2, rtol=1e-5)
    with pytest.raises(NormError, match='`method="entropy"` is available for PyTorch; got nnx'):
        normkit.adapt(model, x, method="entropy")
