"""Which parameters weight decay leaves alone, by what every framework knows of them: names and shapes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

__all__ = ["looks_like_a_norm", "undecayed"]


def undecayed(name: str, shape: Sequence[int], *, norm: bool, biases: bool) -> bool:
    """Whether a parameter stays without decay: of a norm layer, a gain by name, or a bias unless `biases` are to decay.

    Gains by name are those of recurrent layers with norms inside: gamma_hh_l0, beta_c_l0.
    """
    words = name.split("_")
    named = "gamma" in words or "beta" in words or (not biases and "bias" in words)
    return norm or (named and _is_vector(shape))


def looks_like_a_norm(kind: type, shapes: Iterable[Sequence[int]]) -> bool:
    """Whether a class calls itself a norm and has parameters of such shapes: LlamaRMSNorm, GlobalResponseNorm."""
    return any("norm" in base.__name__.lower() for base in kind.__mro__) and all(map(_is_vector, shapes))


def _is_vector(shape: Sequence[int]) -> bool:
    return sum(length > 1 for length in shape) <= 1
