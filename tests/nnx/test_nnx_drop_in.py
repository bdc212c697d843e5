"""Every layer that flax.nnx has can be exchanged for ours: same arguments, state, types and numbers."""

from __future__ import annotations

import inspect
from itertools import pairwise

import numpy as np
import pytest
from nnx_required import jax, jnp, nnx

import normkit.nnx as nk

STOCK = ("BatchNorm", "LayerNorm", "GroupNorm", "InstanceNorm", "RMSNorm")


def data(*shape: int, seed: int = 0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("name", STOCK)
def test_subclass_with_the_same_arguments(name):
    ours, theirs = getattr(nk, name), getattr(nnx, name)
    assert issubclass(ours, theirs)
    for method in ("__init__", "__call__"):
        mine = list(inspect.signature(getattr(ours, method)).parameters.values())
        known = list(inspect.signature(getattr(theirs, method)).parameters.values())
        first = [(p.name, p.kind, p.default) for p in mine[: len(known)]]
        assert first == [(p.name, p.kind, p.default) for p in known]
        assert all(p.kind is p.KEYWORD_ONLY for p in mine[len(known) :])


# layer -> arguments of the constructor, each with the shape of an input
OPTIONS = {
    "BatchNorm": [
        (3, {}, (6, 4, 3)),
        (3, {"axis": 1, "momentum": 0.8, "epsilon": 0.1, "use_bias": False}, (6, 3, 4)),
        (3, {"use_scale": False, "use_fast_variance": False}, (6, 3)),
        (3, {"scale_init": nnx.initializers.normal(), "bias_init": nnx.initializers.normal()}, (6, 3)),
        (3, {"bias_init": nnx.initializers.normal()}, (1, 3)),  # one value: bias, and a variance of 0 is kept
    ],
    "LayerNorm": [
        (6, {}, (4, 6)),
        (6, {"reduction_axes": (1, 2), "epsilon": 0.1, "use_bias": False}, (4, 3, 6)),
        (3, {"reduction_axes": -1, "feature_axes": 1}, (4, 3, 6)),
        (18, {"reduction_axes": (1, -1), "feature_axes": (-2, 2), "use_scale": False}, (4, 3, 6)),
    ],
    "GroupNorm": [
        (6, {"num_groups": None, "group_size": 3}, (4, 2, 3, 6)),
        (6, {"num_groups": 2, "use_bias": False, "epsilon": 0.1}, (4, 6)),
        (32, {}, (2, 5, 32)),
    ],
    "InstanceNorm": [
        (3, {}, (4, 5, 3)),
        (3, {"feature_axes": 1, "epsilon": 0.1, "use_scale": False}, (4, 3, 2, 5)),
        (3, {"bias_init": nnx.initializers.normal()}, (4, 1, 3)),
    ],
    "RMSNorm": [
        (6, {}, (4, 6)),
        (6, {"reduction_axes": (1, 2), "epsilon": 0.1}, (4, 3, 6)),
    ],
}
CASES = [(name, *case) for name, cases in OPTIONS.items() for case in cases]


def pair(name: str, features: int, options: dict):
    """Return ours and Flax' layer with the same arguments."""
    return tuple(getattr(module, name)(features, **options, rngs=nnx.Rngs(7)) for module in (nk, nnx))


def values(tree) -> dict[str, np.ndarray]:
    """Return path -> array of a state."""
    return {jax.tree_util.keystr(path): np.asarray(a) for path, a in jax.tree_util.tree_leaves_with_path(tree)}


def same(ours, theirs, tolerance: float = 1e-5) -> None:
    mine, known = values(ours), values(theirs)
    assert mine.keys() == known.keys()
    for path, value in known.items():
        assert mine[path].dtype == value.dtype
        np.testing.assert_allclose(mine[path], value, atol=tolerance, rtol=tolerance, err_msg=path)


@nnx.jit
def step(layer, x, target):
    """Make one step of gradient descent on the layer's parameters; return its output and all gradients."""

    def loss(layer, x):
        y = layer(x)
        return jnp.mean((y - target) ** 2), y

    (gradients, dx), y = nnx.grad(loss, argnums=(nnx.DiffState(0, nnx.Param), 1), has_aux=True)(layer, x)
    params = nnx.state(layer, nnx.Param)
    nnx.update(layer, jax.tree.map(lambda p, g: p - 0.1 * g, params, gradients))
    return y, dx, gradients


@pytest.mark.parametrize(("name", "features", "options", "shape"), CASES)
def test_twenty_steps_of_training(name, features, options, shape):
    """Same weights and data: outputs, gradients, parameters and statistics stay equal, then those of evaluation."""
    ours, theirs = pair(name, features, options)
    same(nnx.state(ours), nnx.state(theirs), 0.0)
    batches = data(21, *shape)
    for x, target in pairwise(batches):
        same(*(step(layer, x, target + 1.0) for layer in (ours, theirs)))
    same(nnx.state(ours), nnx.state(theirs))
    if name == "BatchNorm":
        same(*(layer(batches[0], use_running_average=True) for layer in (ours, theirs)))


MASKED = [
    ("BatchNorm", 6, {}, (4, 5, 6), (4, 5, 1)),
    ("BatchNorm", 6, {}, (4, 5, 6), (4, 5, 6)),
    ("BatchNorm", 5, {"axis": 1}, (4, 5, 6), (4, 1, 1)),
    ("LayerNorm", 6, {}, (4, 5, 6), (6,)),
    ("GroupNorm", 6, {"num_groups": 3}, (4, 5, 6), (4, 5, 6)),
    ("InstanceNorm", 6, {}, (4, 5, 6), (4, 5, 1)),
    ("RMSNorm", 6, {}, (4, 5, 6), (4, 1, 6)),
]


@pytest.mark.parametrize(("name", "features", "options", "shape", "mask_shape"), MASKED)
def test_masks_of_flax(name, features, options, shape, mask_shape):
    """At real positions outputs are Flax' own, and so are the statistics; elsewhere they are 0."""
    ours, theirs = pair(name, features, options)
    x = data(*shape)
    mask = np.ones(mask_shape, dtype=bool)
    mask.reshape(-1)[1::4] = False
    full = np.broadcast_to(mask, shape)
    y = np.asarray(ours(x, mask=mask))
    np.testing.assert_allclose(y[full], np.asarray(theirs(x, mask=mask))[full], atol=1e-5)
    assert (y[~full] == 0).all()
    same(nnx.state(ours), nnx.state(theirs))


def test_masks_of_positions():
    """Where statistics are taken over positions, a mask may come without the features; layer norm has no such mask."""
    x, mask = data(4, 5, 6), data(4, 5, seed=1) > 0
    for name, options in (("BatchNorm", {}), ("InstanceNorm", {}), ("GroupNorm", {"num_groups": 3})):
        short, long = pair(name, 6, options)[0], pair(name, 6, options)[0]
        same(short(x, mask=mask), long(x, mask=mask[..., None]), 0.0)
        same(nnx.state(short), nnx.state(long), 0.0)
    first = nk.BatchNorm(5, axis=1, rngs=nnx.Rngs(0))
    other = nk.BatchNorm(5, axis=1, rngs=nnx.Rngs(0))
    mask = data(4, 6, seed=2) > 0
    same(first(x, mask=mask), other(x, mask=mask[:, None]), 0.0)
    with pytest.raises(ValueError, match=r"LayerNorm: `mask` must broadcast to the input's shape \(4, 5, 6\); got"):
        nk.LayerNorm(6, rngs=nnx.Rngs(0))(x, mask=data(4, 5) > 0)


@pytest.mark.parametrize("name", STOCK)
@pytest.mark.parametrize("dtype", [None, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("param_dtype", [jnp.float32, jnp.bfloat16])
def test_types(name, dtype, param_dtype):
    """The type of the result, of the parameters and of the statistics follows Flax' rules."""
    options = {"dtype": dtype, "param_dtype": param_dtype, **({"num_groups": 3} if name == "GroupNorm" else {})}
    ours, theirs = pair(name, 6, options)
    for kind in (jnp.float32, jnp.bfloat16, jnp.int32):
        x = jnp.asarray(4 * data(4, 3, 6), kind)
        for evaluating in (False, True) if name == "BatchNorm" else (None,):
            extra = {} if evaluating is None else {"use_running_average": evaluating}
            a, b = ours(x, **extra), theirs(x, **extra)
            assert a.dtype == b.dtype
            np.testing.assert_allclose(*(np.asarray(v, np.float32) for v in (a, b)), atol=0.05)
    kinds = [{path: a.dtype for path, a in values(nnx.state(layer)).items()} for layer in (ours, theirs)]
    assert kinds[0] == kinds[1]


def test_own_promotion():
    """`promote_dtype` is called as Flax calls it and decides the type of the result."""
    seen = []

    def promote(arrays, /, *, dtype=None, inexact=True):
        seen.append((len(arrays), dtype))
        return tuple(None if a is None else jnp.asarray(a, jnp.float16) for a in arrays)

    results = []
    for layer in pair("BatchNorm", 6, {"promote_dtype": promote}) + pair("RMSNorm", 6, {"promote_dtype": promote}):
        results.append(layer(data(4, 6)).dtype)
    assert seen == [(5, None)] * 2 + [(2, None)] * 2
    assert results == [jnp.float16] * 4


def test_modes_and_views():
    """`train`, `eval`, `nnx.view` and the call decide between batch and running statistics, as with Flax."""
    x = data(6, 3)
    for kind, more in ((nk.BatchNorm, {}), (nk.GhostBatchNorm, {"virtual_batch_size": 3}), (nk.BatchRenorm, {})):
        layer = kind(3, **more, rngs=nnx.Rngs(0))
        layer.eval()
        before = layer(x)
        np.testing.assert_allclose(before, x, atol=1e-4)
        assert not np.any(np.asarray(layer.mean[...]))
        layer.train()
        layer(x)
        assert np.any(np.asarray(layer.mean[...]))
        view = nnx.view(layer, use_running_average=True)
        assert view.use_running_average
        same(view(x), layer(x, use_running_average=True), 0.0)
    undecided = nk.BatchNorm(3, use_running_average=None, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="`use_running_average` must be given"):
        undecided(x)
    undecided(x, use_running_average=True)


def test_state_moves():
    """State moves between Flax' batch norm, ours and ghost batch norm; metadata of the parameters stays."""
    theirs = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
    theirs(data(6, 3))
    ghost = nk.GhostBatchNorm(3, virtual_batch_size=3, rngs=nnx.Rngs(1))
    nnx.update(ghost, nnx.state(theirs))
    back = nk.BatchNorm(3, rngs=nnx.Rngs(2), scale_metadata={"sharding_hint": "x"})
    assert back.scale.sharding_hint == "x"
    nnx.update(back, nnx.state(ghost))
    x = data(6, 3, seed=1)
    for layer in (ghost, back):
        same(layer(x, use_running_average=True), theirs(x, use_running_average=True))
    counted = nk.BatchNorm(3, debiased=True, rngs=nnx.Rngs(0))
    assert set(nnx.state(counted)) - set(nnx.state(theirs)) == {"count"}
    assert counted.count[...].dtype == jnp.int32
