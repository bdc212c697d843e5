"""The LSTM of `normkit compare` under the condition `sequences`: images read row by row, of different lengths."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from normkit.errors import NormValueError, message
from normkit.torch.layers import BatchNorm1d
from normkit.torch.recurrent import BatchNormLSTM, LayerNormLSTM

if TYPE_CHECKING:
    from normkit.experiments.protocol import BatchStatistics

__all__ = ["RowLSTM", "batch_statistics"]

_HIDDEN = 32


class RowLSTM(nn.Module):
    """Scores (N, classes) of images (N, C + 1, H, W), whose last channel is 1 where a row is real.

    A row is a step; the classifier sees the state behind the last real one. With one statistic over time only W x is
    normalized (arXiv:1510.01378), since U h of a later step is not known before: W and its norm then stand in front of
    an LSTM whose own W is the identity and stays it. So they do with statistics of each step of W x alone, whose norms
    share gamma and beta as those of arXiv:1603.09025 do. Weights start alike in every variant.

    Args:
        shape: (C, H, W) of the images.
        classes: outputs.
        norm: `none`, `batch` or `layer`.
        sequences: `counted`, `masked`, `inputs` or `steps`, which concerns batch norm alone.
        gamma: first value of the gains, None for that of the layer.
        seed: of the weights.

    Raises NormValueError for another norm.
    """

    def __init__(
        self, shape: tuple[int, ...], classes: int, norm: str, sequences: str, gamma: float | None, seed: int
    ) -> None:
        super().__init__()
        if norm not in ("none", "batch", "layer"):
            raise NormValueError(message("`sequences` must be asked of none, batch or layer", norm))
        channels, steps, width = shape
        features, gates = channels * width, 4 * _HIDDEN
        self.counted = sequences == "counted"
        self.front: nn.Linear | None = None
        self.norms: nn.ModuleList | None = None
        if norm == "batch" and sequences != "steps":
            self.front = nn.Linear(features, gates, bias=False)
            self.norms = nn.ModuleList(BatchNorm1d(gates) for _ in range(steps if sequences == "inputs" else 1))
            for later in self.norms[1:]:
                later.weight, later.bias = self.norms[0].weight, self.norms[0].bias
            self.lstm: nn.Module = nn.LSTM(gates, _HIDDEN, batch_first=True)
        elif norm == "batch":
            self.lstm = BatchNormLSTM(features, _HIDDEN, batch_first=True, max_steps=steps)
        elif norm == "layer":
            self.lstm = LayerNormLSTM(features, _HIDDEN, batch_first=True)
        else:
            self.lstm = nn.LSTM(features, _HIDDEN, batch_first=True)
        self.classifier = nn.Linear(_HIDDEN, classes)
        self._begin(seed, gamma)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        real = _real(x)
        rows = x[:, :-1].transpose(1, 2).flatten(2)
        if self.front is not None and self.norms is not None:
            rows = self._normalized(self.front(rows).transpose(1, 2), real).transpose(1, 2)
        out = self.lstm(rows)[0] if isinstance(self.lstm, nn.LSTM) else self.lstm(rows, mask=real)[0]
        scores: Tensor = self.classifier(out[torch.arange(len(out), device=out.device), real.sum(1) - 1])
        return scores

    def _normalized(self, products: Tensor, real: Tensor) -> Tensor:
        """W x (N, 4 hidden, T), by the statistics of all steps or of each."""
        assert self.norms is not None
        if len(self.norms) == 1:
            found: Tensor = self.norms[0](products, mask=None if self.counted else real)
            return found
        steps = []
        for t, norm in enumerate(self.norms):
            # A single sequence has no statistics of its own and takes the running ones, as in BatchNormLSTM.
            norm.train(self.training and int(real[:, t].sum()) > 1)
            steps.append(norm(products[:, :, t : t + 1], mask=real[:, t : t + 1]))
        return torch.cat(steps, 2)

    def _begin(self, seed: int, gamma: float | None) -> None:
        """Uniform in +-1/sqrt(hidden), as torch.nn has it, each weight from numbers of its own; biases 0."""
        own = dict(self.lstm.named_parameters())
        first = own["weight_ih_l0"] if self.front is None else self.front.weight
        with torch.no_grad():
            for number, weight in enumerate((first, own["weight_hh_l0"], self.classifier.weight)):
                drawn = np.random.default_rng([seed, 1, number]).uniform(-1, 1, weight.shape) / math.sqrt(_HIDDEN)
                weight.copy_(torch.from_numpy(drawn))
            for bias in (own["bias_ih_l0"], own["bias_hh_l0"], self.classifier.bias):
                bias.zero_()
            if self.front is not None:
                own["weight_ih_l0"].copy_(torch.eye(4 * _HIDDEN)).requires_grad_(False)
            if gamma is not None:
                for name, gain in self.named_parameters():
                    if name.startswith(("lstm.gamma", "norms.0.weight")):
                        gain.fill_(gamma)


def batch_statistics(network: RowLSTM, batches: Iterable[Tensor]) -> Iterator[BatchStatistics]:
    """The statistics that batch norm takes of each batch in training mode, in float64; none without batch norm.

    They are read where the layers keep them: with a momentum of 1 what is kept is the last batch's. It works on a copy.
    """
    from normkit.experiments.protocol import BatchStatistics

    copied = copy.deepcopy(network).double().train()
    layers = [module for module in copied.modules() if isinstance(module, BatchNorm1d | BatchNormLSTM)]
    if not layers:
        return
    for layer in layers:
        layer.momentum, layer.bessel = 1.0, False
    for x in batches:
        with torch.no_grad():
            copied(x.double())
        counts = torch.ones_like(_real(x)) if copied.counted else _real(x)
        counts = counts.sum().reshape(1) if copied.norms is not None and len(layers) == 1 else counts.sum(0)
        means, variances = (_kept(layers, name) for name in ("running_mean", "running_var"))
        yield BatchStatistics(counts.cpu().numpy(), means, variances)


def _kept(layers: Sequence[nn.Module], name: str) -> tuple[NDArray[np.float64], ...]:
    """What is kept under this name: (T, channels) of W x, U h and c, or of W x alone."""
    if isinstance(layers[0], BatchNormLSTM):
        found = [getattr(layers[0], f"{name}_{kind}_l0") for kind in ("ih", "hh", "c")]
    else:
        found = [torch.stack([getattr(layer, name) for layer in layers])]
    return tuple(tensor.cpu().numpy().copy() for tensor in found)


def _real(x: Tensor) -> Tensor:
    """Which rows are no padding, (N, T)."""
    return x[:, -1, :, 0] > 0
