"""Normalization for neural networks, done properly: pick it, put it in, check it, make it fast, ship it.

`import normkit` imports no framework: public names are loaded when they are used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from normkit.checks.advice import advise as advise
    from normkit.checks.engine import check as check
    from normkit.core.algebra import groups_for as groups_for
    from normkit.errors import NormError as NormError
    from normkit.experiments import compare as compare
    from normkit.experiments.activations import activations as activations
    from normkit.studies import study as study
    from normkit.surgery.adaptation import adapt as adapt
    from normkit.surgery.conversion import port as port
    from normkit.surgery.folding import fold as fold
    from normkit.surgery.freezing import freeze as freeze
    from normkit.surgery.freezing import param_groups as param_groups
    from normkit.surgery.freezing import unfreeze as unfreeze
    from normkit.surgery.insertion import insert as insert
    from normkit.surgery.recalibration import recalibrate as recalibrate
    from normkit.surgery.replacement import remove as remove
    from normkit.surgery.replacement import replace as replace
    from normkit.surgery.synchronization import sync as sync
    from normkit.surgery.synchronization import unsync as unsync
    from normkit.teaching.steps import show as show

__version__ = "0.1.0"

# Public name -> the module that defines it. No module or package carries a public verb's name: importing it would
# replace the function of that name.
_HOME = {
    "NormError": "normkit.errors",
    "activations": "normkit.experiments.activations",
    "adapt": "normkit.surgery.adaptation",
    "advise": "normkit.checks.advice",
    "check": "normkit.checks.engine",
    "compare": "normkit.experiments",
    "fold": "normkit.surgery.folding",
    "freeze": "normkit.surgery.freezing",
    "groups_for": "normkit.core.algebra",
    "insert": "normkit.surgery.insertion",
    "param_groups": "normkit.surgery.freezing",
    "port": "normkit.surgery.conversion",
    "recalibrate": "normkit.surgery.recalibration",
    "remove": "normkit.surgery.replacement",
    "replace": "normkit.surgery.replacement",
    "show": "normkit.teaching.steps",
    "study": "normkit.studies",
    "sync": "normkit.surgery.synchronization",
    "unfreeze": "normkit.surgery.freezing",
    "unsync": "normkit.surgery.synchronization",
}
__all__ = ["__version__", *sorted(_HOME)]


def __getattr__(name: str) -> Any:
    try:
        home = _HOME[name]
    except KeyError:
        raise AttributeError(f"module 'normkit' has no attribute {name!r}") from None
    return getattr(importlib.import_module(home), name)


def __dir__() -> list[str]:
    return sorted(__all__)
