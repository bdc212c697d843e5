"""Specs refuse what makes no sense, tracked statistics agree with their first values, the catalog is whole."""

from __future__ import annotations

import re
from dataclasses import FrozenInstanceError, replace

import pytest

from normkit.core.algebra import remaining
from normkit.core.catalog import (
    BATCH,
    CATALOG,
    DYNAMIC_TANH_2D,
    GLOBAL_RESPONSE,
    INSTANCE_TRACKED,
    LAYER_2D,
    RENORM,
    RMS,
    RMS_2D,
    STANDARD,
    check_position,
    find,
)
from normkit.core.spec import NormSpec, Tracked, parse
from normkit.errors import NormValueError, message, nearest

ALL = [*CATALOG.values(), INSTANCE_TRACKED, LAYER_2D, RMS_2D, DYNAMIC_TANH_2D]


def test_parse():
    assert parse("n (g k) *s") == (("n",), ("g", "k"), ("*s",))
    for bad in ("n c )", "n (a b c)", "(g k", "n, c"):
        with pytest.raises(NormValueError, match=re.escape("axes must be names, `*name` or `(outer inner)`")):
            parse(bad)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"over": "n z"}, "batch_norm: axes in `over` must stand in `n c *s`; got z"),
        ({"affine": "q"}, "batch_norm: axes in `affine` must stand in `n c *s`; got q"),
        ({"x": "*a *b *c", "over": "*a", "affine": "*c"}, "`x` must have at most two `*` axes"),
        ({"eps": -1.0}, "batch_norm: `eps` must be a finite number of at least 0; got -1.0"),
        ({"minimum": 0}, "`minimum` must be a whole number of at least 1; got 0"),
        ({"formula": "frn"}, "batch_norm: `formula` must be one of 'standard'"),
        ({"gain": "w+1"}, "`gain` must be one of 'w', '1+w'; got 'w+1'"),
    ],
)
def test_a_spec_refuses(changes, message):
    with pytest.raises(NormValueError, match=re.escape(message)):
        replace(BATCH, **changes)


def test_a_spec_is_frozen_and_hashable():
    with pytest.raises(FrozenInstanceError):
        BATCH.eps = 1.0  # type: ignore[misc]
    assert len({*ALL, replace(BATCH)}) == len(ALL)


@pytest.mark.parametrize("spec", ALL, ids=lambda s: f"{s.name}-{bool(s.tracked)}")
def test_entries_of_the_catalog(spec: NormSpec):
    assert re.fullmatch(r"arXiv:\d{4}\.\d{4,5}", spec.paper)
    assert set(spec.over_names) | set(spec.affine_names) <= {part for token in spec.axes for part in token}
    assert [t.name for t in spec.tracked] in ([], ["var"], ["mean", "var"], ["mean", "std"])
    assert all(t.init == (0.0 if t.name == "mean" else 1.0) for t in spec.tracked)
    assert spec.renorm == (spec is RENORM)
    assert spec.first_gain == (spec is not GLOBAL_RESPONSE)
    assert replace(spec, gain="1+w").first_gain == 0.0


def test_conventions_of_the_papers():
    assert [t.bessel for t in BATCH.tracked] == [False, True]  # algorithm 2: m/(m-1) times the variance
    assert [(t.name, t.bessel) for t in RENORM.tracked] == [("mean", False), ("std", False)]
    assert not RMS.center
    # FRN and EvoNorm take the place of norm and activation, dynamic tanh and global response norm do not.
    assert [name for name, spec in CATALOG.items() if spec.activates] == ["frn", "evonorm_b0", "evonorm_s0"]
    assert set(STANDARD) == {"batch", "ghost", "renorm", "instance", "group", "layer", "rms"}
    with pytest.raises(NormValueError, match="frn must not stand after the activation"):
        check_position("frn", "after")


def test_find_names_the_nearest():
    assert find("batch") is BATCH
    with pytest.raises(NormValueError) as caught:
        find("bacth")
    assert str(caught.value) == (
        "a normalizer must be in the catalog; got 'bacth'. hint: did you mean batch? "
        "known: batch, dyt, evonorm_b0, evonorm_s0, frn, ghost, grn, group, instance, layer, renorm, rms"
    )
    with pytest.raises(TypeError):
        CATALOG["mine"] = BATCH  # type: ignore[index]


def test_messages():
    assert message("x must hold", "y", "do z") == "x must hold; got y. hint: do z"
    assert message("x must hold") == "x must hold"
    assert nearest("zzz", ["b", "a"]) == "known: a, b"


@pytest.mark.parametrize("init", [0.0, 1.0, -3.0])
@pytest.mark.parametrize("steps", [1, 2, 10, 1000])
def test_debiased_takes_out_the_first_value(init, steps):
    """A constant statistic is recovered at step 1 and ever after, whatever the first value."""
    tracked, rate, value = Tracked("var", init=init), 0.01, 4.0
    kept = init
    for _ in range(steps):
        kept = tracked.updated(kept, value, rate)
    # Each step rounds twice; dividing by 1 - (1-rate)^steps, at least 0.01, magnifies that.
    assert tracked.debiased(kept, remaining(rate, steps)) == pytest.approx(
        value, rel=0, abs=100 * 2 * steps * 2.0**-52 * 4
    )
