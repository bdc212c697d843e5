"""Subjects of PyTorch: the layers of normkit.torch, and those of torch.nn with what is known about them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

import normkit.torch as nk
from normkit.core import catalog
from normkit.core.spec import NormSpec
from normkit.testing import LAYOUTS, Call, Subject
from normkit.testing.parameters import further_oracle, further_values
from normkit.testing.torch import layer_subject

SHAPES = {
    "1d": ((6, 5, 7), (4, 6), (3, 2, 9)),
    "2d": ((5, 6, 3, 2), (3, 2, 4, 5), (2, 17, 1, 3)),
    "3d": ((3, 4, 2, 3, 2),),
}
MAPS = {name: tuple(s for s in shapes if len(s) > 2) for name, shapes in SHAPES.items()}
ROWS = ((4, 3, 6), (5, 17), (2, 1, 3, 5))


def channels(shape: Sequence[int]) -> Any:
    return (("c", shape[1]),)


def tracking(call: Call, **more: Any) -> dict[str, Any]:
    """Return the keyword arguments of our tracking layers that a call chooses."""
    chosen = {"eps": call.eps, "momentum": call.rate, **more}
    if call.bessel is not None:
        chosen["bessel"] = call.bessel
    if call.nonfinite is not None:
        chosen["nonfinite"] = call.nonfinite
    return chosen


def batch(kind: Callable[..., nn.Module], **more: Any) -> Callable[..., nn.Module]:
    return lambda call, shape: kind(shape[1], **tracking(call, **more))


def renorm(kind: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    return lambda call, shape: kind(shape[1], **tracking(call, schedule=call.schedule))


OURS: dict[str, bool | Any] = {"masks": True, "weights": True, "layouts": LAYOUTS}
KEPT = {**OURS, "nonfinite": ("skip", "update"), "cumulative": True, "counts_empty": True}


def our_entries() -> dict[str, tuple[Callable[..., nn.Module], dict[str, Any]]]:
    """Return name -> (build, attributes) of every layer of normkit.torch."""
    found: dict[str, tuple[Callable[..., nn.Module], dict[str, Any]]] = {}
    for d in ("1d", "2d", "3d"):
        common = {"shapes": SHAPES[d], "sizes": channels}
        maps = {"shapes": MAPS[d], "sizes": channels}
        found[f"BatchNorm{d}"] = (
            batch(getattr(nk, f"BatchNorm{d}")),
            {"spec": catalog.BATCH, **common, **KEPT, "bessel": True},
        )
        ghost = batch(getattr(nk, f"GhostBatchNorm{d}"), virtual_batch_size=2)
        sizes = {"sizes": lambda shape: (("c", shape[1]), ("n", 2))}
        found[f"GhostBatchNorm{d}"] = (ghost, {"spec": catalog.GHOST, **common, **sizes, **KEPT, "bessel": True})
        found[f"BatchRenorm{d}"] = (
            renorm(getattr(nk, f"BatchRenorm{d}")),
            {"spec": catalog.RENORM, **common, **KEPT},
        )
        instance = getattr(nk, f"InstanceNorm{d}")
        found[f"InstanceNorm{d}"] = (
            lambda call, shape, kind=instance: kind(shape[1], eps=call.eps, affine=True),
            {"spec": catalog.INSTANCE, **maps, **OURS},
        )
        found[f"InstanceNorm{d}_tracked"] = (
            batch(instance, affine=True, track_running_stats=True),
            # Like PyTorch's, it does not count, except where momentum=None needs it.
            {"spec": catalog.INSTANCE_TRACKED, **maps, **KEPT, "bessel": True, "counts": False},
        )
    found["SyncBatchNorm"] = (
        batch(nk.SyncBatchNorm),
        {"spec": catalog.BATCH, "shapes": SHAPES["2d"][:1], "sizes": channels, **KEPT, "bessel": True},
    )
    found["GroupNorm"] = (
        lambda call, shape: nk.GroupNorm(math.gcd(3, shape[1]), shape[1], eps=call.eps),
        {
            "spec": catalog.GROUP,
            "sizes": lambda shape: (("g", math.gcd(3, shape[1])),),
            "shapes": ((5, 6, 3, 2), (4, 6), (3, 2, 7)),
            **OURS,
        },
    )
    plain = {"layouts": LAYOUTS}
    rows = {"shapes": ROWS, "sizes": lambda shape: (("*c", shape[-1:]),), **plain}
    images = {"shapes": ((5, 6, 3, 2), (4, 6), (3, 2, 7)), "sizes": channels, **plain}
    found["LayerNorm"] = (lambda call, shape: nk.LayerNorm(shape[-1], eps=call.eps), {"spec": catalog.LAYER, **rows})
    found["LayerNorm_two_axes"] = (
        lambda call, shape: nk.LayerNorm(shape[-2:], eps=call.eps),
        {**rows, "spec": catalog.LAYER, "shapes": ROWS[::2], "sizes": lambda shape: (("*c", shape[-2:]),)},
    )
    found["LayerNorm2d"] = (
        lambda call, shape: nk.LayerNorm2d(shape[1], eps=call.eps),
        {"spec": catalog.LAYER_2D, **images},
    )
    for gain in ("w", "1+w"):
        for cast, roundings in (("gemma", 1), ("llama", 2), ("none", 3)):
            # "llama" rounds the normalized value before the gain, "none" the inverse root mean square before that;
            # 1 + w is one more rounding wherever the gain is applied in the input's type.
            times = roundings + (gain == "1+w" and cast != "gemma")
            options = {"gain": gain, "cast": cast}
            found[f"RMSNorm_{gain}_{cast}"] = (
                lambda call, shape, options=options: nk.RMSNorm(shape[-1], eps=call.eps, **options),
                {"spec": gained(catalog.RMS, gain), **rows, "beta": False, "roundings": times},
            )
            found[f"RMSNorm2d_{gain}_{cast}"] = (
                lambda call, shape, options=options: nk.RMSNorm2d(shape[1], eps=call.eps, **options),
                {"spec": gained(catalog.RMS_2D, gain), **images, "beta": False, "roundings": times},
            )
    return found | further_entries()


def further(
    spec: NormSpec, make: Callable[..., nn.Module], features: Callable[[Any], Any] = lambda shape: (shape[1],)
) -> tuple[Callable[[str], Callable[..., nn.Module]], dict[str, Any]]:
    """Return (type -> build, attributes) of a layer with parameters of its own, which the oracle is given, too."""

    def of_type(dtype: str) -> Callable[..., nn.Module]:
        def build(call: Call, shape: Any) -> nn.Module:
            layer = make(call, shape)
            with torch.no_grad():
                for name, value in further_values(spec, features(shape), dtype).items():
                    getattr(layer, name).copy_(torch.from_numpy(value))
            return layer

        return build

    return of_type, {"spec": spec, "oracle": lambda dtype: further_oracle(dtype, features)}


def learned(call: Call, shape: Any) -> nn.Module:
    layer = nk.FilterResponseNorm(shape[1], call.eps, learn_eps=True)
    nn.init.zeros_(layer.learned_eps)
    return layer


def further_entries() -> dict[str, tuple[Any, dict[str, Any]]]:
    """Return the layers of `normkit.torch.further`: their builds and oracles depend on the type."""
    images = {"shapes": ((5, 6, 3, 2), (3, 2, 7)), "sizes": channels, **OURS}
    groups = lambda shape: math.gcd(3, shape[1])  # noqa: E731
    made = {
        "FilterResponseNorm": (
            further(catalog.FRN, lambda call, shape: nk.FilterResponseNorm(shape[1], call.eps)),
            {**images, "exceptions": {"check_undo": "the threshold tau takes what lies below it"}},
        ),
        "FilterResponseNorm_learned": (  # without positions; of |learned_eps| the suite knows nothing
            further(catalog.FRN, learned),
            {**images, "shapes": ((4, 6), (5, 6, 1)), "exceptions": {"check_undo": "the threshold tau"}},
        ),
        "EvoNormB0": (
            further(catalog.EVONORM_B0, batch(nk.EvoNormB0)),
            {
                **images, **KEPT, "bessel": True, "counts": False,
                "exceptions": {
                    "check_rescaled": "no mean is subtracted from the output",
                    "check_undo": "no mean is subtracted from the output",
                },
            },
        ),
        "EvoNormS0": (
            further(catalog.EVONORM_S0, lambda call, shape: nk.EvoNormS0(shape[1], groups(shape), eps=call.eps)),
            {
                **images, "sizes": lambda shape: (("g", groups(shape)),),
                "exceptions": {
                    "check_rescaled": "the sigmoid sees the scale and the mean of the input",
                    "check_undo": "it is an activation as well",
                },
            },
        ),
        "DynamicTanh": (
            further(
                catalog.DYNAMIC_TANH, lambda call, shape: nk.DynamicTanh(shape[-1]), lambda shape: (shape[-1],)
            ),
            {
                "shapes": ROWS, "sizes": lambda shape: (("*c", shape[-1:]),), "layouts": LAYOUTS,
                "exceptions": {
                    "check_rescaled": "there are no statistics: it sees the scale of its input",
                    "check_undo": "there are no statistics",
                },
            },
        ),
        "DynamicTanh_channels_first": (
            further(catalog.DYNAMIC_TANH_2D, lambda call, shape: nk.DynamicTanh(shape[1], channels_last=False)),
            {
                **images, "masks": False, "weights": False,
                "exceptions": {
                    "check_rescaled": "there are no statistics: it sees the scale of its input",
                    "check_undo": "there are no statistics",
                },
            },
        ),
        "GlobalResponseNorm": (
            further(
                catalog.GLOBAL_RESPONSE,
                lambda call, shape: nk.GlobalResponseNorm(shape[1], call.eps, channels_last=False),
            ),
            {
                **images, "weights": False,
                "exceptions": {
                    "check_rescaled": "the input is added: the output has its scale",
                    "check_undo": "the input is added",
                },
            },
        ),
    }  # fmt: skip
    return {name: (build, {**known, **more}) for name, ((build, known), more) in made.items()}


def gained(spec: NormSpec, gain: Any) -> NormSpec:
    return replace(spec, gain=gain)


def our_layers() -> list[Subject]:
    """Return every layer of normkit.torch in every type."""
    subjects = []
    for name, (build, known) in our_entries().items():
        for dtype in ("float64", "float32", "float16", "bfloat16"):
            accumulator = "float64" if dtype == "float64" else "float32"
            typed = {"dtype": dtype, "accumulator": accumulator}
            if "oracle" in known:
                typed["oracle"] = known["oracle"](dtype)
                made = layer_subject(f"{name}-{dtype}", build(dtype), **{**known, **typed})
            else:
                made = layer_subject(f"{name}-{dtype}", build, **known, **typed)
            subjects.append(made)
    return subjects


# What torch.nn is known to do otherwise. Each exception must fail, so that this list cannot outlive its reason.
EXCEPTIONS: dict[str, dict[str, str]] = {
    "InstanceNorm2d": {"check_empty_batch": "raises IndexError"},
    "InstanceNorm2d_tracked": {
        "check_empty_batch": "raises IndexError",
        "check_cumulative": "momentum=None never updates the running statistics",
    },
    "GroupNorm": {
        "check_single_axes": "refuses a batch of one with one value per group, though a batch of two is accepted",
        "check_layouts": "channels_last computes E[x^2] - E[x]^2, wrong once the mean is large",
    },
}


def torch_layers() -> list[Subject]:
    """Return the layers of torch.nn: what they fail is evidence that a check sees it, and a reason for ours."""
    common = {"shapes": SHAPES["2d"], "sizes": channels}
    found = {
        "BatchNorm2d": (
            lambda call, shape: nn.BatchNorm2d(shape[1], call.eps, call.rate),
            {"spec": catalog.BATCH, **common, "cumulative": True, "nonfinite": ("update",), "counts_empty": True},
        ),
        "InstanceNorm2d": (
            lambda call, shape: nn.InstanceNorm2d(shape[1], call.eps, affine=True),
            {"spec": catalog.INSTANCE, **common},
        ),
        "InstanceNorm2d_tracked": (
            lambda call, shape: nn.InstanceNorm2d(shape[1], call.eps, call.rate, affine=True, track_running_stats=True),
            {"spec": catalog.INSTANCE_TRACKED, **common, "cumulative": True, "nonfinite": ("update",), "counts": False},
        ),
        "GroupNorm": (
            lambda call, shape: nn.GroupNorm(math.gcd(3, shape[1]), shape[1], call.eps),
            {"spec": catalog.GROUP, "sizes": lambda shape: (("g", math.gcd(3, shape[1])),), "shapes": ((5, 6, 3, 2),)},
        ),
        "LayerNorm": (
            lambda call, shape: nn.LayerNorm(shape[-1], call.eps),
            {"spec": catalog.LAYER, "shapes": ROWS, "sizes": lambda shape: (("*c", shape[-1:]),)},
        ),
        "RMSNorm": (
            lambda call, shape: nn.RMSNorm(shape[-1], call.eps),
            {"spec": catalog.RMS, "shapes": ROWS, "sizes": lambda shape: (("*c", shape[-1:]),), "beta": False},
        ),
    }
    subjects = []
    for name, (build, known) in found.items():
        for dtype in ("float64", "float32"):
            more = {"layouts": LAYOUTS, "dtype": dtype, "accumulator": dtype, "exceptions": EXCEPTIONS.get(name, {})}
            subjects.append(layer_subject(f"nn.{name}-{dtype}", build, **known, **more))
    return subjects
