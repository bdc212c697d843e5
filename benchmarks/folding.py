"""Measure how much faster models evaluate once `normkit.fold` has put their batch norms into the convolutions.

    python benchmarks/folding.py

writes benchmarks/folding.csv. ResNet-50 and MobileNetV2 of `transformers` with random weights and statistics, in
evaluation mode without gradients, on two threads. Folded and unfolded model take turns, and who begins does as well, so
that what else the machine does meets both. `ratio` is the time of the folded model over that of the other: the median
over the pairs, and the quartiles around it. Run it on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import copy
import csv
import itertools
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from torch import nn

import normkit
from normkit.benchmarking.circumstances import processor
from normkit.tables import Table

MODELS: dict[str, Callable[[], nn.Module]] = {
    "ResNet-50": lambda: transformers.ResNetModel(transformers.ResNetConfig()),
    "MobileNetV2": lambda: transformers.MobileNetV2Model(transformers.MobileNetV2Config()),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
THREADS = 2
WARM_UP = 2
COLUMNS = (
    "model", "dtype", "layout", "batch", "size", "folded", "norms", "unfolded_ms", "folded_ms", "ratio",
    "lower", "upper", "repetitions", "threads", "processor", "instructions", "torch",
)  # fmt: skip
SHOWN = COLUMNS[: COLUMNS.index("repetitions")]


def randomized(model: nn.Module) -> nn.Module:
    """With statistics, gamma and beta as no fresh norm has them, and outputs that stay finite."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
    return model.eval()


def folded(model: nn.Module, size: int) -> nn.Module:
    """Folded in float32, before it is converted: the products are rounded once."""
    result: nn.Module = normkit.fold(model, torch.randn(1, 3, size, size))
    return result


def norms(model: nn.Module) -> int:
    return sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())


def seconds(model: nn.Module, x: torch.Tensor) -> float:
    begun = time.perf_counter()
    model(x)
    return time.perf_counter() - begun


@torch.no_grad()
def pairs(unfolded: nn.Module, folded: nn.Module, x: torch.Tensor, repetitions: int) -> list[tuple[float, float]]:
    """Seconds of both, taken one right after the other."""
    measured = []
    for turn in range(-WARM_UP, repetitions):
        order = (unfolded, folded) if turn % 2 else (folded, unfolded)
        took = {id(model): seconds(model, x) for model in order}
        if turn >= 0:
            measured.append((took[id(unfolded)], took[id(folded)]))
    return measured


def row(name: str, dtype: str, layout: str, batch: int, arguments: argparse.Namespace) -> dict[str, object]:
    torch.manual_seed(0)
    model = randomized(MODELS[name]())
    changed = folded(model, arguments.size)
    form = {"dtype": DTYPES[dtype], "memory_format": LAYOUTS[layout]}
    both = [copy.deepcopy(one).to(**form) for one in (model, changed)]
    x = torch.randn(batch, 3, arguments.size, arguments.size).to(**form)
    measured = pairs(both[0], both[1], x, arguments.repetitions)
    lower, ratio, upper = statistics.quantiles([after / before for before, after in measured], n=4)
    return {
        "model": name,
        "dtype": dtype,
        "layout": layout,
        "batch": batch,
        "size": arguments.size,
        "folded": norms(model) - norms(changed),
        "norms": norms(model),
        "unfolded_ms": f"{1e3 * statistics.median(before for before, _ in measured):.2f}",
        "folded_ms": f"{1e3 * statistics.median(after for _, after in measured):.2f}",
        "ratio": f"{ratio:.3f}",
        "lower": f"{lower:.3f}",
        "upper": f"{upper:.3f}",
        "repetitions": arguments.repetitions,
        "threads": torch.get_num_threads(),
        "processor": processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=30, help="pairs of measurements, at least 2")
    parser.add_argument("--size", type=int, default=224, help="height and width of the images")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8], help="images at once")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".csv"))
    arguments = parser.parse_args()
    torch.set_num_threads(THREADS)
    grid = itertools.product(arguments.models, arguments.dtypes, arguments.layouts, arguments.batches)
    rows = [row(*case, arguments) for case in grid]
    with arguments.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    print(Table(SHOWN, [[str(row[name]) for name in SHOWN] for row in rows], words=3))


if __name__ == "__main__":
    main()
