import dataclasses
import signal

import pytest

from normkit.errors import NormRuntimeError
from normkit.experiments import runner
from normkit.experiments.config import Config
from normkit.experiments.data import load

CONFIG = Config(model="mlp", norms=("none",), lrs=(0.01, 0.02, 0.03), batch_sizes=(8,), seeds=1, epochs=1)


@pytest.fixture
def data(npz):
    return load(npz())


@pytest.fixture
def processes(monkeypatch):
    """The workers that are started."""
    started = []
    start = runner._start

    def noted():
        started.append(start())
        return started[-1]

    monkeypatch.setattr(runner, "_start", noted)
    return started


def nothing(result):
    pass


def test_results_come_in_the_order_of_the_configurations(data, processes):
    configs = list(CONFIG.trials(data.fingerprint))
    arrived = []
    results = runner.run_trials(configs, data, 2, arrived.append)
    assert [result.config for result in results] == configs
    assert len(arrived) == 3
    assert len(processes) == 2
    assert all(process.poll() is not None for process in processes)


def test_a_dying_worker_is_reported(data, processes, monkeypatch):
    monkeypatch.setattr(runner, "_serve", killing(runner._serve))
    with pytest.raises(NormRuntimeError, match=r"ended with SIGKILL while training none, rate 0\.01.*fewer workers"):
        runner.run_trials(list(CONFIG.trials("f")), data, 1, nothing)


def killing(serve):
    def killed(process, *arguments):
        process.send_signal(signal.SIGKILL)
        process.wait()
        serve(process, *arguments)

    return killed


def test_a_failing_trial_is_reported_with_its_cause(data, processes):
    broken = [dataclasses.replace(trial, epochs="many") for trial in CONFIG.trials("f")]
    with pytest.raises(NormRuntimeError, match="failed: TypeError") as error:
        runner.run_trials(broken, data, 1, nothing)
    assert "Traceback" in str(error.value.__cause__)
    assert all(process.poll() is not None for process in processes)


def test_an_error_in_the_thread_of_a_worker_does_not_leave_the_run_waiting(data, processes, monkeypatch):
    def broken(*arguments):
        raise ZeroDivisionError

    monkeypatch.setattr(runner, "_feed", broken)
    with pytest.raises(ZeroDivisionError):
        runner.run_trials(list(CONFIG.trials("f")), data, 2, nothing)


def test_an_interruption_leaves_no_worker_behind(data, processes):
    def interrupt(result):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        runner.run_trials(list(CONFIG.trials("f")), data, 2, interrupt)
    assert len(processes) == 2
    assert all(process.poll() is not None for process in processes)
