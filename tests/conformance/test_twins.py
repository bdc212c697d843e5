"""Every check is proven by a norm that is broken on purpose and must fail it."""

from __future__ import annotations

import pytest
from twins import CONTROLS, TWINS, Twin

from normkit.testing import CHECKS, Subject, conform, ids, pairs

CONTROL_PAIRS = pairs(CONTROLS)


@pytest.mark.parametrize("twin", TWINS, ids=lambda twin: f"{twin.check}-{twin.what}")
def test_the_check_sees_the_broken_twin(twin: Twin) -> None:
    check, fits = CHECKS[twin.check]
    assert fits(twin.subject), "the check does not apply to this subject"
    with pytest.raises(twin.error, match=twin.check if twin.error is AssertionError else None):
        check(twin.subject)


@pytest.mark.parametrize(("check", "subject"), CONTROL_PAIRS, ids=ids(CONTROL_PAIRS))
def test_the_unbroken_pieces_pass(check, subject: Subject) -> None:
    conform(check, subject)


def test_every_check_has_a_twin() -> None:
    assert {twin.check for twin in TWINS} == set(CHECKS)
