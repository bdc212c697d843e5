"""The layers of normkit.nnx pass the conformance suite; what flax.nnx does otherwise is in test_nnx_right.py."""

from __future__ import annotations

import pytest
from nnx_subjects import ENTRIES, FURTHER, subject

from normkit.testing import Subject, conform, ids, pairs

WHOLE = pairs(subject(name, "float32") for name in ENTRIES if name != "BatchNorm_axis1")
# What a narrow type or another axis can break.
NARROW = (
    "check_outputs",
    "check_gradients",
    "check_large_mean",
    "check_large_values",
    "check_statistics",
    "check_many_steps",
    "check_mask",
    "check_masked_garbage",
)
PART = [subject(name, "bfloat16") for name in ENTRIES if name != "BatchNorm_axis1"]
PART.append(subject("BatchNorm_axis1", "float32"))
# Those with formulas of their own, which are the core's: every check compiles anew, and these are what a layer can fail
# by itself.
OWN = ("check_outputs", "check_gradients", "check_statistics", "check_mask", "check_masked_garbage")
SOME = [(check, one) for check, one in pairs(subject(name, "float32") for name in FURTHER) if check.__name__ in OWN]
SOME += [(check, one) for check, one in pairs(PART) if check.__name__ in NARROW]


@pytest.mark.parametrize(("check", "one"), WHOLE + SOME, ids=ids(WHOLE + SOME))
def test_normkit(check, one: Subject) -> None:
    conform(check, one)
