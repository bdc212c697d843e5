"""The commands that change a model of the user's and write its weights."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import typer

from normkit.cli.loading import Checkpoint, Data, Model, builder, function, inputs, loaded, writable
from normkit.errors import NormValueError, message
from normkit.experiments.code import Code, call
from normkit.experiments.protocol import training
from normkit.files import save
from normkit.surgery import batches, folding, insertion, recalibration, replacement
from normkit.surgery.plan import Report
from normkit.surgery.protocol import recording
from normkit.tables import Result, plain

__all__ = ["EXIT_CODES", "VERBS"]

EXIT_CODES = (
    "Exit codes: 0 done, 2 bad input or usage, 130 interrupted, 1 anything else, such as a full disk. Whatever goes "
    "wrong, the file under --out stays as it was. A checkpoint is read without running code from it; file.py is run."
)
_EXAMPLE = 8  # samples that a model is looked into with

_Out = Annotated[
    Path | None,
    typer.Option(help="State dict to write, .pt or .safetensors. Needed unless --dry-run.", show_default=False),
]
_DryRun = Annotated[bool, typer.Option("--dry-run", help="Print what would be done and write nothing.")]
_Json = Annotated[bool, typer.Option("--json", help="Print the report as JSON and nothing else.")]


class _Files(NamedTuple):
    """What all these commands are given."""

    model: str
    checkpoint: Path | None
    data: str | None
    out: Path | None
    dry_run: bool
    json: bool


def fold(
    model: Model,
    data: Data,
    checkpoint: Checkpoint = None,
    out: _Out = None,
    dry_run: _DryRun = False,
    json: _Json = False,
) -> int:
    """Fold norms into the linear maps beside them: the same outputs in evaluation mode from fewer operations.

    The result has other layers than build() gives. What is printed shows how to load it: normkit.torch.load_folded.
    """

    def change(network: Any, inputs: Any) -> Any:
        return folding.fold(network.eval(), _example(inputs), inplace=True, dry_run=dry_run, return_report=True)

    files = _Files(model, checkpoint, data, out, dry_run, json)
    recipe = ["import normkit.torch", f"model = normkit.torch.load_folded({function(model)}(), state)"]
    return _carry_out("fold", files, change, recipe)


def recalibrate(
    model: Model,
    data: Data,
    checkpoint: Checkpoint = None,
    exact: Annotated[bool, typer.Option("--exact", help="Layer by layer, one pass over the data for each.")] = False,
    steps: Annotated[
        int | None, typer.Option(help="Take so many batches, at most. [default: all]", show_default=False)
    ] = None,
    out: _Out = None,
    dry_run: _DryRun = False,
    json: _Json = False,
) -> int:
    """Replace the running statistics of every batch norm by those of the whole data."""

    def change(network: Any, inputs: Any) -> Any:
        return recalibration.recalibrate(network, inputs, exact=exact, steps=steps, return_report=True)

    files = _Files(model, checkpoint, data, out, dry_run, json)
    return _carry_out("recalibrate", files, change, [f"model = {function(model)}()", "model.load_state_dict(state)"])


def insert(
    model: Model,
    norm: Annotated[str, typer.Option(help="Short name of the norm: batch, group, ...")],
    data: Data,
    placement: Annotated[str, typer.Option(help="before or after the activation.")] = "before",
    init: Annotated[
        str, typer.Option(help="fresh, or identity: in evaluation mode the outputs stay as they are.")
    ] = "fresh",
    checkpoint: Checkpoint = None,
    out: _Out = None,
    dry_run: _DryRun = False,
    json: _Json = False,
) -> int:
    """Put norms behind the linear maps of a model, wherever an activation follows."""
    where = {} if placement == "before" else {"placement": placement}

    def change(network: Any, inputs: Any) -> Any:
        options: dict[str, Any] = {**where, "init": init, "dry_run": dry_run}
        return insertion.insert(network, norm, _example(inputs), **options, return_report=True)

    files = _Files(model, checkpoint, data, out, dry_run, json)
    options = "".join(f", {name}={value!r}" for name, value in where.items())
    made = f"model = normkit.insert({function(model)}(), {norm!r}, x{options})  # x: inputs of the same shape"
    return _carry_out("insert", files, change, ["import normkit", made, "model.load_state_dict(state)"])


def replace(
    model: Model,
    norms: Annotated[str, typer.Option(help="What becomes what, OLD:NEW,...: batch:group")],
    groups: Annotated[
        int | None, typer.Option(help="Of new group norms. [default: at most 32]", show_default=False)
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(help="Inputs as for the other commands, to measure the change.", show_default=False),
    ] = None,
    checkpoint: Checkpoint = None,
    out: _Out = None,
    dry_run: _DryRun = False,
    json: _Json = False,
) -> int:
    """Turn norms into other norms, with everything carried over that both have."""
    pairs = [pair.strip().partition(":") for pair in norms.split(",")]
    if not all(old and new for old, _, new in pairs):
        raise NormValueError(message("`--norms` must be pairs OLD:NEW separated by commas", repr(norms), "batch:group"))
    named = {old: new for old, _, new in pairs}

    def change(network: Any, inputs: Any) -> Any:
        example = None if inputs is None else _example(inputs)
        options: dict[str, Any] = {"example": example, "groups": groups, "dry_run": dry_run}
        return replacement.replace(network, named, **options, return_report=True)

    files = _Files(model, checkpoint, data, out, dry_run, json)
    options = "" if groups is None else f", groups={groups}"
    made = f"model = normkit.replace({function(model)}(), {named!r}{options})"
    return _carry_out("replace", files, change, ["import normkit", made, "model.load_state_dict(state)"])


VERBS: tuple[Callable[..., int], ...] = (insert, replace, fold, recalibrate)


def _carry_out(verb: str, files: _Files, change: Callable[[Any, Any], Any], recipe: list[str]) -> int:
    """Change a model, write it, report.

    `change(model, data)` gives the report, or (model, report). `recipe` says how to load what was written: lines of
    Python that make `model` from `state`, the user's function and inputs `x`. They are run before anything is written.
    """
    torch = training("torch")  # first of all, so that it is this that is missing where PyTorch is

    def user(label: str) -> Any:
        return Code.named(label).load(torch.no_training)

    try:
        _check_out(files)
        with contextlib.redirect_stdout(sys.stderr):  # what the user's code prints is no result
            print(f"{verb} {files.model}")
            build = builder(files.model, user)
            network = loaded(build, files.checkpoint)
            data = None if files.data is None else inputs(files.data, user)
            done = call(files.model, change, network, data)
            network, report = done if isinstance(done, tuple) else (None, done)
            lines = [] if files.out is None or files.dry_run else _written(network, files, build, data, recipe)
    except KeyboardInterrupt:
        raise typer.Abort from None  # typer would end without a word
    if isinstance(report, Report):
        report = dataclasses.replace(report, notes=())  # they are about optimizers, and there is none
    _show(report, files, lines)
    return 0


def _check_out(files: _Files) -> None:
    """Find before the work what would fail after it."""
    from normkit.torch.checkpoints import check_suffix

    if files.dry_run:
        return
    if files.out is None:
        raise NormValueError(message("`--out` must name the file to write", hint="or ask with --dry-run"))
    check_suffix(files.out)
    writable("--out", files.out)


def _example(data: Any) -> Any:
    """The first samples."""

    def cut(x: Any) -> Any:
        if isinstance(x, Mapping):
            return {name: cut(value) for name, value in x.items()}
        if isinstance(x, tuple | list):
            return tuple(map(cut, x))
        return x[:_EXAMPLE] if hasattr(x, "shape") else x

    first = next(batches.inputs(data), None)
    if first is None:
        raise NormValueError(message("`--data` must hold at least one batch", "none"))
    return cut(first)


def _written(model: Any, files: _Files, build: Callable[[], Any], data: Any, recipe: list[str]) -> list[str]:
    """Write the state dict, and return how to load it, which was tried before."""
    from normkit.torch.checkpoints import from_bytes, to_bytes

    assert files.out is not None
    name = function(files.model)
    content = to_bytes(model.state_dict(), files.out)
    known = {name: build, "state": from_bytes(content, files.out)}
    if data is not None:
        known["x"] = _example(data)
    try:
        exec("\n".join(recipe), known)
        same = data is None or _same_outputs(model, known["model"], known["x"])
    except Exception as error:
        must = f"weights must load into what {name}() gives the next time"
        raise NormValueError(message(must, f"{type(error).__name__}: {error}")) from error
    if not same:
        must = "outputs must depend on nothing but weights in the state dict, or they cannot be written"
        raise NormValueError(message(must, "other outputs after loading", "make it a parameter or a persistent buffer"))
    save(files.out, content, "`--out`")
    safe = files.out.suffix == ".safetensors"
    read = f"load_file({str(files.out)!r})" if safe else f"torch.load({str(files.out)!r}, weights_only=True)"
    return ["from safetensors.torch import load_file" if safe else "import torch", f"state = {read}", *recipe]


def _same_outputs(model: Any, other: Any, x: Any) -> bool:
    """Whether two models give the same in evaluation mode, bit by bit: they compute the same on the same numbers."""
    side = recording("torch")

    def outputs(model: Any) -> np.ndarray:
        with side.watching(model, (), lambda _, measure: measure()) as forward:
            return side.array(forward(x))

    return np.array_equal(outputs(model), outputs(other), equal_nan=True)


def _show(report: Result, files: _Files, lines: list[str]) -> None:
    if files.json:
        out = None if files.dry_run else str(files.out)
        print(json.dumps({**plain(report.to_dict()), "out": out, "load": lines}, indent=1, allow_nan=False))
        return
    print(report)
    if lines:
        print(f"\nwritten: {files.out}\nload it with\n" + "\n".join(f"    {line}" for line in lines))
