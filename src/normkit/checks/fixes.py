"""Doing what findings say: each change once, measured by checking again, undone where the model is worse for it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from normkit.checks.findings import Diagnosis, Finding, Fix
from normkit.errors import NormError, NormTypeError, NormValueError, message
from normkit.frameworks import framework_of, part
from normkit.surgery import freezing, recalibration, replacement
from normkit.surgery.protocol import porting

__all__ = ["VERBS", "Subject", "Verb", "planned", "repaired"]

_CLEAR = 0.01  # by this share a loss has to grow to be worse; less is rounding and the choice of the batches

Undo = Callable[[], None]


@dataclass(frozen=True)
class Subject:
    """What was checked, and how to check it again."""

    model: Any
    data: Any
    steps: int
    again: Callable[[], Diagnosis]

    def norms(self, path: str) -> list[Any]:
        """The norm layers at or under a path. Raises NormValueError where there is none."""
        side = porting(framework_of(self.model))
        found = [
            layer
            for own, layer in side.walk(self.model)
            if path in ("", own) or own.startswith((f"{path}.", f"{path}/"))
        ]
        if not found:
            raise NormValueError(message("a path must be that of a norm layer, or of a part with one", repr(path)))
        return found

    def structure(self) -> Undo:
        """What makes the model of the layers of now again.

        Raises NormTypeError where layers are not exchanged in place: `normkit.replace` and `normkit.remove` give a new
        Keras model, and a fix is of the model that was checked.
        """
        framework = framework_of(self.model)
        if framework != "torch":
            must = "`model` must be a torch.nn.Module, for layers to be exchanged in place"
            hint = "take the model that the line returns, and check that"
            raise NormTypeError(message(must, f"a model of {framework}", hint))
        back: Undo = part(framework, "examination").structure(self.model)
        return back


class Verb(NamedTuple):
    """A change that a fix may ask for.

    Attributes:
        run: makes it, and returns what takes it back. Arguments are those of the fix.
        keeps: whether what the model computes in training stays, so that its loss before and after can be compared.
        stored: whether the change is in the weights; else it belongs into the code that builds the model.
    """

    run: Callable[..., Undo]
    keeps: bool = True
    stored: bool = False


def _recalibrate(subject: Subject) -> Undo:
    _, report = recalibration.recalibrate(subject.model, subject.data, steps=subject.steps, return_report=True)
    undo: Undo = report.undo
    return undo


def _freeze(subject: Subject, path: str) -> Undo:
    """Statistics, gamma and beta of a norm, or of all norms in a part of the model."""
    layers = subject.norms(path)
    for layer in layers:
        freezing.freeze(layer)

    def undo() -> None:
        for layer in layers:
            freezing.unfreeze(layer)

    return undo


def _momentum(subject: Subject, path: str, value: float) -> Undo:
    return _set(subject.norms(path)[0], "momentum", value)


def _eps(subject: Subject, path: str, value: float) -> Undo:
    layer = subject.norms(path)[0]
    return _set(layer, "eps" if hasattr(layer, "eps") else "epsilon", value)


def _replace(subject: Subject, path: str, norm: str) -> Undo:
    back = subject.structure()
    replacement.replace(subject.model, {path: norm}, inplace=True)
    return back


def _remove(subject: Subject, path: str) -> Undo:
    back = subject.structure()
    replacement.remove(subject.model, path, inplace=True)
    return back


def _set(layer: Any, name: str, value: Any) -> Undo:
    old = getattr(layer, name)
    setattr(layer, name, value)
    return lambda: setattr(layer, name, old)


# In the order in which they are made: what changes the model first, the statistics of what results last.
VERBS: dict[str, Verb] = {
    "remove": Verb(_remove, keeps=False),
    "replace": Verb(_replace, keeps=False),
    "eps": Verb(_eps, keeps=False),
    "momentum": Verb(_momentum),
    "recalibrate": Verb(_recalibrate, stored=True),
    # A frozen layer is not recalibrated: with statistics that are not those of the data it would keep those.
    "freeze": Verb(_freeze),
}


def planned(findings: Iterable[Finding], unsafe: bool) -> tuple[list[Fix], list[Fix]]:
    """The fixes to carry out, each once, in the order of `VERBS`; and those that are left to a person."""
    order = list(VERBS)
    distinct: dict[tuple[Any, ...], Fix] = {}
    left: dict[str, Fix] = {}
    for finding in findings:
        fix = finding.fix
        if fix is None:
            continue
        if fix.verb in VERBS and (fix.safe or unsafe):
            distinct.setdefault((fix.verb, *sorted(_hashable(fix.arguments))), fix)
        else:
            left.setdefault(fix.line, fix)
    return sorted(distinct.values(), key=lambda fix: order.index(str(fix.verb))), list(left.values())


def repaired(subject: Subject, diagnosis: Diagnosis, unsafe: bool) -> Diagnosis:
    """See `Diagnosis.fix`."""
    chosen, left = planned(diagnosis.findings, unsafe)
    undos, done, notes = list[Undo](), list[Fix](), list[str]()

    def undo() -> None:
        for take_back in reversed(undos):
            take_back()

    try:
        for fix in chosen:
            try:
                undos.append(VERBS[str(fix.verb)].run(subject, **fix.arguments))
            except NormError as error:  # a verb that refuses has changed nothing
                notes.append(f"not done: {fix.line}: {error}")
            else:
                done.append(fix)
        after = subject.again() if done else diagnosis
    except BaseException:
        undo()
        raise
    worse = _worse(diagnosis, after, done) if done else ""
    if worse:
        undo()
        tried = "; ".join(dict.fromkeys(fix.line for fix in done))
        # Checked anew, so that the result is that of the model as it is.
        return replace(subject.again(), notes=(*notes, f"undone: {tried}: {worse}", *_left(left)))
    lines = dict.fromkeys(f"done: {fix.line}" for fix in done)  # one line may be for several layers
    return replace(after, notes=(*lines, *notes, *_left(left)), fixed=tuple(done))


def _left(fixes: list[Fix]) -> list[str]:
    reasons = {fix.line: "unsafe: changes what is trained" if fix.verb in VERBS else "" for fix in fixes}
    return [f"left to you{f' ({why})' if why else ''}: {line}" for line, why in reasons.items()]


def _worse(before: Diagnosis, after: Diagnosis, done: list[Fix]) -> str:
    """Why a model is worse than before, "" where it is not."""
    for severity in ("error", "warning"):
        counts = [sum(finding.severity == severity for finding in found.findings) for found in (before, after)]
        if counts[1] > counts[0]:
            return f"{counts[1]} instead of {counts[0]} {severity}s"
        if counts[1] < counts[0]:
            break
    old, new = before.gap, after.gap
    if old is None or new is None or old.measure != "loss" or not all(VERBS[str(fix.verb)].keeps for fix in done):
        return ""
    # Not a number before is no measure; not a number after is worse than any.
    if old.eval == old.eval and not new.eval <= old.eval + max(
        _CLEAR * abs(old.eval), old.error if old.batches > 1 else 0
    ):
        return f"the loss in evaluation is {new.eval:.3g} instead of {old.eval:.3g}"
    return ""


def _hashable(arguments: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(name, repr(value)) for name, value in arguments.items()]
