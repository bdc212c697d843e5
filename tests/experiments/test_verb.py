import json
import pickle
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
        for timed in ("seconds", "step_seconds", "peak_memory"):
            del trial[timed]
        trial["curve"] = [(step, loss, metric) for step, _, loss, metric in trial["curve"]]
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
    assert sorted(path.name for path in out.iterdir()) == ["figures", "report.html", "results.json", "trials.db"]
    assert {path.suffix for path in (out / "figures").iterdir()} == {".svg", ".png"}
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
    assert [line.split()[0] for line in lines if line][:1] == ["norm"] or "norm" in lines[1]
    rows = [line.split()[0] for line in lines if line.split() and line.split()[0] in comparison.config.norms]
    assert rows == ["none", "batch", "batch:after"]
    assert "screening" in str(comparison)
    assert max(map(len, lines[:5])) <= 120


def test_pyplot_is_not_loaded(finished, tmp_path):
    """In a process of its own, as other packages load it (Keras)."""
    (tmp_path / "comparison").write_bytes(pickle.dumps(finished[0]))
    code = """
import pickle, sys
from pathlib import Path
pickle.loads(Path("comparison").read_bytes()).save("report")
assert "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)


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
        ({"loss": "mae", "metric": "accuracy"}, "`metric` must be loss or your own"),
        ({"model": "cnn"}, "`cnn` must be given images; got rows of 3 columns"),
        ({"norms": ("none", "instance")}, "`instance` cannot be used in mlp"),
        ({"workers": 0}, "`workers` must be at least 1; got 0"),
        ({"workers": 1.5}, "`workers` must be a whole number"),
        ({"data": "nowhere.npz"}, "must be a file that exists"),
        ({"inputs": "standart"}, "did you mean standard?"),
    ],
)
def test_refused_before_training_and_nothing_written(here, npz, tmp_path, monkeypatch, changes, said):
    def train(*arguments):
        raise AssertionError("training began")

    monkeypatch.setattr(verb, "run_trials", train)
    out = tmp_path / "made" / "out"
    arguments = {"data": npz(), "norms": ("none",), "out": out, **TINY, **changes}
    with pytest.raises(NormError) as error:
        normkit.compare(**arguments)
    assert said in str(error.value)
    assert not out.parent.exists()


def test_an_interruption_before_the_first_trial_keeps_only_the_storage(here, npz, tmp_path, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(verb, "run_trials", interrupt)
    with pytest.raises(KeyboardInterrupt):
        normkit.compare(data=npz(), out=tmp_path / "out", **TINY)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["trials.db"]


@pytest.mark.parametrize("missing", ["jinja2", "matplotlib"])
def test_what_the_report_needs_is_asked_for_before_training(npz, tmp_path, monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(MissingExtraError, match=rf"the report needs {missing}.*normkit\[lab\]"):
        normkit.compare(data=npz(), out=tmp_path / "out", **TINY)
    assert not (tmp_path / "out").exists()


def test_a_missing_framework_names_its_extra(npz, tmp_path, monkeypatch):
    # Workers are processes of their own: there torch is hidden by a file that cannot be imported.
    (tmp_path / "torch.py").write_text("raise ImportError('no torch here')")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(MissingExtraError, match=r"no torch here.*normkit\[torch\]"):
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


BUILD = """
import torch
from torch import nn

def build(norm):
    return nn.Sequential(nn.Linear(3, 8), norm(8), nn.ReLU(), nn.Linear(8, 2))

def roomy(norm):
    return nn.Sequential(nn.Linear(3, 8), norm(8, nn.ReLU()), nn.Linear(8, 2))

def narrow(norm):
    return nn.Sequential(nn.Linear(3, 8), norm(8), nn.ReLU(), nn.Linear(8, 1))

def broken(norm):
    return nn.Sequential(nn.Linear(3, wide))

def ignores(norm):
    return nn.Linear(3, 2)

def nothing(norm):
    norm(8)

def bare():
    return nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))

def batched():
    return nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))

def plain():
    return nn.Linear(3, 2)

