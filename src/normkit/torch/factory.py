"""From a short name of the catalog to a layer."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from normkit.core.algebra import groups_for
from normkit.core.catalog import find
from normkit.core.constraints import Integer, check
from normkit.core.schedule import RenormSchedule
from normkit.errors import NormValueError, message
from normkit.torch import layers

__all__ = ["norm_layer"]

# In a short run the running statistics must follow within it, and before the clips of renorm open.
_RENORM_MOMENTUM = 0.05


def norm_layer(name: str, num_features: int, spatial: int, *, steps: int | None = None) -> nn.Module:
    """Return a layer of that normalizer for inputs (N, C, *S).

    Args:
        name: short name in the catalog: batch, ghost, renorm, instance, group, layer, rms.
        num_features: channels C.
        spatial: number of axes in S: 0 for a table, 2 for an image.
        steps: length of the training; scales batch renormalization's schedule to it.

    Raises:
        NormValueError: for an unknown name (with the nearest ones), and where a normalizer has nothing to normalize
        over.
    """
    spec = find(name)
    check("norm_layer", _ARGUMENTS, {"num_features": num_features, "spatial": spatial})
    if spatial > 3:
        raise NormValueError(message("`spatial` must be at most 3", spatial))
    if name == "instance" and spatial == 0:
        hint = "use layer or group"
        raise NormValueError(message(f"{spec.name} needs spatial axes to normalize over", "a table (N, C)", hint))
    makers: dict[str, Callable[[], nn.Module]] = {
        "batch": lambda: _by_axes("BatchNorm", spatial)(num_features),
        "ghost": lambda: _by_axes("GhostBatchNorm", spatial)(num_features, virtual_batch_size=16),
        "renorm": lambda: _by_axes("BatchRenorm", spatial)(
            num_features,
            **({} if steps is None else {"schedule": RenormSchedule.for_steps(steps), "momentum": _RENORM_MOMENTUM}),
        ),
        "instance": lambda: _by_axes("InstanceNorm", spatial)(num_features, affine=True),
        # A group of few values keeps next to nothing of them: mean and variance are gone, and on a table nothing else
        # is there. Of 16 features at least, or of 4 maps.
        "group": lambda: layers.GroupNorm(
            groups_for(num_features, max(1, min(32, num_features // (4 if spatial else 16)))), num_features
        ),
        "layer": lambda: (layers.LayerNorm2d if spatial else layers.LayerNorm)(num_features),
        "rms": lambda: (layers.RMSNorm2d if spatial else layers.RMSNorm)(num_features),
    }
    return makers[name]()


_ARGUMENTS = {"num_features": Integer(1), "spatial": Integer(0)}


def _by_axes(family: str, spatial: int) -> Callable[..., nn.Module]:
    return getattr(layers, f"{family}{max(1, spatial)}d")
