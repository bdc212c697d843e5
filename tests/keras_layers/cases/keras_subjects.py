"""The layers of normkit.keras as subjects of the conformance suite."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import keras

import normkit.keras as nk
from normkit.core import catalog
from normkit.core.spec import NormSpec
from normkit.testing import Call, Subject
from normkit.testing.keras import layer_subject, tracking

BACKEND = keras.backend.backend()
# JAX compiles every operation for every shape.
IMAGES = ((5, 6, 3, 2),) if BACKEND == "jax" else ((5, 6, 3, 2), (4, 6), (3, 2, 7))
ROWS = ((4, 3, 6),) if BACKEND == "jax" else ((4, 3, 6), (5, 17), (2, 1, 3, 5))
GHOSTS = ((5, 6, 3, 2),) if BACKEND == "jax" else ((5, 6, 3, 2), (7, 4), (6, 2, 7))


def like_keras(spec: NormSpec) -> NormSpec:
    """Return a spec with what Keras does otherwise: a single value is no error and the kept variance is biased."""
    return replace(spec, minimum=1, tracked=tuple(replace(t, bessel=False) for t in spec.tracked))


def channels(shape: Any) -> Any:
    return (("c", shape[1]),)


def batch(axis: int, **more: Any) -> Callable[..., Any]:
    return lambda call, shape, dtype: nk.BatchNormalization(axis, dtype=dtype, **tracking(call, **more))


def renorm(call: Call, shape: Any, dtype: str) -> Any:
    """Build a renorm layer. Its two momentums are one in the suite, whose normalizers keep each statistic once."""
    same = {"renorm_momentum": 0.9 if call.rate is None else 1.0 - call.rate}
    closed = {"rmin": 1.0, "rmax": 1.0, "dmax": 0.0}
    clips = {"renorm_clipping": closed} if call.schedule is None else {"renorm_schedule": call.schedule}
    return nk.BatchRenormalization(dtype=dtype, **tracking(call), **same, **clips)


KEPT = {"masks": True, "weights": True, "nonfinite": ("skip", "update"), "cumulative": True, "counts": False}
# Before the first update Keras' moving_variance is 1, as moving_stddev is, and evaluation adds epsilon to it.
RENORM = {"check_first_values": "a first variance of 1 and a first standard deviation of 1, with epsilon inside"}
ENTRIES: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "BatchNormalization": (
        batch(-1),
        {"spec": like_keras(catalog.BATCH), "last": True, "shapes": IMAGES, "sizes": channels, "bessel": True, **KEPT},
    ),
    "BatchNormalization_axis_1": (
        batch(1),
        {"spec": like_keras(catalog.BATCH), "shapes": IMAGES[:1], "sizes": channels, "bessel": True, **KEPT},
    ),
    "GhostBatchNormalization": (
        lambda call, shape, dtype: nk.GhostBatchNormalization(virtual_batch_size=2, dtype=dtype, **tracking(call)),
        {
            "spec": like_keras(catalog.GHOST),
            "last": True,
            "shapes": GHOSTS,
            "sizes": lambda shape: (("c", shape[1]), ("n", 2)),
            "bessel": True,
            **KEPT,
        },
    ),
    "BatchRenormalization": (
        renorm,
        {"spec": like_keras(catalog.RENORM), "last": True, "shapes": IMAGES, "sizes": channels, **KEPT},
    ),
    "InstanceNormalization": (
        lambda call, shape, dtype: nk.InstanceNormalization(1, epsilon=call.eps, dtype=dtype),
        {
            "spec": like_keras(catalog.INSTANCE),
            "shapes": IMAGES[::2],
            "sizes": channels,
            "masks": True,
            "weights": True,
        },
    ),
    "GroupNormalization": (
        lambda call, shape, dtype: nk.GroupNormalization(math.gcd(3, shape[-1]), epsilon=call.eps, dtype=dtype),
        {
            "spec": catalog.GROUP,
            "last": True,
            "shapes": IMAGES,
            "sizes": lambda shape: (("g", math.gcd(3, shape[1])),),
            "masks": True,
            "weights": True,
        },
    ),
    "LayerNormalization": (
        lambda call, shape, dtype: nk.LayerNormalization(epsilon=call.eps, dtype=dtype),
        {"spec": catalog.LAYER, "shapes": ROWS, "sizes": lambda shape: (("*c", shape[-1:]),)},
    ),
    "LayerNormalization_two_axes": (
        lambda call, shape, dtype: nk.LayerNormalization([-2, -1], epsilon=call.eps, dtype=dtype),
        {"spec": catalog.LAYER, "shapes": ROWS[:1], "sizes": lambda shape: (("*c", shape[-2:]),)},
    ),
    "LayerNormalization_axis_1": (
        lambda call, shape, dtype: nk.LayerNormalization(1, epsilon=call.eps, dtype=dtype),
        {"spec": replace(catalog.LAYER_2D, eps=1e-3), "shapes": IMAGES[:1], "sizes": channels},
    ),
    "RMSNormalization": (
        lambda call, shape, dtype: nk.RMSNormalization(epsilon=call.eps, dtype=dtype),
        {"spec": catalog.RMS, "shapes": ROWS, "sizes": lambda shape: (("*c", shape[-1:]),), "beta": False},
    ),
}


def subject(entry: str, dtype: str = "float32", **more: Any) -> Subject:
    """Return an entry in one type. Sums go in another order for another batch, so that bits may differ."""
    build, known = ENTRIES[entry]
    accumulator = "float64" if dtype == "float64" else "float32"
    exceptions = RENORM if entry == "BatchRenormalization" and dtype in ("float32", "float64") else {}
    attributes = {"accumulator": accumulator, "rowwise": False, "exceptions": exceptions, **known, **more}
    return layer_subject(f"{entry}-{dtype}", build, dtype=dtype, **attributes)
