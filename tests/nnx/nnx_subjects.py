"""Subjects of Flax NNX: the layers of normkit.nnx."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
from nnx_required import nnx

import normkit.nnx as nk
from normkit.core import catalog
from normkit.core.spec import NormSpec
from normkit.testing import Call, Subject
from normkit.testing.nnx import DTYPES, layer_subject
from normkit.testing.parameters import further_oracle, further_values

MAP = (5, 6, 3, 2)


def batch(kind: Callable[..., nnx.Module], *chosen: str, **more: Any) -> Callable[..., Any]:
    """Return a builder of a layer that tracks; `chosen` are the attributes of a call that it takes."""

    def build(call: Call, shape: Any, dtype: Any) -> nnx.Module:
        momentum = None if call.rate is None else 1.0 - call.rate
        options = {**more, **{name: getattr(call, name) for name in chosen if getattr(call, name) is not None}}
        return kind(shape[1], momentum=momentum, epsilon=call.eps, dtype=dtype, rngs=nnx.Rngs(0), **options)

    return build


def plain(kind: Callable[..., nnx.Module], axis: int, options: Any = lambda _: {}) -> Callable[..., Any]:
    return lambda call, shape, dtype: kind(
        shape[axis], epsilon=call.eps, dtype=dtype, rngs=nnx.Rngs(0), **options(shape)
    )


def channels(shape: Any) -> Any:
    return (("c", shape[1]),)


def entry(build: Any, spec: NormSpec, *shapes: Any, **known: Any) -> tuple[Any, dict[str, Any]]:
    # As in Flax a single value is enough.
    return build, {"spec": replace(spec, minimum=1), "shapes": shapes, "sizes": channels, **known}


POSITIONS = {"masks": True, "weights": True}
# Whether it counts depends on the momentum, except in batch renormalization.
KEPT = {**POSITIONS, "nonfinite": ("skip", "update"), "cumulative": True, "counts": False}
ROWS = {"sizes": lambda shape: (("*c", shape[-1:]),), "channels_last": False}
# The suite's default is a correction as in PyTorch; that of the layers, Flax', is compared with Flax itself.
CHOOSES = ("bessel", "nonfinite")

ENTRIES = {
    "BatchNorm": entry(batch(nk.BatchNorm, *CHOOSES, bessel=True), catalog.BATCH, MAP, (4, 6), **KEPT, bessel=True),
    "BatchNorm_axis1": entry(
        batch(nk.BatchNorm, *CHOOSES, bessel=True, axis=1),
        catalog.BATCH,
        MAP,
        **KEPT,
        bessel=True,
        channels_last=False,
    ),
    "GhostBatchNorm": entry(
        batch(nk.GhostBatchNorm, *CHOOSES, bessel=True, virtual_batch_size=2),
        catalog.GHOST,
        MAP,
        **KEPT,
        bessel=True,
        sizes=lambda shape: (("c", shape[1]), ("n", 2)),
    ),
    "BatchRenorm": entry(
        batch(nk.BatchRenorm, "nonfinite", "schedule"), catalog.RENORM, MAP, **{**KEPT, "counts": True}
    ),
    "InstanceNorm": entry(plain(nk.InstanceNorm, 1), catalog.INSTANCE, MAP, **POSITIONS),
    "GroupNorm": entry(
        plain(nk.GroupNorm, 1, lambda shape: {"num_groups": math.gcd(3, shape[1])}),
        catalog.GROUP,
        MAP,
        **POSITIONS,
        sizes=lambda shape: (("g", math.gcd(3, shape[1])),),
    ),
    "LayerNorm": entry(plain(nk.LayerNorm, -1), catalog.LAYER, (4, 3, 6), **ROWS),
    "RMSNorm": entry(plain(nk.RMSNorm, -1), catalog.RMS, (4, 3, 6), **ROWS, beta=False),
}


def further(kind: Callable[..., nnx.Module], spec: NormSpec, **known: Any) -> tuple[Any, dict[str, Any]]:
    """The entry of a layer with parameters of its own. The oracle is given the same values of them."""

    def build(call: Call, shape: Any, dtype: Any) -> nnx.Module:
        options: dict[str, Any] = {} if kind is nk.DynamicTanh else {"epsilon": call.eps}
        if kind is nk.EvoNormS0:
            options["groups"] = math.gcd(3, shape[1])
        if kind is nk.EvoNormB0:
            layer = batch(kind, *CHOOSES, bessel=True)(call, shape, dtype)
        else:
            layer = kind(features(shape)[0], dtype=dtype, rngs=nnx.Rngs(0), **options)
        for name, value in further_values(spec, features(shape), "float32").items():
            variable = getattr(layer, name)
            variable[...] = jnp.asarray(value, variable.dtype).reshape(variable.shape)
        return layer

    def features(shape: Any) -> tuple[int, ...]:
        return (shape[-1 if "*c" in spec.affine_names else 1],)

    own = {"oracle": further_oracle("float32", features), **known}
    return entry(build, spec, (4, 3, 6) if "*c" in spec.affine_names else MAP, **own)


FURTHER = {
    "FilterResponseNorm": further(nk.FilterResponseNorm, catalog.FRN, **POSITIONS),
    "EvoNormB0": further(nk.EvoNormB0, catalog.EVONORM_B0, **KEPT, bessel=True),
    "EvoNormS0": further(
        nk.EvoNormS0, catalog.EVONORM_S0, **POSITIONS, sizes=lambda shape: (("g", math.gcd(3, shape[1])),)
    ),
    "DynamicTanh": further(nk.DynamicTanh, catalog.DYNAMIC_TANH, **ROWS),
    "GlobalResponseNorm": further(nk.GlobalResponseNorm, catalog.GLOBAL_RESPONSE, masks=True),
}


def subject(name: str, dtype: str) -> Subject:
    build, known = (ENTRIES | FURTHER)[name]
    # XLA chooses its loops by the shape of the batch, and with them the order of a sum.
    return layer_subject(
        f"{name}-{dtype}",
        lambda call, shape: build(call, shape, DTYPES[dtype]),
        dtype=dtype,
        rowwise=False,
        **known,
    )
