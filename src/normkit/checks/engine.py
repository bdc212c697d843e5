"""The verb `check`: examine, ask the rules, say it in one sentence."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from normkit.checks.evidence import Evidence
from normkit.checks.examination import Forward, Loss, Request, examine
from normkit.checks.findings import SEVERITIES, Diagnosis, Finding, number, share
from normkit.checks.fixes import Subject, repaired
from normkit.checks.output import counted
from normkit.checks.rule import Limits, Rule
from normkit.checks.settings import Settings
from normkit.core.constraints import Constraint, Flag, Integer, Optional
from normkit.core.constraints import check as checked
from normkit.errors import NormTypeError, NormValueError, message, nearest
from normkit.frameworks import framework_of, part

__all__ = ["LOSSES", "STEPS", "check", "chosen", "diagnosed", "looked"]

STEPS = 8  # batches: the standard error over them is known to a quarter of itself
LOSSES = ("cross_entropy", "mse", "mae")  # those of `normkit compare`
_ARGUMENTS: dict[str, Constraint] = {"steps": Integer(1), "batch_size": Optional(Integer(1)), "show_progress": Flag()}


def check(
    model: Any,
    data: Any = None,
    *,
    optimizer: Any = None,
    loss: str | Loss | None = None,
    forward: Forward | None = None,
    steps: int = STEPS,
    batch_size: int | None = None,
    select: Iterable[str] | None = None,
    ignore: Iterable[str] | None = None,
    limits: Mapping[str, Limits] | None = None,
    allow: Mapping[str, Iterable[str]] | None = None,
    show_progress: bool = True,
) -> Diagnosis:
    """Find normalization mistakes in a model, with evidence; the model is afterwards as it was, bit by bit.

    Looked at are the norm layers themselves; with `data` also the flow of data, the same batches with the statistics of
    the batch and with the kept ones (dropout off in both), one pass and one step in training mode, a sample alone and
    in its batch; with `optimizer` its groups of parameters. Rules read what was seen; `docs/rules.md` has them all.
    What could not be looked at is listed, with the reason.

    Nothing is trained: the step is a forward and a backward pass whose gradients and statistics are thrown away. Modes,
    buffers, gradients and random numbers are restored, also after an error or an interruption.

    Args:
        model: a torch.nn.Module or a built Keras model, as it is trained: in training mode, parts that are meant to
            evaluate in evaluation mode.
        data: inputs (N, ...) as one array or tensor, or a pair of such inputs and targets, taken in batches of at most
            256; or an iterable of batches that can be read several times, each an array, a dictionary of named inputs,
            or a tuple of inputs and targets. Best the loader of the training.
        optimizer: of the training.
        loss: `loss(outputs, targets)`, the mean over a batch; or `cross_entropy`, `mse`, `mae`. Without one, evaluation
            and training are compared by the outputs. Keras models bring theirs with them.
        forward: `forward(model, batch)` gives the outputs, where a model is not simply called on the inputs.
        steps: take so many batches, at most.
        batch_size: of the training, for data that is given as arrays.
        select: codes of the rules to ask, or their beginnings: `["NK1", "NK203"]`. None: all.
        ignore: rules not to ask, likewise.
        limits: thresholds to change, `{"NK102": {"share": 0.1}}`; `normkit explain NK102` names them.
        allow: patterns of paths at which a rule may find what it likes: `{"NK601": ["backbone.*"]}`. These findings are
            counted, and left out of everything else.
        show_progress: say on a terminal what is being looked at.

    Returns:
        A diagnosis to print, to show in a notebook, or to `save` as .txt, .json or .html. Its `sentence` says it all;
        `findings` has layer, numbers, severity and what to do; `fix()` does it as far as there is a verb for it.

    Raises:
        NormTypeError: for what is no model, no data, no optimizer, no function.
        NormValueError: for data that can be read only once, unknown codes, limits and losses, models that are not
            built, labels that the loss cannot take.

    Whatever the model raises in evaluation mode on the first batches is raised.

    Example:
        >>> import normkit, torch
        >>> from torch import nn
        >>> _ = torch.manual_seed(0)
        >>> norm = nn.BatchNorm1d(4, momentum=None)  # keeps the mean of all batches
        >>> model = nn.Sequential(nn.Linear(3, 4, bias=False), norm, nn.ReLU(), nn.Linear(4, 2))
        >>> x, y = torch.randn(512, 3), torch.randint(2, (512,))
        >>> _ = model(x - 9)  # what it was trained on
        >>> found = normkit.check(model, (x, y), loss="cross_entropy", select=["NK102"])
        >>> [(finding.code, finding.path) for finding in found.findings]
        [('NK102', '1')]
        >>> found.findings[0].fix.line
        'normkit.recalibrate(model, data)'
        >>> found.fix().sentence
        'no normalization problem found in 1 layer, 1 rule'
    """
    given = {"steps": steps, "batch_size": batch_size, "show_progress": show_progress}
    checked("check", _ARGUMENTS, given)
    settings = Settings.of(select, ignore, limits, allow)
    if forward is not None and not callable(forward):
        raise NormTypeError(message("`forward` must be a function", repr(forward), "def forward(model, batch): ..."))
    chosen_loss = _loss(model, loss)
    with _teller(show_progress) as tell:
        request = Request(model, data, optimizer, chosen_loss, forward, steps, tell, batch_size, wanted=settings.wanted)
        return looked(request, settings)


def looked(request: Request, settings: Settings) -> Diagnosis:
    """Examine and ask. The result can repair the model, and looks again after that."""
    seen = examine(request)
    quiet = request._replace(tell=lambda _: None)
    subject = Subject(request.model, request.data, request.steps, lambda: looked(quiet, settings))
    found = diagnosed(seen, settings.rules, settings.limits, settings.allows)
    return replace(found, _repair=functools.partial(repaired, subject))


def chosen(select: Iterable[str] | None = None, ignore: Iterable[str] | None = None) -> tuple[Rule, ...]:
    """The rules that are meant by codes or beginnings of codes (`NK1`). Raises NormValueError for unknown ones."""
    return Settings.of(select, ignore).rules


def diagnosed(
    seen: Evidence,
    asked: Iterable[Rule],
    limits: Mapping[str, Limits],
    allows: Callable[[Finding], bool] = lambda _: False,
) -> Diagnosis:
    """Ask the rules whose evidence is there. What `allows` says of is counted, and left out of everything else."""
    run, found = [], list[Finding]()
    for rule in asked:
        if seen.framework in rule.frameworks and seen.examined.issuperset(rule.needs):
            run.append(rule.code)
            found += rule(seen, limits.get(rule.code))
    places = {layer.path: number for number, layer in enumerate(seen.layers)}
    found.sort(key=lambda f: (SEVERITIES.index(f.severity), f.code, places.get(f.path, -1)))
    findings = [finding for finding in found if not allows(finding)]
    return Diagnosis(
        model=seen.model,
        sentence=_sentence(seen, findings, len(run)),
        findings=tuple(findings),
        layers=len(seen.layers),
        rules=tuple(run),
        skipped={part: why for part, why in seen.skipped.items() if why},
        seen=None if seen.graph is None else seen.graph.how,
        gap=seen.gap,
        allowed=tuple(finding for finding in found if allows(finding)),
    )


def _loss(model: Any, loss: Any) -> Loss | None:
    """A loss as a function, from its name or itself."""
    if loss is None or (callable(loss) and not isinstance(loss, type)):
        return loss
    if not isinstance(loss, str):
        hint = None if not isinstance(loss, type) else f"an instance, {loss.__name__}()"
        must = f"`loss` must be a function, or one of {', '.join(LOSSES)}"
        raise NormTypeError(message(must, repr(loss), hint))
    if loss not in LOSSES:
        must = "`loss` must be a function, or a known name"
        raise NormValueError(message(must, repr(loss), nearest(loss, LOSSES)))
    named: Loss = part(framework_of(model), "objectives").by_name(loss)

    def labelled(outputs: Any, targets: Any) -> Any:
        if targets is None:
            must = f"`data` must hold targets for the loss {loss}"
            raise NormValueError(message(must, "inputs alone", "a pair of inputs and targets: data=(x, y)"))
        return named(outputs, targets)

    return labelled


def _sentence(seen: Evidence, findings: list[Finding], rules: int) -> str:
    gap = next((finding for finding in findings if finding.code == "NK101"), None)
    if gap is not None and seen.gap is not None:
        return _of_gap(seen, findings)
    serious = [finding for finding in findings if finding.severity != "info"]
    layers = f"{_many(len(seen.layers), 'layer')}, {_many(rules, 'rule')}"
    if not seen.layers and not serious:
        return f"no normalization layer found in {seen.model}"
    if not serious:
        notes = f" ({_many(len(findings), 'note')})" if findings else ""
        return f"no normalization problem found in {layers}{notes}"
    first = serious[0]
    where = f" at {first.path}" if first.path else ""
    do = "" if first.fix is None else f". Do: {first.fix.line}"
    return f"{counted(serious)} in {layers}. First: {first.words}{where}{do}"


def _many(number: int, what: str) -> str:
    return f"{number} {what}{'s' if number != 1 else ''}"


def _of_gap(seen: Evidence, findings: list[Finding]) -> str:
    gap = seen.gap
    assert gap is not None
    values = f"loss {number(gap.eval)} / {number(gap.train)}"
    if gap.measure == "outputs":
        values = f"outputs differ by {share(gap.eval)} of their size"
    causes = [finding for finding in findings if finding.cause]
    cause = max(causes, key=lambda finding: finding.weight, default=None)
    text = f"eval is worse than train on the same {gap.batches} batches ({values})"
    if gap.measure == "outputs":
        text = f"eval differs from train on the same {gap.batches} batches ({values})"
    if cause is None:
        return f"{text}. Cause: not found"
    first = next((f.path for f in findings if f.code == cause.code and f.path), gap.first or "")
    text += f". Cause: {cause.cause}{f', first at {first}' if first else ''}"
    text += f". Recalibrating closes {share(min(1.0, max(0.0, gap.closed)))}"
    return text if cause.fix is None else f"{text}. Do: {cause.fix.line}"


class _teller:  # noqa: N801  # a context manager, used as one
    """Says on a terminal what is being looked at, in one line that goes away."""

    def __init__(self, show: bool) -> None:
        self._show = show and sys.stderr.isatty()
        self._width = 0

    def __enter__(self) -> Callable[[str], None]:
        return self._tell

    def __exit__(self, *_: object) -> None:
        if self._width:
            sys.stderr.write("\r" + " " * self._width + "\r")
            sys.stderr.flush()

    def _tell(self, words: str) -> None:
        if self._show:
            line = f"checking: {words}"
            sys.stderr.write("\r" + line.ljust(self._width))
            sys.stderr.flush()
            self._width = max(self._width, len(line))
