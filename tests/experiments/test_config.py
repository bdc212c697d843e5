import dataclasses

import pytest

from normkit.errors import NormError
from normkit.experiments.config import Config, TrialConfig, Variant

TRIAL = TrialConfig("torch", "cnn", "0123456789abcdef", "batch:after", 0.1, 32, "standard", 0, 6)


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
        ({"batch_sizes": (32, 1)}, "`batch` must see at least 2 samples"),
        ({"batch_sizes": (1,), "norms": ("renorm",)}, "`renorm` must see at least 2 samples"),
        ({"seeds": 0}, "`seeds` must be at least 1; got 0"),
        ({"seeds": True}, "`seeds` must be a whole number"),
        ({"epochs": 0}, "`epochs` must be at least 1; got 0"),
        ({"inputs": ("standart",)}, "did you mean standard?"),
        ({"target": 95.0}, "95 % is written 0.95"),
        ({"target": "0.95"}, "`target` must be a number"),
        ({"model": "cn"}, "did you mean cnn?"),
        ({"model": "mine.py:build"}, "not available yet"),
        ({"framework": "keras"}, "`framework` must be torch for now"),
        ({"framework": "toch"}, "did you mean torch?"),
    ],
)
def test_what_cannot_be_run_is_refused(changes, said):
    with pytest.raises(NormError) as error:
        Config(**changes)
    assert said in str(error.value)


def test_batch_size_one_is_fine_without_statistics_over_the_batch():
    assert Config(norms=("none", "layer", "group", "rms"), batch_sizes=(1,)).batch_sizes == (1,)


def test_default_grid_has_126_trials():
    trials = list(Config(model="cnn").trials("f"))
    assert len(trials) == 7 * 6 * 3
    assert len({trial.key() for trial in trials}) == 126


def test_before_is_the_default_position():
    assert Variant.parse("batch:before") == Variant.parse("batch") == Variant("batch", "before")
    assert Variant.parse("batch:after").label == "batch:after"
    assert Variant.parse("batch:after").words == "batch norm after the activation"
    assert Variant.parse("rms").words == "RMS norm"


def test_key_never_changes():
    # Written down once: results on disk are found again by this key. Change it only together with PROTOCOL.
    assert TRIAL.key() == "ba0d32f69e1b33f6"
    assert '"lr": 0.1' in TRIAL.canonical()


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(TrialConfig)])
def test_every_field_enters_the_key(name):
    value = getattr(TRIAL, name)
    changed = dataclasses.replace(TRIAL, **{name: value + "x" if isinstance(value, str) else value + 1})
    assert changed.key() != TRIAL.key()
