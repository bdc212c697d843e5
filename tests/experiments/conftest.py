import dataclasses
import pickle
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from normkit.experiments import runner, worker
from normkit.experiments.config import TrialConfig
from normkit.experiments.results import Evaluation, TrialResult


@pytest.fixture
def arrays() -> dict[str, Any]:
    """Two easy classes in a table of three columns."""
    rng = np.random.default_rng(0)
    y = np.arange(60) % 2
    x = rng.normal(size=(60, 3)) + 3 * y[:, None]
    return {"x_train": x[:40], "y_train": y[:40], "x_test": x[40:], "y_test": y[40:]}


@pytest.fixture
def npz(tmp_path: Path, arrays: dict[str, Any]) -> Callable[..., str]:
    """Save the arrays, with changes, and return the path."""

    def save(**changes: Any) -> str:
        kept = {name: value for name, value in {**arrays, **changes}.items() if value is not None}
        np.savez(tmp_path / "data.npz", **kept)
        return str(tmp_path / "data.npz")

    return save


@pytest.fixture
def trial() -> Callable[..., TrialResult]:
    """Make a result by hand: a validation metric every 10 steps, an epoch each, from step 0; 0.1 s per step."""
    return make_trial


def make_trial(
    norm: str = "none",
    lr: float = 0.1,
    seed: int = 0,
    values: Sequence[float] = (0.1, 0.9),
    train_loss: float = 0.1,
    final: float = 0.5,
    diverged: bool = False,
    metric: str = "accuracy",
    **changes: Any,
) -> TrialResult:
    """Fields of the configuration and of the result go by their names."""
    settings = {"batch_size": 32, "inputs": "standard", "epochs": max(1, len(values) - 1)}
    asked = {name: changes.pop(name, value) for name, value in settings.items()}
    config = TrialConfig(
        framework="torch",
        model="mlp",
        code="",
        data="f" * 16,
        norm=norm,
        lr=lr,
        seed=seed,
        loss="",
        optimizer="sgd",
        metric="",
        **asked,
    )
    curve = tuple(Evaluation(10 * n, 1.0 * n, 1 - value, value) for n, value in enumerate(values))
    steps = curve[-1].step or 1
    result = TrialResult(
        config=config,
        metric=metric,
        curve=curve,
        train_losses=(train_loss,),
        steps=steps,
        seconds=0.1 * steps,
        diverged=diverged,
        final=None if diverged else final,
        step_seconds=0.1,
        peak_memory=50_000_000,
        versions=(("torch", "2"),),
    )
    return dataclasses.replace(result, **changes)


class Here:
    """A worker without a process of its own, which takes seconds to start: what it is told and answers is the same."""

    def __init__(self, number: int, job: Any, answers: Any, log: Any, env: Any, judge: Any) -> None:
        self.number, self.answers = number, answers
        self.answer = worker._begin(pickle.loads(pickle.dumps(job)), lambda report: judge(number, report))
        self.questions = self
        self.process = SimpleNamespace(kill=lambda: None)

    def put(self, asked: tuple[Any, str]) -> None:
        answer = pickle.loads(pickle.dumps(self.answer(asked[0])))
        if isinstance(answer, worker.Failure):
            answer = runner._failed(answer, asked[1])
        self.answers.put((self.number, answer))

    def close(self) -> None:
        pass


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let workers work in this process, and leave the process as it was."""
    threads = torch.get_num_threads()
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(runner, "_Worker", Here)
    monkeypatch.setattr("normkit.experiments.memory.gc.collect", lambda: 0)  # of all that tests have loaded: 0.2 s
    yield
    torch.set_num_threads(threads)
