"""Names to axes: which name stands at which axis of an input with so many of them."""

from __future__ import annotations

from normkit.core.spec import NormSpec
from normkit.errors import NormValueError, message

__all__ = ["Sizes", "static", "tokens"]

# Static sizes by name: groups ("g", 8), virtual batch size ("n", 32), channels ("c", 64), normalized_shape ("*c", (8,
# 5)).
Sizes = tuple[tuple[str, int | tuple[int, ...]], ...]


def static(sizes: Sizes, name: str) -> int | tuple[int, ...] | None:
    """Return the static size of a name, None where it is read from the input."""
    for known, size in sizes:
        if known == name:
            return size
    return None


def tokens(spec: NormSpec, ndim: int, sizes: Sizes = ()) -> tuple[tuple[str, ...], ...]:
    """Return one token per axis of the input, `*` axes repeated as often as there are axes for them.

    A `*` axis with a static size takes as many axes as that size has numbers; the other takes what remains.
    """
    lengths = [static(sizes, token[0]) for token in spec.axes]
    stars = [i for i, token in enumerate(spec.axes) if token[0].startswith("*")]
    repeat = [len(size) if i in stars and isinstance(size, tuple) else 1 for i, size in enumerate(lengths)]
    free = [i for i in stars if not isinstance(lengths[i], tuple)]
    left = ndim - sum(repeat[i] for i in range(len(spec.axes)) if i not in free)
    if len(free) > 1:
        raise NormValueError(message(f"{spec.name}: one of the `*` axes in `{spec.x}` must have a static size"))
    if left < 0 or (left and not free):
        least = f"{ndim - left} or more" if free else f"{ndim - left}"
        raise NormValueError(message(f"{spec.name}: the input must have axes `{spec.x}` ({least})", f"{ndim} axes"))
    for i in free:
        repeat[i] = left
    return tuple(token for i, token in enumerate(spec.axes) for _ in range(repeat[i]))
