"""The commands that look: `check` finds mistakes, `advise` says what to begin with."""

from __future__ import annotations

import contextlib
import json as json_module
import sys
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from normkit.checks import advice, engine
from normkit.checks.cases import DATA
from normkit.checks.findings import Diagnosis
from normkit.checks.fixes import VERBS
from normkit.checks.output import github as annotated
from normkit.checks.settings import Settings, comments, configured
from normkit.cli.loading import Checkpoint, Model, builder, function, inputs, loaded, writable
from normkit.errors import NormTypeError, NormValueError, message
from normkit.experiments.code import Code, call
from normkit.experiments.config import is_reference
from normkit.files import save
from normkit.frameworks import FRAMEWORKS, framework_of, part

__all__ = ["EXIT_CODES", "advise", "check"]

EXIT_CODES = (
    "Exit codes: 0 no finding of severity `error`, 1 such a finding (or a file that could not be written), 2 bad input "
    "or usage, 130 interrupted. file.py is run; a checkpoint is read without running code from it."
)
_FRAMEWORKS = ("torch", "keras")
_REPORTS = (".txt", ".json", ".html")


class _Outputs(NamedTuple):
    """Where the result goes."""

    json: bool
    github: bool
    out: Path | None
    fixed_out: Path | None


def check(
    model: Model,
    data: Annotated[
        str | None,
        typer.Option(
            help="Inputs, or inputs and targets: an .npz file (its x and y, or x_train and y_train), an .npy file, or "
            "file.py:name for arrays, a pair of them, a loader, or a function that returns one.",
            show_default=False,
        ),
    ] = None,
    checkpoint: Checkpoint = None,
    loss: Annotated[
        str | None,
        typer.Option(
            help=f"{', '.join(engine.LOSSES)}, or file.py:name of a function of (outputs, targets). [default: the "
            "model's own, else outputs are compared]",
            show_default=False,
        ),
    ] = None,
    optimizer: Annotated[
        str | None,
        typer.Option(help="file.py:name of a function that makes it from the model.", show_default=False),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help=f"Batches to look at, at most. [default: {engine.STEPS}]", show_default=False)
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Samples per batch, for data that is arrays.", show_default=False)
    ] = None,
    select: Annotated[
        str | None,
        typer.Option(help="Rules to ask, or their beginnings: NK1,NK203. [default: all]", show_default=False),
    ] = None,
    ignore: Annotated[str | None, typer.Option(help="Rules not to ask, likewise.", show_default=False)] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the diagnosis as JSON and nothing else.")] = False,
    github: Annotated[bool, typer.Option("--github", help="Print annotations for GitHub Actions instead.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="Write the diagnosis too: .html, .json or .txt.", show_default=False)
    ] = None,
    fix: Annotated[
        bool, typer.Option("--fix", help="Do what can be done safely, check again, undo it where that is worse.")
    ] = False,
    fix_unsafe: Annotated[
        bool, typer.Option("--fix-unsafe", help="Also what changes the model so that it has to be trained again.")
    ] = False,
    fixed_out: Annotated[
        Path | None,
        typer.Option(help="Weights of the repaired model: .pt, .safetensors, .weights.h5.", show_default=False),
    ] = None,
) -> int:
    """Find normalization mistakes in a model, PyTorch or Keras, with evidence.

    Settings are read from [tool.normkit.check] of the nearest pyproject.toml (select, ignore, steps, limits, allow),
    and from comments in file.py: `# normkit: ignore[NK601] backbone.*`.
    """
    outputs = _Outputs(json, github, out, fixed_out)
    _check_usage(outputs, fix or fix_unsafe)
    own = configured(Path())
    settings = Settings.of(
        own.get("select") if select is None else _listed(select),
        own.get("ignore") if ignore is None else _listed(ignore),
        own.get("limits"),
        own.get("allow"),
    )

    def user(label: str) -> Any:
        return Code.named(label).load()

    try:
        with contextlib.redirect_stdout(sys.stderr):  # what the user's code prints is no result
            print(f"check {model}")
            build = builder(model, user, _FRAMEWORKS)
            network = loaded(build, checkpoint)
            checkpoints = part(framework_of(network), "checkpoints")
            if fixed_out is not None:
                checkpoints.check_suffix(fixed_out)
            file = Path(model.rpartition(":")[0])
            settings = settings.allowing(comments(file.read_text(encoding="utf-8"), file.name))
            found = call(
                model,
                engine.check,
                network,
                None if data is None else inputs(data, user, labels=True),
                optimizer=None if optimizer is None else _optimizer(optimizer, user, network),
                loss=user(loss) if loss is not None and is_reference(loss) else loss,
                steps=own.get("steps", engine.STEPS) if steps is None else steps,
                batch_size=batch_size,
                select=settings.select,
                ignore=settings.ignore,
                limits=settings.limits,
                allow=settings.allow,
            )
            if fix or fix_unsafe:
                found = call(model, found.fix, fix_unsafe)
            written = _weights(network, found, fixed_out, model) if fixed_out is not None else ()
    except KeyboardInterrupt:
        raise typer.Abort from None  # typer would end without a word
    _show(found, outputs, model, written)
    return 1 if found.errors else 0


