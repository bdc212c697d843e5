"""What the papers say of training with EvoNorm, filter response norm and dynamic tanh, on scanned digits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

import normkit.torch as nk

pytestmark = pytest.mark.long
SEEDS = 5
EPOCHS = 30  # of the notes' common harness
POINTS = 0.03  # below that five seeds of 450 test images tell nothing (their standard error is 0.4 points)


def digits():
    x, y = load_digits(return_X_y=True)
    x = ((x - 4.9) / 6.0).astype(np.float32)  # mean and deviation of all pixels, rounded
    parts = train_test_split(x, y, test_size=450, stratify=y, random_state=0)
    return [torch.from_numpy(part) for part in parts]


def accuracy(build, seed, rate):
    """Of a network after a short training with batches of 32."""
    x, x_test, y, y_test = digits()
    torch.manual_seed(seed)
    network = build()
    optimizer = torch.optim.SGD(network.parameters(), lr=rate, momentum=0.9)
    steps = EPOCHS * (len(x) // 32)
    # The paper on filter response norm warms the rate up, and here all do.
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / (0.1 * steps)))
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(x)).split(32)[: len(x) // 32]:
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(x[batch]), y[batch]).backward()
            optimizer.step()
            schedule.step()
    network.eval()
    with torch.no_grad():
        return float((network(x_test).argmax(1) == y_test).float().mean())


def mean_accuracy(build, rate=0.05):
    return float(np.mean([accuracy(build, seed, rate) for seed in range(SEEDS)]))


def cnn(block):
    """Three convolutions, the last with one position left, so that a batch of 2 is seen as one."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 16, 3, stride=2), block(16),
        nn.Conv2d(16, 32, 3), block(32),
        nn.Flatten(), nn.Linear(32, 64), nn.Unflatten(1, (64, 1, 1)), block(64),
        nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip


def test_evonorm_s0_against_group_norm_and_silu():
    """REPRO 21, stat: within 3 points."""
    group = mean_accuracy(lambda: cnn(lambda c: nn.Sequential(nk.GroupNorm(4, c), nn.SiLU())))
    evonorm = mean_accuracy(lambda: cnn(lambda c: nk.EvoNormS0(c, 4)))
    assert abs(evonorm - group) <= POINTS, (evonorm, group)
    assert group > 0.9


def test_filter_response_norm_against_batch_norm_of_two():
    """REPRO 20, stat: with statistics of two samples each it is not behind batch norm."""
    batch = mean_accuracy(lambda: cnn(lambda c: nn.Sequential(nk.GhostBatchNorm2d(c, virtual_batch_size=2), nn.ReLU())))
    response = mean_accuracy(lambda: cnn(lambda c: nk.FilterResponseNorm(c, learn_eps=True)))
    assert response >= batch, (response, batch)


class Transformer(nn.Module):
    """Two blocks on the eight rows of an image."""

    def __init__(self, norm):
        super().__init__()
        self.embed = nn.Linear(8, 32)
        self.place = nn.Parameter(0.02 * torch.randn(8, 32))
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True, norm_first=True) for _ in range(2)
        )
        for block in self.blocks:
            block.norm1, block.norm2 = norm(32), norm(32)
        self.norm, self.last = norm(32), nn.Linear(32, 10)

    def forward(self, x):
        x = self.embed(x.reshape(-1, 8, 8)) + self.place
        for block in self.blocks:
            x = x + block._sa_block(block.norm1(x), None, None)
            x = x + block._ff_block(block.norm2(x))
        return self.last(self.norm(x).mean(1))


def test_dynamic_tanh_against_layer_norm():
    """REPRO 23, stat: at most 3 points behind in a transformer of 2 blocks."""
    layer, tanh = (mean_accuracy(lambda kind=kind: Transformer(kind)) for kind in (nk.LayerNorm, nk.DynamicTanh))
    assert tanh >= layer - POINTS, (tanh, layer)
    assert layer > 0.9
