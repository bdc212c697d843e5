"""normkit for Keras 3, on TensorFlow, JAX and PyTorch: drop-in layers, and plain ones for shipping.

A `.keras` file with these layers needs `import normkit.keras` before it is loaded.
"""

from normkit.errors import MissingExtraError, message

try:
    import keras as _keras  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "keras":  # Keras is there, its backend is not: Keras' own words
        raise
    must = "normkit.keras needs Keras 3 and one of its backends: TensorFlow, JAX or PyTorch"
    raise MissingExtraError(message(must, hint="pip install 'normkit[keras]'")) from error

from normkit.keras.further import *  # noqa: F403
from normkit.keras.further import __all__ as _further
from normkit.keras.layers import *  # noqa: F403
from normkit.keras.layers import __all__ as _layers
from normkit.keras.plain import as_plain as as_plain
from normkit.keras.recurrent import *  # noqa: F403
from normkit.keras.recurrent import __all__ as _recurrent

__all__ = ["as_plain", *_layers, *_further, *_recurrent]
