"""Measure how often each rule of `normkit.check` finds its fault, by strength, and how often it is heard without one.

    python benchmarks/check_rates.py

writes benchmarks/check_rates.csv, which `python -m normkit.checks.pages docs/rules.md` makes a table of. Four small
networks (convolutions, dense layers, residual blocks, sequences) learn two data sets (scikit-learn's digits, and which
of its two photographs an 8 x 8 piece is of). Each is trained once per seed; a fault is planted in a copy, or trained in
where only training makes it. `found` counts the trials in which the rule was heard, `serious` those in which it gave a
warning or an error. Rows of the fault `none` are networks trained in the usual way, by batches of several sizes, looked
at with the data they learned and with data held out.

Not planted: NK305 (Keras alone), NK901 and NK902 (several processes).
"""

from __future__ import annotations

import argparse
import copy
import csv
import itertools
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from sklearn.datasets import load_digits, load_sample_images
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

import normkit
from normkit.checks.settings import RULES
from normkit.tables import Table

NOT_PLANTED = ("NK305", "NK901", "NK902")
SIZES = (16, 32, 64)  # of the batches of healthy twins
SIZE, STEPS, RATE = 32, 120, 0.05
LEARNED = 1200  # samples; 480 are held out
HELD_OUT = 480
MEMORY = 128  # samples with random labels that are learned by heart
EPOCHS = 20  # in so many epochs; with convolutions NK105 was not heard after 30 either
CHANNELS = 16
COLUMNS = ("code", "fault", "strength", "trials", "found", "serious")
loss = nn.functional.cross_entropy
Samples = tuple[Tensor, Tensor]
Norm = nn.modules.batchnorm._BatchNorm


# -- Data -------------------------------------------------------------------------------------------------------------


def digits() -> Samples:
    found = load_digits()
    return torch.tensor(found.images[:, None] / 16.0, dtype=torch.float32), torch.tensor(found.target)


def photographs() -> Samples:
    """Pieces of 8 x 8 grey pixels out of two photographs."""
    random, size, each = np.random.default_rng(0), 8, (LEARNED + HELD_OUT) // 2
    pieces = []
    for picture in load_sample_images().images:
        grey = picture.mean(axis=2) / 255.0
        places = zip(*(random.integers(0, length - size, each) for length in grey.shape), strict=True)
        pieces.append(np.stack([grey[row : row + size, column : column + size] for row, column in places]))
    x = torch.tensor(np.concatenate(pieces)[:, None], dtype=torch.float32)
    return x, torch.arange(2).repeat_interleave(each)


DATA: dict[str, Callable[[], Samples]] = {"digits": digits, "photographs": photographs}


def split(samples: Samples) -> tuple[Samples, Samples]:
    x, y = samples
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[: LEARNED + HELD_OUT]
    x, y = x[order], y[order]
    return (x[:LEARNED], y[:LEARNED]), (x[LEARNED:], y[LEARNED:])


def loader(samples: Samples, size: int = SIZE, seed: int = 0, shuffle: bool = True, drop: bool = True) -> Any:
    random = torch.Generator().manual_seed(seed)
    return DataLoader(TensorDataset(*samples), size, shuffle=shuffle, drop_last=drop, generator=random)


# -- Networks ---------------------------------------------------------------------------------------------------------


def cnn() -> nn.Module:
    parts: list[nn.Module] = []
    for inputs in (1, *[CHANNELS] * 4):
        parts += [nn.Conv2d(inputs, CHANNELS, 3, padding=1, bias=False), nn.BatchNorm2d(CHANNELS), nn.ReLU()]
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(CHANNELS, 10))


def mlp() -> nn.Module:
    parts: list[nn.Module] = [nn.Flatten()]
    for _ in range(3):
        parts += [nn.Linear(64, 64, bias=False), nn.BatchNorm1d(64), nn.ReLU()]
    return nn.Sequential(*parts, nn.Linear(64, 10))


