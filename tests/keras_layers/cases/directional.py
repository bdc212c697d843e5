"""Gradients checked along a direction, by central differences of an oracle in float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

Arrays = Mapping[str, np.ndarray]
H = 1e-5


def assert_gradients(oracle: Callable[[Arrays], np.ndarray], at: Arrays, dy: np.ndarray, found: Arrays) -> None:
    """Compare sum(gradient * direction) for each input of the oracle, along a random direction.

    H leaves an error of about H^2 and eps64 / H, far below eps32. A gradient in float32 has gone through some thirty
    roundings of values up to the sum of its terms, which cancel.
    """
    rng = np.random.default_rng(7)
    for name, value in at.items():
        along = rng.standard_normal(value.shape)
        ends = [np.sum(dy * oracle({**at, name: value + side * H * along})) for side in (1, -1)]
        want, got = (ends[0] - ends[1]) / (2 * H), np.sum(found[name] * along)
        terms = np.sqrt(np.sum((found[name] * along) ** 2)) + np.abs(dy).max()
        assert abs(got - want) < 30 * 2.0**-23 * terms, (name, got, want)
