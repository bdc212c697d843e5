"""Subjects of PyTorch: modules with torch.nn's state names, and the plain formula under autograd.

Imported by those who test PyTorch layers, never by :mod:`normkit.testing`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from normkit.core.plan import plan
from normkit.core.spec import NormSpec
from normkit.testing.formulas import ENTRIES, capabilities, forward
from normkit.testing.precision import rounded
from normkit.testing.subject import Call, Outcome, Shape, Subject, chosen

__all__ = ["layer_subject", "place", "run_layer", "torch_formula_subject"]

Array = np.ndarray

DTYPES = {"float64": torch.float64, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def layer_subject(name: str, build: Callable[[Call, Shape], nn.Module], **known: Any) -> Subject:
    """Return a subject of a module.

    Args:
        name: for test ids.
        build: (call, input shape) -> a fresh module in float32, for what the call says of eps, rate, bessel, nonfinite
            and schedule.
        known: the other attributes of a Subject.
    """
    subject = Subject(name=name, run=_not_yet, **known)
    return replace(subject, run=lambda call: run_layer(build, subject.dtype, call))


def _not_yet(call: Call) -> Outcome:
    raise NotImplementedError


def run_layer(build: Callable[[Call, Shape], nn.Module], dtype: str, call: Call) -> Outcome:
    """Build the module, load the call's state, run its history and itself, and read everything back."""
    kind = DTYPES[dtype]
    module = build(call, call.x.shape if call.made_for is None else call.made_for).to(kind)
    _load(module, call)
    module.train()
    for batch in call.history:
        module(_tensor(batch, kind))
    module.train(call.training)
    x = place(_tensor(call.x, kind), call.layout).requires_grad_(call.dy is not None)
    options: dict[str, Any] = {}
    if call.mask is not None:
        options["mask"] = torch.from_numpy(call.mask.copy())
    if call.weight is not None:
        options["sample_weight"] = _tensor(call.weight, torch.float64 if dtype == "float64" else torch.float32)
    y = module(x, **options)
    if y.dtype != kind:
        raise AssertionError(f"the output of an input in {kind} must have its type; got {y.dtype}")
    arguments = {"x": x, **options}
    gradients: dict[str, Any] = {}
    if call.dy is not None:
        dy = place(_tensor(call.dy, kind), call.layout, gradient=True)
        arguments["dy"] = dy
        named = {"x": x, "gamma": getattr(module, "weight", None), "beta": getattr(module, "bias", None)}
        wanted = {name: t for name, t in named.items() if t is not None}
        found = torch.autograd.grad(y, list(wanted.values()), dy)
        gradients = dict(zip(wanted, map(_array, found), strict=True))
    outcome = Outcome(_array(y), gradients.get("x"), gradients.get("gamma"), gradients.get("beta"))
    given = {"x": call.x, "dy": call.dy, "mask": call.mask, "sample_weight": call.weight}
    changed = tuple(key for key, value in arguments.items() if not _equal(_array(value), given[key]))
    # Buffers must not share memory with the input: it is overwritten before they are read.
    with torch.no_grad():
        x.fill_(torch.nan)
    kept = {key.removeprefix("running_"): _array(b) for key, b in module.named_buffers() if key.startswith("running_")}
    number = getattr(module, "num_batches_tracked", None)
    return replace(outcome, kept=kept, count=None if number is None else int(number), changed=changed)


def _load(module: nn.Module, call: Call) -> None:
    named = {"weight": call.gamma, "bias": call.beta}
    named |= {f"running_{name}": value for name, value in (call.kept or {}).items()}
    with torch.no_grad():
        for name, value in named.items():
            target = getattr(module, name, None)
            if value is not None and target is not None:
                target.copy_(torch.from_numpy(value.copy()).reshape(target.shape))
        if getattr(module, "num_batches_tracked", None) is not None:
            module.num_batches_tracked.fill_(call.count)  # type: ignore[operator]


