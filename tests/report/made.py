"""Comparisons made by hand: trials with the numbers a test needs, judged by the real analysis."""

import importlib.util
import math
from pathlib import Path

import numpy as np

from normkit.experiments.comparison import Comparison
from normkit.experiments.config import Config, Task
from normkit.experiments.results import Gap, SiteStats, Snapshot

# The maker of trials stands in the conftest of another folder: which of them `import conftest` finds is open.
_spec = importlib.util.spec_from_file_location("trials", Path(__file__).parents[1] / "experiments" / "conftest.py")
_trials = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_trials)
make_trial = _trials.make_trial

ACCURACY = Task("accuracy", "max", 0.95, math.log(10), 0.1)
LOSS = Task("loss", "min", None)
ENVIRONMENT = {
    "versions": {"normkit": "0.1.0", "python": "3.11", "torch": "2"},
    "system": "Linux x86_64",
    "instruction_sets": ["avx2", "sse2"],
    "cores": 2,
    "workers": 2,
    "seconds": 61.0,
    "started": 0,
    "command": None,
    "loss": "mean cross entropy",
    "optimizer": "SGD, momentum 0.9, constant rate",
}


def make_comparison(trials, task=ACCURACY, environment=None, notes=(), data="digits: 1797 scans", **asked):
    """The comparison that these trials belong to; fields of the question go by their names."""
    configs = [trial.config for trial in trials]
    found = {
        "norms": tuple(dict.fromkeys(config.norm for config in configs)),
        "lrs": tuple({config.lr for config in configs}),
        "batch_sizes": tuple(dict.fromkeys(config.batch_size for config in configs)),
        "inputs": tuple(dict.fromkeys(config.inputs for config in configs if config.inputs)) or None,
        "seeds": 1 + max(config.seed for config in configs),
        "epochs": configs[0].epochs,
    }
    if "run" not in asked:
        asked = {"model": "mlp", "data": "digits", **asked}
    return Comparison(
        Config(**{**found, **asked}), task, data, tuple(trials), {**ENVIRONMENT, **(environment or {})}, tuple(notes)
    )


# ---- three comparisons as they come in life, for the page in a browser


def grid(norms=("none", "batch", "batch:after", "layer", "group", "renorm", "rms"), seeds=5, sizes=(32,)):
    """Accuracy on digits: 6 rates, snapshots, gap and memory; large rates diverge without a norm."""
    rng = np.random.default_rng(0)
    speed = {"none": 0.05, "batch": 0.2, "batch:after": 0.22, "layer": 0.09, "group": 0.1, "renorm": 0.18, "rms": 0.07}
    top = {
        "none": 0.965,
        "batch": 0.985,
        "batch:after": 0.984,
        "layer": 0.975,
        "group": 0.978,
        "renorm": 0.984,
        "rms": 0.97,
    }
    widest = {"none": 0.03, "layer": 0.1, "rms": 0.1}
    cost = {"none": 4.3, "batch": 6.0, "batch:after": 6.7, "layer": 5.6, "group": 4.2, "renorm": 6.8, "rms": 6.2}
    trials = []
    for seed in range(seeds):
        for size in sizes:
            for norm in norms:
                for lr in (0.003, 0.01, 0.03, 0.1, 0.3, 1.0):
                    lost = lr > 3 * widest.get(norm, 1.0)
                    fit = math.exp(-(math.log(lr / 0.03) ** 2) / 8) * (0.4 if lr > widest.get(norm, 1.0) else 1)
                    pace = speed[norm] * fit * (0.7 if size == 8 else 1)
                    end = top[norm] - 0.3 * (1 - fit) ** 2 + rng.normal(0, 0.003)
                    values = [0.1 + (end - 0.1) * (1 - math.exp(-pace * n)) + rng.normal(0, 0.004) for n in range(31)]
                    sites = [snapshot(norm, step, rng) for step in (0, 150, 300)]
                    trials.append(
                        make_trial(
                            norm,
                            lr,
                            seed,
                            values=np.clip(values[:3] if lost else values, 0, 1).tolist(),
                            final=float(np.clip(end - 0.005 + rng.normal(0, 0.002), 0, 1)),
                            diverged=lost,
                            batch_size=size,
                            epochs=6,
                            train_loss=2.0 if fit < 0.4 else 0.1,
                            step_seconds=0.001 * cost[norm] * rng.uniform(0.95, 1.05),
                            peak_memory=int(1e6 * (40 + 2 * cost[norm])),
                            gap=Gap(0.02, 0.03, 0.99, 0.985) if not lost else None,
                            snapshots=() if lost else tuple(sites),
                        )
                    )
    return make_comparison(trials, model="cnn", environment={"command": "normkit compare cnn", "started": 30})


def snapshot(norm, step, rng):
    scale = [0.41 * 0.4**n if norm == "none" else 1 + 0.1 * rng.normal() for n in range(6)]
    grown = [s * (1 + step / 100) for s in scale]
    return Snapshot(
        step,
        tuple(
            SiteStats(
                f"body.{3 * n + 2}", "relu", 0.1, std, min(1, 0.1 * n if norm == "none" else 0.02), None, 1, 0, 0, 0
            )
            for n, std in enumerate(grown)
        ),
    )


def regression():
    """A loop of the user's: loss, no target, no snapshots, no test value, memory of one variant unknown."""
    rng = np.random.default_rng(1)
    trials = [
        make_trial(
            norm,
            lr,
            seed,
            values=[3.0 * math.exp(-0.5 * n * lr * 10) + floor + abs(rng.normal(0, 0.004)) for n in range(12)],
            final=floor + abs(rng.normal(0, 0.004)),
            metric="rmse",
            tested=False,
            train_losses=(),
            inputs="",
            step_seconds=0.12 if norm == "none" else 0.15,
            peak_memory=None if norm == "layer" else 80_000_000,
        )
        for seed in range(3)
        for norm, floor in (("none", 0.09), ("batch", 0.03), ("layer", 0.05))
        for lr in (0.01, 0.1)
    ]
    environment = {"loss": None, "optimizer": None, "command": "normkit compare train.py:train --goal min --seeds 3"}
    notes = ["train.py:train reported 12 times a trial."]
    return make_comparison(
        trials, Task("rmse", "min", None), environment, notes, "", run="train.py:train", metric="rmse", goal="min"
    )


def settings():
    """Two batch sizes, two input scalings; everything diverged in one of them, the baseline in another."""
    lost = {(8, "none"): ("none", "batch", "group"), (8, "max"): ("none",)}
    trials = [
        make_trial(
            norm,
            lr,
            seed,
            values=(0.1, 0.2) if norm in lost.get((size, inputs), ()) else (0.1, 0.5, 0.96 if norm != "none" else 0.9),
            final=0.9 + 0.02 * (norm != "none") + 0.001 * seed,
            diverged=norm in lost.get((size, inputs), ()),
            batch_size=size,
            inputs=inputs,
        )
        for seed in range(5)
        for inputs in ("none", "max")
        for size in (8, 32)
        for norm in ("none", "batch", "group")
        for lr in (0.01, 0.1)
    ]
    return make_comparison(trials, data="table of 12 columns: 600 rows", model="mine.py:build")
