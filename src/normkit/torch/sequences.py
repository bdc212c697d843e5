"""The LSTM of `normkit compare` under the condition `sequences`: images read row by row, of different lengths."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn

from normkit.errors import NormValueError, message
from normkit.torch.layers import BatchNorm1d
from normkit.torch.recurrent import BatchNormLSTM, LayerNormLSTM

__all__ = ["RowLSTM"]

_HIDDEN = 32


class RowLSTM(nn.Module):
    """Scores (N, classes) of images (N, C + 1, H, W), whose last channel is 1 where a row is real.

    A row is a step; the classifier sees the state behind the last real one. With one statistic over time only W x is
    normalized (arXiv:1510.01378), since U h of a later step is not known before: W and its norm then stand in front of
    an LSTM whose own W is the identity and stays it. Weights start alike in every variant.

    Args:
        shape: (C, H, W) of the images.
        classes: outputs.
        norm: `none`, `batch` or `layer`.
        sequences: `counted`, `masked` or `steps`, which concerns batch norm alone.
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
        self.norm: BatchNorm1d | None = None
        if norm == "batch" and sequences != "steps":
            self.front, self.norm = nn.Linear(features, gates, bias=False), BatchNorm1d(gates)
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
        real = x[:, -1, :, 0] > 0
        rows = x[:, :-1].transpose(1, 2).flatten(2)
        if self.front is not None and self.norm is not None:
            products = self.front(rows).transpose(1, 2)
            rows = self.norm(products, mask=None if self.counted else real).transpose(1, 2)
        out = self.lstm(rows)[0] if isinstance(self.lstm, nn.LSTM) else self.lstm(rows, mask=real)[0]
        scores: Tensor = self.classifier(out[torch.arange(len(out), device=out.device), real.sum(1) - 1])
        return scores

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
                gains = [gain for name, gain in own.items() if name.startswith("gamma")]
                for gain in gains if self.norm is None else [self.norm.weight]:
                    gain.fill_(gamma)
