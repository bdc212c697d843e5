"""Transforms: jit, grad, vmap, scan, remat, split and merge, an optimizer, several devices; and what cannot be done."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from nnx_required import jax, jnp, nnx

import normkit.nnx as nk
from normkit.errors import NormRuntimeError


def data(*shape: int):
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


X = data(8, 3)


def layer(kind=nk.BatchNorm, **options):
    return kind(3, **options, rngs=nnx.Rngs(0))


def trained():
    """Return a layer after one eager step on X."""
    after = layer()
    after(X)
    return after


def same(one, other, tolerance: float = 1e-6) -> None:
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, atol=tolerance)


def loss(model, x):
    return jnp.sum(jnp.sin(model(x)))


@pytest.mark.parametrize("kind", ["jit", "grad", "value_and_grad", "jit of grad", "remat", "scan", "split and merge"])
def test_statistics_are_updated_once(kind):
    """Every way to carry state leaves what one eager step leaves."""
    model = layer()
    if kind == "jit":
        nnx.jit(loss)(model, X)
    elif kind == "grad":
        nnx.grad(loss)(model, X)
    elif kind == "value_and_grad":
        nnx.value_and_grad(loss)(model, X)
    elif kind == "jit of grad":
        nnx.jit(lambda m, x: nnx.grad(loss)(m, x))(model, X)
    elif kind == "remat":
        nnx.grad(lambda m, x: nnx.remat(loss)(m, x))(model, X)
    elif kind == "scan":
        carry = nnx.scan(lambda m, x: (m, m(x)), in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))
        carry(model, X[None])
    else:
        graph, params, rest = nnx.split(model, nnx.Param, ...)

        @jax.jit
        def step(params, rest, x):
            def inner(params):
                model = nnx.merge(graph, params, rest, copy=True)
                return loss(model, x), nnx.state(model, nnx.BatchStat)

            return jax.grad(inner, has_aux=True)(params)

        _, stats = step(params, rest, X)
        nnx.update(model, stats)
    same(nnx.state(model), nnx.state(trained()))


def test_gradients_of_parameters():
    """Gradients do not go through the statistics, nor through what is kept of earlier batches."""
    model = layer(debiased=True)
    one = nnx.jit(nnx.grad(loss))(model, X)
    two = nnx.grad(loss)(layer(), X)
    same(one, two, 1e-5)

    def kept(model, x):
        model(x)
        return jnp.sum(model.mean[...]) + jnp.sum(model.var[...])

    assert not np.any(jax.tree.leaves(nnx.grad(kept, argnums=1)(layer(), X))[0])


WRITES = {
    "jit": lambda m: jax.jit(lambda x: m(x))(X),
    "grad": lambda m: jax.grad(lambda x: m(x).sum())(X),
    "checkpoint": lambda m: jax.checkpoint(lambda x: m(x))(X),
    "scan": lambda m: jax.lax.scan(lambda c, x: (c, m(x)), 0, X[None]),
    "a second merge": lambda m: jax.grad(lambda p, g, r: nnx.merge(g, p, r)(X).sum(), allow_int=True)(
        *(lambda g, p, r: (p, g, r))(*nnx.split(m, nnx.Param, ...))
    ),
}


@pytest.mark.parametrize("kind", WRITES)
@pytest.mark.parametrize("of", [nk.BatchNorm, nk.GhostBatchNorm, nk.BatchRenorm])
def test_statistics_from_outside_of_a_transform(kind, of):
    """Plain transforms of JAX cannot write them: an error that says what can. Evaluation is free."""
    model = layer(of)
    before = nnx.clone(nnx.state(model))
    with pytest.raises(NormRuntimeError, match=r"must belong to the transform.*hint: use nnx\.jit.*copy=True"):
        WRITES[kind](model)
    same(nnx.state(model), before, 0.0)
    model.eval()
    WRITES[kind](model)


def test_vmap_with_an_axis_name_shares_statistics():
    model, x = layer(axis_name="lanes"), data(4, 8, 3)
    lanes = nnx.vmap(lambda m, x: m(x), in_axes=(nnx.StateAxes({...: None}), 0), axis_name="lanes")
    y = lanes(model, x)
    whole = layer()
    same(y, whole(x.reshape(32, 3)).reshape(x.shape), 1e-5)
    same(nnx.state(model), nnx.state(whole))
    mask = np.arange(8) < np.array([8, 3, 0, 1])[:, None]
    masked = nnx.vmap(lambda m, x, mask: m(x, mask=mask), in_axes=(nnx.StateAxes({...: None}), 0, 0), axis_name="lanes")
    y = masked(model, x, mask)
    same(y[mask], whole(x[mask]), 1e-5)
    same(nnx.state(model), nnx.state(whole))


def test_vmap_with_a_state_for_every_lane():
    x = data(4, 8, 3)
    models = nnx.vmap(lambda _: layer(), in_axes=0)(jnp.arange(4))
    nnx.vmap(lambda m, x: m(x))(models, x)
    for lane in range(4):
        alone = layer()
        alone(x[lane])
        np.testing.assert_allclose(models.mean[...][lane], alone.mean[...], atol=1e-6)


def test_vmap_over_one_state_is_an_error():
    shared = nnx.vmap(lambda m, x: m(x), in_axes=(nnx.StateAxes({...: None}), 0))
    with pytest.raises(
        NormRuntimeError, match=r"one value for all lanes of a vmap; got.*axis_name, or every lane a state"
    ):
        shared(layer(), data(4, 8, 3))
    with pytest.raises(NormRuntimeError, match="one value for all lanes of a vmap"):
        nnx.jit(nnx.vmap(nnx.grad(loss), in_axes=(nnx.StateAxes({...: None}), 0)))(layer(), data(4, 8, 3))
    with pytest.raises(NormRuntimeError, match="axis_name='lanes' must be the name of an axis that is mapped over"):
        shared(layer(axis_name="lanes"), data(4, 8, 3))
    with pytest.raises(NormRuntimeError, match=r"must know `axis_index_groups`; got \[\[0, 1\], \[2, 3\]\]"):
        nnx.vmap(lambda m, x: m(x), in_axes=(nnx.StateAxes({...: None}), 0), axis_name="lanes")(
            layer(axis_name="lanes", axis_index_groups=[[0, 1], [2, 3]]), data(4, 8, 3)
        )


def test_a_model_learns():
    """A small network with every kind of norm, under nnx.jit with nnx.Optimizer, fits, and evaluates as it trained."""
    optax = pytest.importorskip("optax")
    x = data(64, 4)
    target = (x[:, 0] * x[:, 1] > 0).astype(np.int32)

    class Net(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.layers = nnx.List(
                [
                    nnx.Linear(4, 32, rngs=rngs),
                    nk.BatchNorm(32, debiased=True, rngs=rngs),
                    nnx.Linear(32, 32, rngs=rngs),
                    nk.GhostBatchNorm(32, virtual_batch_size=16, momentum=0.8, rngs=rngs),
                    nk.BatchRenorm(32, momentum=0.8, rngs=rngs),
                    nk.GroupNorm(32, num_groups=4, rngs=rngs),
                    nk.RMSNorm(32, rngs=rngs),
                    nk.LayerNorm(32, rngs=rngs),
                    nnx.Linear(32, 2, rngs=rngs),
                ]
            )

        def __call__(self, x):
            for one in self.layers[:-1]:
                x = nnx.relu(one(x)) if isinstance(one, nk.BatchNorm) else one(x)
            return self.layers[-1](x)

    model = Net(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, x, target):
        def cost(model):
            return optax.softmax_cross_entropy_with_integer_labels(model(x), target).mean()

        value, gradients = nnx.value_and_grad(cost)(model)
        optimizer.update(model, gradients)
        return value

    losses = [float(step(model, optimizer, x, target)) for _ in range(40)]
    assert losses[-1] < 0.1 < losses[0]
    model.eval()
    assert (np.asarray(model(x)).argmax(-1) == target).mean() > 0.95


@pytest.fixture(scope="module")
def on_devices():
    """Outcomes of devices.py, run once with four devices."""
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    script = Path(__file__).with_name("devices.py")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


CHECKS = (
    "whole_batch", "flax_own_shard_map", "gradients", "unequal_masks", "empty_device", "single_values", "weights",
    "large_mean", "groups", "groups_need_no_check", "ghost_batches", "renorm", "positions_of_one_sample",
    "flax_is_wrong",
)  # fmt: skip


@pytest.mark.parametrize("name", CHECKS)
def test_several_devices(on_devices, name):
    assert on_devices[name] == "ok"


def test_every_check_of_several_devices_is_listed(on_devices):
    assert set(on_devices) == set(CHECKS)
