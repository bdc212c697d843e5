"""Measure a training step of the recurrent layers with norms against that of PyTorch's own without.

    python benchmarks/recurrent.py

writes benchmarks/recurrent.csv. One layer, forward and backward, with the gradient of the input as inside a network.
Layers take turns, so that what else the machine does meets all; `ratio` is the median over the rounds of a layer's time
over that of torch.nn in the same round, with the quartiles around it. `formula` runs without the compiled kernels
(`use_kernel`), `compiled` is what runs by default. Run it on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import nn

import normkit.torch as nk
from normkit.benchmarking.circumstances import processor
from normkit.tables import Table

LAYERS: dict[str, tuple[type[nn.Module], ...]] = {
    "LSTM": (nk.BatchNormLSTM, nk.LayerNormLSTM),
    "GRU": (nk.BatchNormGRU, nk.LayerNormGRU),
}
THREADS = 2
WARM_UP = 2
COLUMNS = (
    "layer", "runs", "ms", "torch_ms", "ratio", "lower", "upper", "steps", "batch", "hidden", "rounds", "threads",
    "processor", "instructions", "torch",
)  # fmt: skip
SHOWN = COLUMNS[: COLUMNS.index("rounds")]


def step(layer: nn.Module, x: torch.Tensor, formula: bool) -> Callable[[], float]:
    """A function that makes one training step and says how long it took."""

    def run() -> float:
        with nk.use_kernel("formula") if formula else nullcontext():
            layer.zero_grad()
            x.grad = None
            begun = time.perf_counter()
            layer(x)[0].sum().backward()
            return time.perf_counter() - begun

    return run


def rows(kind: str, arguments: argparse.Namespace) -> list[dict[str, object]]:
    torch.manual_seed(0)
    steps, batch, hidden = arguments.steps, arguments.batch, arguments.hidden
    x = torch.randn(steps, batch, hidden, requires_grad=True)
    runs = {("torch", ""): step(getattr(nn, kind)(hidden, hidden), x, False)}
    for make in LAYERS[kind]:
        layer = make(hidden, hidden)
        runs |= {(make.__name__, how): step(layer, x, how == "formula") for how in ("compiled", "formula")}
    taken: dict[tuple[str, str], list[float]] = {name: [] for name in runs}
    for turn in range(-WARM_UP, arguments.rounds):
        order = list(runs) if turn % 2 else list(runs)[::-1]
        for name in order:
            seconds = runs[name]()
            if turn >= 0:
                taken[name].append(seconds)
    theirs = taken.pop(("torch", ""))
    found: list[dict[str, object]] = []
    for (name, how), ours in taken.items():
        lower, ratio, upper = statistics.quantiles([a / b for a, b in zip(ours, theirs, strict=True)], n=4)
        found.append(
            {
                "layer": name,
                "runs": how,
                "ms": f"{1e3 * statistics.median(ours):.1f}",
                "torch_ms": f"{1e3 * statistics.median(theirs):.1f}",
                "ratio": f"{ratio:.2f}",
                "lower": f"{lower:.2f}",
                "upper": f"{upper:.2f}",
                "steps": steps,
                "batch": batch,
                "hidden": hidden,
                "rounds": arguments.rounds,
                "threads": torch.get_num_threads(),
                "processor": processor(),
                "instructions": torch.backends.cpu.get_cpu_capability(),
                "torch": torch.__version__,
            }
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30, help="measurements of each, at least 2")
    parser.add_argument("--steps", type=int, default=64, help="length of the sequences")
    parser.add_argument("--batch", type=int, default=64, help="sequences at once")
    parser.add_argument("--hidden", type=int, default=128, help="features of input and state")
    parser.add_argument("--kinds", nargs="+", choices=LAYERS, default=list(LAYERS))
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".csv"))
    arguments = parser.parse_args()
    torch.set_num_threads(THREADS)
    found = [row for kind in arguments.kinds for row in rows(kind, arguments)]
    with arguments.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(found)
    print(Table(SHOWN, [[str(row[name]) for name in SHOWN] for row in found], words=2))


if __name__ == "__main__":
    main()
