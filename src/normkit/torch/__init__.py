"""normkit for PyTorch: drop-in layers, functions, a layer for every normalizer of the catalog, folded models."""

from normkit.kernels.registry import use_kernel as use_kernel
from normkit.torch import functional as functional
from normkit.torch.checkpoints import load_folded as load_folded
from normkit.torch.constant import FrozenBatchNorm2d as FrozenBatchNorm2d
from normkit.torch.factory import norm_layer as norm_layer
from normkit.torch.further import *  # noqa: F403
from normkit.torch.further import __all__ as _further
from normkit.torch.layers import *  # noqa: F403
from normkit.torch.layers import __all__ as _layers
from normkit.torch.normalizer_free import *  # noqa: F403
from normkit.torch.normalizer_free import __all__ as _without
from normkit.torch.recurrent import *  # noqa: F403
from normkit.torch.recurrent import __all__ as _recurrent
from normkit.torch.synchronized import SyncBatchNorm as SyncBatchNorm
from normkit.torch.weights import *  # noqa: F403
from normkit.torch.weights import __all__ as _weights

__all__ = ["FrozenBatchNorm2d", "SyncBatchNorm", "functional", "load_folded", "norm_layer", "use_kernel"]
__all__ += [*_layers, *_further, *_recurrent, *_without, *_weights]