def place(t: Tensor, layout: str, *, gradient: bool = False) -> Tensor:
    """Return the same values, lying in memory as `layout` says (see `normkit.testing.LAYOUTS`)."""
    if layout == "channels_last" and not gradient and t.dim() > 2:
        return t.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "strided":
        spaced = torch.full((*t.shape[:-1], 2 * t.shape[-1]), torch.nan, dtype=t.dtype)
        spaced[..., ::2] = t
        return spaced[..., ::2]
    if layout == "expanded" and gradient:
        return t[:1].expand(t.shape)
    return t


def _tensor(values: Array, dtype: torch.dtype) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).to(dtype)


def _array(t: Tensor) -> Array:
    return t.detach().to(torch.float64).numpy().copy()


def _equal(actual: Array, given: Array | None) -> bool:
    return given is not None and bool(np.array_equal(actual, given.astype(np.float64), equal_nan=True))


def torch_formula_subject(entry: str, *, dtype: str = "float32") -> Subject:
    """Return the core's formula in plain torch operations, differentiated by autograd."""
    spec, sizes, shapes = ENTRIES[entry]
    accumulator = "float64" if dtype == "float64" else "float32"
    return Subject(
        name=f"torch_formula-{entry}-{dtype}",
        spec=spec,
        run=lambda call: _run_formula(spec, sizes, dtype, accumulator, call),
        shapes=shapes,
        sizes=sizes,
        dtype=dtype,
        accumulator=accumulator,
        **capabilities(spec),
    )


def _run_formula(spec: NormSpec, sizes: Any, dtype: str, accumulator: str, call: Call) -> Outcome:
    made_for = call.x.shape if call.made_for is None else call.made_for
    spec = chosen(spec, call.bessel)
    p = plan(spec, call.x.ndim, sizes(made_for))
    wide = DTYPES[accumulator]
    positions = (call.x.shape[0], 1, *call.x.shape[2:])
    real = None if call.mask is None else torch.from_numpy(call.mask.copy()).reshape(positions)
    weight = None
    if call.weight is not None:
        weight = _tensor(call.weight, wide)
        each = weight.reshape(-1, *(1 for _ in positions[1:])) if weight.dim() == 1 else weight.reshape(positions)
        weight = each.expand(positions)
    gamma, beta = (None if v is None else _tensor(v, wide).requires_grad_() for v in (call.gamma, call.beta))
    kept: dict[str, Any]
    if call.kept is None:
        kept = {t.name: torch.full((made_for[1],), t.init, dtype=wide) for t in spec.tracked}
    else:
        kept = {name: _tensor(value, wide) for name, value in call.kept.items()}
    count = call.count
    shared: dict[str, Any] = {"stop": torch.Tensor.detach}
    for batch in call.history:
        made = forward(
            torch, spec, p, call, _tensor(batch, wide), gamma, beta, kept=kept, count=count, training=True, **shared
        )
        kept, count = {name: value.detach() for name, value in made.kept.items()}, made.count
    x = place(_tensor(call.x, wide), call.layout).requires_grad_()
    made = forward(
        torch, spec, p, call, x, gamma, beta,
        kept=kept, count=count, training=call.training, real=real, weight=weight, **shared,
    )  # fmt: skip
    gradients: dict[str, Array] = {}
    if call.dy is not None:
        wanted = {name: t for name, t in (("x", x), ("gamma", gamma), ("beta", beta)) if t is not None}
        dy = place(_tensor(call.dy, wide), call.layout, gradient=True)
        found = torch.autograd.grad(made.y, list(wanted.values()), dy)
        gradients = {name: rounded(_array(g), dtype) for name, g in zip(wanted, found, strict=True)}
    after = {name: _array(value) for name, value in made.kept.items()}
    y = rounded(_array(made.y), dtype)
    number = made.count if spec.tracked else None
    return Outcome(y, gradients.get("x"), gradients.get("gamma"), gradients.get("beta"), after, number)
