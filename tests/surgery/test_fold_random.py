"""Random chains of layers: whatever is folded, the outputs stay, and the plan is right before it is tried."""

import random

import pytest
import torch
from architectures import randomized
from torch import nn

import normkit


def layer(draw, channels, width):
    """A layer for maps (N, channels, width, width)."""
    groups = draw.choice([1, 2]) if channels % 2 == 0 else 1
    out = groups * draw.choice([1, 2, 3])
    bias = draw.random() < 0.5
    border = draw.choice(["zeros", "circular", "reflect"])
    norms = [
        nn.BatchNorm2d(channels, affine=bias, eps=draw.choice([1e-5, 1e-3])),
        nn.BatchNorm2d(channels),
        nn.BatchNorm2d(channels, track_running_stats=False),
        nn.InstanceNorm2d(channels, affine=bias),
        nn.GroupNorm(groups, channels),
        nn.LayerNorm(width),
    ]
    maps = [
        nn.Conv2d(channels, out, 2, groups=groups, bias=bias, padding=draw.choice([0, 1]), padding_mode=border),
        nn.Conv2d(channels, 2 * channels, 1, groups=channels, bias=bias),
        nn.ConvTranspose2d(channels, out, 2, groups=groups, bias=bias),
        nn.Linear(width, 5, bias=bias),
    ]
    moves = [nn.Dropout(), nn.ReflectionPad2d(1), nn.ChannelShuffle(groups), nn.PixelUnshuffle(1)]
    return draw.choice(draw.choice([norms, norms, maps, maps, moves, [nn.ReLU()]]))


@pytest.mark.parametrize("seed", [*range(8), *(pytest.param(n, marks=pytest.mark.long) for n in range(8, 100))])
def test_a_random_chain(seed):
    draw = random.Random(seed)
    torch.manual_seed(seed)
    x, layers = torch.randn(2, 4, 6, 6).double(), []
    y = x.float()
    for _ in range(draw.randint(3, 7)):
        if len(set(y.shape[2:])) == 1:  # a linear map makes them unequal; then the chain ends
            layers.append(layer(draw, *y.shape[1:3]))
            y = layers[-1].eval()(y)
    model = randomized(nn.Sequential(*layers)).double()
    folded, report = normkit.fold(model, x, return_report=True)
    assert not any(edit.reason.startswith("folded,") for edit in report.kept), report
    for inputs in (x, 3 * torch.randn(5, 4, 6, 6).double()):
        want = model(inputs)
        # 1e-16 per rounding, through at most seven layers.
        assert (folded(inputs) - want).abs().max() <= 1e-12 * want.abs().max(), report
