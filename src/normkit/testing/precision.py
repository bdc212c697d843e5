"""How exact a result has to be: rounding to a type by name, the one tolerance, the one comparison.

NumPy has no bfloat16, so types go by name, and all arrays are float64 that hold values of their type.
"""

from __future__ import annotations

import numpy as np

__all__ = ["C_ACC", "EPS", "assert_close", "narrower", "rounded", "tolerance"]

Array = np.ndarray

# Distance from 1 to the next number of each type.
EPS = {"float64": 2.0**-52, "float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}
_NUMPY = {"float64": np.float64, "float32": np.float32, "float16": np.float16}

# See `tolerance`.
C_ACC = 3.0


def rounded(values: Array, dtype: str) -> Array:
    """Return float64 values rounded to the nearest number of `dtype`, ties to even."""
    values = np.asarray(values, dtype=np.float64)
    if dtype in _NUMPY:
        with np.errstate(over="ignore"):
            return values.astype(_NUMPY[dtype]).astype(np.float64)
    if dtype != "bfloat16":
        raise ValueError(f"`dtype` must be one of {', '.join(EPS)}; got {dtype!r}")
    finite = np.where(np.isfinite(values), values, 0.0)
    _, exponent = np.frexp(finite)
    spacing = np.ldexp(1.0, np.maximum(exponent, -125) - 8)  # 8 significant bits, float32's exponents
    nearest = np.rint(finite / spacing) * spacing
    nearest = np.where(np.abs(nearest) < 2.0**128, nearest, np.copysign(np.inf, nearest))
    return np.where(np.isfinite(values), nearest, values)


def narrower(dtype: str, other: str) -> bool:
    """Return whether `dtype` has fewer digits than `other`."""
    return EPS[dtype] > EPS[other]


def tolerance(
    size: float | Array,
    *,
    output: str,
    accumulator: str,
    condition: float | Array = 0.0,
    terms: float | Array | None = None,
    roundings: int = 1,
) -> float | Array:
    """Return how far a result may be from the oracle's.

    size * c_out * eps(output) + terms * c_acc * eps(accumulator) * (1 + condition)

    Args:
        size: largest magnitude of the result.
        output: type of the result.
        accumulator: type in which statistics and sums are formed.
        condition: |mean| / sqrt(var + eps) of the statistics behind it. A mean known to eps |mean| is wrong by eps
            |mean| / std in units of the normalized value: that much is lost by everybody who stores the mean once.
        terms: largest magnitude of what was added to form the result, where it cancels (the gradient of a batch of two
            is a difference of almost equal numbers); default `size`.
        roundings: how often values are rounded to `output` on the way, the result included; those before the last act
            on the terms.

    c_out = 0.5 for each rounding: the nearest number is at most half a spacing away, eps / 2 of the magnitude. One is
    the rule; Llama's RMS norm, which rounds before it multiplies by gamma, declares two.

    c_acc = 3: between x and y stand about eight roundings of half a spacing (mean, deviation, square, sum, root,
    quotient, gamma, beta), which seldom add up. Measured over the suite and on statistics of up to 6000 values, the
    formulas in NumPy and PyTorch and PyTorch's own sound kernels need less than 2; the rest is room for other orders of
    summation. Mistakes need hundreds.
    """
    added = np.abs(size if terms is None else terms)
    last, before = 0.5 * EPS[output] * np.abs(size), 0.5 * EPS[output] * (roundings - 1) * added
    return last + before + added * (C_ACC * EPS[accumulator]) * (1.0 + condition)


def assert_close(label: str, actual: Array | None, expected: Array, allowed: float | Array) -> None:
    """Raise AssertionError with the worst value, where it is and what was allowed, unless all are within `allowed`.

    A value that is not finite agrees only with itself. `allowed` 0 asks for the same bits.
    """
    if actual is None:
        raise AssertionError(f"{label}: nothing was returned; expected an array of shape {expected.shape}")
    if actual.shape != expected.shape:
        raise AssertionError(f"{label}: expected shape {expected.shape}, actual {actual.shape}")
    with np.errstate(invalid="ignore"):
        distance = np.abs(actual - expected)
    same = (actual == expected) | (np.isnan(actual) & np.isnan(expected))
    distance = np.where(same, 0.0, np.where(np.isnan(distance), np.inf, distance))
    allowed = np.broadcast_to(np.asarray(allowed, dtype=np.float64), expected.shape)
    wrong = ~(distance <= allowed)
    if not wrong.any():
        return
    with np.errstate(divide="ignore", invalid="ignore"):
        excess = np.where(wrong, np.where(allowed > 0, distance / allowed, np.inf), 0.0)
    excess = np.where(np.isnan(actual) & wrong, np.inf, excess)
    where = np.unravel_index(int(np.argmax(excess)), expected.shape)
    raise AssertionError(
        f"{label}: {int(wrong.sum())} of {expected.size} values differ, the worst at {tuple(int(i) for i in where)}\n"
        f"  expected:   {expected[where]:.9E}\n"
        f"  actual:     {actual[where]:.9E}\n"
        f"  difference: {distance[where]:.3E}\n"
        f"  tolerance:  {allowed[where]:.3E}"
    )
