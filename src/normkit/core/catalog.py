"""Every normalizer, once. A new one is an entry here and a short class per framework.

The short names are the ones used everywhere: `normkit compare --norms batch,group`, `normkit explain batch`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from normkit.core.spec import NormSpec, Tracked
from normkit.errors import NormValueError, message, nearest

__all__ = ["CATALOG", "STANDARD", "check_position", "find"]

# Ioffe and Szegedy evaluate with the unbiased variance, m/(m-1) times that of the batch (algorithm 2).
_MOVING = (Tracked("mean", init=0.0), Tracked("var", init=1.0, bessel=True))

BATCH = NormSpec(
    "batch_norm", x="n c *s", over="n *s", affine="c", tracked=_MOVING, minimum=2, paper="arXiv:1502.03167"
)
# Groups of n samples; what is left over forms one short group. The statistics of all groups enter as one update.
GHOST = replace(BATCH, name="ghost_batch_norm", x="(m n) c *s", paper="arXiv:1705.08741")
# The paper keeps the standard deviation, not the variance, and no Bessel factor: training and evaluation use the same
# number, so its bias cancels.
RENORM = replace(
    BATCH,
    name="batch_renorm",
    tracked=(Tracked("mean", init=0.0), Tracked("std", init=1.0)),
    renorm=True,
    paper="arXiv:1702.03275",
)
INSTANCE = NormSpec("instance_norm", x="n c *s", over="*s", affine="c", minimum=2, paper="arXiv:1607.08022")
# Not in the paper, but in PyTorch: the statistics of the instances, averaged, are kept for evaluation.
INSTANCE_TRACKED = replace(INSTANCE, tracked=_MOVING)
GROUP = NormSpec("group_norm", x="n (g k) *s", over="k *s", affine="g k", paper="arXiv:1803.08494")
LAYER = NormSpec("layer_norm", x="*n *c", over="*c", affine="*c", paper="arXiv:1607.06450")
# Layer norm over the channels of each position of an image, as in ConvNeXt.
LAYER_2D = NormSpec("layer_norm_2d", x="n c *s", over="c", affine="c", eps=1e-6, paper="arXiv:2201.03545")
RMS = NormSpec("rms_norm", x="*n *c", over="*c", affine="*c", center=False, eps=1e-6, paper="arXiv:1910.07467")
RMS_2D = replace(RMS, name="rms_norm_2d", x="n c *s", over="c", affine="c")
# What follows has a formula of its own, in `core.activated`. The first three are activations as well: their papers give
# the activation behind them up.
FRN = NormSpec(
    "filter_response_norm",
    x="n c *s",
    over="*s",
    affine="c",
    center=False,
    eps=1e-6,
    formula="filter_response",
    others=(("tau", 0.0),),
    paper="arXiv:1911.09737",
)
_EVONORM: dict[str, Any] = {"others": (("v", 1.0),), "paper": "arXiv:2004.02967"}
# Only the variance is kept: no mean is subtracted from the output.
EVONORM_B0 = replace(BATCH, name="evonorm_b0", tracked=_MOVING[1:], formula="evonorm_b0", **_EVONORM)
EVONORM_S0 = replace(GROUP, name="evonorm_s0", formula="evonorm_s0", **_EVONORM)
# No statistics at all, in the place of layer norm.
DYNAMIC_TANH = NormSpec(
    "dynamic_tanh",
    x="*n *c",
    over="",
    affine="*c",
    center=False,
    eps=0.0,
    formula="dynamic_tanh",
    others=(("alpha", 0.5),),
    paper="arXiv:2503.10622",
)
DYNAMIC_TANH_2D = replace(DYNAMIC_TANH, name="dynamic_tanh_2d", x="n c *s", affine="c")
# The root of the sum of squares over positions; what is divided by is its mean over the channels.
GLOBAL_RESPONSE = NormSpec(
    "global_response_norm",
    x="n c *s",
    over="*s",
    affine="c",
    center=False,
    eps=1e-6,
    formula="global_response",
    paper="arXiv:2301.00808",
)

CATALOG: Mapping[str, NormSpec] = MappingProxyType(
    {
        "batch": BATCH,
        "ghost": GHOST,
        "renorm": RENORM,
        "instance": INSTANCE,
        "group": GROUP,
        "layer": LAYER,
        "rms": RMS,
        "frn": FRN,
        "evonorm_b0": EVONORM_B0,
        "evonorm_s0": EVONORM_S0,
        "dyt": DYNAMIC_TANH,
        "grn": GLOBAL_RESPONSE,
    }
)
# Those of gamma, beta and kept statistics alone: what a NormRecord can say, and surgery can read and turn into another.
STANDARD = tuple(name for name, spec in CATALOG.items() if spec.formula == "standard")


def find(name: str) -> NormSpec:
    """Return the entry with this short name, or raise NormValueError with the nearest names."""
    try:
        return CATALOG[name]
    except KeyError:
        raise NormValueError(
            message("a normalizer must be in the catalog", repr(name), nearest(name, CATALOG))
        ) from None


def check_position(name: str, position: str) -> None:
    """Raise NormValueError for a normalizer after the activation whose paper puts it in the place of both.

    `name` is one of the catalog, or `none`; `position` is `before` or `after`.
    """
    if position == "after" and name in CATALOG and CATALOG[name].activates:
        must = f"{name} must not stand after the activation, whose place it takes"
        raise NormValueError(message(must, f"{name}:after", f"write {name}"))
