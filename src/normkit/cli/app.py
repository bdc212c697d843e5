"""The commands. Results go to standard output, progress and errors to standard error."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable
from json import dumps
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from normkit.cli import bench, checks, sharing, studies, surgery, teaching
from normkit.cli.console import Storage, Workers, interrupted, typed
from normkit.errors import NormError, NormRuntimeError, NormValueError, message
from normkit.experiments import Comparison, Config
from normkit.experiments import compare as run_comparison
from normkit.experiments.config import INPUTS, LOSSES, NORMS, OPTIMIZERS
from normkit.experiments.pruning import PRUNERS
from normkit.experiments.verb import TRIALS
from normkit.frameworks import FRAMEWORKS, part

__all__ = ["run"]

_EXIT_CODES = (
    "Exit codes: 0 done, 2 bad input or usage, 130 interrupted (finished trials are kept), 1 anything else: a full "
    "disk, a worker that died, an error in the middle of a training (finished trials are kept)."
)
_DEFAULT = Config()
T = TypeVar("T")

# typer brings click with it since 0.26 and imported it before: this finds the class in both.
_UsageError: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")

app = typer.Typer(
    name="normkit",
    help="Normalization for neural networks.",
    epilog=_EXIT_CODES,
    rich_markup_mode=None,
    add_completion=False,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


def run(arguments: list[str]) -> int:
    """Run one command and return its exit code. What normkit words goes to standard error in one line."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _terminated)
    try:
        code = app(args=arguments, prog_name="normkit", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except _UsageError as error:
        text = error.format_message()
        # An empty command line shows the help, which is the message then.
        print(f"error: {text}" if arguments else text, file=sys.stderr)
        return 2
    except NormRuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except NormError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, typer.Abort):
        return interrupted()


def _terminated(*_: object) -> None:
    raise KeyboardInterrupt  # being told to end is an interruption: workers end, nothing is half written


def _version(asked: bool) -> None:
    if asked:
        from normkit import __version__

        print(f"normkit {__version__}")
        raise typer.Exit


