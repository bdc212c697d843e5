"""Values for the parameters besides gamma and beta, such as tau and alpha, and the oracle that is given the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from normkit.core.activated_reference import activated_reference
from normkit.core.spec import NormSpec
from normkit.testing.precision import rounded

__all__ = ["further_oracle", "further_values"]

# To both sides of what they are compared with.
_RANGES = {"tau": (-0.4, 0.6), "v": (0.3, 1.2), "alpha": (0.4, 0.8)}


def further_values(spec: NormSpec, features: Sequence[int], dtype: str) -> dict[str, Any]:
    """Return values by name, rounded to float32, in which a layer is built, and to the type."""
    rng = np.random.default_rng(len(spec.name))
    return {
        name: rounded(rounded(rng.uniform(*_RANGES[name], 1 if name == "alpha" else features), "float32"), dtype)
        for name, _ in spec.others
    }


def further_oracle(dtype: str, features: Callable[[Any], Sequence[int]]) -> Any:
    """Return an oracle for a Subject. `features` is the shape of gamma for the shape of an input."""

    def oracle(spec: NormSpec, x: Any, *args: Any, **options: Any) -> Any:
        others = further_values(spec, features(x.shape), dtype)
        return activated_reference(spec, x, *args, others=others, **options)

    return oracle
