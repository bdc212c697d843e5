"""normkit for Flax NNX: drop-in layers for those of `flax.nnx`, batch renormalization and ghost batches."""

from normkit.errors import MissingExtraError, message

try:
    import jax as _jax  # noqa: F401
    from flax import nnx as _nnx  # noqa: F401
except ModuleNotFoundError as error:
    if (error.name or "").split(".")[0] not in ("flax", "jax", "jaxlib"):
        raise
    raise MissingExtraError(message("normkit.nnx needs JAX and Flax", hint="pip install 'normkit[nnx]'")) from error

from normkit.nnx.further import *  # noqa: F403
from normkit.nnx.further import __all__ as _further
from normkit.nnx.layers import *  # noqa: F403
from normkit.nnx.layers import __all__ as _layers

__all__ = [*_layers, *_further]
