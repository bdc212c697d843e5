"""Two devices with unequal batches and masks give what one device gives with all of it."""

from __future__ import annotations

import gc
import socket
import warnings

import keras
import numpy as np
import pytest

import normkit.keras as nk
from normkit.testing.keras import call_layer

BACKEND = keras.backend.backend()
RNG = np.random.default_rng(7)
X = RNG.standard_normal((8, 5, 3)) + 1e3  # a sum of squares would lose all digits
DY = RNG.standard_normal(X.shape)
MASK = np.zeros((8, 5), dtype=bool)
MASK[:4], MASK[4:, :2] = True, RNG.random((4, 2)) < 0.5  # 20 real positions on the one, few on the other
MASK[4] = True
WEIGHT = RNG.uniform(0.5, 2.0, 8)
MODES = {"plain": {}, "mask": {"mask": MASK}, "weights": {"sample_weight": WEIGHT},
         "both": {"mask": MASK, "sample_weight": WEIGHT}}  # fmt: skip


def values(variable) -> np.ndarray:
    return np.array(keras.ops.convert_to_numpy(variable), dtype=np.float64)


def alone(mode: str):
    """Return output, gradients and moving statistics of one device with the whole batch."""
    layer = nk.BatchNormalization(momentum=None)
    y, found = call_layer(layer, X, DY, training=True, **MODES[mode])
    return y, found, [values(w) for w in (layer.moving_mean, layer.moving_variance, layer.count)]


def half(mode: str, rank: int) -> dict[str, np.ndarray]:
    return {name: value[4 * rank : 4 * rank + 4] for name, value in MODES[mode].items()}


def close(actual, want, label: str) -> None:
    np.testing.assert_allclose(actual, want, rtol=1e-4, atol=1e-4, err_msg=label)


if BACKEND == "tensorflow":

    @pytest.fixture(scope="module")
    def strategy():
        """Two replicas on logical CPUs. A strategy leaves a pool of threads to the collector, which warns of it."""
        import tensorflow as tf

        made = [tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])]
        yield made[0]
        made.clear()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)
            gc.collect()

    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("compiled", [True, False])
    def test_replicas_of_tensorflow(strategy, mode, compiled):
        import tensorflow as tf

        with strategy.scope():
            layer = nk.BatchNormalization(momentum=None, synchronized=True)
            layer.build((None, 5, 3))

        def step():
            rank = tf.distribute.get_replica_context().replica_id_in_sync_group
            start = 4 * rank
            x, dy = (tf.constant(a, "float32")[start : start + 4] for a in (X, DY))
            options = {name: tf.constant(a)[start : start + 4] for name, a in MODES[mode].items()}
            with tf.GradientTape() as tape:
                tape.watch(x)
                y = layer(x, training=True, **options)
            weights = [layer.gamma.value, layer.beta.value]
            dx, dgamma, dbeta = tape.gradient(y, [x, *weights], output_gradients=dy)
            return y, dx, dgamma, dbeta

        run = tf.function(lambda: strategy.run(step)) if compiled else lambda: strategy.run(step)
        y, dx, dgamma, dbeta = ([v.numpy() for v in strategy.experimental_local_results(r)] for r in run())
        want, found, kept = alone(mode)
        close(np.concatenate(y), want, "y")
        close(np.concatenate(dx), found["x"], "dx")
        close(sum(dgamma), found["gamma"], "dgamma")
        close(sum(dbeta), found["beta"], "dbeta")
        for variable, value in zip((layer.moving_mean, layer.moving_variance, layer.count), kept, strict=True):
            for copy in strategy.experimental_local_results(variable.value):
                close(copy.numpy(), value, variable.name)

    def test_without_replicas_there_is_nothing_to_do():
        layer, plain = nk.BatchNormalization(synchronized=True), nk.BatchNormalization()
        np.testing.assert_array_equal(*(call_layer(each, X, training=True)[0] for each in (layer, plain)))


def rank_of_torch(rank: int, port: int, queue) -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    for mode in MODES:
        layer = nk.BatchNormalization(momentum=None, synchronized=True)
        part = slice(4 * rank, 4 * rank + 4)
        y, found = call_layer(layer, X[part], DY[part], training=True, **half(mode, rank))
        kept = [values(w) for w in (layer.moving_mean, layer.moving_variance, layer.count)]
        queue.put((mode, rank, y, found, kept))
    dist.destroy_process_group()


if BACKEND == "torch":

    def test_two_processes_of_torch():
        import torch.multiprocessing as mp

        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        context = mp.get_context("spawn")
        queue = context.Queue()
        workers = [context.Process(target=rank_of_torch, args=(rank, port, queue)) for rank in range(2)]
        for worker in workers:
            worker.start()
        found = {(mode, rank): rest for mode, rank, *rest in (queue.get(timeout=90) for _ in range(2 * len(MODES)))}
        for worker in workers:
            worker.join(30)
        for mode in MODES:
            want, gradients, kept = alone(mode)
            (y0, g0, kept0), (y1, g1, kept1) = found[mode, 0], found[mode, 1]
            close(np.concatenate([y0, y1]), want, f"y, {mode}")
            close(np.concatenate([g0["x"], g1["x"]]), gradients["x"], f"dx, {mode}")
            for name in ("gamma", "beta"):
                close(g0[name] + g1[name], gradients[name], f"d{name}, {mode}")
            for a, b, value in zip(kept0, kept1, kept, strict=True):
                close(a, value, mode)
                np.testing.assert_array_equal(a, b)


if BACKEND == "jax":

    def test_sharded_arrays_of_jax_are_one_batch():
        """So that `synchronized` has nothing to add."""
        import jax
        from jax.sharding import Mesh, NamedSharding, PartitionSpec

        assert len(jax.devices()) == 2
        layer = nk.BatchNormalization(momentum=None)
        layer.build(X.shape)
        mesh = Mesh(np.array(jax.devices()), ("batch",))
        x = jax.device_put(X.astype("float32"), NamedSharding(mesh, PartitionSpec("batch")))

        @jax.jit
        def step(trainable, kept, x):
            return layer.stateless_call(trainable, kept, x, training=True)

        variables = ([w.value for w in ws] for ws in (layer.trainable_variables, layer.non_trainable_variables))
        y, (mean, var, _) = step(*variables, x)
        assert len(y.sharding.device_set) == 2
        want, _, kept = alone("plain")
        for actual, value in ((y, want), (mean, kept[0]), (var, kept[1])):
            close(np.asarray(actual), value, "jax")
