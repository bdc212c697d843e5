"""Runs a normalizer on arrays of JAX: numbered axes to specs, masks to weights, and the sums of several devices.

Everything is plain operations, which XLA fuses, differentiates and vectorizes; nothing here knows which transform runs.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from numbers import Integral
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.nnx.nn.dtypes import canonicalize_dtype
from jax import lax

from normkit.core.axes import Sizes
from normkit.core.plan import NormPlan, plan, product
from normkit.core.spec import NormSpec
from normkit.errors import NormRuntimeError, NormTypeError, NormValueError, message

__all__ = ["array", "canonical", "check_features", "finish", "lanes", "placed", "prepare", "promoted"]


def canonical(owner: str, name: str, axes: Any, ndim: int) -> tuple[int, ...]:
    """Return axes of such an input as sorted numbers from 0, each once."""
    given = tuple(axes) if isinstance(axes, Sequence) else (axes,)
    whole = all(isinstance(axis, Integral) and not isinstance(axis, bool) for axis in given)
    if not whole or not all(-ndim <= axis < ndim for axis in given):
        raise NormValueError(message(f"{owner}: `{name}` must be axes of the input", f"{axes!r} of {ndim} axes"))
    return tuple(sorted({axis % ndim for axis in given}))


@functools.lru_cache(maxsize=1024)
def placed(
    spec: NormSpec, ndim: int, over: tuple[int, ...], features: tuple[int, ...], split: int | None, sizes: Sizes
) -> tuple[NormSpec, NormPlan]:
    """Return an entry of the catalog, its axes where Flax' numbers put them, and its plan.

    `over` are the axes of the statistics and `features` those of gamma. Axis `split` is the one that the entry writes
    as `(outer inner)`, statistics being taken over its inner part. A single value is enough, as in Flax.
    """
    names: list[tuple[str, ...]] = [(f"a{i}",) for i in range(ndim)]
    if split is not None:
        names[split] = next(token for token in spec.axes if len(token) == 2)
    x = " ".join(f"({' '.join(name)})" if len(name) == 2 else name[0] for name in names)
    inner = " ".join(names[axis][-1] for axis in over)
    affine = " ".join(" ".join(names[axis]) for axis in features)
    found = replace(spec, x=x, over=inner, affine=affine, minimum=1)
    return found, plan(found, ndim, sizes)


def array(owner: str, x: Any) -> Any:
    """Return the input as an array, or raise NormTypeError where it is none of real numbers."""
    x = x if hasattr(x, "dtype") else jnp.asarray(x)
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        raise NormTypeError(message(f"{owner}: the input must be real", x.dtype))
    return x


def check_features(owner: str, x: Any, features: tuple[int, ...], length: int) -> None:
    """Refuse inputs with another number of features than the layer."""
    if product(x.shape[axis] for axis in features) != length:
        where = ", ".join(map(str, features))
        must = f"{owner}: the input must have {length} features on axis {where}"
        raise NormValueError(message(must, f"shape {tuple(x.shape)}"))


def promoted(layer: Any, x: Any, *kept: Any) -> tuple[Any, Any, Any, Any]:
    """Return (x, scale, bias, type of the result): Flax' own promotion, then widened to at least float32.

    `kept` take part in the choice of the type, as in Flax, but the caller goes on with its own: they are not rounded.
    """
    names = [name for name in ("scale", "bias") if hasattr(layer, name)]
    variables = [getattr(layer, name) for name in names]
    arrays = [None if v is None else v[...] for v in variables]
    x, *rest = layer.promote_dtype((x, *kept, *arrays), dtype=layer.dtype)
    arrays = rest[len(kept) :]
    result = canonicalize_dtype(x, *arrays, dtype=layer.dtype)
    wide = jnp.promote_types(x.dtype, jnp.float32)
    named = {name: None if a is None else a.astype(wide) for name, a in zip(names, arrays, strict=True)}
    return x.astype(wide), named.get("scale"), named.get("bias"), result


def lanes(owner: str, axis_name: Any, groups: Any) -> Any:
    """Return the namespace for the formulas; its sums go over the devices as well.

    Sums of counts do too, so devices with few real positions, or none, weigh what they have.
    """
    if axis_name is None:
        return jnp

    def total(a: Any, axis: Any = None, keepdims: bool = False) -> Any:
        part = jnp.sum(a, axis=axis, keepdims=keepdims)
        try:
            return lax.psum(part, axis_name, axis_index_groups=groups)
        except NotImplementedError:
            must = f"{owner}: this transform must know `axis_index_groups`"
            raise NormRuntimeError(message(must, groups, "shard_map(..., check_vma=False) and pmap do")) from None

    try:
        lax.axis_index(axis_name)
    except NameError:
        must = f"{owner}: axis_name={axis_name!r} must be the name of an axis that is mapped over"
        hint = f"call it in jax.shard_map over a mesh with that axis or in nnx.vmap(..., axis_name={axis_name!r})"
        raise NormRuntimeError(message(must, hint=f"{hint}; under plain jit leave axis_name out")) from None
    names = ("reshape", "sqrt", "where", "clip", "concatenate")
    return SimpleNamespace(sum=total, **{name: getattr(jnp, name) for name in names})


class Input(NamedTuple):
    """An input with masked positions 0, which of them are real, and their weights; the latter two may be None."""

    x: Any
    real: Any
    weight: Any


def prepare(
    owner: str,
    x: Any,
    features: tuple[int, ...],
    mask: Any,
    sample_weight: Any = None,
    *,
    short: bool,
    across: tuple[Any, Any] = (None, None),
) -> Input:
    """Turn mask and sample weight into weights of the shape of x, the features' axes perhaps of length 1.

    Args:
        owner: for errors.
        x: the input, in the type of the statistics.
        features: its feature axes.
        mask, sample_weight: as the user gave them.
        short: whether they may come without the feature axes.
        across: axis_name and axis_index_groups of the devices that share statistics.
    """
    real = weight = None
    if sample_weight is not None:
        weight = jnp.asarray(sample_weight)
        if weight.ndim == 1 and 0 not in features and len(weight) == x.shape[0]:
            weight = weight.reshape(-1, *(1 for _ in x.shape[1:]))
        weight = _whole(owner, "sample_weight", weight, x.shape, features, short).astype(x.dtype)
        if not isinstance(weight, jax.core.Tracer) and not bool(((weight >= 0) & jnp.isfinite(weight)).all()):
            must = f"{owner}: `sample_weight` must be finite and >= 0"
            raise NormValueError(message(must, f"values from {np.min(weight)} to {np.max(weight)}"))
        weight = lax.stop_gradient(weight)
        top = jnp.max(weight, initial=0.0)  # only proportions count; near 1 their squares neither vanish nor overflow
        top = top if across[0] is None else lax.pmax(top, across[0], axis_index_groups=across[1])
        weight = weight / jnp.where(top > 0, top, 1.0)
    if mask is not None:
        real = jnp.asarray(mask)
        if real.dtype != jnp.bool_:
            hint = "True marks real data: mask.astype(bool), or ~mask for a padding mask"
            raise NormTypeError(message(f"{owner}: `mask` must be boolean", real.dtype, hint))
        real = _whole(owner, "mask", real, x.shape, features, short)
        # Replaced, not multiplied: what stands in the padding may be NaN.
        x = jnp.where(real, x, 0.0)
        weight = real.astype(x.dtype) if weight is None else jnp.where(real, weight, 0.0)
    if weight is None and across[0] is not None:
        weight = jnp.ones((x.shape[0], *(1 for _ in x.shape[1:])), x.dtype)  # counted over the devices, like any other
    return Input(x, real, weight)


def _whole(owner: str, name: str, t: Any, shape: tuple[int, ...], features: tuple[int, ...], short: bool) -> Any:
    """Return `t` with all axes of the input; those of the features stay of length 1 where `t` has none of them."""
    ndim = len(shape)
    positions = tuple(n for axis, n in enumerate(shape) if axis not in features)
    if short and t.ndim == len(positions):
        full = jnp.expand_dims(t, features)
    else:
        full = t.reshape((1,) * (ndim - t.ndim) + t.shape)
    if full.ndim == ndim and all(n in (1, m) for n, m in zip(full.shape, shape, strict=True)):
        return jnp.broadcast_to(full, [full.shape[axis] if axis in features else n for axis, n in enumerate(shape)])
    must = f"{owner}: `{name}` must broadcast to the input's shape {shape}"
    must = f"{must}, or to {positions} without its features" if short else must
    raise NormValueError(message(must, f"shape {t.shape}"))


def finish(y: Any, real: Any, dtype: Any) -> Any:
    """Return the output in its type, masked positions 0."""
    return (y if real is None else jnp.where(real, y, 0.0)).astype(dtype)
