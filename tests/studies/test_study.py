"""Studies that are run: on small tables, in real trainings."""

import dataclasses
import json
import math
import statistics

import numpy as np
import pytest

import normkit
from normkit.cli import main
from normkit.errors import NormError
from normkit.experiments.results import unpacked
from normkit.studies import STUDIES, Outcome, Outcomes, verb
from normkit.studies.measurements import Measurements
from normkit.studies.presets import Effort
from normkit.studies.probed import Probed
from normkit.studies.verdict import Level, decided

QUIET = {"quick": True, "seeds": 3, "workers": 1, "show_progress": False}


@pytest.fixture(scope="module")
def arrays():
    """Two classes in a table of three columns far from zero: 64 samples are left for training."""
    rng = np.random.default_rng(0)
    y = np.arange(120) % 2
    x = rng.normal(size=(120, 3)) + 3 * y[:, None] + 5
    return {"x_train": x[:80], "y_train": y[:80], "x_test": x[80:], "y_test": y[80:]}


@pytest.fixture(scope="module")
def finished(arrays, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "studies"
    return normkit.study("learning-rate", arrays, out=out, **QUIET), out


def test_a_study_is_complete(finished):
    outcome, out = finished
    assert isinstance(outcome, Outcome)
    assert sorted(path.name for path in out.iterdir()) == ["learning-rate", "trials.db"]
    assert sorted(path.name for path in (out / "learning-rate").iterdir()) == ["report.html", "results.json"]
    assert [case.title for case in outcome.cases] == ["mlp on arrays"]
    assert outcome.environment["started"] == 2 * 4 * 3
    stored = json.loads((out / "learning-rate" / "results.json").read_text())
    assert stored == json.loads(json.dumps(outcome.to_dict(), allow_nan=False))
    assert stored["verdict"] == outcome.level == outcome.cases[0].level


def test_what_was_measured_is_what_the_trials_say(finished):
    (case,) = finished[0].cases
    (comparison,) = case.comparisons
    for m in case.found:
        trials = [trial for trial in comparison.trials if trial.config.norm == m.norm]
        best = [trial for trial in trials if trial.config.lr == m.best_lr]
        assert (m.runs, m.seeds, m.epochs) == (len(trials), 3, 4)
        assert m.diverged == sum(trial.diverged for trial in trials)
        assert list(m.final) == [trial.final for trial in best]
        assert m.trained == pytest.approx(sum(trial.seconds for trial in trials))
        assert m.examples == 40 == len(unpacked(best[0].examples))
        for rate in m.rates:
            losses = [trial.train_losses[-1:] for trial in trials if trial.config.lr == rate and not trial.diverged]
            learned = len(losses) == 3 and all(loss and loss[0] < math.log(2) / 2 for loss in losses)
            assert (rate in m.usable) is learned
        for gap, trial in zip(m.gaps, best, strict=True):
            assert gap == pytest.approx(trial.gap.train_metric - trial.gap.eval_metric)
        assert [len(depths) for depths in m.depths] == [10] * 3
    assert case.checks == STUDIES["learning-rate"].checks(case.found)
    assert case.level is decided(case.checks)


def test_the_verdict_states_what_it_rests_on(finished):
    outcome, _ = finished
    found = list(outcome.cases[0].found)
    lost = sum(m.diverged for m in found)
    assert outcome.basis.startswith("24 runs with 3 seeds, 4 epochs (8 steps) each, ")
    assert f"{lost} of the runs ({100 * lost / 24:.0f} %) diverged" in outcome.basis
    spreads = sorted(100 * statistics.stdev(m.final) for m in found if m.final)
    assert f"{spreads[0]:.1f}" in outcome.basis.partition("varies by")[2]
    shown = str(outcome)
    assert outcome.study.claim.split()[0] in shown
    assert max(map(len, shown.splitlines())) <= 120
    for m in found:
        assert any(line.split()[0] == m.norm for line in shown.splitlines() if line)
    assert "quick version" in shown


def test_the_same_call_goes_on_and_says_the_same(finished, arrays):
    outcome, out = finished
    again = normkit.study("learning-rate", arrays, out=out, **QUIET)
    assert again.environment["started"] == 0
    assert {k: v for k, v in again.to_dict().items() if k != "environment"} == {
        k: v for k, v in outcome.to_dict().items() if k != "environment"
    }


def test_the_page_needs_nothing_else_and_says_it_all(finished):
    outcome, out = finished
    page = (out / "learning-rate" / "report.html").read_text()
    assert "http" not in page.replace("http://www.w3.org", "")
    assert len(page) < 500_000
    for said in (outcome.study.claim, str(outcome.level).capitalize(), outcome.study.method):
        assert said in page.replace("\u00a0", " ")
    assert page.count("<svg") == 1
    assert outcome._repr_html_().lstrip().startswith("<style>")


def test_circumstances_and_several_comparisons(arrays):
    """A study of two comparisons under conditions, the second of them longer; seeds are given."""
    outcome = normkit.study("train-eval-gap", arrays, **QUIET | {"seeds": 1})
    (case,) = outcome.cases
    assert [(m.arm, m.epochs) for m in case.found] == [
        ("momentum 0.1", 1), ("momentum 0.01", 1), ("momentum 0.01, recalibrated", 1), ("momentum 0.01, long", 30)
    ]  # fmt: skip
    assert outcome.level is Level.UNKNOWN
    assert "with one seed nothing is known of the spread" in outcome.basis
    slow, settled = (case.found.one("batch", arm).gaps[0] for arm in ("momentum 0.01", "momentum 0.01, recalibrated"))
    assert abs(settled) <= abs(slow)


def test_what_probes_saw_is_judged_and_shown(arrays, tmp_path, monkeypatch):
    """Of one rate and one seed, where every value is that of one trial."""
    small = dataclasses.replace(STUDIES["covariate-shift"], quick=Effort((0.03,), 3, 6, ("mlp",)))
    monkeypatch.setattr(verb, "find", {"covariate-shift": small}.__getitem__)
    outcome = normkit.study("covariate-shift", arrays, out=tmp_path, **QUIET | {"seeds": 1})
    (case,) = outcome.cases
    trials = {(trial.config.norm, trial.config.lr): trial for trial in case.comparisons[0].trials}
    assert outcome.environment["started"] == len(trials) == 2
    for m in case.found:
        for lr in m.rates:
            trial = trials[m.norm, lr]
            if trial.diverged:
                assert m.at(lr) == Probed(lr)
                continue
            assert len(trial.probes) == 8
            assert m.at(lr).smoothness == (statistics.median(probe.smoothness for probe in trial.probes),)
            shifts = [layer.cosine for probe in trial.probes for layer in probe.layers[1:]]
            assert m.at(lr).cosine == (statistics.median(shifts),)
    assert (tmp_path / "covariate-shift" / "report.html").read_text().count("<svg") == 1
    stored = json.loads((tmp_path / "covariate-shift" / "results.json").read_text())
    assert [m["probed"][0]["lr"] for m in stored["cases"][0]["measured"]] == [0.03, 0.03]


def test_noise_of_the_steps_is_shown_and_written(tmp_path, monkeypatch):
    """Of one rate and one seed, where every value is that of one trial; images of 6 rows."""
    rng = np.random.default_rng(0)
    y = np.arange(120) % 2
    x = rng.normal(size=(120, 6, 6)) + y[:, None, None]
    data = {"x_train": x[:88], "y_train": y[:88], "x_test": x[88:], "y_test": y[88:]}
    study = STUDIES["recurrent"]
    small = dataclasses.replace(study, parts=study.parts[:1], judge=lambda _: (), quick=Effort((0.03,), 1, 1, ("mlp",)))
    monkeypatch.setattr(verb, "find", {"recurrent": small}.__getitem__)
    outcome = normkit.study("recurrent", data, out=tmp_path, **QUIET | {"seeds": 1})
    (case,) = outcome.cases
    trials = {str(trial.config.conditions): trial for trial in case.comparisons[0].trials}
    (steps,) = case.found.one("batch", "statistics per step").noise
    assert repr(steps) == repr(trials["sequences steps, gamma 0.1, batch spread"].noise)
    rows = {(row[0], row[1]): row[2:] for row in case.noise.rows}
    alive = [f"{step.alive:.1f}" for step in steps]
    assert list(rows["sequences alive", ""]) == ["", *alive]
    assert rows["statistics per step", "U h"][:2] == ("", "-")
    noisy = [f"{100 * step.means[0]:.0f}/{100 * step.variances[0]:.0f}" for step in steps]
    assert list(rows["statistics per step", "W x"]) == ["", *noisy]
    assert list(rows["one statistic, padding masked", "W x"])[1:] == [""] * 6
    assert max(map(len, str(outcome).splitlines())) <= 120
    assert str(case.noise) in str(outcome)
    page = (tmp_path / "recurrent" / "report.html").read_text()
    assert "Batch statistics, step by step" in page
    assert f"<td>{noisy[-1]}</td>" in page
    stored = json.loads((tmp_path / "recurrent" / "results.json").read_text())
    written = {m["arm"]: m["noise"] for m in stored["cases"][0]["measured"] if m["norm"] == "batch"}
    assert written["statistics per step"][0][0]["means"][1] is None
    assert [step["alive"] for step in written["statistics per step"][0]] == [step.alive for step in steps]


@pytest.mark.parametrize(("one", "other"), [("covariate-shift", "smoothness"), ("convergence", "overhead")])
def test_studies_of_the_same_runs_ask_for_the_same(one, other):
    for name in ("parts", "full", "quick", "data"):
        assert getattr(STUDIES[one], name) == getattr(STUDIES[other], name)


def test_on_images_with_the_convolutional_network():
    """Images whose class is a bright half; instance norm takes part, and the test part comes under another light."""
    rng = np.random.default_rng(0)
    y = np.arange(80) % 2
    x = rng.uniform(0, 1, (80, 8, 8))
    x[y == 1, :, :4] += 2
    data = {"x_train": x[:48], "y_train": y[:48], "x_test": x[48:], "y_test": y[48:]}
    (case,) = normkit.study("appearance", data, model="cnn", **QUIET | {"seeds": 1}).cases
    assert case.title == "cnn on arrays"
    assert {m.norm for m in case.found} == {"none", "batch", "layer", "instance"}
    assert len(case.comparisons) == 3
    assert case.level is Level.UNKNOWN
    names = [m.arm for m in case.found.all(norm="batch")]
    assert names[-2:] == ["another light in test", "another light in test, its statistics"]


def test_all_is_a_table_of_what_could_be_run(finished, arrays, monkeypatch):
    _, out = finished
    monkeypatch.setattr(verb, "STUDIES", {name: STUDIES[name] for name in ("learning-rate", "appearance")})
    found = normkit.study("all", arrays, out=out, command="normkit study all --data x.npz --quick", **QUIET)
    assert isinstance(found, Outcomes)
    assert [outcome.study.name for outcome in found.outcomes] == ["learning-rate"]
    assert found.left_out == (("appearance", "appearance must be asked of images; got rows of 3 columns"),)
    (row,) = found.table().rows
    assert row[2:] == (str(found.outcomes[0].level), "normkit study learning-rate --data x.npz --quick")
    assert "appearance is left out" in (out / "report.html").read_text()
    assert 'href="learning-rate/report.html"' in (out / "report.html").read_text()
    assert json.loads((out / "results.json").read_text())["left_out"][0][0] == "appearance"


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"name": "learningrate"}, "did you mean learning-rate"),
        ({"model": "mpl"}, "did you mean mlp"),
        ({"model": "cnn"}, "`cnn` must be given images"),
        ({"data": "mine.py:data"}, "`data` of a study must be digits, wine"),
        ({"data": [1, 2]}, "`data` of a study must be digits, wine"),
        ({"quick": 1}, "`quick` must be True or False"),
        ({"seeds": 0}, "`seeds` must be at least 1"),
    ],
)
def test_what_cannot_be_studied_is_refused_and_nothing_written(arrays, tmp_path, asked, said):
    out = tmp_path / "made" / "out"
    with pytest.raises(NormError) as error:
        normkit.study(**{"name": "convergence", "data": arrays, "out": out, **QUIET, **asked})
    assert said in str(error.value)
    assert not out.parent.exists()


