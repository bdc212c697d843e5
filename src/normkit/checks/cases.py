"""What to begin with, as data: which norm for which data and batch size, what else, and on what evidence.

Numbers are those of the papers and threads that are named; what is a choice of ours is marked as one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

__all__ = ["CASES", "DATA", "FEW", "LINES", "REMARKS", "Case", "Fact", "Remark"]

DATA = ("images", "sequence", "table")
# Samples per forward pass on one device from which batch norm is the first choice: the least that a detector needed.
FEW = 16


class Fact(NamedTuple):
    """What was found, and where: an arXiv id, or an issue as repository#number."""

    words: str
    source: str


class Remark(NamedTuple):
    """What else to know or to try: a sentence, code by framework (`any`: all of them) where there is some, evidence."""

    words: str
    lines: Mapping[str, str] = {}
    facts: tuple[Fact, ...] = ()


class Case(NamedTuple):
    """The first choice for data of a kind, from a batch size on.

    Attributes:
        data: the kind.
        at_least: samples per forward pass on one device.
        norm: short name of the first choice.
        where: it stands.
        others: short names to compare it with.
        remarks: names of :data:`REMARKS`.
        facts: the evidence for it.
    """

    data: str
    at_least: int
    norm: str
    where: str
    others: tuple[str, ...]
    remarks: tuple[str, ...]
    facts: tuple[Fact, ...]


_GROUP_TABLE = Fact(
    "ResNet-50 on ImageNet, error by images per device: batch norm 23.6 % at 32, 24.8 % at 8, 27.3 % at 4, "
    "34.7 % at 2; group norm 24.0 to 24.2 % at all of these",
    "arXiv:1803.08494",
)
_SIXTEEN = Fact("a detector with 6 images per device was worse than with frozen norms, and needed 16", "PAA#10")
_BEFORE = Fact("the norm stands between the linear map and the activation", "arXiv:1502.03167")
_LAYER = Fact("layer norm does not depend on the batch size, and suits recurrent networks", "arXiv:1607.06450")
_PRE = Fact("with the norm inside the residual branch transformers train without warm-up", "arXiv:2002.04745")
_NOISE = Fact(
    "the mean of m values of deviation s is off by s / sqrt(m): in a dense layer m is the batch size",
    "arXiv:1809.00846",
)

_MAP = "between each linear map and its activation (before the activation)"
_CONV = "between each convolution and its activation (before the activation)"
_BRANCH = "first in every residual branch, x + block(norm(x)), and once before the head (pre-norm)"

# The first that fits.
CASES = (
    Case(
        "images", FEW, "batch", _CONV, ("none", "batch:after", "group"),
        ("bias", "rate", "dropout", "last batch", "momentum"), (_GROUP_TABLE, _SIXTEEN, _BEFORE),
    ),
    Case(
        "images", 1, "group", _CONV, ("batch", "renorm", "none"),
        ("accumulation", "renorm", "frozen", "sync", "groups", "rate"), (_GROUP_TABLE, _SIXTEEN),
    ),
    Case("sequence", 1, "layer", _BRANCH, ("rms", "none"), ("rms", "padding"), (_LAYER, _PRE)),
    Case(
        "table", FEW, "batch", _MAP, ("none", "batch:after", "layer"),
        ("inputs", "bias", "rate", "dropout", "last batch", "momentum"), (_BEFORE, _NOISE),
    ),
    Case(
        "table", 1, "layer", _MAP, ("none", "batch", "renorm"), ("inputs", "accumulation", "renorm"), (_LAYER, _NOISE)
    ),
)  # fmt: skip

