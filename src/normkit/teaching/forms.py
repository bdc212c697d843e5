"""The formulas of normalizers in words, and what there is to say of those that do not normalize, scale and shift."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from normkit.core.spec import NormSpec

__all__ = ["FORMS", "Form", "formula_of", "title_of"]

_MORE = "There are none: this does more to x than scale and shift it."


@dataclass(frozen=True)
class Form:
    """A formula of its own, of :mod:`normkit.core.activated`.

    Attributes:
        words: the formula.
        undo: whether any gamma and beta undo it, in a sentence.
        remark: what else is made of the statistics, in a sentence.
        normalized: whether x is divided by its root mean square first, before anything else is done.
    """

    words: str
    undo: str = _MORE
    remark: str = ""
    normalized: bool = False


# By `NormSpec.formula`.
FORMS: Mapping[str, Form] = {
    "filter_response": Form(
        "y = max(x / sqrt(mean(x^2) + eps) * gamma + beta, tau)",
        "There are none where the maximum takes tau: what is below is cut off.",
        normalized=True,
    ),
    "evonorm_b0": Form(
        "y = x / max(sqrt(variance + eps), v * x + sqrt(variance of the instance + eps)) * gamma + beta",
        remark="The variance of the instance is that of one channel of one sample, over its positions.",
    ),
    "evonorm_s0": Form("y = x * sigmoid(v * x) / sqrt(variance + eps) * gamma + beta"),
    "dynamic_tanh": Form(
        "y = gamma * tanh(alpha * x) + beta", "There are none: tanh does more to x than scale and shift it."
    ),
    "global_response": Form(
        "y = gamma * (x * g / (mean(g) + eps)) + beta + x, g = sqrt(sum(x^2))",
        "gamma = 0 and beta = 0, the first values, give x back.",
        "g = sqrt(m * mean square); its mean is taken over the channels of a sample, which so compete.",
    ),
}


# Parts of names that are not written as words.
_WRITTEN = {"rms": "RMS", "evonorm": "EvoNorm", "b0": "B0", "s0": "S0"}


def title_of(spec: NormSpec) -> str:
    """The name of a normalizer in a sentence: `batch norm`, `RMS norm`."""
    return " ".join(_WRITTEN.get(part, part) for part in spec.name.split("_"))


def formula_of(spec: NormSpec) -> str:
    """The formula of a normalizer in one line."""
    if spec.formula in FORMS:
        return FORMS[spec.formula].words
    gain = "(1 + gamma)" if spec.gain == "1+w" else "gamma"
    if not spec.center:
        return f"y = x / sqrt(mean(x^2) + eps) * {gain}"
    normalized = "(x - mean) / sqrt(variance + eps)"
    return f"y = ({normalized} * r + d) * {gain} + beta" if spec.renorm else f"y = {normalized} * {gain} + beta"