def test_numbers_to_predict_are_refused(arrays):
    numbers = {**arrays, "y_train": arrays["x_train"][:, 0] + 0.1, "y_test": arrays["x_test"][:, 0] + 0.1}
    with pytest.raises(NormError, match="must have classes"):
        normkit.study("convergence", numbers, **QUIET)


def test_without_a_name_the_studies_are_listed(capsys):
    assert main(["study"]) == 0
    listed = capsys.readouterr().out
    assert str(normkit.study()) == listed.rstrip("\n")
    assert [line.split()[0] for line in listed.splitlines() if line[:1].strip()][:-1] == list(STUDIES)
    assert len(normkit.study().table().rows) == len(STUDIES)


def test_on_the_command_line(arrays, tmp_path, capfd):
    np.savez(tmp_path / "data.npz", **arrays)
    asked = ["study", "non-iid", "--data", str(tmp_path / "data.npz"), "--out", str(tmp_path / "out"), "--quick"]
    assert main(asked) == 2  # batches of 160 from 64 samples
    assert "must be at most the number of samples left for training; got 160 and 64" in capfd.readouterr().err
    asked[1] = "convergence"
    assert main([*asked, "--seeds", "1", "--workers", "1", "--json"]) == 0
    printed = json.loads(capfd.readouterr().out)
    assert printed["verdict"] == "not enough evidence"
    assert printed["environment"]["command"].startswith("normkit study convergence --data")
    assert (tmp_path / "out" / "convergence" / "report.html").is_file()


def test_the_criterion_sees_nothing_but_the_measurements():
    """An empty study is an error and no verdict: what is not measured cannot be judged."""
    for study in STUDIES.values():
        with pytest.raises((LookupError, ValueError)):
            study.checks(Measurements([]))
