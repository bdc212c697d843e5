"""What is told of every normalizer besides its spec: a line, its layers, its pitfalls. By the short names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

__all__ = ["ENTRIES", "Entry"]


@dataclass(frozen=True)
class Entry:
    """One normalizer.

    Attributes:
        line: what it does, in a line.
        source: the file of the package and the class whose docstring tells of it.
        pitfalls: what goes wrong with it, and what helps.
        torch, keras, nnx: names of its layers in each framework; empty where there is none.
    """

    line: str
    source: tuple[str, str]
    pitfalls: tuple[str, ...]
    torch: tuple[str, ...] = ()
    keras: tuple[str, ...] = ()
    nnx: tuple[str, ...] = ()


def _sized(name: str) -> tuple[str, ...]:
    return tuple(f"{name}{axes}d" for axes in (1, 2, 3))


_LAYERS, _FURTHER = "torch/layers.py", "torch/further.py"
_AS_ACTIVATION = "It is the activation as well: put no further one behind it."
_ENTRIES = {
    "batch": Entry(
        "each channel over the samples and positions of the batch",
        (_LAYERS, "_BatchNorm"),
        (
            "Few samples in a forward pass make noisy statistics: with fewer than 16 or so try `group` or `renorm`. "
            "Accumulated gradients do not help.",
            "Evaluation is wrong until the running values have forgotten their first ones, and after the data or the "
            "weights have changed much: `normkit.recalibrate(model, data)`.",
            "A last batch of a single sample has no variance: drop it, or shuffle it in.",
            "Padding and repeated positions count like data, unless the layer is given a `mask`.",
            "`momentum` is the weight of the new batch in PyTorch and one minus it in Keras and Flax.",
            "A bias right before it is subtracted again: leave it out.",
        ),
        _sized("BatchNorm"),
        ("BatchNormalization",),
        ("BatchNorm",),
    ),
    "ghost": Entry(
        "batch norm over groups of so many samples, for large batches",
        (_LAYERS, "_GhostBatchNorm"),
        (
            "Consecutive samples form a group: data that is not shuffled makes groups of one kind.",
            "The size of a group replaces the batch size wherever noise matters, so it is to be chosen like one.",
            "Evaluation is that of batch norm, with all its pitfalls.",
        ),
        _sized("GhostBatchNorm"),
        ("GhostBatchNormalization",),
        ("GhostBatchNorm",),
    ),
    "renorm": Entry(
        "batch norm, corrected towards its running values, for small batches",
        (_LAYERS, "_BatchRenorm"),
        (
            "The clips open by a schedule in steps. The paper's is made for 130 000 of them: a short run never leaves "
            "batch norm unless it is given `RenormSchedule.for_steps(steps)`.",
            "Running values that lag behind are corrected towards: take a momentum that follows before the clips open.",
            "A kept standard deviation is no variance: `normkit.port` converts it.",
        ),
        _sized("BatchRenorm"),
        ("BatchRenormalization",),
        ("BatchRenorm",),
    ),
    "instance": Entry(
        "each channel of each sample over its positions",
        (_LAYERS, "_InstanceNorm"),
        (
            "Level and contrast of every channel are gone: right for style, wrong where they are what is to be told.",
            "Maps of one position have no variance: 1 x 1 maps and tables cannot be normalized so.",
            "PyTorch makes it without gamma and beta unless asked.",
        ),
        _sized("InstanceNorm"),
        ("InstanceNormalization",),
        ("InstanceNorm",),
    ),
    "group": Entry(
        "groups of channels of each sample over their channels and positions",
        (_LAYERS, "GroupNorm"),
        (
            "The groups must divide the channels: `normkit.groups_for(72)` says 24.",
            "Groups of few values keep next to nothing of them: a group of one value becomes beta, of two the sign.",
            "A bias before it is not subtracted again, unless every channel is a group.",
        ),
        ("GroupNorm",),
        ("GroupNormalization",),
        ("GroupNorm",),
    ),
    "layer": Entry(
        "each sample, or each position of a sequence, over its features",
        (_LAYERS, "LayerNorm"),
        (
            "Of two features only the sign of their difference is left: 1 and 200 become -1 and 1.",
            "On images (N, C, H, W) PyTorch's LayerNorm takes the last axes; over the channels it is LayerNorm2d.",
            "Features on unlike scales: the largest one makes the mean and the variance. Scale the inputs first.",
        ),
        ("LayerNorm", "LayerNorm2d"),
        ("LayerNormalization",),
        ("LayerNorm",),
    ),
    "rms": Entry(
        "layer norm without the mean: divided by the root mean square",
        (_LAYERS, "RMSNorm"),
        (
            "The mean stays: with a large common offset all features come out near 1.",
            "eps differs between implementations, None being the machine epsilon in PyTorch: small inputs show it.",
            "Squares of half precision overflow above 255 where they are not accumulated in float32, as here.",
            "Weights for a gain of 1 + w are not those for w: Gemma has the one, Llama the other.",
        ),
        ("RMSNorm", "RMSNorm2d"),
        ("RMSNormalization",),
        ("RMSNorm",),
    ),
    "frn": Entry(
        "each channel of each sample over its positions, without the mean, and a threshold",
        (_FURTHER, "FilterResponseNorm"),
        (
            _AS_ACTIVATION,
            "Channels of one position are left with their sign: there eps has to be learned.",
            "The paper warms the learning rate up.",
        ),
        ("FilterResponseNorm",),
        ("FilterResponseNormalization",),
        ("FilterResponseNorm",),
    ),
    "evonorm_b0": Entry(
        "norm and activation in one, with the variances of batch and instance",
        (_FURTHER, "EvoNormB0"),
        (
            _AS_ACTIVATION,
            "It keeps the variance of the batch, with batch norm's trouble in small batches and early evaluation.",
        ),
        ("EvoNormB0",),
        ("EvoNormB0",),
        ("EvoNormB0",),
    ),
    "evonorm_s0": Entry(
        "norm and activation in one, with the variance of groups of channels",
        (_FURTHER, "EvoNormS0"),
        (_AS_ACTIVATION, "The groups must divide the channels."),
        ("EvoNormS0",),
        ("EvoNormS0",),
        ("EvoNormS0",),
    ),
    "dyt": Entry(
        "gamma tanh(alpha x) + beta in the place of layer norm, without statistics",
        (_FURTHER, "DynamicTanh"),
        (
            "Nothing adapts to the size of the input: where alpha x is far above 1 the gradient is gone.",
            "The first alpha matters; the paper takes another one in attention than elsewhere for large models.",
        ),
        ("DynamicTanh",),
        ("DynamicTanh",),
        ("DynamicTanh",),
    ),
    "grn": Entry(
        "channels scaled by their size among the others, behind an activation",
        (_FURTHER, "GlobalResponseNorm"),
        (
            "A new layer passes its input on: gamma and beta begin at 0.",
            "It stands behind the activation, within a block, and does not take a normalizer's place.",
        ),
        ("GlobalResponseNorm",),
        ("GlobalResponseNormalization",),
        ("GlobalResponseNorm",),
    ),
}
ENTRIES: Mapping[str, Entry] = MappingProxyType(_ENTRIES)
