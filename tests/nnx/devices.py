"""Checks on four devices, which need a process of their own; prints {name: "ok" or what went wrong} as JSON."""

import json
import traceback

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import normkit.nnx as nk
from normkit.core.schedule import RenormSchedule
from normkit.errors import NormRuntimeError

DEVICES, SAMPLES = 4, 6
MESH = Mesh(np.array(jax.devices()), ("d",))
X = np.random.default_rng(0).standard_normal((DEVICES * SAMPLES, 3)).astype(np.float32)
DY = np.random.default_rng(1).standard_normal(X.shape).astype(np.float32)
GROUPS = [[0, 1], [2, 3]]


def layer(kind=nk.BatchNorm, **options):
    return kind(3, momentum=0.5, rngs=nnx.Rngs(0), **options)


def on_devices(model, x, *, check=True, state=None, **options):
    """Run a model on a batch that is split over the devices; return outputs, gradients and statistics.

    `state` says on which axis those of the devices are stacked; None: they are the same.
    """
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    names = list(options)

    def call(params, x, *given):
        layer = nnx.merge(graph, params, rest, copy=True)
        return layer(x, **dict(zip(names, given, strict=True))), nnx.state(layer, nnx.BatchStat)

    split = jax.shard_map(
        call,
        mesh=MESH,
        in_specs=(P(), P("d"), *(P("d") for _ in names)),
        out_specs=(P("d"), P() if state is None else P(state)),
        check_vma=check,
    )
    return differentiated(lambda p, x: split(p, x, *options.values()), params, x)


def alone(model, x, **options):
    """Run a model on the whole batch at once."""
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def call(params, x):
        layer = nnx.merge(graph, params, rest, copy=True)
        return layer(x, **options), nnx.state(layer, nnx.BatchStat)

    return differentiated(call, params, x)


def differentiated(call, params, x):
    """Return (output, gradients by parameters and input, statistics), jitted: operations one by one take minutes."""

    @jax.jit
    def run(params, x, dy):
        y, pull, stats = jax.vjp(call, params, x, has_aux=True)
        return y, pull(dy), stats

    return run(params, x, DY[: len(x)])


def close(ours, want, tolerance=1e-5):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=tolerance, rtol=tolerance)


def lengths(*real):
    """Return a mask with so many real samples on each device."""
    return (np.arange(SAMPLES) < np.array(real)[:, None]).reshape(-1)


def whole_batch():
    close(on_devices(layer(axis_name="d"), X), alone(layer(), X))
    close(on_devices(layer(axis_name="d", bessel=True, debiased=True), X), alone(layer(bessel=True, debiased=True), X))


def flax_own_shard_map():
    """The model is an argument, as under nnx.jit, and keeps its statistics."""
    model, want = layer(axis_name="d"), layer()
    specs = (nnx.StateSharding({...: P()}), P("d"))
    step = nnx.jit(nnx.shard_map(lambda m, x: m(x), mesh=MESH, in_specs=specs, out_specs=P("d")))
    close(step(model, X), want(X))
    close(nnx.state(model), nnx.state(want))


def gradients():
    close(on_devices(layer(axis_name="d"), X, check=False), alone(layer(), X))


def unequal_masks():
    mask = lengths(6, 1, 4, 2)
    close(on_devices(layer(axis_name="d"), X, mask=mask), alone(layer(), X, mask=mask))
    y, _, stats = on_devices(layer(axis_name="d"), X, mask=mask)
    close(stats, alone(layer(), X[mask])[2])
    assert not np.any(np.asarray(y)[~mask])


def empty_device():
    for mask in (lengths(6, 0, 4, 0), lengths(0, 0, 0, 2)):
        close(on_devices(layer(axis_name="d"), X, mask=mask), alone(layer(), X, mask=mask))
    _, _, stats = on_devices(layer(axis_name="d"), X, mask=lengths(0, 0, 0, 0))
    close(stats, nnx.state(layer(), nnx.BatchStat), 0.0)


def single_values():
    """One value on each device is a batch of four."""
    close(on_devices(layer(axis_name="d"), X[:4]), alone(layer(), X[:4]))