class Block(nn.Module):
    """x + norm(conv(relu(norm(conv(x)))))."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, bias=False)
        self.norm1, self.relu1 = nn.BatchNorm2d(CHANNELS), nn.ReLU()
        self.conv2 = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, bias=False)
        self.norm2, self.relu2 = nn.BatchNorm2d(CHANNELS), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        inside = self.relu1(self.norm1(self.conv1(x)))
        return self.relu2(x + self.norm2(self.conv2(inside)))


def residual() -> nn.Module:
    stem = [nn.Conv2d(1, CHANNELS, 3, padding=1, bias=False), nn.BatchNorm2d(CHANNELS), nn.ReLU()]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(CHANNELS, 10)]
    return nn.Sequential(*stem, Block(), Block(), *head)


class Sequences(nn.Module):
    """Rows of an image as eight positions of eight features; a layer norm in front of the head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm1, self.relu1 = nn.Linear(8, CHANNELS, bias=False), nn.BatchNorm1d(CHANNELS), nn.ReLU()
        self.conv = nn.Conv1d(CHANNELS, CHANNELS, 3, padding=1, bias=False)
        self.norm2, self.relu2 = nn.BatchNorm1d(CHANNELS), nn.ReLU()
        self.last, self.head = nn.LayerNorm(CHANNELS), nn.Linear(CHANNELS, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu1(self.norm1(self.embed(x.squeeze(1)).transpose(1, 2)))
        x = self.relu2(self.norm2(self.conv(x)))
        return self.head(self.last(x.mean(2)))


MODELS: dict[str, Callable[[], nn.Module]] = {"cnn": cnn, "mlp": mlp, "residual": residual, "sequence": Sequences}


def fit(model: nn.Module, data: Iterable[Any], steps: int = STEPS, rate: float = RATE) -> nn.Module:
    """SGD, the last third of the steps at a tenth of the rate."""
    optimizer = torch.optim.SGD(model.parameters(), rate, momentum=0.9)
    model.train()
    batches = itertools.chain.from_iterable(itertools.repeat(data))
    for step, (x, y) in zip(range(steps), batches, strict=False):
        if step == steps - steps // 3:
            optimizer.param_groups[0]["lr"] = rate / 10
        optimizer.zero_grad()
        loss(model(x), y).backward()
        optimizer.step()
    return model


def norms(model: nn.Module) -> list[tuple[str, Any]]:
    return [(path, module) for path, module in model.named_modules() if isinstance(module, Norm)]


def middle(model: nn.Module) -> Any:
    found = norms(model)
    return found[len(found) // 2][1]


def replaced(model: nn.Module, kinds: Any, make: Callable[[Any], nn.Module], many: int | None = None) -> nn.Module:
    """The modules of a kind, or the first so many of them, made anew."""
    for path in [path for path, module in model.named_modules() if isinstance(module, kinds)][:many]:
        model.set_submodule(path, make(model.get_submodule(path)))
    return model


# -- Faults -----------------------------------------------------------------------------------------------------------


class Twin(NamedTuple):
    """A healthy network, to plant a fault in; what is given to `check` with it."""

    name: str
    model: nn.Module
    samples: Samples
    seed: int
    data: Any
    optimizer: Any = None

    def over(self, samples: Samples, **options: Any) -> Twin:
        return self._replace(data=loader(samples, seed=self.seed, **options))

    def anew(self) -> nn.Module:
        torch.manual_seed(self.seed)
        return MODELS[self.name]()


Plant = Callable[[Twin, Any], Twin]


class Fault(NamedTuple):
    """What is planted for a rule, by which strengths, and in which networks."""

    code: str
    words: str
    strengths: tuple[Any, ...]
    plant: Plant
    models: tuple[str, ...]


FAULTS: list[Fault] = []


def fault(code: str, words: str, *strengths: Any, models: tuple[str, ...] = tuple(MODELS)) -> Callable[[Plant], Plant]:
    def register(plant: Plant) -> Plant:
        FAULTS.append(Fault(code, words, strengths, plant, models))
        return plant

    return register


def count(strength: str) -> int | None:
    """Of norms: one or all."""
    return 1 if strength == "one" else None


@fault("NK101", "kept variance of one layer times", 1.1, 2, 5, 20)
@torch.no_grad()
def variance(twin: Twin, strength: float) -> Twin:
    middle(twin.model).running_var.mul_(strength)
    return twin


@fault("NK102", "kept means of one layer off by so many deviations", 0.1, 0.5, 1, 3)
@torch.no_grad()
def shift(twin: Twin, strength: float) -> Twin:
    norm = middle(twin.model)
    norm.running_mean.add_(strength * norm.running_var.sqrt())
    return twin


@fault("NK103", "share of the first values left in the statistics", 0.01, 0.1, 0.3, 0.9)
@torch.no_grad()
def slow(twin: Twin, strength: float) -> Twin:
    for _, norm in norms(twin.model):
        norm.momentum = 1 - strength ** (1 / norm.num_batches_tracked.item())
        norm.running_mean.mul_(1 - strength)
        norm.running_var.lerp_(torch.ones_like(norm.running_var), strength)
    return twin


@fault("NK104", "norms whose buffers were not loaded", "one", "all")
def not_loaded(twin: Twin, strength: str) -> Twin:
    for _, norm in norms(twin.model)[: count(strength)]:
        norm.reset_running_stats()
    return twin


@fault("NK105", "random labels learned by heart in fixed batches of", 32, 8, 4, 2, models=("mlp",))
def by_heart(twin: Twin, strength: int) -> Twin:
    x, y = twin.samples
    labels = torch.randint(0, int(y.max()) + 1, (MEMORY,), generator=torch.Generator().manual_seed(twin.seed))
    twin = twin.over((x[:MEMORY], labels), size=strength, shuffle=False)
    return twin._replace(model=fit(twin.anew(), twin.data, EPOCHS * len(twin.data), 0.02))


@fault("NK106", "dropout right before each norm, with p", 0.02, 0.1, 0.3, 0.5)
def dropout(twin: Twin, strength: float) -> Twin:
    model = replaced(twin.anew(), Norm, lambda norm: nn.Sequential(nn.Dropout(strength), norm))
    return twin._replace(model=fit(model, twin.data))


@fault("NK107", "values per statistic", 32, 10, 4, 2, models=("mlp",))
@fault("NK402", "samples per batch", 32, 8, 4, 2)
def small(twin: Twin, strength: int) -> Twin:
    return twin.over(twin.samples, size=strength)


@fault("NK108", "share of the samples that are sorted by class", 0.1, 0.3, 0.6, 1.0)
def ordered(twin: Twin, strength: float) -> Twin:
    """The rest is shuffled among itself; batches come in a random order."""
    x, y = twin.samples
    random, order = torch.Generator().manual_seed(twin.seed), y.argsort()
    mixed = torch.randperm(len(y), generator=random)[round(strength * len(y)) :]
    order[mixed] = order[mixed[torch.randperm(len(mixed), generator=random)]]
    parts = order[: len(order) // SIZE * SIZE].view(-1, SIZE)
    return twin._replace(data=[(x[part], y[part]) for part in parts[torch.randperm(len(parts), generator=random)]])


@fault("NK201", "NaN in channels of one layer", "one", "all")
@torch.no_grad()
def nan(twin: Twin, strength: str) -> Twin:
    middle(twin.model).running_mean[: count(strength)] = float("nan")
    return twin


@fault("NK202", "kept variance of a channel times", 0.1, 0.0, -1e-6, -1.0)
@torch.no_grad()
def negative(twin: Twin, strength: float) -> Twin:
    var = middle(twin.model).running_var
    var[var.argmax()] *= strength
    return twin


@fault("NK203", "norms kept in", "bfloat16", "float16")
def narrow(twin: Twin, strength: str) -> Twin:
    return twin._replace(model=twin.model.to(getattr(torch, strength)), data=None)


@fault("NK204", "kept variance of half the channels, in eps", 10, 2, 0.5, 0.01)
@torch.no_grad()
def dead(twin: Twin, strength: float) -> Twin:
    norm = middle(twin.model)
    norm.running_var[::2] = strength * norm.eps
    return twin


@fault("NK205", "gain of a channel", 30, 200, 2000)
@torch.no_grad()
def gain(twin: Twin, strength: float) -> Twin:
    norm = middle(twin.model)
    norm.weight[0] = strength * (norm.running_var[0] + norm.eps).sqrt()
    return twin


@fault("NK206", "gamma of half the channels", 1e-2, 1e-3, 1e-5, 0.0)
@torch.no_grad()
def gamma(twin: Twin, strength: float) -> Twin:
    middle(twin.model).weight[::2] = strength
    return twin


@fault("NK301", "frozen but in training mode, up to norm", "one", "all")
def frozen(twin: Twin, strength: str) -> Twin:
    left = count(strength) or len(norms(twin.model))
    for module in twin.model.modules():
        if left and not list(module.children()):
            module.requires_grad_(False)
            left -= isinstance(module, Norm)
    return twin


@fault("NK302", "norms left in evaluation mode", "one", "all")
def evaluating(twin: Twin, strength: str) -> Twin:
    for _, norm in norms(twin.model)[: count(strength)]:
        norm.eval()
    return twin


@fault("NK303", "norms that keep no statistics", "one", "all")
def untracked(twin: Twin, strength: str) -> Twin:
    def bare(norm: Any) -> nn.Module:
        return type(norm)(norm.num_features, track_running_stats=False)

    return twin._replace(model=replaced(twin.model, Norm, bare, count(strength)))


class Leaning(nn.Module):
    """Adds so much of the mean over the batch to the outputs."""

    def __init__(self, model: nn.Module, much: float) -> None:
        super().__init__()
        self.model, self.much = model, much

    def forward(self, x: Tensor) -> Tensor:
        y = self.model(x)
        return y + self.much * y.mean(0)


@fault("NK304", "share of the batch's mean output in each", 1e-6, 1e-3, 1e-2, 1.0)
def leaning(twin: Twin, strength: float) -> Twin:
    return twin._replace(model=Leaning(twin.model, strength))


@fault("NK401", "values per statistic of a group norm before the head", 2, 1)
@fault("NK404", "values per statistic of a group norm before the head", 16, 8, 4, 2)
def groups(twin: Twin, strength: int) -> Twin:
    path, head = [(path, part) for path, part in twin.model.named_modules() if isinstance(part, nn.Linear)][-1]
    features = head.in_features
    twin.model.set_submodule(path, nn.Sequential(nn.GroupNorm(features // strength, features), head))
    return twin


@fault("NK403", "samples of 32 in the last batch", 16, 7, 1)
def left_over(twin: Twin, strength: int) -> Twin:
    x, y = (part[: 10 * SIZE + strength] for part in twin.samples)
    return twin.over((x, y), drop=False)


class Again(nn.Module):
    """A norm that is called several times on the same input, or once under checkpointing."""

    def __init__(self, norm: nn.Module, how: str) -> None:
        super().__init__()
        self.norm, self.how = norm, how

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "checkpointed":
            return checkpoint(self.norm, x, use_reentrant=False)
        for _ in range(1, int(self.how)):
            self.norm(x)
        return self.norm(x)


@fault("NK501", "calls of a norm on the same input", "1", "2", "3", "checkpointed")
def again(twin: Twin, strength: str) -> Twin:
    return twin._replace(model=replaced(twin.model, Norm, lambda norm: Again(norm, strength)))


class Views(nn.Module):
    """One norm for an image and its mirror image, which is brighter by some deviations."""

    def __init__(self, model: nn.Module, shift: float) -> None:
        super().__init__()
        self.norm, self.model, self.shift = nn.BatchNorm2d(1), model, shift

    def forward(self, x: Tensor) -> Tensor:
        other = x.flip(-1) + self.shift * x.std()
        return self.model(self.norm(x)) + self.model(self.norm(other))


@fault("NK502", "deviations between two inputs of one norm", 0, 0.3, 1, 3)
def views(twin: Twin, strength: float) -> Twin:
    return twin._replace(model=Views(twin.model, strength))


def with_bias(layer: Any) -> nn.Module:
    if isinstance(layer, nn.Linear):
        return nn.Linear(layer.in_features, layer.out_features)
    return type(layer)(layer.in_channels, layer.out_channels, layer.kernel_size, padding=layer.padding)


@fault("NK601", "maps with a bias in front of norms", "one", "all")
def bias(twin: Twin, strength: str) -> Twin:
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d)
    return twin._replace(model=replaced(twin.model, kinds, with_bias, count(strength)))


@fault("NK602", "norms that are doubled", "one", "all")
def doubled(twin: Twin, strength: str) -> Twin:
    def twice(norm: Any) -> nn.Module:
        return nn.Sequential(norm, type(norm)(norm.num_features))

    return twin._replace(model=replaced(twin.model, Norm, twice, count(strength)))


@fault("NK603", "of five norms are missing", 1, 2, models=("cnn", "residual"))
def missing(twin: Twin, strength: int) -> Twin:
    inside = {"cnn": ("4", "7"), "residual": ("3.norm1", "4.norm1")}[twin.name]
    for path in inside[:strength]:
        twin.model.set_submodule(path, nn.Identity())
    return twin


@fault("NK604", "dropout behind each activation, with p", 0.02, 0.1, 0.3, 0.5)
def dropout_in_front(twin: Twin, strength: float) -> Twin:
    return twin._replace(model=replaced(twin.model, nn.ReLU, lambda act: nn.Sequential(act, nn.Dropout(strength))))


class Positions(nn.Module):
    """Batch norm takes eight positions for its eight features."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.head = nn.Linear(8, 8, bias=False), nn.BatchNorm1d(8), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.embed(x.squeeze(1))).relu().mean(1))


@fault("NK605", "norms over another axis, of the same length or not told by the length", "one", "all",
       models=("cnn", "residual", "sequence"))  # fmt: skip
def axis(twin: Twin, strength: str) -> Twin:
    if twin.name == "sequence":
        torch.manual_seed(twin.seed)
        return twin._replace(model=Positions())
    return twin._replace(model=replaced(twin.model, Norm, lambda _: nn.LayerNorm(8), count(strength)))


@fault("NK606", "share of padding", 0, 0.05, 0.25, 0.5, models=("sequence",))
def padding(twin: Twin, strength: float) -> Twin:
    """Of eight positions 0 to as many are padded as give that share on average."""
    x, y = twin.samples
    random = torch.Generator().manual_seed(twin.seed)
    most = 16 * strength
    padded = (torch.rand(len(x), generator=random) * most).round().clamp(max=7)
    return twin.over((x * (torch.arange(8) < 8 - padded[:, None])[:, None, :, None], y))


@fault("NK701", "weight decay", 1e-6, 1e-4, 1e-2)
def decay(twin: Twin, strength: float) -> Twin:
    return twin._replace(optimizer=torch.optim.SGD(twin.model.parameters(), 0.1, weight_decay=strength))


@fault("NK702", "norms that the optimizer has not", "one", "all", "no parameter of the model")
def not_held(twin: Twin, strength: str) -> Twin:
    model = twin.model
    if strength == "no parameter of the model":
        return twin._replace(optimizer=torch.optim.SGD(copy.deepcopy(model).parameters(), 0.1))
    lost = {id(one) for _, norm in norms(model)[: count(strength)] for one in norm.parameters()}
    return twin._replace(optimizer=torch.optim.SGD([one for one in model.parameters() if id(one) not in lost], 0.1))


@fault("NK801", "momentum", 0.3, 0.6, 0.9, 0.99)
def momentum(twin: Twin, strength: float) -> Twin:
    for _, norm in norms(twin.model):
        norm.momentum = strength
    return twin


@fault("NK802", "eps of one layer, of the others 1e-5", 1e-4, 1e-3, models=("cnn", "residual"))
def eps(twin: Twin, strength: float) -> Twin:
    middle(twin.model).eps = strength
    return twin


@fault("NK803", "mean of the inputs in deviations, at a norm in front", 10, 50, 200, 1000)
def far(twin: Twin, strength: float) -> Twin:
    x, y = twin.samples
    front = nn.Sequential(nn.BatchNorm2d(1), twin.model)
    return twin._replace(model=front).over((x - x.mean() + strength * x.std(), y))


class Half(nn.Module):
    """A layer norm in float16 in front of the rest."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.norm, self.model = nn.LayerNorm(8).half(), model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(self.norm(x.half()).float())


@fault("NK804", "largest float16 input over the largest float16", 0.1, 0.2, 0.5, 2)
def overflow(twin: Twin, strength: float) -> Twin:
    x, y = twin.samples
    return twin._replace(model=Half(twin.model)).over((x / x.max() * strength * 65504, y))


# -- Rates ------------------------------------------------------------------------------------------------------------


def heard(twin: Twin, **options: Any) -> dict[str, bool]:
    """The codes that are found, and whether as a warning or an error."""
    given = None if twin.data is None else loss
    with torch.random.fork_rng():
        torch.manual_seed(twin.seed)
        found = normkit.check(
            twin.model, twin.data, optimizer=twin.optimizer, loss=given, show_progress=False, **options
        )
    said: dict[str, bool] = {}
    for finding in found.findings:
        said[finding.code] = said.get(finding.code, False) or finding.severity != "info"
    return said


def healthy(name: str, data: str, seed: int, size: int = SIZE) -> Twin:
    samples, _ = SAMPLES[data]
    torch.manual_seed(1000 * seed + zlib.crc32(name.encode()) % 1000)
    batches = loader(samples, size, seed)
    model = fit(MODELS[name](), batches)
    return Twin(name, model, samples, seed, batches)


SAMPLES: dict[str, tuple[Samples, Samples]] = {name: split(make()) for name, make in DATA.items()}


def planted(code: str, twins: dict[str, list[Twin]]) -> Iterator[dict[str, object]]:
    """A row for each strength of the faults of a rule."""
    for fault in (fault for fault in FAULTS if fault.code == code):
        for strength in fault.strengths:
            said = []
            for twin in (twin for name in fault.models for twin in twins.get(name, ())):
                sick = fault.plant(twin._replace(model=copy.deepcopy(twin.model)), strength)
                said.append(heard(sick, select=[code]))
            if said:
                yield _row(code, fault.words, strength, said)


def alarms(codes: Iterable[str], names: Iterable[str], seeds: int) -> Iterator[dict[str, object]]:
    """A row for each rule: what it says of networks in which nothing was planted."""
    said = []
    for name, data, seed, size in itertools.product(names, DATA, range(seeds), SIZES):
        twin = healthy(name, data, seed, size)
        optimizer = torch.optim.SGD(normkit.param_groups(twin.model, weight_decay=1e-4), RATE)
        for samples in SAMPLES[data]:
            given = twin._replace(data=loader(samples, size, seed), optimizer=optimizer)
            said.append(heard(given, select=list(codes)))
    for code in codes:
        yield _row(code, "none", "", said)


def _row(code: str, fault: str, strength: object, said: list[dict[str, bool]]) -> dict[str, object]:
    counted = Counter(one[code] for one in said if code in one)
    return {
        "code": code,
        "fault": fault,
        "strength": strength,
        "trials": len(said),
        "found": counted.total(),
        "serious": counted[True],
    }


def measured(codes: Iterable[str], names: list[str], seeds: int, healthy_seeds: int) -> Iterator[dict[str, object]]:
    twins = {name: [healthy(name, data, seed) for data in DATA for seed in range(seeds)] for name in names}
    codes = list(codes)
    for code in codes:
        yield from planted(code, twins)
    if healthy_seeds:
        yield from alarms(codes, names, healthy_seeds)


def main(arguments: list[str] | None = None) -> None:
    codes = [code for code in sorted(RULES) if code not in NOT_PLANTED]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=2, help="of the networks in which faults are planted")
    parser.add_argument("--healthy", type=int, default=3, help="seeds of the healthy ones")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--rules", nargs="+", choices=codes, default=codes)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".csv"))
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)  # so small layers are slower on two
    rows = list(measured(given.rules, given.models, given.seeds, given.healthy))
    with given.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(Table(COLUMNS, [[str(row[name]) for name in COLUMNS] for row in rows], words=3))


if __name__ == "__main__":
    main()
