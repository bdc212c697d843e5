import dataclasses
import math

import pytest

from normkit.errors import NormError
from normkit.experiments.conditions import Conditions
from normkit.experiments.config import Config, TrialConfig, Variant

TRIAL = TrialConfig(
    framework="torch",
    model="cnn",
    code="",
    data="0123456789abcdef",
    norm="batch:after",
    lr=0.1,
    batch_size=32,
    inputs="standard",
    seed=0,
    epochs=6,
    loss="cross_entropy",
    optimizer="sgd",
    metric="accuracy",
)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"norms": ("bach",)}, "did you mean batch?"),
        ({"norms": ("batch:behind",)}, "`before` or `after`"),
        ({"norms": ("batch:",)}, "`before` or `after`"),
        ({"norms": ("none:after",)}, "no position"),
        ({"norms": ()}, "`norms` must name at least one"),
        ({"norms": "batch"}, "`norms` must be a list or tuple"),
        ({"norms": ("batch", "batch:before")}, "batch twice"),
        ({"lrs": (0.1, -1.0)}, "positive and finite; got -1"),
        ({"lrs": (0.0,)}, "positive and finite; got 0"),
        ({"lrs": (float("nan"),)}, "positive and finite; got nan"),
        ({"lrs": (float("inf"),)}, "positive and finite; got inf"),
        ({"lrs": ("0.1",)}, "a number; got '0.1'"),
        ({"lrs": (0.1, 0.1)}, "0.1 twice"),
        ({"batch_sizes": (0,)}, "at least 1; got 0"),
        ({"batch_sizes": (1.5,)}, "a whole number; got 1.5"),
        ({"batch_sizes": (32, 1), "norms": ("none", "batch")}, "`batch` must see at least 2 samples"),
        ({"batch_sizes": (1,), "norms": ("renorm",)}, "`renorm` must see at least 2 samples"),
        ({"seeds": 0}, "`seeds` must be at least 1; got 0"),
        ({"seeds": True}, "`seeds` must be a whole number"),
        ({"epochs": 0}, "`epochs` must be at least 1; got 0"),
        ({"inputs": ("standart",)}, "did you mean standard?"),
        ({"target": 95.0, "metric": "accuracy"}, "95 % is written 0.95"),
        ({"target": math.inf}, "`target` must be finite"),
        ({"target": "0.95"}, "`target` must be a number"),
        ({"model": "cn"}, "did you mean cnn?"),
        ({"model": "mine.py"}, "write file.py:build"),
        ({"model": "mlp", "run": "train.py:train"}, "must not be given both"),
        ({"run": "train.py"}, "`run` must be file.py:name"),
        ({"run": "train.py:train", "data": "digits"}, "`data` must be left to a training loop"),
        ({"run": "train.py:train", "inputs": ("max",)}, "`inputs` must be left to a training loop"),
        ({"run": "train.py:train", "optimizer": "adam"}, "`optimizer` must be left to a training loop"),
        ({"loss": "crossentropy"}, "did you mean cross_entropy?"),
        ({"optimizer": "adamm"}, "did you mean adam"),
        ({"metric": "acc"}, "did you mean accuracy?"),
        ({"metric": "mine.py:auc"}, "`goal` must be given for a metric of your own (mine.py:auc)"),
        ({"run": "train.py:train", "metric": "auc"}, "`goal` must be given"),
        ({"metric": "accuracy", "goal": "min"}, "`goal` of accuracy must be max; got min"),
        ({"goal": "biggest"}, "`goal` must be min or max"),
        ({"framework": "toch"}, "did you mean torch?"),
    ],
)
def test_what_cannot_be_run_is_refused(changes, said):
    with pytest.raises(NormError) as error:
        Config(**changes)
    assert said in str(error.value)


def test_batch_size_one_is_fine_without_statistics_over_the_batch():
    assert Config(norms=("none", "layer", "group", "rms"), batch_sizes=(1,)).batch_sizes == (1,)


def test_every_cell_of_the_grid_is_a_trial_of_its_own():
    grid = Config(model="cnn", norms=("none", "batch"), batch_sizes=(8, 32), inputs=("none", "max"), seeds=3)
    trials = list(grid.trials("", "f"))
    assert len(trials) == 2 * 6 * 2 * 2 * 3
    assert len({trial.key() for trial in trials}) == len(trials)


def test_a_folder_does_not_enter_the_key():
    here, there = (
        Config(model=f"{folder}/m.py:build", norms=("none",), batch_sizes=(8,), inputs=("none",)) for folder in "ab"
    )
    assert [t.key() for t in here.trials("c", "d")] == [t.key() for t in there.trials("c", "d")]
    assert next(here.trials("c", "d")).key() != next(here.trials("other code", "d")).key()


def test_before_is_the_default_position():
    assert Variant.parse("batch:before") == Variant.parse("batch") == Variant("batch", "before")
    assert Variant.parse("batch:after").label == "batch:after"
    assert Variant.parse("batch:after").words == "batch norm after the activation"
    assert Variant.parse("rms").words == "RMS norm"
    assert Variant.parse("frn").words == "filter response norm"
    with pytest.raises(NormError, match="frn must not stand after the activation, whose place it takes"):
        Variant.parse("frn:after")


def test_key_never_changes():
    # Written down once: results on disk are found again by this key. Change it only together with PROTOCOL.
    assert TRIAL.key() == "fe3b23edd7980165"
    assert '"lr": 0.1' in TRIAL.canonical()


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(TrialConfig)])
def test_every_field_enters_the_key(name):
    value = getattr(TRIAL, name)
    other = value + "x" if isinstance(value, str) else Conditions(depth=2) if name == "conditions" else value + 1
    changed = dataclasses.replace(TRIAL, **{name: other})
    assert changed.key() != TRIAL.key()
