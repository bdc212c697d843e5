"""The core's formulas pass the suite: in NumPy with the closed-form backward, in torch under autograd."""

from __future__ import annotations

import pytest

from normkit.testing import conform, formula_subjects, ids, pairs
from normkit.testing.formulas import ENTRIES
from normkit.testing.torch import torch_formula_subject

NUMPY = pairs(formula_subjects())
TORCH = pairs(
    torch_formula_subject(entry, dtype=dtype) for entry in ENTRIES for dtype in ("float64", "float32", "bfloat16")
)


@pytest.mark.parametrize(("check", "subject"), NUMPY, ids=ids(NUMPY))
def test_numpy(check, subject) -> None:
    conform(check, subject)


@pytest.mark.parametrize(("check", "subject"), TORCH, ids=ids(TORCH))
def test_torch(check, subject) -> None:
    conform(check, subject)
