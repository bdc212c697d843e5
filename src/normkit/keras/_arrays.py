"""`keras.ops` as the formulas of the core use an array library, on whatever backend is active.

Two things differ from NumPy. TensorFlow traces graphs in which a length may be unknown (None), so `reshape` fills it in
from the input. And a sum may run over all replicas of a distributed step: statistics are sums, so that is all there is
to synchronizing them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from keras import config, ops

from normkit.errors import NormRuntimeError, message

__all__ = ["ARRAYS", "Arrays", "over_replicas", "wide"]


def wide(dtype: str) -> str:
    """Return the type in which statistics of such inputs accumulate: float32 or wider."""
    return "float64" if dtype == "float64" else "float32"  # keras.backend.result_type says float32 for both on PyTorch


class Arrays:
    """The functions of an array library that formulas use. `reduce` merges a sum with those of the other replicas."""

    sqrt = staticmethod(ops.sqrt)
    tanh = staticmethod(ops.tanh)
    where = staticmethod(ops.where)
    concatenate = staticmethod(ops.concatenate)

    def __init__(self, reduce: Callable[[Any], Any] | None = None) -> None:
        self.reduce = reduce

    def sum(self, x: Any, axis: Any, keepdims: bool = False) -> Any:
        total = ops.sum(x, axis=axis, keepdims=keepdims)
        return total if self.reduce is None else self.reduce(total)

    @staticmethod
    def clip(x: Any, low: Any, high: Any) -> Any:
        """Limit to an interval, without an upper end where `high` is None.

        Not with `ops.clip`, which knows no None, nor `ops.maximum`, which makes float64 to float32 on PyTorch.
        """
        x = ops.where(x < low, ops.zeros_like(x) + low, x)
        return x if high is None else ops.where(x > high, ops.zeros_like(x) + high, x)

    @staticmethod
    def reshape(x: Any, shape: Sequence[Any]) -> Any:
        """Reshape; lengths unknown to the graph (None) stand in the same order in the input and in `shape`."""
        if None not in shape:
            return ops.reshape(x, shape)
        if tuple(shape) == tuple(x.shape):
            return x
        lengths = (length for known, length in zip(x.shape, ops.shape(x), strict=True) if known is None)
        return ops.reshape(x, tuple(next(lengths) if n is None else n for n in shape))


ARRAYS = Arrays()


def over_replicas() -> Callable[[Any], Any] | None:
    """Return the function that sums over all replicas of this step; None where there is one only.

    Raises NormRuntimeError where the backend cannot.
    """
    name = config.backend()
    if name == "tensorflow":
        import tensorflow as tf

        context = tf.distribute.get_replica_context()
        if context is None or context.num_replicas_in_sync == 1:
            return None
        return lambda total: context.all_reduce(tf.distribute.ReduceOp.SUM, total)
    if name == "torch":
        import torch.distributed as dist

        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return None
        from torch.distributed.nn.functional import all_reduce  # the one whose backward pass sums as well

        return lambda total: all_reduce(total)
    must = "`synchronized=True` must run on TensorFlow or PyTorch"
    hint = "with keras.distribution JAX takes statistics over the whole batch on all devices anyway: leave it out"
    raise NormRuntimeError(message(must, f"the backend {name}", hint))