def weights():
    """Only the proportions count, over all devices."""
    weight = np.random.default_rng(2).uniform(0.5, 2.0, len(X)).astype(np.float32)
    weight[:SAMPLES] *= 100.0
    options = {"axis_name": "d", "bessel": True}
    want = alone(layer(bessel=True), X, sample_weight=weight)
    close(on_devices(layer(**options), X, sample_weight=weight), want)


def large_mean():
    x = (X + 1e4).astype(np.float32)
    want = (x - x.astype(np.float64).mean(0)) / np.sqrt(x.astype(np.float64).var(0) + 1e-5)
    close(on_devices(layer(axis_name="d"), x)[0], want)
    theirs = on_devices(layer(nnx.BatchNorm, axis_name="d"), x)[0]
    assert not np.max(np.abs(theirs - want)) < 1.0


def groups():
    """Pairs of devices have statistics of their own."""
    mask = lengths(6, 2, 5, 0)
    model = layer(axis_name="d", axis_index_groups=GROUPS)
    y, (_, dx), stats = on_devices(model, X, check=False, state="d", mask=mask)
    half = len(X) // 2
    for pair, part in enumerate((slice(0, half), slice(half, None))):
        want, pull, kept = alone(layer(), X[part], mask=mask[part])
        close(y[part], want)
        close(stats["mean"][...].reshape(DEVICES, 3)[2 * pair], kept["mean"][...])
        if pair == 0:
            close(dx[part], pull[1])


def groups_need_no_check():
    with pytest.raises(NormRuntimeError, match=r"must know `axis_index_groups`.*check_vma=False"):
        on_devices(layer(axis_name="d", axis_index_groups=GROUPS), X, state="d")


def ghost_batches():
    """Groups stay within a device, and all make one update."""
    options = {"bessel": True, "virtual_batch_size": SAMPLES // 2}
    close(
        on_devices(layer(nk.GhostBatchNorm, axis_name="d", **options), X), alone(layer(nk.GhostBatchNorm, **options), X)
    )
    mask = lengths(6, 1, 4, 0)
    close(
        on_devices(layer(nk.GhostBatchNorm, axis_name="d", **options), X, mask=mask),
        alone(layer(nk.GhostBatchNorm, **options), X, mask=mask),
    )


def renorm():
    schedule = RenormSchedule(r_max=1.5, d_max=0.5, start=0, r_end=0, d_end=0)
    mask = lengths(6, 1, 4, 0)
    given = {"kind": nk.BatchRenorm, "schedule": schedule}
    close(on_devices(layer(axis_name="d", **given), X, mask=mask), alone(layer(**given), X, mask=mask))


def positions_of_one_sample():
    """Layers that keep nothing share a sample whose positions lie on several devices."""
    images = X.reshape(2, 12, 3)
    for kind, options in (
        (nk.InstanceNorm, {}),
        (nk.GroupNorm, {"num_groups": 3}),
        (nk.RMSNorm, {"reduction_axes": (1, 2)}),
    ):
        ours, want = (kind(3, rngs=nnx.Rngs(0), **options, **more) for more in ({"axis_name": "d"}, {}))
        y = jax.jit(jax.shard_map(ours, mesh=MESH, in_specs=P(None, "d"), out_specs=P(None, "d")))(images)
        close(y, want(images))


def flax_is_wrong():
    """Flax averages the means of devices, whatever they count, and is NaN where one of them has nothing."""
    mask = lengths(6, 1, 4, 2)[:, None]
    want = alone(layer(), X, mask=mask)[2]
    theirs = on_devices(layer(nnx.BatchNorm, axis_name="d"), X, mask=mask)[2]
    assert np.max(np.abs(np.asarray(theirs["mean"][...] - want["mean"][...]))) > 0.01
    theirs = on_devices(layer(nnx.BatchNorm, axis_name="d"), X, mask=lengths(6, 0, 4, 2)[:, None])[2]
    assert np.isnan(np.asarray(theirs["mean"][...])).all()


CHECKS = (
    whole_batch, flax_own_shard_map, gradients, unequal_masks, empty_device, single_values, weights, large_mean, groups,
    groups_need_no_check, ghost_batches, renorm, positions_of_one_sample, flax_is_wrong,
)  # fmt: skip


def outcome(check):
    try:
        check()
    except Exception:
        return traceback.format_exc()
    return "ok"


if __name__ == "__main__":
    assert len(jax.devices()) == DEVICES
    print(json.dumps({check.__name__: outcome(check) for check in CHECKS}))
