import signal

import pytest

from normkit.errors import NormError, NormRuntimeError
from normkit.experiments import runner
from normkit.experiments.code import Code
from normkit.experiments.config import Config
from normkit.experiments.data import load
from normkit.experiments.runner import Crew, run_trials
from normkit.experiments.session import Job
from normkit.experiments.store import Store

CONFIG = Config(
    model="mlp", data="data.npz", norms=("none",), lrs=(0.01, 0.02, 0.03), batch_sizes=(8,), seeds=1, epochs=1
)


@pytest.fixture
def job(npz):
    return Job(CONFIG, load(npz()), {})


@pytest.fixture
def processes(monkeypatch):
    """The workers that are started."""
    started = []
    start = runner._Worker.__init__

    def noted(worker, *arguments):
        start(worker, *arguments)
        started.append(worker.process)

    monkeypatch.setattr(runner._Worker, "__init__", noted)
    return started


def run(job, workers, done=lambda result, count: None):
    with Crew(job, workers) as crew, Store("study", "max") as store:
        return run_trials(crew.plan().trials, crew, store, done)


def test_every_trial_is_run_once_and_told(job, processes):
    told = []
    results = run(job, 2, lambda result, count: told.append((result.config.key(), count)))
    assert [result.config.lr for result in results.values()] == [0.01, 0.02, 0.03]
    assert list(results) == [result.config.key() for result in results.values()]
    assert {key for key, _ in told} == set(results)
    assert [count for _, count in told] == [1, 2, 3]
    assert len(processes) == 2
    assert all(process.poll() is not None for process in processes)


def test_workers_are_started_only_for_work(job, processes):
    run(job, 8)
    assert len(processes) == 3


def test_what_is_finished_is_not_run_again(job):
    told = []
    with Crew(job, 1) as crew, Store("study", "max") as store:
        trials = crew.plan().trials
        first = run_trials(trials[:2], crew, store, lambda result, count: None)
        every = run_trials(trials, crew, store, lambda result, count: told.append(count))
    assert told == [3]
    assert {key: every[key] for key in first} == first


def test_a_dying_worker_is_reported(job, processes):
    def kill(result, count):
        processes[0].send_signal(signal.SIGKILL)
        processes[0].wait()

    with pytest.raises(NormRuntimeError, match=r"ended with SIGKILL while training none, rate 0\.0.*fewer workers"):
        run(job, 1, kill)


def loop(tmp_path, body, head=""):
    (tmp_path / "train.py").write_text(f"{head}def train(trial):\n    {body}\n")
    name = f"{tmp_path}/train.py:train"
    return Job(Config(run=name, norms=("none",), lrs=(0.1,), seeds=1), None, {name: Code.named(name)})


def test_a_failing_trial_is_reported_with_its_cause(tmp_path, processes):
    with pytest.raises(
        NormError, match=r"training none, rate 0\.1.* failed: train\.py:train raised TypeError"
    ) as error:
        run(loop(tmp_path, "trial.lr + 'x'"), 1)
    assert "Traceback" in str(error.value.__cause__)
    assert all(process.poll() is not None for process in processes)


def test_a_loop_that_ends_the_program_is_reported(tmp_path):
    with pytest.raises(NormError, match="the program was ended"):
        run(loop(tmp_path, "raise SystemExit(3)"), 1)
    with pytest.raises(NormRuntimeError, match="it ended with exit code 3 while training"):
        run(loop(tmp_path, "import os; os._exit(3)"), 1)


def test_what_the_users_code_prints_goes_to_the_log(tmp_path):
    job = loop(tmp_path, "print('hello from', trial.lr); trial.report(1, loss=1.0)")
    with Crew(job, 1, tmp_path / "output.log") as crew, Store("study", "max") as store:
        run_trials(crew.plan().trials, crew, store, lambda result, count: None)
    assert (tmp_path / "output.log").read_text() == "hello from 0.1\n"


def test_an_empty_log_is_not_left_behind(job, tmp_path):
    with Crew(job, 1, tmp_path / "output.log") as crew:
        crew.plan()
    assert not (tmp_path / "output.log").exists()


def test_an_interruption_leaves_no_worker_behind(job, processes):
    def interrupt(result, count):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(job, 2, interrupt)
    assert len(processes) == 2
    assert all(process.poll() is not None for process in processes)


def test_a_framework_that_a_loop_loads_late_is_seeded_too(tmp_path):
    """A loop without PyTorch does without it; what loads it in the middle of its first trial is run again, seeded."""
    found = []
    for head, name in (("import torch\n", "'torch'"), ("", "'to' + 'rch'")):
        body = f"import importlib; torch = importlib.import_module({name}); trial.report(1, loss=torch.rand(()).item())"
        job = loop(tmp_path, body, head)
        found.append([result.final for result in run(job, 1).values()])
    assert found[0] == found[1]


def test_a_loop_without_a_framework_loads_none(tmp_path):
    job = loop(tmp_path, "import sys; trial.report(1, loss=float('to' + 'rch' in sys.modules))")
    assert [result.final for result in run(job, 1).values()] == [0.0]
