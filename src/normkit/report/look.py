"""What all pages have in common: colors, and the templates with their filters."""

from __future__ import annotations

import importlib
from typing import Any

from normkit.errors import MissingExtraError, message

__all__ = ["DARK", "LIGHT", "require", "template"]

# What a page calls its colours; every one of a variant has a contrast of at least 3 to the paper.
LIGHT = {"ink": "#23262b", "soft": "#5c636e", "faint": "#c6cad1", "paper": "#ffffff", "tint": "#f5f6f8"}
LIGHT |= {"v0": "#7a7f87", "v1": "#1766c2", "v2": "#0a8a9c", "v3": "#c2410c"}
LIGHT |= {"v4": "#178a4c", "v5": "#8a3ffc", "v6": "#c21d6b", "v7": "#9a6b00"}
DARK = {"ink": "#e7e9ec", "soft": "#a3aab5", "faint": "#444b55", "paper": "#15181c", "tint": "#1e2227"}
DARK |= {"v0": "#a6acb5", "v1": "#6cb0ff", "v2": "#3fd0e0", "v3": "#ff8f5a"}
DARK |= {"v4": "#4fd08a", "v5": "#b992ff", "v6": "#ff77b5", "v7": "#e0b04a"}


def require(*names: str) -> None:
    """Raise MissingExtraError where a package that a page needs is not installed."""
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError as error:
            must = f"the report needs {name}, which is not installed"
            raise MissingExtraError(message(must, hint="pip install 'normkit[lab]'")) from error


def template(name: str) -> Any:
    """A template of jinja2; `page.html.j2` is the page around the one that `body` names."""
    require("jinja2")
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("normkit.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["capital"] = lambda sentence: sentence[:1].upper() + sentence[1:]
    environment.filters["typeset"] = lambda sentence: sentence.replace(" %", "\u00a0%").replace("> ", ">\u00a0")
    environment.globals.update(light=LIGHT, dark=DARK)
    return environment.get_template(name)