def focal(outputs, targets):
    p = torch.softmax(outputs, 1).gather(1, targets[:, None])[:, 0]
    return ((1 - p) ** 2 * -p.log()).mean()

def adagrad(parameters, lr):
    return torch.optim.Adagrad(parameters, lr=lr)

def errors(outputs, targets):
    return (outputs.argmax(1) != targets).float().sum()

number = 3
"""
SMALL = {"norms": ("none", "batch"), "lrs": (0.03,), "batch_sizes": (8,), "seeds": 1, "epochs": 1, "workers": 1}
SMALL["show_progress"] = False


@pytest.fixture
def mine(tmp_path, npz):
    """A file of the user's, and data for it."""
    (tmp_path / "mine.py").write_text(BUILD)
    (tmp_path / "data.py").write_text(
        "import numpy as np\nfrom torch.utils.data import DataLoader, TensorDataset\nimport torch\n"
        f"d = np.load({npz()!r})\n"
        "x, y, u, v = (torch.tensor(d[k]).to(t) for k, t in zip(d.files, (torch.float32, torch.int64) * 2))\n"
        "loaders = DataLoader(TensorDataset(x, y), 8, shuffle=True), DataLoader(TensorDataset(u, v), 8)\n"
        "sets = {'train': TensorDataset(x, y), 'test': TensorDataset(u, v)}\n"
        "def arrays(): return x.numpy(), y.numpy(), u.numpy(), v.numpy()\n"
        "class Shrinking:\n"
        "    n = 6\n"
        "    def __iter__(self):\n"
        "        self.n -= 1\n"
        "        return iter(list(loaders[1])[:1] * self.n)\n"
        "shrinking = Shrinking(), loaders[1]\n"
        "empty = [], loaders[1]\n"
    )
    return lambda name, file="mine": f"{tmp_path}/{file}.py:{name}"


def test_a_model_of_the_users_with_everything_of_their_own(mine, npz):
    result = normkit.compare(
        mine("build"), npz(), loss=mine("focal"), optimizer=mine("adagrad"), metric=mine("errors"), goal="min", **SMALL
    )
    assert (result.config.model, result.task.metric, result.task.goal) == (mine("build"), "errors", "min")
    assert result.environment["optimizer"] == "mine.py:adagrad"
    assert all(trial.final == int(trial.final) for trial in result.trials)
    assert result.trials[0].snapshots[0].sites[0].activation == "relu"
    assert result.trials[1].snapshots[0].sites[0].gamma_mean == 1.0


def test_by_default_all_norms_that_the_model_has_a_place_for(here, mine, npz):
    asked = {**SMALL, "norms": None}
    result = normkit.compare(mine("build"), npz(), **asked)
    assert result.config.norms == ("none", "batch", "layer", "group", "renorm", "rms")
    assert any("batch:after" in note for note in result.notes)
    assert normkit.compare(mine("roomy"), npz(), **asked).config.norms[2] == "batch:after"


@pytest.mark.parametrize("name", ["bare", "batched"])
def test_a_model_that_knows_nothing_of_norms(here, mine, npz, name):
    """As good as one that takes `norm` at the same place: its inputs to the activations are normalized."""
    result = normkit.compare(mine(name), npz(), **SMALL)
    none, batch = (next(t for t in result.trials if t.config.norm == norm) for norm in ("none", "batch"))
    assert none.snapshots[0].sites[0].gamma_mean is None
    assert batch.snapshots[0].sites[0].gamma_mean == 1.0
    assert not batch.diverged


@pytest.mark.parametrize(("name", "tested"), [("loaders", False), ("sets", True), ("arrays", True)])
def test_data_of_the_users(mine, name, tested):
    result = normkit.compare(mine("build"), mine(name, "data"), **{**SMALL, "batch_sizes": None})
    assert {trial.tested for trial in result.trials} == {tested}
    assert result.config.batch_sizes == ((8,) if name == "loaders" else (32,))
    assert bool([note for note in result.notes if "no test part" in note]) != tested
    again = normkit.compare(mine("build"), mine(name, "data"), **{**SMALL, "batch_sizes": None})
    assert untimed(result) == untimed(again)