def advise(
    batch_size: Annotated[int, typer.Option(help="Samples per forward pass on one device.")],
    data: Annotated[str, typer.Option(help=f"What they are: {', '.join(DATA)}.")],
    model: Annotated[
        str | None, typer.Argument(help="file.py:build, to look at its norms.", show_default=False)
    ] = None,
    framework: Annotated[
        str | None,
        typer.Option(help=f"{', '.join(sorted(FRAMEWORKS))}. [default: the model's, else torch]", show_default=False),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print it as JSON and nothing else.")] = False,
) -> int:
    """Say at once which normalization to begin with, where, what else, on what evidence, and how to test it."""
    try:
        with contextlib.redirect_stdout(sys.stderr):
            network = None
            if model is not None:
                network = builder(model, lambda label: Code.named(label).load(), tuple(FRAMEWORKS))()
            found = advice.advise(network, batch_size=batch_size, data=data, framework=framework, name=model)
    except KeyboardInterrupt:
        raise typer.Abort from None  # typer would end without a word
    print(json_module.dumps(found.to_dict(), indent=1) if json else found)
    return 0


def _check_usage(outputs: _Outputs, fixing: bool) -> None:
    if outputs.json and outputs.github:
        raise NormValueError(message("one of --json and --github must be chosen", "both"))
    if fixing and outputs.fixed_out is None:
        raise NormValueError(message("`--fixed-out` must name the file for the repaired weights", "none"))
    if outputs.fixed_out is not None and not fixing:
        raise NormValueError(message("`--fixed-out` needs --fix, or --fix-unsafe", "neither"))
    for option, path in (("--out", outputs.out), ("--fixed-out", outputs.fixed_out)):
        if path is not None:
            writable(option, path)
    if outputs.out is not None and outputs.out.suffix.lower() not in _REPORTS:
        must = f"`--out` must end in {', '.join(_REPORTS)}"
        raise NormValueError(message(must, repr(str(outputs.out)), "weights go to --fixed-out"))


def _listed(text: str) -> list[str]:
    return [code.strip() for code in text.split(",") if code.strip()]


def _optimizer(label: str, user: Any, network: Any) -> Any:
    if not is_reference(label):
        must = "`--optimizer` must be a function of the model in a file"
        raise NormValueError(message(must, repr(label), "write file.py:optimizer"))
    make = user(label)
    if not callable(make):
        raise NormTypeError(message(f"{label} must be a function of the model", type(make).__name__))
    return call(label, make, network)


def _weights(network: Any, found: Diagnosis, path: Path, model: str) -> tuple[str, ...]:
    """Write the weights of a repaired model, if anything was repaired. Returns the lines that load them."""
    if not found.fixed:
        return ()
    framework = framework_of(network)
    save(path, part(framework, "checkpoints").content(network, path), "`--fixed-out`")
    built = f"model = {function(model)}()"
    # What weights do not hold; one line may be for several layers.
    code = list(dict.fromkeys(fix.line for fix in found.fixed if not VERBS[str(fix.verb)].stored))
    if framework == "keras":
        return (built, *code, f"model.load_weights({str(path)!r})")
    safe = path.suffix == ".safetensors"
    read = f"load_file({str(path)!r})" if safe else f"torch.load({str(path)!r}, weights_only=True)"
    first = "from safetensors.torch import load_file" if safe else "import torch"
    return (first, built, *code, f"model.load_state_dict({read})")


def _show(found: Diagnosis, outputs: _Outputs, model: str, lines: tuple[str, ...]) -> None:
    if outputs.out is not None:
        found.save(outputs.out)
    if outputs.github:
        print(annotated(found, model.rpartition(":")[0]))
        return
    fixed = str(outputs.fixed_out) if lines else None
    if outputs.json:
        print(
            json_module.dumps({**found.to_dict(), "fixed_out": fixed, "load": list(lines)}, indent=1, allow_nan=False)
        )
        return
    print(found)
    if outputs.fixed_out is not None:
        how = f"written: {fixed}\nload it with\n" + "\n".join(f"    {line}" for line in lines)
        print(f"\n{how if lines else 'nothing was repaired, and nothing written'}")
    if outputs.out is not None:
        print(f"\nreport: {outputs.out}")
