"""Small networks on scikit-learn's digits: trained in less than a second, tests of several rules share them."""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

__all__ = ["HELD_OUT", "LEARN", "accuracy", "dense", "fit", "images", "loader", "loss", "measured", "mixture"]

loss = nn.functional.cross_entropy
_SPLIT = 1200


def _digits() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    found = load_digits()
    x, y = torch.tensor(found.images[:, None] / 16.0, dtype=torch.float32), torch.tensor(found.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = x[order], y[order]
    return (x[:_SPLIT], y[:_SPLIT]), (x[_SPLIT:], y[_SPLIT:])


LEARN, HELD_OUT = _digits()


def loader(data: tuple[Tensor, Tensor] = LEARN, size: int = 32, shuffle: bool = True) -> DataLoader:
    """Batches in a random order that is the same in every run."""
    return DataLoader(TensorDataset(*data), size, shuffle=shuffle, generator=torch.Generator().manual_seed(3))


def mixture(kinds: int, size: int = 40) -> list[tuple[Tensor, Tensor]]:
    """Batches of so many classes each, in a random order of the batches."""
    random, (x, y) = torch.Generator().manual_seed(0), LEARN
    parts = []
    for first in range(0, 10, kinds):
        places = torch.where((y >= first) & (y < first + kinds))[0]
        places = places[torch.randperm(len(places), generator=random)]
        parts += [places[k : k + size] for k in range(0, len(places) - size + 1, size)]
    return [(x[parts[k]], y[parts[k]]) for k in torch.randperm(len(parts), generator=random).tolist()]


def dense(momentum: float = 0.1, dropout: float = 0.0, width: int = 64) -> nn.Sequential:
    """Three dense layers with batch norm; with dropout, that comes between activation and norm."""
    torch.manual_seed(1)
    parts: list[nn.Module] = [nn.Flatten()]
    for inputs in (64, width, width):
        norm, drop = nn.BatchNorm1d(width, momentum=momentum), [nn.Dropout(dropout)] if dropout else []
        after = [nn.ReLU(), *drop, norm] if dropout else [norm, nn.ReLU()]
        parts += [nn.Linear(inputs, width), *after]
    return nn.Sequential(*parts, nn.Linear(width, 10))


def images(momentum: float = 0.1, width: int = 8) -> nn.Sequential:
    """Three convolutions with batch norm."""
    torch.manual_seed(1)
    parts: list[nn.Module] = []
    for inputs, outputs in ((1, width), (width, width), (width, 2 * width)):
        parts += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs, momentum=momentum)]
        parts += [nn.ReLU()]
    parts.insert(6, nn.MaxPool2d(2))
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 10))


def fit(model: nn.Module, data: object, epochs: int, rate: float = 0.05, settle: bool = False) -> nn.Module:
    """Plain SGD; with `settle` the last third of the epochs at a tenth of the rate, as schedules end."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, rate, momentum=0.9)
    model.train()
    for epoch in range(epochs):
        if settle and epoch == epochs - epochs // 3:
            optimizer.param_groups[0]["lr"] = rate / 10
        for x, y in data:  # type: ignore[attr-defined]
            optimizer.zero_grad()
            loss(model(x), y).backward()
            optimizer.step()
    return model


@torch.no_grad()
def accuracy(model: nn.Module, data: tuple[Tensor, Tensor] = HELD_OUT) -> float:
    """In evaluation mode."""
    training = model.training
    right = (model.eval()(data[0]).argmax(1) == data[1]).float().mean().item()
    model.train(training)
    return right


@torch.no_grad()
def measured(model: nn.Module, data: tuple[Tensor, Tensor] = HELD_OUT, size: int = 0) -> float:
    """The loss in evaluation mode; with a size, batch norms take the statistics of batches of it, and keep theirs."""
    training = model.training
    buffers = {name: value.clone() for name, value in model.state_dict().items()}
    model.eval()
    if size:
        for layer in model.modules():
            layer.training = isinstance(layer, nn.modules.batchnorm._BatchNorm)
    parts = [data] if not size else list(zip(*(part.split(size) for part in data), strict=True))
    total = sum(float(loss(model(x), y)) * len(x) for x, y in parts)
    model.load_state_dict(buffers)
    model.train(training)
    return total / len(data[0])