@pytest.mark.parametrize(
    ("model", "data", "said"),
    [
        ("broken", None, "broken raised NameError: name 'wide' is not defined (line 15 of mine.py)"),
        ("ignores", None, "norm"),
        ("nothing", None, "nn.Module"),
        ("plain", None, "must have a linear map that a norm can follow"),
        ("number", None, "must be a function"),
        ("missing", None, "must define missing"),
        ("narrow", None, "label 1 and 1 outputs"),
        ("build", "empty", "must give batches; got none"),
        ("build", "shrinking", "same number of batches in every epoch"),
    ],
)
def test_what_is_wrong_with_the_users_code_is_said(here, mine, npz, tmp_path, model, data, said):
    asked = {**SMALL, "out": tmp_path / "out", "batch_sizes": None if data else (8,)}
    with pytest.raises(NormError) as error:
        normkit.compare(mine(model), mine(data, "data") if data else npz(), **asked)
    assert said in str(error.value)
    assert data == "shrinking" or not (tmp_path / "out").exists()


def test_numbers_to_predict_need_no_word_more(here, npz, arrays):
    x = arrays["x_train"]
    result = normkit.compare(data=npz(y_train=x[:, 0] * 7 + 90, y_test=arrays["x_test"][:, 0] * 7 + 90), **SMALL)
    assert (result.task.metric, result.task.goal, result.task.target) == ("loss", "min", None)
    assert result.task.guess == pytest.approx(1.0)
    assert any("scaled to mean 0" in note for note in result.notes)


def test_a_loop_of_the_users_from_python(tmp_path):
    seen = []

    def train(trial):
        seen.append(1)  # in the worker, not here
        value = {"none": 2.0, "batch": 1.0}[str(trial.norm)] + trial.lr * trial.seed
        for step in (1, 2, 3):
            trial.report(step, loss=value / step)

    result = normkit.compare(
        run=train,
        norms=("none", "batch"),
        lrs=(0.1, 0.2),
        seeds=3,
        out=tmp_path / "out",
        show_progress=False,
        workers=1,
    )
    assert seen == []
    assert (result.config.run, result.task) == ("python:train", (*result.task[:2], None, None, None))
    none, batch = result.groups[0].variants
    assert (none.best_lr, batch.best_lr) == (0.1, 0.1)
    assert batch.final == pytest.approx([(1 + 0.1 * s) / 3 for s in range(3)])
    assert result.groups[0].against_baseline[0].value == pytest.approx(-1 / 3)
    assert (tmp_path / "out" / "report.html").is_file()


def test_a_function_that_takes_trial_is_a_loop_wherever_it_is_given(tmp_path):
    (tmp_path / "train.py").write_text("def train(trial):\n    str(trial.norm)\n    trial.report(1, accuracy=0.5)\n")
    asked = {"norms": ("none", "batch"), "lrs": (0.1,), "seeds": 1, "workers": 1, "show_progress": False}
    result = normkit.compare(f"{tmp_path}/train.py:train", **asked)
    assert result.config.run.endswith("train.py:train")
    assert result.config.model is None
    assert result.task.target == 0.95


def test_trials_with_other_versions_are_noted(finished):
    comparison, _ = finished
    newer = comparison.trials[0].__class__(**{**vars(comparison.trials[0]), "versions": (("torch", "9"),)})
    assert verb._notes(comparison.trials) == []
    assert "different versions" in verb._notes([*comparison.trials, newer])[0]


def test_the_password_of_a_storage_is_not_in_the_results(here, finished, npz, tmp_path):
    result = normkit.compare(data=npz(), storage=f"sqlite:///{tmp_path}/secret.db", **SMALL)
    assert result.environment["storage"] == "sqlite"
    assert "secret" not in json.dumps(result.to_dict())


LOADERS = """
import torch
from torch.utils.data import DataLoader, TensorDataset
g = torch.Generator().manual_seed(0)
torch.manual_seed(0)
x, y = torch.randn(64, 3), torch.arange(64) % 2
x[y == 1] += 1
own = DataLoader(TensorDataset(x, y), 8, shuffle=True, generator=g), DataLoader(TensorDataset(x, y), 64)
raw = TensorDataset(x, y)
scaled = TensorDataset(100 * x, y)
missing = TensorDataset(torch.full((64, 3), torch.nan), y)
"""


