import contextlib
import dataclasses
import math
import time

import numpy as np
import pytest
import torch

from normkit.errors import NormError
from normkit.experiments.config import TrialConfig
from normkit.experiments.loop import run_loop
from normkit.experiments.protocol import training


def config(norm="batch", **changes):
    return TrialConfig(
        **{
            "framework": "torch",
            "model": "train.py:train",
            "code": "",
            "data": "",
            "norm": norm,
            "lr": 0.1,
            "batch_size": 8,
            "inputs": "",
            "seed": 3,
            "epochs": 2,
            "loss": "",
            "optimizer": "",
            "metric": "",
            **changes,
        }
    )


def run(train, norm="batch", metric=None):
    return run_loop(config(norm), train, metric, lambda: training("torch"))


def loop(*reports, returns=None):
    def train(trial):
        trial.norm(4)
        for step, values in enumerate(reports):
            trial.report(10 * (step + 1), **values)
        return returns

    return train


def test_a_loop_is_given_its_numbers():
    seen = {}

    def train(trial):
        seen.update(
            lr=trial.lr, batch_size=trial.batch_size, seed=trial.seed, epochs=trial.epochs, norm=str(trial.norm)
        )
        trial.report(1, loss=1.0)

    run(train)
    assert seen == {"lr": 0.1, "batch_size": 8, "seed": 3, "epochs": 2, "norm": "batch"}


def test_norm_gives_layers_for_any_number_of_axes():
    def train(trial):
        layer = trial.norm(4)
        for shape in ((5, 4), (5, 4, 3), (5, 4, 3, 2)):
            assert layer(torch.randn(shape)).shape == shape
        trial.report(1, loss=0.0)

    for norm in ("none", "batch", "layer", "group", "renorm", "rms"):
        assert run(train, norm).final == 0.0


@pytest.mark.parametrize(("norm", "lowest"), [("none", 0.0), ("batch", 0.0), ("batch:after", -1.0)])
def test_norm_puts_the_activation_where_the_variant_says(norm, lowest):
    def train(trial):
        outputs = trial.norm(4, torch.nn.ReLU())(torch.randn(50, 4))
        trial.report(1, loss=outputs.min().sign())

    assert run(train, norm).final == lowest


def test_what_is_reported_becomes_the_curve():
    result = run(loop({"loss": 2.0, "accuracy": 0.5}, {"loss": torch.tensor(1.0), "accuracy": np.float32(0.75)}))
    assert [(e.step, e.loss, e.metric) for e in result.curve] == [(10, 2.0, 0.5), (20, 1.0, 0.75)]
    assert (result.metric, result.final, result.tested, result.steps) == ("accuracy", 0.75, False, 20)
    assert result.train_losses == ()


def test_time_in_reports_does_not_count():
    def train(trial):
        trial.norm(4)
        time.sleep(0.05)
        trial.report(1, loss=Slow())
        time.sleep(0.05)
        trial.report(2, loss=0.5)

    class Slow:
        def __float__(self):
            time.sleep(0.3)
            return 1.0

    result = run(train)
    assert 0.1 <= result.seconds < 0.3
    assert 0.05 <= result.step_seconds < result.seconds  # between the reports: the set-up is before the first


@pytest.mark.parametrize("returned", [0.9, torch.tensor(0.9), {"accuracy": 0.9, "loss": 3.0}])
def test_what_is_returned_was_tested_apart(returned):
    result = run(loop({"accuracy": 0.5}, returns=returned))
    assert result.tested
    assert result.final == pytest.approx(0.9)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_a_diverged_trial_and_no_crash(bad):
    result = run(loop({"loss": 1.0}, {"loss": bad}, {"loss": 0.5}))
    assert (result.diverged, result.final, result.steps, len(result.curve)) == (True, None, 20, 1)
    assert run(loop({"loss": bad})).diverged
    assert run(loop({"loss": 1.0}, returns=bad)).diverged


def test_a_loop_that_swallows_errors_is_diverged_all_the_same():
    def train(trial):
        trial.norm(4)
        with contextlib.suppress(Exception):
            trial.report(1, loss=math.nan)
        trial.report(2, loss=1.0)

    assert run(train).diverged


@pytest.mark.parametrize(
    ("reports", "metric", "said"),
    [
        ([{"loss": 1.0}, {"accuracy": 0.5}], None, "loss, the metric of this comparison, every time; got accuracy"),
        ([{"auc": 1.0}], None, "must be given accuracy or loss, or the comparison metric= and goal=; got auc"),
        ([{}], None, "got nothing"),
        ([{"loss": 1.0}], "auc", "must be given auc"),
        ([{"accuracy": 95.0}], None, "accuracy must be a share from 0 to 1; got 95. hint: divide by 100"),
        ([{"loss": "low"}], None, "`loss` of a report must be a number; got str"),
        ([{"loss": torch.zeros(2)}], None, "`loss` of a report must be a number; got Tensor"),
        ([], None, "must call trial.report(step, loss=..., accuracy=...) at least once"),
    ],
)  # fmt: skip
def test_reports_that_cannot_be_used(reports, metric, said):
    with pytest.raises(NormError) as error:
        run(loop(*reports), metric=metric)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        ((1.5,), r"must be a whole number; got 1\.5"),
        ((-1,), "at least 0; got -1"),
        ((3, 3), "larger than that of the report before; got 3 after 3"),
    ],
)
def test_steps_grow(steps, said):
    def train(trial):
        trial.norm(4)
        for step in steps:
            trial.report(step, loss=1.0)

    with pytest.raises(NormError, match=said):
        run(train)


def test_a_loop_that_ignores_its_norm_is_refused():
    def train(trial):
        trial.report(1, loss=1.0)

    with pytest.raises(NormError, match=r"train\.py:train must use trial\.norm"):
        run(train)
    assert run(train, "none").final == 1.0


@pytest.mark.parametrize("look", [str, lambda norm: norm == "batch", lambda norm: norm(3)])
def test_reading_the_name_is_using_it(look):
    def train(trial):
        look(trial.norm)
        trial.report(1, loss=1.0)

    run(train)


def test_what_a_loop_raises_is_named_with_its_line():
    def train(trial):
        raise RuntimeError("no data")

    with pytest.raises(NormError, match=r"train\.py:train raised RuntimeError: no data \(line \d+ of test_loop\.py\)"):
        run(train)


def test_what_a_loop_returns_must_be_the_metric():
    with pytest.raises(NormError, match="must return a number, nothing, or accuracy"):
        run(loop({"accuracy": 0.5}, returns={"auc": 1.0}))
    with pytest.raises(NormError, match="must be a number"):
        run(loop({"accuracy": 0.5}, returns="done"))


def test_results_survive_json():
    from normkit.experiments.store import plain

    result = run(loop({"loss": 1.0}))
    assert plain(result) == plain(plain(result))
    assert dataclasses.replace(plain(result), seconds=0, curve=()) == dataclasses.replace(result, seconds=0, curve=())
