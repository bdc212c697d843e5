"""Trials that fall behind the other rates of their norm are ended, and what that means for what is found."""

import itertools
from types import SimpleNamespace

import optuna
import pytest
from conftest import make_trial

import normkit
from normkit.errors import NormValueError
from normkit.experiments.analysis import score, summarize
from normkit.experiments.config import Config, Task
from normkit.experiments.pruning import is_behind, may_lose
from normkit.experiments.store import Store
from normkit.report import words

LRS, SEEDS, STEPS = (0.1, 0.2, 0.3, 0.4), 3, 4
STATES = optuna.trial.TrialState


def shown(lr, values, state=STATES.COMPLETE, **attributes):
    """A trial as Optuna gives it, with a report per step."""
    reports = dict(enumerate(values, start=1))
    last = values[-1] if state == STATES.COMPLETE else None
    return SimpleNamespace(
        state=state,
        values=[last],
        params={"lr": lr},
        intermediate_values=reports,
        system_attrs={},
        user_attrs=attributes,
    )


@pytest.mark.parametrize(("direction", "sign"), [("maximize", 1), ("minimize", -1)])
def test_the_median_of_the_complete_ones_decides(direction, sign):
    others = [shown(0.1, [sign * value] * 2) for value in (1.0, 2.0, 3.0, 4.0, 5.0)]
    for value, behind in ((2.9, True), (3.1, False)):
        mine = shown(0.2, [sign * value], STATES.RUNNING)
        assert is_behind(optuna, "median", direction, [*others, mine], 5)[0] == behind
    assert not is_behind(optuna, "median", direction, [*others[:4], shown(0.2, [-9.0 * sign], STATES.RUNNING)], 4)[0]


def test_the_last_whole_rate_is_left_alone():
    mine = shown(0.1, [0.1], STATES.RUNNING)
    kept, lost = shown(0.2, [0.9], result={}), shown(0.3, [0.5], STATES.PRUNED, result={}, pruned="median")
    assert may_lose([kept, lost, mine], 2)
    assert not may_lose([lost, mine], 1)
    assert not may_lose([kept, shown(0.2, [0.1], STATES.PRUNED, result={}, diverged=True), mine], 2)
    assert not may_lose([shown(0.1, [0.9], result={}), mine], 1)  # of its own rate
    assert not may_lose([shown(0.2, [0.9], STATES.RUNNING), mine], 1)  # may still diverge


def train(trial):
    quality = {"none": 0.2, "batch": 0.6}[str(trial.norm)] - 0.4 * abs(trial.lr - 0.2) + 0.001 * trial.seed
    for step in range(1, 5):
        trial.report(step, accuracy=quality * step / 4)


def compare(pruner, storage=None):
    asked = {"norms": ("none", "batch"), "lrs": LRS, "seeds": SEEDS, "workers": 1, "show_progress": False}
    return normkit.compare(run=train, pruner=pruner, storage=storage, **asked)


@pytest.mark.parametrize("pruner", ["median", "hyperband"])
def test_a_comparison_finds_the_same_rates_with_less_work(here, tmp_path, pruner):
    url = f"sqlite:///{tmp_path / 'trials.db'}"
    pruned = compare(pruner, url)
    ended = [trial for trial in pruned.trials if trial.pruned]
    assert ended
    for trial in ended:
        assert (trial.final, trial.diverged) == (None, False)
        assert trial.steps < STEPS
        assert trial.config.lr != 0.2
    # `none` is worse than `batch` at every rate, and keeps its best one all the same.
    assert [variant.best_lr for variant in pruned.groups[0].variants] == [0.2, 0.2]
    # Without a pruner what it ended is trained to its end, and nothing else.
    whole = compare(None, url)
    assert whole.environment["started"] == len(ended)
    assert not any(trial.pruned for trial in whole.trials)
    assert [v.final for v in whole.groups[0].variants] == [v.final for v in pruned.groups[0].variants]
    assert compare(pruner, url).environment["started"] == 0


def test_a_pruned_trial_is_no_diverged_one():
    made = [
        make_trial(lr=lr, seed=seed, pruned=lr == 0.3 and seed == 1, diverged=lr == 0.2 and seed == 0)
        for lr, seed in itertools.product((0.1, 0.2, 0.3), range(3))
    ]
    assert [score(trial) is None for trial in made] == [trial.pruned or trial.diverged for trial in made]
    rates = summarize(made, Task("accuracy", "max", None))[0].variants[0].rates
    assert [(rate.diverged, rate.pruned, rate.mean is None, rate.usable) for rate in rates] == [
        (0, 0, False, True),
        (1, 0, True, False),
        (0, 1, True, False),
    ]


def test_two_machines_do_not_end_the_last_two_rates_in_the_same_moment(tmp_path, monkeypatch):
    """Each is worse than the other, to a pruner that ends all: the later of the two sees it, and goes on."""
    monkeypatch.setattr("normkit.experiments.store.is_behind", lambda *_: (True, {}))
    with Store("study", "max", pruner="median") as store:
        for lr in (0.1, 0.2):
            complete = make_trial(lr=lr, seed=0)
            store.finish(store.claim(complete.config), complete)
        claims = [store.claim(make_trial(lr=lr, seed=1).config) for lr in (0.1, 0.2)]
        assert [store.stops(claim, 1, 0.5) for claim in claims] == [True, False]


def test_the_report_says_what_was_pruned(here, tmp_path):
    comparison = compare("median")
    number = sum(trial.pruned for trial in comparison.trials)
    assert any(f"{number} of 24 trials were pruned (median)" in caveat for caveat in words.caveats(comparison))
    comparison.save(tmp_path / "out")
    assert "of its seeds pruned" in (tmp_path / "out" / "report.html").read_text()
    assert "diverged" not in words.text(comparison)


def test_an_unknown_pruner_is_refused():
    with pytest.raises(NormValueError, match=r"`pruner` must be a known one; got 'mediam'.*median"):
        Config(pruner="mediam")
