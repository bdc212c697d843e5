"""The commands that teach: `explain` tells of a normalizer or a rule, `list` names the normalizers."""

from __future__ import annotations

import contextlib
import json as json_module
import sys
from pathlib import Path
from typing import Annotated

import typer

from normkit.checks import pages
from normkit.checks.output import wrapped
from normkit.checks.rule import RULES, Rule
from normkit.cli.loading import inputs, writable
from normkit.core.catalog import CATALOG
from normkit.errors import NormValueError, message, nearest
from normkit.experiments.code import Code
from normkit.surgery import batches
from normkit.tables import Result
from normkit.teaching.explanations import explanation, listing
from normkit.teaching.steps import Steps, show

__all__ = ["explain", "normalizers"]

_FORMATS = {True: (".txt", ".json", ".html", ".svg"), False: (".txt", ".json", ".html")}  # with numbers, and without


def explain(
    name: Annotated[str, typer.Argument(help="A normalizer (batch; `normkit list` has all) or a rule (NK102).")],
    numbers: Annotated[
        bool, typer.Option("--numbers", help="Follow one small batch through the normalizer, step by step.")
    ] = False,
    data: Annotated[
        str | None,
        typer.Option(
            help="Your own batch for --numbers, (N, C, ...), (..., C) for layer and rms: an .npy file, an .npz file "
            "(its x, its x_train, else its first array), or file.py:name.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Write it too: .txt, .json, .html, or .svg of --numbers.", show_default=False),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print it as JSON and nothing else.")] = False,
) -> int:
    """Tell how a normalizer works and what goes wrong with it; or what a rule of `check` looks for, and what to do."""
    rule = RULES.get(name.upper())
    if rule is None and name not in CATALOG:
        must = "what is to be explained must be a known normalizer or rule"
        raise NormValueError(message(must, repr(name), _nearest(name)))
    if data is not None and not numbers:
        raise NormValueError(message("`--data` needs --numbers", repr(data)))
    if rule is not None:
        if numbers or out is not None:
            must = f"`{'--numbers' if numbers else '--out'}` needs a normalizer"
            raise NormValueError(message(must, f"the rule {rule.code}", ", ".join(CATALOG)))
        _print_rule(rule, json)
        return 0
    if out is not None:
        writable("--out", out)
        if out.suffix.lower() not in _FORMATS[numbers]:
            must = f"`--out` must end in {', '.join(_FORMATS[numbers])}"
            raise NormValueError(message(must, repr(str(out))))
    found: Result = _steps(name, data) if numbers else explanation(name)
    if out is not None:
        found.save(out)
    _print(found, json)
    if out is not None and not json:
        print(f"\nwritten: {out}")
    return 0


def normalizers(
    json: Annotated[bool, typer.Option("--json", help="Print it as JSON and nothing else.")] = False,
) -> int:
    """List every normalizer: its short name, what it normalizes, its layers and its paper."""
    _print(listing(), json)
    return 0


def _steps(name: str, source: str | None) -> Steps:
    if source is None:
        return show(name)
    try:
        with contextlib.redirect_stdout(sys.stderr):  # what the user's code prints is no result
            found = inputs(source, lambda label: Code.named(label).load())
            if not batches.whole(found):  # a loader, or a list of batches: the first one
                return show(name, next(batches.inputs(found, 1), ()))
            return show(name, found[0] if isinstance(found, tuple) else found)
    except KeyboardInterrupt:
        raise typer.Abort from None  # typer would end without a word


def _print(found: Result, json: bool) -> None:
    print(json_module.dumps(found.to_dict(), indent=1, allow_nan=False) if json else found)


def _print_rule(rule: Rule, json: bool) -> None:
    if json:
        named = {"code": rule.code, "title": rule.title, "story": rule.story, "url": rule.url}
        own = {"needs": list(rule.needs), "limits": dict(rule.limits), "frameworks": list(rule.frameworks)}
        print(json_module.dumps({**named, **own}, indent=1))
        return
    facts = "\n".join(line for what, words in pages.facts(rule) for line in wrapped(f"{what}: {words}", "    "))
    print(f"{rule.code}  {rule.title}\n\n{rule.story}\n\n{facts}\nsee: {rule.url}")


def _nearest(name: str) -> str:
    """The nearest names: those of rules for what looks like a code."""
    return nearest(name.upper(), RULES) if name.upper().startswith("NK") else nearest(name, CATALOG)
