"""Normalizers whose output is more than "normalize, scale and shift": what they do with the statistics instead."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from normkit.core import activated, formula
from normkit.core.catalog import EVONORM_B0, EVONORM_S0, FRN, INSTANCE
from normkit.core.plan import NormPlan, plan
from normkit.core.spec import NormSpec

__all__ = ["FORMS", "Form", "Given", "formula_of"]


class Given(NamedTuple):
    """What an output is made of."""

    spec: NormSpec
    plan: NormPlan
    x: Any
    gamma: Any
    beta: Any
    more: Mapping[str, Any]  # further values by name
    eps: float
    kept: Mapping[str, Any] | None = None  # what evaluation normalizes by


@dataclass(frozen=True)
class Form:
    """An output of its own.

    Attributes:
        formula: in words.
        run: it, in NumPy.
        first: further values with one number per channel, and the first ones.
        normalized: whether x is divided by its deviation first, before anything else is done.
    """

    formula: str
    run: Callable[[Given], Any]
    first: Mapping[str, float] = field(default_factory=dict)
    normalized: bool = False


def _frn(g: Given) -> Any:
    y, _ = formula.normalize(np, g.spec, g.plan, g.x, g.gamma, g.beta, eps=g.eps)
    return activated.thresholded(np, g.plan, y, g.more["tau"])


def _evonorm_b0(g: Given) -> Any:
    alone = plan(INSTANCE, g.x.ndim)
    values = (g.x, g.more["v"], g.gamma, g.beta)
    return activated.evonorm_b0(np, g.spec, g.plan, alone, *values, eps=g.eps, kept=g.kept)[0]


def _evonorm_s0(g: Given) -> Any:
    return activated.evonorm_s0(np, g.spec, g.plan, g.x, g.more["v"], g.gamma, g.beta, eps=g.eps)


# By the name of the spec.
FORMS: Mapping[str, Form] = {
    FRN.name: Form("y = max(x / sqrt(mean(x^2) + eps) * gamma + beta, tau)", _frn, {"tau": 0.0}, True),
    EVONORM_B0.name: Form(
        "y = x / max(sqrt(variance + eps), v * x + sqrt(variance of the instance + eps)) * gamma + beta",
        _evonorm_b0,
        {"v": 1.0},
    ),
    EVONORM_S0.name: Form("y = x * sigmoid(v * x) / sqrt(variance + eps) * gamma + beta", _evonorm_s0, {"v": 1.0}),
}


def formula_of(spec: NormSpec) -> str:
    """The formula of a normalizer in one line."""
    if spec.name in FORMS:
        return FORMS[spec.name].formula
    gain = "(1 + gamma)" if spec.gain == "1+w" else "gamma"
    if not spec.center:
        return f"y = x / sqrt(mean(x^2) + eps) * {gain}"
    normalized = "(x - mean) / sqrt(variance + eps)"
    return f"y = ({normalized} * r + d) * {gain} + beta" if spec.renorm else f"y = {normalized} * {gain} + beta"
