"""The layers of normkit.keras pass the suite on the active backend: all of it in float32, and what half types break.

JAX compiles every operation for every shape, so there the checks of many shapes run for some of the layers.
"""

from __future__ import annotations

import pytest
from keras_subjects import BACKEND, ENTRIES, subject

from normkit.testing import CHECKS, Subject, checks_for, conform, ids, pairs

DOUBLE = pairs(subject(entry, "float64") for entry in ENTRIES)
FEW = {
    f"check_{name}"
    for name in (
        *("outputs", "gradients", "output_type", "large_mean", "large_values", "mask", "masked_garbage", "all_masked"),
        *("sample_weight", "kept", "statistics", "cumulative", "many_steps", "schedule"),
    )
}
KINDS = ("BatchNormalization", "GhostBatchNormalization", "BatchRenormalization", "GroupNormalization",
         "LayerNormalization", "RMSNormalization")  # fmt: skip
MANY_SHAPES = {f"check_{name}" for name in ("single_axes", "padding", "one_channel", "batch_mates", "empty_batch")}
FLOAT = [
    (check, s)
    for check, s in pairs(subject(entry) for entry in ENTRIES)
    if BACKEND != "jax"
    or check.__name__ in FEW
    or s.name.removesuffix("-float32") in KINDS[:1]
    or (s.name.removesuffix("-float32") in KINDS and check.__name__ not in MANY_SHAPES)
]
HALF = [
    (check, s)
    for kind in KINDS
    for dtype in (("bfloat16",) if BACKEND == "jax" else ("bfloat16", "float16"))
    for s in [subject(kind, dtype)]
    for check in checks_for(s)
    if check.__name__ in FEW
]
# Lengths that a graph does not know, as in `fit` on TensorFlow, take another path through the layers.
DYNAMIC = FEW - {"check_large_values"} | {"check_single_axes", "check_empty_batch", "check_nonfinite", "check_bessel"}
GRAPH = [
    (check, s)
    for kind in ("BatchNormalization", "GhostBatchNormalization", "GroupNormalization", "InstanceNormalization")
    for s in [subject(kind, graph=True)]
    for check in checks_for(s)
    if check.__name__ in DYNAMIC
]


@pytest.mark.parametrize(("check", "subject"), FLOAT, ids=ids(FLOAT))
def test_float32(check, subject: Subject) -> None:
    conform(check, subject)


if BACKEND != "jax":  # it has no float64 unless the whole process says so

    @pytest.mark.parametrize(("check", "subject"), DOUBLE, ids=ids(DOUBLE))
    def test_float64(check, subject: Subject) -> None:
        conform(check, subject)


@pytest.mark.parametrize(("check", "subject"), HALF, ids=ids(HALF))
def test_half_types(check, subject: Subject) -> None:
    conform(check, subject)


if BACKEND == "tensorflow":

    @pytest.mark.parametrize(("check", "subject"), GRAPH, ids=ids(GRAPH))
    def test_in_a_graph_of_unknown_lengths(check, subject: Subject) -> None:
        conform(check, subject)


def test_the_lists_name_checks():
    assert set(CHECKS) >= FEW | DYNAMIC | MANY_SHAPES
