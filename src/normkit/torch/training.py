"""Training with PyTorch, as `normkit.experiments.protocol` asks for it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from normkit.torch.models import build, weighted_layers

__all__ = ["TorchTrainer", "limit_threads", "trainer", "versions"]


class TorchTrainer:
    """A network in training with SGD and momentum on the mean cross entropy, on the CPU."""

    def __init__(self, network: torch.nn.Module, *, lr: float, momentum: float) -> None:
        self.network = network
        self.optimizer = torch.optim.SGD(network.parameters(), lr=lr, momentum=momentum)

    def step(self, x: NDArray[np.float32], y: NDArray[np.int64]) -> float:
        """One update on a batch, in training mode. Returns the mean loss before it, in nats."""
        self.network.train()
        loss = F.cross_entropy(self.network(torch.from_numpy(x)), torch.from_numpy(y))
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item()

    def evaluate(self, x: NDArray[np.float32], y: NDArray[np.int64]) -> tuple[float, int]:
        """Sum of the losses and number of right answers, in evaluation mode; changes nothing."""
        self.network.eval()
        labels = torch.from_numpy(y)
        with torch.inference_mode():
            scores = self.network(torch.from_numpy(x))
            loss = F.cross_entropy(scores, labels, reduction="sum")
            return loss.item(), int((scores.argmax(1) == labels).sum())

    def weights(self) -> dict[str, NDArray[Any]]:
        """A copy of the weights of the dense and convolutional layers, by their order."""
        layers = weighted_layers(self.network)
        return {f"layer {number}": layer.weight.detach().numpy().copy() for number, layer in enumerate(layers)}


def trainer(
    *,
    model: str,
    shape: tuple[int, ...],
    classes: int,
    norm: str,
    position: str,
    lr: float,
    momentum: float,
    seed: int,
    steps: int,
) -> TorchTrainer:
    """A network with weights drawn from `seed`; raises NormValueError where this norm or model makes no sense."""
    network = build(model, shape=shape, classes=classes, norm=norm, position=position, steps=steps, seed=seed)
    return TorchTrainer(network, lr=lr, momentum=momentum)


def limit_threads(count: int) -> None:
    """Let this process compute with so many threads."""
    torch.set_num_threads(count)


def versions() -> dict[str, str]:
    """Names and versions of what trains."""
    return {"torch": torch.__version__}