def test_a_loader_with_random_numbers_of_its_own_gives_all_variants_the_same(here, mine, tmp_path):
    (tmp_path / "loaders.py").write_text(LOADERS)
    found = {}
    for norms in (("none", "batch"), ("batch", "none")):
        asked = {**SMALL, "batch_sizes": None, "norms": norms}
        for trial in normkit.compare(mine("build"), mine("own", "loaders"), **asked).trials:
            found.setdefault(trial.config.norm, []).append(trial.train_losses)
    assert all(first == second for first, second in found.values())


def test_two_names_of_one_file_are_two_questions(here, mine, tmp_path):
    (tmp_path / "loaders.py").write_text(LOADERS)
    asked = {**SMALL, "storage": f"sqlite:///{tmp_path}/trials.db", "norms": ("none",)}
    first, second = (normkit.compare(mine("build"), mine(name, "loaders"), **asked) for name in ("raw", "scaled"))
    assert second.environment["started"] == 1
    assert first.trials[0].curve != second.trials[0].curve
    assert normkit.compare(mine("build"), mine("raw", "loaders"), **asked).environment["started"] == 0


def test_values_that_are_missing_are_refused_in_data_sets_too(here, mine, tmp_path):
    (tmp_path / "loaders.py").write_text(LOADERS)
    with pytest.raises(NormError, match=r"samples of loaders\.py:missing must be finite; got nan"):
        normkit.compare(mine("build"), mine("missing", "loaders"), **SMALL)


def test_a_network_that_does_not_fit_the_data_is_worded(here, npz, tmp_path):
    (tmp_path / "m.py").write_text(
        "from torch import nn\ndef build(norm): return nn.Sequential(nn.Linear(9, 2), norm(2))\n"
    )
    with pytest.raises(NormError, match=r"m\.py:build must take a step on this data; got RuntimeError: mat1"):
        normkit.compare(f"{tmp_path}/m.py:build", npz(), **SMALL)


ONCE = {"norms": ("none",), "lrs": (0.1, 0.2, 0.3), "seeds": 1, "workers": 1, "show_progress": False}


def test_a_loop_finds_nothing_on_its_standard_input(tmp_path):
    (tmp_path / "t.py").write_text(
        "import subprocess\ndef train(trial):\n    subprocess.run(['cat'])\n    trial.report(1, loss=1.0)\n"
    )
    assert len(normkit.compare(f"{tmp_path}/t.py:train", **ONCE).trials) == 3


def test_a_file_that_is_edited_meanwhile_does_not_mix(tmp_path):
    """The worker goes on with what it loaded; another one, started later, refuses."""
    file = tmp_path / "t.py"
    file.write_text(
        "VALUE = 1.0\ndef train(trial):\n"
        "    text = open(__file__).read().replace('VALUE = 1.0', 'VALUE = 2.0')\n"
        "    open(__file__, 'w').write(text)\n    trial.report(1, loss=VALUE)\n"
    )
    assert [trial.final for trial in normkit.compare(f"{file}:train", **ONCE).trials] == [1.0] * 3
    from normkit.experiments.session import Job, Session

    with pytest.raises(NormRuntimeError, match=r"t\.py must stay as it is while trials are run"):
        Session(Job(None, None, {}, {str(file): "another hash"}))


def test_a_metric_of_a_loop_may_have_any_name(tmp_path):
    (tmp_path / "t.py").write_text("def train(trial):\n    trial.report(1, rmse=1.0)\n")
    result = normkit.compare(f"{tmp_path}/t.py:train", metric="rmse", goal="min", **ONCE)
    assert (result.task.metric, result.task.goal) == ("rmse", "min")
    with pytest.raises(NormError, match="`metric` of a training loop must be the name of what it reports"):
        normkit.compare(f"{tmp_path}/t.py:train", metric=len, goal="min", **ONCE)
