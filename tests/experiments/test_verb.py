import json
import subprocess
import sys

import matplotlib
import pytest

import normkit
from normkit.errors import MissingExtraError, NormError, NormRuntimeError
from normkit.experiments import Comparison, verb

TINY = {"lrs": (0.03, 1e6), "batch_sizes": (8,), "epochs": 2, "workers": 1, "show_progress": False}


def untimed(comparison):
    """What must not change from run to run."""
    plain = comparison.to_dict()
    for trial in plain["trials"]:
        del trial["seconds"]
        for evaluation in trial["curve"]:
            del evaluation["seconds"]
    return json.dumps([plain["config"], plain["trials"]])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One small comparison on digits, with a rate that diverges, and its folder."""
    out = tmp_path_factory.mktemp("out") / "report"
    state = matplotlib.rcParams.copy()
    comparison = normkit.compare(
        "mlp", norms=("none", "batch", "batch:after"), seeds=2, out=out, **{**TINY, "batch_sizes": (128,)}
    )
    assert matplotlib.rcParams.copy() == state
    return comparison, out


def test_result_is_complete(finished):
    comparison, out = finished
    assert isinstance(comparison, Comparison)
    assert len(comparison.trials) == 3 * 2 * 2
    assert sorted(path.name for path in out.iterdir()) == ["report.html", "results.json"]
    stored = json.loads((out / "results.json").read_text())
    assert stored == json.loads(json.dumps(comparison.to_dict()))
    assert stored["environment"]["versions"]["normkit"] == normkit.__version__
    assert len({trial["key"] for trial in stored["trials"]}) == 12
    none = comparison.groups[0].variants[0]
    assert none.rates[1].diverged == 2
    assert none.best_lr == 0.03


def test_result_in_words(finished):
    comparison, _ = finished
    lines = str(comparison).splitlines()
    assert lines[0].split()[:3] == ["norm", "best", "rate"]
    assert [line.split()[0] for line in lines[2:5]] == ["none", "batch", "batch:after"]
    assert "2 seeds are a screening, not proof" in lines[-1]
    assert max(map(len, lines[:5])) <= 120


def test_report_needs_nothing_else_and_is_small(finished):
    comparison, out = finished
    page = (out / "report.html").read_text()
    assert len(page) < 500_000
    for loading in ("src=", '<link rel="stylesheet', "@import", "<script", "url(http"):
        assert loading not in page
    assert page.count("<svg ") == 2
    for shown in ("batch:after", "ln(classes) / 2", "scikit", "momentum 0.9", "2 seeds are a screening"):
        assert (shown in page) == (shown != "scikit")
    assert "<svg " in comparison._repr_html_()
    assert "<html" not in comparison._repr_html_()


def test_pyplot_is_not_loaded(finished):
    assert "matplotlib.pyplot" not in sys.modules


def test_saved_again_elsewhere_it_is_the_same(finished, tmp_path):
    comparison, out = finished
    report = comparison.save(tmp_path / "again")
    assert report == tmp_path / "again" / "report.html"
    assert report.read_text() == (out / "report.html").read_text()


def test_a_full_disk_is_reported_and_leaves_the_old_results(finished, tmp_path, monkeypatch):
    comparison, _ = finished
    (tmp_path / "results.json").write_text("old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(NormRuntimeError, match=r"results\.json must fit.*No space left"):
        comparison.save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]
    assert (tmp_path / "results.json").read_text() == "old"


def test_the_same_question_has_the_same_answer(npz):
    asked = {**TINY, "data": npz(), "norms": ("none", "batch"), "lrs": (0.03,), "seeds": 1}
    first = normkit.compare(**asked)
    second = normkit.compare(**{**asked, "workers": 2})
    assert first.config.model == "mlp"
    assert untimed(first) == untimed(second)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"batch_sizes": (33,)}, "number of samples left for training; got 33 and 32"),
        ({"model": "cnn"}, "`cnn` must be given images; got rows of 3 columns"),
        ({"norms": ("none", "instance")}, "`instance` cannot be used in mlp"),
        ({"workers": 0}, "`workers` must be at least 1; got 0"),
        ({"workers": 1.5}, "`workers` must be a whole number"),
        ({"data": "nowhere.npz"}, "must be a file that exists"),
        ({"inputs": "standart"}, "did you mean standard?"),
    ],
)
def test_refused_before_training_and_nothing_written(npz, tmp_path, monkeypatch, changes, said):
    def train(*arguments):
        raise AssertionError("training began")

    monkeypatch.setattr(verb, "run_trials", train)
    out = tmp_path / "made" / "out"
    arguments = {"data": npz(), "norms": ("none",), "out": out, **TINY, **changes}
    with pytest.raises(NormError) as error:
        normkit.compare(**arguments)
    assert said in str(error.value)
    assert not out.parent.exists()


def test_an_interruption_writes_nothing(npz, tmp_path, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(verb, "run_trials", interrupt)
    with pytest.raises(KeyboardInterrupt):
        normkit.compare(data=npz(), out=tmp_path / "out", **TINY)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("missing", ["jinja2", "matplotlib"])
def test_what_the_report_needs_is_asked_for_before_training(npz, tmp_path, monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(MissingExtraError, match=rf"the report needs {missing}.*normkit\[lab\]"):
        normkit.compare(data=npz(), out=tmp_path / "out", **TINY)
    assert not (tmp_path / "out").exists()


def test_a_missing_framework_names_its_extra(npz, monkeypatch):
    monkeypatch.setitem(sys.modules, "normkit.torch.training", None)
    with pytest.raises(MissingExtraError, match=r"normkit\[torch\]"):
        normkit.compare(data=npz(), **TINY)


def test_a_script_needs_no_main_guard(npz, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import normkit\n"
        f"small = dict(data={npz()!r}, norms=('none',), lrs=(0.03,), batch_sizes=(8,), epochs=1, seeds=1)\n"
        "print(normkit.compare(**small))\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("nothing to compare it with") == 1
    assert done.stderr.count("1 trial, 1 worker") == 1


def test_experiments_load_no_framework():
    code = "import sys, normkit.experiments, normkit.report.render; print({'torch', 'matplotlib'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"
