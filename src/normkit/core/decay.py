"""Which parameters weight decay leaves alone, by what every framework knows of them: names and shapes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

__all__ = ["looks_like_a_norm", "undecayed"]


def undecayed(name: str, shape: Sequence[int], *, norm: bool, biases: bool) -> bool:
    """Whether a parameter stays without decay: one of a norm layer, or a bias unless `biases` are to decay."""
    return norm or (not biases and "bias" in name.split("_") and _is_vector(shape))


def looks_like_a_norm(kind: type, shapes: Iterable[Sequence[int]]) -> bool:
    """Whether a class calls itself a norm and has parameters of such shapes: LlamaRMSNorm, GlobalResponseNorm."""
    return any("norm" in base.__name__.lower() for base in kind.__mro__) and all(map(_is_vector, shapes))


def _is_vector(shape: Sequence[int]) -> bool:
    return sum(length > 1 for length in shape) <= 1
