"""Every study on measurements made by hand reaches every verdict: none of them is fixed beforehand."""

import pytest
from made_measurements import RATES, ROUGH, SMOOTH, changed, holds, off, probes, stepwise

from normkit.studies import STUDIES
from normkit.studies import criteria as names
from normkit.studies.measurements import USUAL, Measurements
from normkit.studies.probed import Probed
from normkit.studies.verdict import Level, decided


def verdict(name, found):
    return decided(STUDIES[name].checks(found))


@pytest.mark.parametrize("name", STUDIES)
def test_it_holds(name):
    checks = STUDIES[name].checks(holds()[name])
    assert decided(checks) is Level.HOLDS, [check for check in checks if not check.holds]


@pytest.mark.parametrize("name", STUDIES)
def test_two_seeds_are_not_enough(name):
    assert verdict(name, holds(seeds=2)[name]) is Level.UNKNOWN


# What must come out otherwise for nothing of the claim to hold, and for a part of it.
NOT = {
    "recurrent": [
        ("batch", names.COUNTED, {"mean": 0.95}),
        ("batch", names.MASKED, {"mean": 0.95}),
        ("batch", names.EACH, {"mean": 0.85}),
        ("batch", names.STEPS, {"mean": 0.85, "noise": stepwise(0.2, 0.2, 0.2)}),
        ("layer", names.ALONE, {"mean": 0.7}),
        ("none", names.ALONE, {"mean": 0.95}),
    ],
    "inputs": [
        ("batch", USUAL, {"inputs": "none", "mean": 0.7}),
        ("none", names.FIRST, {"mean": 0.6}),
        ("none", USUAL, {"usable": RATES[:2], "mean": 0.9}),
    ],
    "convergence": [("batch", USUAL, {"steps": 150, "mean": 0.8})],
    "overhead": [("batch", USUAL, {"steps": 150})],
    "learning-rate": [("batch", USUAL, {"usable": RATES[:1]})],
    "initialization": [
        ("none", None, {"usable": RATES[:1]}),
        ("batch", None, {"usable": ()}),
        ("batch", names.weights(10), {"usable": (), "mean": 0.8}),
    ],
    "depth": [
        ("none", names.layers(20), {"depths": (1.0, 1.01), "usable": RATES[:2]}),
        ("batch", names.layers(20), {"depths": (1.0, 0.2), "usable": ()}),
    ],
    "train-eval-gap": [
        ("batch", names.TORCH, {"gap": 0.2}),
        ("batch", names.KERAS, {"gap": 0.01}),
        ("batch", names.POPULATION, {"gap": 0.5}),
        ("batch", names.LONG, {"gap": 0.2}),
    ],
    "batch-size": [
        *[("batch", names.groups_of(size), {"mean": 0.95}) for size in (32, 16, 8, 4, 2)],
        ("group", USUAL, {"mean": 0.85}),
    ],
    "placement": [("batch:after", USUAL, {"mean": 0.8, "steps": 150})],
    "regularization": [("batch", None, {"mean": 0.8})],
    "dropout": [("none", None, {"mean": 0.99}), ("batch", None, {"mean": 0.8})],
    "appearance": [
        ("batch", names.RANDOM, {"mean": 0.93}),
        ("batch", names.SWAPPED, {"mean": 0.02}),
        ("batch", names.SHIFTED, {"mean": 0.15}),
        ("batch", names.TESTED, {"mean": 0.15}),
    ],
    "non-iid": [("batch", names.BLOCKED, {"mean": 0.95, "gap": 0.0})],
    "covariate-shift": [("batch", USUAL, {"probed": probes(difference=0.6, cosine=0.3)})],
    "smoothness": [("batch", USUAL, {"probed": probes(**ROUGH)})],
    "weight-decay": [
        ("batch", USUAL, {"probed": probes(growth=0.9)}),
        ("batch", names.DECAY, {"probed": probes(resting=2.0, turned=0.5, drift=0.02)}),
        ("batch", names.RATE, {"mean": 0.8}),
        ("none", names.RATE, {"mean": 0.951}),
    ],
}
PART = {
    "recurrent": [("batch", names.COUNTED, {"mean": 0.9})],
    "inputs": [("none", names.FIRST, {"inputs": "none", "mean": 0.6})],
    "convergence": [("batch", USUAL, {"mean": 0.8})],
    "learning-rate": [("none", USUAL, {"usable": RATES[:2]}), ("batch", USUAL, {"usable": (*RATES[:2], 0.05)})],
    "initialization": [("batch", names.weights(10), {"mean": 0.85})],
    "depth": [("none", names.layers(20), {"depths": (1.0, 1.1), "usable": RATES[:1]})],
    "train-eval-gap": [("batch", names.LONG, {"gap": 0.1})],
    "batch-size": [("group", USUAL, {"mean": 0.9})],
    "placement": [("batch:after", USUAL, {"steps": 150})],
    "regularization": [("batch", names.LABELS, {"mean": 0.8})],  # as the pilot found it
    "dropout": [("batch", names.LABELS, {"mean": 0.8})],
    "appearance": [("batch", names.SWAPPED, {"mean": 0.05}), ("batch", names.SHIFTED, {"mean": 0.15})],
    "non-iid": [("renorm", names.BLOCKED, {"mean": 0.3})],
    "covariate-shift": [("batch", USUAL, {"probed": probes(difference=0.1, cosine=0.3)})],
    "smoothness": [("batch", USUAL, {"probed": probes(**{**SMOOTH, "variation": 0.6})})],
    "weight-decay": [("batch", names.RATE, {"mean": 0.8})],
}


