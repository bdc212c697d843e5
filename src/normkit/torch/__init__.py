"""normkit for PyTorch: drop-in layers, functions, a layer for every normalizer of the catalog, folded models."""

from normkit.kernels.registry import use_kernel as use_kernel
from normkit.torch import functional as functional
from normkit.torch.checkpoints import load_folded as load_folded
from normkit.torch.factory import norm_layer as norm_layer
from normkit.torch.layers import *  # noqa: F403
from normkit.torch.layers import __all__ as _layers

__all__ = ["functional", "load_folded", "norm_layer", "use_kernel", *_layers]
