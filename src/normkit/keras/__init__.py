"""normkit for Keras 3, on TensorFlow, JAX and PyTorch: drop-in layers, and plain ones for shipping.

A `.keras` file with these layers needs `import normkit.keras` before it is loaded.
"""

import os as _os

from normkit.errors import MissingExtraError, NormValueError, message

try:
    import keras as _keras

    if _keras.config.backend() not in ("tensorflow", "jax", "torch"):
        raise ValueError
except ModuleNotFoundError as error:
    missing = (error.name or "").partition(".")[0]
    if missing == "keras":
        must = "normkit.keras needs Keras 3 and one of its backends: TensorFlow, JAX or PyTorch"
        raise MissingExtraError(message(must, hint="pip install 'normkit[keras]'")) from error
    must = f"Keras needs its backend, {missing}, which is not installed"
    hint = f"pip install {missing}, or set KERAS_BACKEND to tensorflow, jax or torch, whichever is there"
    raise MissingExtraError(message(must, hint=hint)) from error
except ValueError as error:
    must = "KERAS_BACKEND must be tensorflow, jax or torch"
    raise NormValueError(message(must, repr(_os.environ.get("KERAS_BACKEND")))) from error

from normkit.keras.further import *  # noqa: F403
from normkit.keras.further import __all__ as _further
from normkit.keras.layers import *  # noqa: F403
from normkit.keras.layers import __all__ as _layers
from normkit.keras.plain import as_plain as as_plain
from normkit.keras.recurrent import *  # noqa: F403
from normkit.keras.recurrent import __all__ as _recurrent

__all__ = ["as_plain", *_layers, *_further, *_recurrent]