def after(name, changes):
    found = holds()[name]
    for norm, arm, values in changes:
        found = changed(found, norm, arm, **values)
    return found


@pytest.mark.parametrize("name", STUDIES)
def test_it_does_not_hold(name):
    checks = STUDIES[name].checks(off(after(name, NOT[name]), 1.5))
    assert decided(checks) is Level.NOT, [check for check in checks if check.holds is not False]


@pytest.mark.parametrize("name", PART)
def test_it_holds_partly(name):
    checks = STUDIES[name].checks(after(name, PART[name]))
    assert decided(checks) is Level.PARTLY, checks


@pytest.mark.parametrize("name", [name for name in STUDIES if STUDIES[name].formulas])
def test_a_formula_decides_with_the_rest(name):
    assert verdict(name, off(holds()[name], 0.9)) is Level.PARTLY
    assert verdict(name, off(holds()[name], 1.05)) is Level.UNKNOWN  # the interval is on both sides of the tolerance
    assert verdict(name, off(holds()[name], 1.02)) is Level.HOLDS
    with pytest.raises(LookupError, match="no formula"):
        STUDIES[name].checks(Measurements(holds()[name]))


def test_a_claim_of_a_single_check_cannot_hold_partly():
    assert set(STUDIES) - set(PART) == {"overhead"}
    assert len(STUDIES["overhead"].checks(holds()["overhead"])) == 1


@pytest.mark.parametrize("name", ["convergence", "regularization", "dropout", "placement"])
def test_a_norm_that_diverges_at_every_rate_has_lost(name):
    checks = STUDIES[name].checks(off(changed(holds()[name], "batch", mean=None), 1.5))
    assert not any(check.holds for check in checks)
    assert False in {check.holds for check in checks}


def test_where_nothing_is_lost_there_is_nothing_to_win_back():
    found = after("batch-size", [("batch", names.groups_of(4), {"mean": 0.955})])
    assert len(STUDIES["batch-size"].checks(found)) == 3
    assert verdict("batch-size", found) is Level.HOLDS


def test_the_popular_explanation_may_fall_while_the_loss_is_smoother():
    """What Santurkar et al. found: with batch norm the gradients of the layers shift more, and the loss is smoother."""
    found = {name: probes(difference=d, cosine=c, **rest) for name, d, c, rest in (
        ("batch", 0.5, 0.1, SMOOTH), ("none", 0.2, 0.9, ROUGH)
    )}  # fmt: skip
    for name, level in (("covariate-shift", Level.NOT), ("smoothness", Level.HOLDS)):
        assert verdict(name, after(name, [(norm, USUAL, {"probed": each}) for norm, each in found.items()])) is level


def test_rates_at_which_nothing_is_known_leave_it_open():
    found = after("covariate-shift", [("none", USUAL, {"usable": (), "mean": None, "probed": probes()})])
    assert {check.holds for check in STUDIES["covariate-shift"].checks(found)} == {None}


def test_a_change_of_nothing_is_no_number_of_times():
    still = Probed(RATES[1], difference=(0.0,) * 5, cosine=(1.0,) * 5)
    found = after("covariate-shift", [("none", USUAL, {"usable": RATES[:2], "probed": (still,)})])
    checks = STUDIES["covariate-shift"].checks(found)
    assert [check.holds for check in checks] == [None, False]


@pytest.mark.parametrize(
    ("noise", "answers"),
    [
        (stepwise(0.2, 0.2, 0.5), [True, True]),
        (stepwise(0.2, 0.4, 0.5), [True, False]),  # the first step is asked of W x, the second of U h
        (stepwise(0.2, 0.2, 0.25), [False, False]),
        (stepwise(0.2, 0.2, 0.3), [None, None]),
        (stepwise(0.2, 0.2, 0.5, unknown=True), [True, None]),
        (stepwise(0.2, 0.2, 0.5, seeds=2), [None, None]),
        ((), [None, None]),  # diverged at every rate
    ],
)
def test_noise_of_late_steps_is_judged_by_its_factor_alone(noise, answers):
    found = after("recurrent", [("batch", names.STEPS, {"mean": 0.92, "noise": noise})])
    assert [check.holds for check in STUDIES["recurrent"].checks(found)[-2:]] == answers


def test_weights_that_do_not_rest_are_compared_with_no_prediction():
    found = after("weight-decay", [("batch", names.DECAY, {"probed": probes(resting=1.0, turned=1.0, drift=0.2)})])
    checks = STUDIES["weight-decay"].checks(found)
    assert [check.holds for check in checks] == [True, None, None, True, True]
    assert "do not rest" in checks[1].said


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_measures_what_its_criterion_asks_for(name):
    """The presets have every norm and circumstance that the criterion looks up, on both networks."""
    study = STUDIES[name]
    for model in study.full.models:
        there = {
            (norm, arm.name, inputs)
            for part in study.parts
            if model in part.models
            for norm in part.norms
            for arm in part.arms
            for inputs in part.inputs
        }
        asked = {(m.norm, m.arm) for m in holds()[name]}
        assert asked <= {(norm, arm) for norm, arm, _ in there}
    for part in study.parts:
        assert len({arm.name for arm in part.arms}) == len({str(arm.conditions) for arm in part.arms}) == len(part.arms)
    assert study.quick.seeds >= 3
