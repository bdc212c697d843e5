"""A conformance suite that anybody can run on their own norm.

A :class:`Subject` says what a norm claims to compute (a `NormSpec`), what it can do, and how to run one call; the
checks compare it with the float64 oracle of the core and with itself. Every check is a function `check_*(subject)` that
raises AssertionError with the worst value, its place and the tolerance::

    from normkit.testing import conform, ids, pairs

    PAIRS = pairs([my_subject])

    @pytest.mark.parametrize(("check", "subject"), PAIRS, ids=ids(PAIRS))
    def test_conformance(check, subject):
        conform(check, subject)

Subjects of PyTorch modules are made by :mod:`normkit.testing.torch`. This package itself imports NumPy only.
"""

from __future__ import annotations

from normkit.testing.formulas import formula_subject, formula_subjects
from normkit.testing.health import assert_healthy
from normkit.testing.masks import (
    check_all_masked,
    check_mask,
    check_mask_all_true,
    check_masked_garbage,
    check_padding,
    check_repeated_samples,
    check_sample_weight,
    check_weight_scale,
    check_zero_weight,
)
from normkit.testing.precision import EPS, assert_close, rounded, tolerance
from normkit.testing.relations import (
    check_batch_mates,
    check_permuted_batch,
    check_rescaled,
    check_undo,
)
from normkit.testing.state import (
    check_bessel,
    check_cumulative,
    check_evaluation_after_training,
    check_kept,
    check_many_steps,
    check_nonfinite,
    check_schedule,
    check_statistics,
)
from normkit.testing.subject import LAYOUTS, Call, Outcome, Subject, arranged
from normkit.testing.suite import CHECKS, checks_for, conform, ids, pairs
from normkit.testing.values import (
    check_batch_of_one,
    check_constant_slice,
    check_empty_batch,
    check_eps,
    check_first_values,
    check_gradcheck,
    check_gradients,
    check_inputs_intact,
    check_large_mean,
    check_large_values,
    check_layouts,
    check_one_channel,
    check_output_type,
    check_outputs,
    check_repeated_call,
    check_single_axes,
    check_wrong_shape,
)

__all__ = [
    "CHECKS",
    "EPS",
    "LAYOUTS",
    "Call",
    "Outcome",
    "Subject",
    "arranged",
    "assert_close",
    "assert_healthy",
    "check_all_masked",
    "check_batch_mates",
    "check_batch_of_one",
    "check_bessel",
    "check_constant_slice",
    "check_cumulative",
    "check_empty_batch",
    "check_eps",
    "check_evaluation_after_training",
    "check_first_values",
    "check_gradcheck",
    "check_gradients",
    "check_inputs_intact",
    "check_kept",
    "check_large_mean",
    "check_large_values",
    "check_layouts",
    "check_many_steps",
    "check_mask",
    "check_mask_all_true",
    "check_masked_garbage",
    "check_nonfinite",
    "check_one_channel",
    "check_output_type",
    "check_outputs",
    "check_padding",
    "check_permuted_batch",
    "check_repeated_call",
    "check_repeated_samples",
    "check_rescaled",
    "check_sample_weight",
    "check_schedule",
    "check_single_axes",
    "check_statistics",
    "check_undo",
    "check_weight_scale",
    "check_wrong_shape",
    "check_zero_weight",
    "checks_for",
    "conform",
    "formula_subject",
    "formula_subjects",
    "ids",
    "pairs",
    "rounded",
    "tolerance",
]