@app.callback()
def normkit_command(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and stop.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Normalization for neural networks."""


@app.command(epilog=_EXIT_CODES)
def compare(
    context: typer.Context,
    model: Annotated[
        str | None,
        typer.Argument(
            help="cnn, mlp, file.py:build for a function build(norm) or build() that returns a network, or "
            "file.py:train for a training loop train(trial). [default: cnn for images, mlp for tables]",
            show_default=False,
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="digits, an .npz file with x_train, y_train, x_test, y_test, a name or id of OpenML (mnist), or "
            "file.py:name for arrays, data sets or loaders. [default: digits]",
            show_default=False,
        ),
    ] = None,
    norms: Annotated[
        str | None,
        typer.Option(
            help=f"Norms, NAME[:before|:after] the activation; none is no norm. [default: {','.join(NORMS)}]",
            show_default=False,
        ),
    ] = None,
    lrs: Annotated[str, typer.Option(help="Learning rates.")] = ",".join(f"{lr:g}" for lr in _DEFAULT.lrs),
    batch_sizes: Annotated[
        str | None,
        typer.Option(help="Samples per step. [default: 32, or what the loaders give]", show_default=False),
    ] = None,
    inputs: Annotated[
        str | None,
        typer.Option(
            help=f"Scaling of the inputs: {', '.join(INPUTS)}. [default: standard for arrays]", show_default=False
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(help="Number of seeds; fewer than 5 are a screening.")] = _DEFAULT.seeds,
    epochs: Annotated[int, typer.Option(help="Passes over the training data.")] = _DEFAULT.epochs,
    loss: Annotated[
        str | None,
        typer.Option(help=f"{', '.join(LOSSES)} or file.py:name. [default: by the targets]", show_default=False),
    ] = None,
    optimizer: Annotated[
        str | None,
        typer.Option(help=f"{', '.join(OPTIMIZERS)} or file.py:name. [default: sgd]", show_default=False),
    ] = None,
    metric: Annotated[
        str | None,
        typer.Option(
            help="accuracy, loss, file.py:name, or the name of what a loop reports. [default: by the loss]",
            show_default=False,
        ),
    ] = None,
    goal: Annotated[str | None, typer.Option(help="max or min, for a metric of your own.", show_default=False)] = None,
    target: Annotated[
        float | None,
        typer.Option(
            help="Value of the metric whose first crossing is timed. [default: 0.95 for accuracy]", show_default=False
        ),
    ] = None,
    framework: Annotated[str, typer.Option(help=f"What trains: {', '.join(FRAMEWORKS)}.")] = _DEFAULT.framework,
    pruner: Annotated[
        str,
        typer.Option(
            help=f"What gives up trials that fall behind the other rates of their norm: none, {', '.join(PRUNERS)}."
        ),
    ] = "none",
    workers: Workers = None,
    storage: Storage = None,
    out: Annotated[Path, typer.Option(help="Folder for the report, the results and the trials.")] = Path(
        "normkit-report"
    ),
    json: Annotated[bool, typer.Option("--json", help="Print the results as JSON and nothing else.")] = False,
) -> int:
    """Compare normalizations: every norm at every rate, batch size and seed, each judged at its own best rate.

    Finished trials are kept: the same command goes on where an earlier one ended, and may run several times at once.
    """
    try:
        comparison = run_comparison(
            model,
            data,
            norms=_names(norms),
            lrs=_numbers("--lrs", lrs),
            batch_sizes=_whole_numbers("--batch-sizes", batch_sizes),
            inputs=_names(inputs),
            seeds=seeds,
            epochs=epochs,
            loss=loss,
            optimizer=optimizer,
            metric=metric,
            goal=goal,
            target=target,
            framework=framework,
            pruner=None if pruner == "none" else pruner,
            workers=workers,
            storage=storage,
            out=out,
            command=typed(context),
        )
    except KeyboardInterrupt:
        kept = storage is not None or (out / TRIALS).exists()
        return interrupted("finished trials are kept, run the same command again to go on" if kept else None)
    _show(comparison, out / "report.html", json)
    return 0


@app.command(epilog="Exit codes: 0 done, 2 bad usage or PyTorch is missing, 1 anything else.")
def kernels(json: Annotated[bool, typer.Option("--json", help="Print the table as JSON.")] = False) -> int:
    """List which kernel runs which normalizer on this machine, and why not a compiled one."""
    found = part("torch", "coverage").coverage()
    print(dumps(found.to_dict(), indent=2) if json else found)
    return 0


for verb in surgery.VERBS:
    app.command(epilog=surgery.EXIT_CODES)(verb)
app.command(epilog=bench.EXIT_CODES)(bench.bench)
app.command(epilog=_EXIT_CODES)(studies.study)
app.command(epilog=_EXIT_CODES)(sharing.worker)
app.command(epilog=checks.EXIT_CODES)(checks.check)
for verb in (checks.advise, teaching.explain):
    app.command()(verb)
app.command("list")(teaching.normalizers)


def _show(comparison: Comparison, report: Path, json: bool) -> None:
    if json:
        from normkit.report.words import to_json

        sys.stdout.write(to_json(comparison))
    else:
        print(f"\n{comparison}\n\nreport: {report}")


def _names(text: str | None) -> tuple[str, ...] | None:
    return None if text is None else tuple(name.strip() for name in text.split(",") if name.strip())


def _numbers(option: str, text: str) -> tuple[float, ...]:
    return _converted(option, text, float, "numbers") or ()


def _whole_numbers(option: str, text: str | None) -> tuple[int, ...] | None:
    return _converted(option, text, int, "whole numbers")


def _converted(option: str, text: str | None, kind: Callable[[str], T], what: str) -> tuple[T, ...] | None:
    names = _names(text)
    try:
        return None if names is None else tuple(kind(name) for name in names)
    except ValueError:
        raise NormValueError(message(f"`{option}` must be {what} separated by commas", repr(text))) from None
