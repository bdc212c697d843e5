"""What is measured: norm, activation, shape, layout and type of one training step or one evaluation."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from normkit.core.catalog import find
from normkit.core.spec import NormSpec
from normkit.errors import NormValueError, message

__all__ = ["GRID", "QUICK", "TINY", "Case", "chosen"]

Layout = Literal["contiguous", "channels_last"]

# Shapes of the batch norms of real networks: a first and a wide layer, later ones with small maps, and a table.
IMAGES = ((32, 64, 56, 56), (64, 64, 112, 112), (128, 256, 14, 14), (64, 512, 7, 7), (16, 32, 28, 28))
ROWS = (4096, 512)
IMAGE = IMAGES[0]
UNET = (4, 320, 64, 64)  # as in the U-nets of diffusion models, which normalize groups and apply SiLU
TINY = (8, 16, 4, 4)  # the cost of a call, not of its arithmetic
GROUPS = 32  # the number that the paper of group norm (arXiv:1803.08494) recommends
LAYOUTS: tuple[Layout, ...] = ("contiguous", "channels_last")
DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class Case:
    """One case.

    Attributes:
        norm: short name in the catalog.
        shape: of the input, (N, C, *S), or (N, D) for norms of rows.
        activation: `relu`, `silu` or None.
        layout: how inputs, outputs and gradients lie in memory.
        dtype: of input and output; gamma and beta hold values of it, in float32 where a peer can mix both.
        training: forward and backward with statistics of the batch, or forward with kept statistics and no gradients.
    """

    norm: str
    shape: tuple[int, ...]
    activation: str | None = None
    layout: Layout = "contiguous"
    dtype: str = "float32"
    training: bool = True

    def __str__(self) -> str:
        words = [self.norm + (f"+{self.activation}" if self.activation else ""), self.size, self.layout, self.dtype]
        return " ".join(words + ([] if self.training else ["eval"]))

    @property
    def size(self) -> str:
        """The shape in words."""
        return "x".join(map(str, self.shape))

    @property
    def values(self) -> int:
        """Number of values of the input."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Size of the input in memory."""
        return self.values * (2 if self.dtype == "bfloat16" else 4)

    @property
    def spec(self) -> NormSpec:
        """The normalizer."""
        return find(self.norm)

    @property
    def groups(self) -> int:
        """Of group norm."""
        return min(GROUPS, self.shape[1])

    @property
    def channels(self) -> int:
        """Values of gamma."""
        return self.shape[1]  # of rows, which have two axes, the last one


def _grid() -> Iterator[Case]:
    for dtype in DTYPES:
        for shape, layout in itertools.product(IMAGES, LAYOUTS):
            yield Case("batch", shape, "relu", layout, dtype)
        yield Case("batch", ROWS, "relu", dtype=dtype)
        yield Case("batch", TINY, "relu", dtype=dtype)
        for layout in LAYOUTS:
            yield Case("batch", IMAGE, "relu", layout, dtype, training=False)
        for norm in ("layer", "rms"):
            yield Case(norm, ROWS, dtype=dtype)
        for layout in LAYOUTS:
            yield Case("group", IMAGE, None, layout, dtype)
            yield Case("group", UNET, "silu", layout, dtype)
            yield Case("instance", IMAGE, None, layout, dtype)


GRID = tuple(_grid())
# One case of every kind, small: whether everything works, not how fast.
QUICK = (
    Case("batch", TINY, "relu"),
    Case("batch", TINY, "relu", "channels_last", "bfloat16"),
    Case("batch", TINY, "relu", training=False),
    Case("layer", (64, 32)),
    Case("rms", (64, 32), dtype="bfloat16"),
    Case("group", (4, 64, 6, 6), "silu"),
    Case("instance", TINY, None, "channels_last"),
)


def chosen(cases: Sequence[Case], wanted: str | None) -> tuple[Case, ...]:
    """The cases that one of the parts of `wanted`, separated by commas, names: all of its words are in their names.

    >>> [str(case) for case in chosen(GRID, "7x7 channels_last bfloat16, rms float32")]
    ['rms 4096x512 contiguous float32', 'batch+relu 64x512x7x7 channels_last bfloat16']

    Raises NormValueError where a part names none.
    """
    if wanted is None:
        return tuple(cases)
    found: set[Case] = set()
    for part in wanted.split(","):
        named = {case for case in cases if part.split() and all(word in str(case) for word in part.split())}
        if not named:
            must = "every part of `--cases` must name cases by words of theirs"
            raise NormValueError(message(must, repr(part.strip()), f"known: {', '.join(map(str, cases))}"))
        found |= named
    return tuple(case for case in cases if case in found)
