"""The verb `advise`: what to begin with, at once, and the comparison that would test it."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from normkit.checks.cases import CASES, DATA, FEW, LINES, REMARKS, Case, Fact, Remark
from normkit.checks.output import wrapped
from normkit.core.catalog import CATALOG
from normkit.core.constraints import Constraint, Integer, OneOf, check
from normkit.core.record import NormRecord
from normkit.errors import NormValueError
from normkit.frameworks import FRAMEWORKS, framework_of
from normkit.surgery.protocol import porting
from normkit.surgery.replacement import turned
from normkit.tables import Result, Table

__all__ = ["Advice", "advise"]

_LEARNING_RATES = ".01,.03,.1,.3"
_OVER_BATCH = ("batch", "ghost", "renorm", "sync")


@dataclass(frozen=True)
class Advice(Result):
    """What to begin with.

    Attributes:
        sentence: the whole in one sentence.
        norm: short name of the norm.
        where: it stands.
        line: of code, to paste; None where the model has that norm already.
        also: what else to know or try, each with code or None.
        evidence: what was found, and where.
        compare: the command that tests it on the user's own model and data.
        model: what norms the model has, in words; None without a model.
    """

    sentence: str
    norm: str
    where: str
    line: str | None
    also: tuple[tuple[str, str | None], ...]
    evidence: tuple[Fact, ...]
    compare: str
    model: str | None = None

    def table(self) -> Table:
        """One row per remark."""
        return Table(("also", "code"), [(words, code or "") for words, code in self.also], words=2, title=self.sentence)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        also = [{"words": words, "code": code} for words, code in self.also]
        return {**asdict(self), "also": also, "evidence": [fact._asdict() for fact in self.evidence]}

    def __str__(self) -> str:
        lines = [self.sentence, "", *([f"    {self.line}", ""] if self.line else [])]
        for words, code in self.also:
            lines += [*wrapped(words, "  ", "- "), *([f"      {code}"] if code else [])]
        lines += ["", "evidence"]
        for fact in self.evidence:
            lines += wrapped(f"{fact.words} ({fact.source})", "  ", "- ")
        return "\n".join([*lines, "", "test it on your own model and data", f"    {self.compare}"])


def advise(
    model: Any = None, *, batch_size: int, data: str, framework: str | None = None, name: str | None = None
) -> Advice:
    """Say which normalization to begin with, where, and what else, without training anything.

    The answer is that of a table of cases, with the papers and threads behind it: large batches of images and rows get
    batch norm, small ones group or layer norm, sequences layer norm before every block. It is a first guess; the
    command that it ends with measures it.

    Args:
        model: a torch.nn.Module, a Keras model or an nnx.Module: its norms are looked at, and for PyTorch the line that
            changes them is given. None: a block to begin with.
        batch_size: samples per forward pass on one device. Accumulated gradients do not count.
        data: "images", "sequence" or "table".
        framework: "torch", "keras" or "nnx"; that of the model by default, else "torch".
        name: of the model for the command, `file.py:build`.

    Returns:
        Advice to print; `line` and `compare` are to be pasted.

    Raises:
        NormTypeError: for what is no model.
        NormValueError: for a batch size below 1, and unknown kinds of data and frameworks.

    Example:
        >>> import normkit, torch
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 72, 3), torch.nn.BatchNorm2d(72), torch.nn.ReLU())
        >>> advice = normkit.advise(model, batch_size=4, data="images")
        >>> advice.line
        'model = normkit.replace(model, {"batch": "group"})'
        >>> normkit.advise(batch_size=64, data="sequence").norm
        'layer'
    """
    constraints: dict[str, Constraint] = {
        "batch_size": Integer(1),
        "data": OneOf(DATA),
        "framework": OneOf(tuple(FRAMEWORKS)),
    }
    if framework is None:
        framework = "torch" if model is None else framework_of(model)
    elif model is not None:
        constraints["framework"] = OneOf((framework_of(model),))
    check("advise", constraints, {"batch_size": batch_size, "data": data, "framework": framework})
    case = next(case for case in CASES if case.data == data and batch_size >= case.at_least)
    records = [] if model is None else [record for _, record in _norms(framework, model)]
    remarks = [remark for name in case.remarks if _fits(remark := REMARKS[name], framework)]
    facts = dict.fromkeys([*case.facts, *(fact for remark in remarks for fact in remark.facts)])
    line = LINES[data, case.norm, framework] if model is None else _line(case, framework, records)
    return Advice(
        sentence=_sentence(case, batch_size, model is not None and line is None),
        norm=case.norm,
        where=case.where,
        line=line,
        also=tuple((remark.words, _code(remark, framework)) for remark in remarks),
        evidence=tuple(facts),
        compare=_compare(case, batch_size, framework, name),
        model=None if model is None else _words(case, records),
    )


def _norms(framework: str, model: Any) -> Iterator[tuple[str, NormRecord]]:
    side = porting(framework)
    for path, layer in side.walk(model):
        try:
            record = side.read(layer)
        except NormValueError:  # computes what no record can say: nothing to advise about
            continue
        if record is not None:
            yield path, record


def _line(case: Case, framework: str, records: list[NormRecord]) -> str | None:
    kinds = {record.kind for record in records}
    if case.norm in kinds and not (kinds & set(_OVER_BATCH) and case.norm not in _OVER_BATCH):
        return None
    if framework != "torch":
        return LINES[case.data, case.norm, framework]
    over = sorted(kinds & set(_OVER_BATCH))
    if over and case.norm not in _OVER_BATCH:
        changes = ", ".join(f'"{kind}": "{case.norm}"' for kind in over)
        return f"model = normkit.replace(model, {{{changes}}})"
    if not records and case.data != "sequence":
        return f'model = normkit.insert(model, "{case.norm}", x)  # x: a batch of inputs'
    return LINES[case.data, case.norm, framework] if not records else None


def _words(case: Case, records: list[NormRecord]) -> str:
    """What a model has, and into how many groups its channels would go."""
    if not records:
        return "no norm that is known"
    counted = ", ".join(f"{count} {kind}" for kind, count in Counter(record.kind for record in records).most_common())
    over = [record for record in records if record.kind in _OVER_BATCH]
    if case.norm != "group" or not over:
        return counted
    groups = {record.shape[0]: turned(record, "group", groups=None, ndim=4).groups for record in over}
    return f"{counted}; groups: " + ", ".join(f"{width} channels in {count}" for width, count in sorted(groups.items()))


def _sentence(case: Case, batch_size: int, stays: bool) -> str:
    words = CATALOG[case.norm].name.replace("_", " ")
    samples = f"{batch_size} sample{'s' if batch_size > 1 else ''}"
    few = "" if case.data == "sequence" else f", {'at least' if batch_size >= FEW else 'fewer than'} {FEW}"
    return f"{case.data}, {samples} per forward pass{few}: {'keep' if stays else 'begin with'} {words}, {case.where}"


def _fits(remark: Remark, framework: str) -> bool:
    """Remarks whose code is for other frameworks say nothing here."""
    return not remark.lines or _code(remark, framework) is not None


def _code(remark: Remark, framework: str) -> str | None:
    return remark.lines.get(framework, remark.lines.get("any"))


def _compare(case: Case, batch_size: int, framework: str, name: str | None) -> str:
    embedded = {"images": "cnn", "table": "mlp"}.get(case.data, "mymodel.py:build")
    words = ["normkit", "compare", name or embedded, "--data", "my.npz", "--norms", ",".join((case.norm, *case.others))]
    words += ["--lrs", _LEARNING_RATES, "--batch-sizes", str(batch_size)]
    return shlex.join(words if framework == "torch" else [*words, "--framework", framework])