_REPLACED = 'model = normkit.replace(model, {"batch": "renorm"})'
REMARKS = {
    "accumulation": Remark(
        "accumulating gradients is no larger batch to a batch norm: every forward pass takes its own statistics",
        facts=(Fact("asked again and again", "yolov5#1630"),),
    ),
    "bias": Remark(
        "the map before a batch norm needs no bias: the norm subtracts it again",
        facts=(Fact("an automatic check for it found a mistake in a model of its own", "allennlp#4990"),),
    ),
    "dropout": Remark(
        "try without dropout, or put it behind the last batch norm: before one, variances in training and evaluation "
        "differ",
        facts=(
            Fact("dropout that keeps half of a standard normal input doubles its variance", "arXiv:1801.05134"),
            Fact("the faster networks of the batch norm paper had none", "arXiv:1502.03167"),
        ),
    ),
    "frozen": Remark(
        "with pretrained weights, frozen batch norms are the usual way for small batches",
        {"any": "normkit.freeze(model)"},
        (_SIXTEEN,),
    ),
    "groups": Remark(
        "the number of groups must divide the channels, and 32 does not always: groups_for gives the nearest",
        {"any": "normkit.groups_for(72)"},
        (Fact("72 channels", "opacus#390"),),
    ),
    "inputs": Remark("standardize the columns first; normkit compare measures what it does: --inputs none,standard"),
    "last batch": Remark(
        "a last batch of one sample stops a batch norm over vectors, a small one has poor statistics: leave it out",
        {"torch": "loader = torch.utils.data.DataLoader(dataset, batch_size, shuffle=True, drop_last=True)"},
        (Fact("Expected more than 1 value per channel", "fastai#1352"),),
    ),
    "momentum": Remark(
        "short trainings need faster averages: with 0.99 the first values weigh 1 % after 458 steps, with 0.9 after 44",
        {
            "keras": "layer = keras.layers.BatchNormalization(momentum=0.9)",
            "nnx": "layer = nnx.BatchNorm(64, momentum=0.9, rngs=rngs)",
        },
        (Fact("validation loss went up and down by half until the momentum was 0.9", "keras#10666"),),
    ),
    "padding": Remark(
        "a batch norm would take padding into its statistics; layer and RMS norm treat every position by itself",
        facts=(Fact("masked statistics converged much better", "Multilingual_TTS#81"),),
    ),
    "rate": Remark(
        "with the norm in, try higher learning rates before anything else",
        facts=(Fact("Inception learned at a rate of 0.045, 30 times the one without", "arXiv:1502.03167"),),
    ),
    "renorm": Remark(
        "batch renormalization is between the two: statistics of the batch, corrected by the running ones",
        {"torch": _REPLACED},
        (Fact("Inception-v3 in groups of 4: 76.5 % against 74.2 % with batch norm", "arXiv:1702.03275"),),
    ),
    "rms": Remark(
        "RMS norm leaves the mean alone and costs less",
        {"torch": "norm = nn.RMSNorm(64)", "keras": "norm = keras.layers.RMSNormalization()",
         "nnx": "norm = nnx.RMSNorm(64, rngs=rngs)"},
        (Fact("7 to 64 % faster than layer norm", "arXiv:1910.07467"),),
    ),
    "sync": Remark(
        "on several devices the batch is that of all of them, if norms are synchronized",
        {
            "torch": "model = normkit.sync(model)",
            "keras": "layer = keras.layers.BatchNormalization(synchronized=True)",
        },
        (Fact("the normalization batch can be chosen by itself", "arXiv:1811.06992"),),
    ),
}  # fmt: skip

# One block as it is written, by data, norm and framework; `rngs` is nnx.Rngs(0).
LINES = {
    ("images", "batch", "torch"):
        "block = nn.Sequential(nn.Conv2d(3, 64, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU())",
    ("images", "group", "torch"):
        "block = nn.Sequential(nn.Conv2d(3, 64, 3), nn.GroupNorm(normkit.groups_for(64), 64), nn.ReLU())",
    ("sequence", "layer", "torch"):
        "block = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))  # x + block(x)",
    ("table", "batch", "torch"): "block = nn.Sequential(nn.Linear(16, 64, bias=False), nn.BatchNorm1d(64), nn.ReLU())",
    ("table", "layer", "torch"): "block = nn.Sequential(nn.Linear(16, 64), nn.LayerNorm(64), nn.ReLU())",
    ("images", "batch", "keras"):
        "block = [keras.layers.Conv2D(64, 3, use_bias=False), keras.layers.BatchNormalization(), keras.layers.ReLU()]",
    ("images", "group", "keras"):
        "block = [keras.layers.Conv2D(64, 3), keras.layers.GroupNormalization(normkit.groups_for(64)), "
        "keras.layers.ReLU()]",
    ("sequence", "layer", "keras"):
        'block = [keras.layers.LayerNormalization(), keras.layers.Dense(256, "gelu"), keras.layers.Dense(64)]  '
        "# x + block(x)",
    ("table", "batch", "keras"):
        "block = [keras.layers.Dense(64, use_bias=False), keras.layers.BatchNormalization(), keras.layers.ReLU()]",
    ("table", "layer", "keras"):
        "block = [keras.layers.Dense(64), keras.layers.LayerNormalization(), keras.layers.ReLU()]",
    ("images", "batch", "nnx"):
        "block = nnx.Sequential(nnx.Conv(3, 64, (3, 3), use_bias=False, rngs=rngs), nnx.BatchNorm(64, rngs=rngs), "
        "nnx.relu)",
    ("images", "group", "nnx"):
        "block = nnx.Sequential(nnx.Conv(3, 64, (3, 3), rngs=rngs), "
        "nnx.GroupNorm(64, num_groups=normkit.groups_for(64), rngs=rngs), nnx.relu)",
    ("sequence", "layer", "nnx"):
        "block = nnx.Sequential(nnx.LayerNorm(64, rngs=rngs), nnx.Linear(64, 256, rngs=rngs), nnx.gelu, "
        "nnx.Linear(256, 64, rngs=rngs))  # x + block(x)",
    ("table", "batch", "nnx"):
        "block = nnx.Sequential(nnx.Linear(16, 64, use_bias=False, rngs=rngs), nnx.BatchNorm(64, rngs=rngs), nnx.relu)",
    ("table", "layer", "nnx"):
        "block = nnx.Sequential(nnx.Linear(16, 64, rngs=rngs), nnx.LayerNorm(64, rngs=rngs), nnx.relu)",
}  # fmt: skip
