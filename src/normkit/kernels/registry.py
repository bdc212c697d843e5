"""Which kernel runs: an order, a table of exceptions, and a choice made by hand.

| kernel | what it is |
|---|---|
| `native` | the compiled kernels of this package |
| `torch` | PyTorch's own, where they are exact |
| `formula` | the formula of `core.formula` in plain operations, with its closed-form backward; covers everything |
| `reference` | the float64 oracle of `core.reference` in NumPy, slow, without gradients; by hand only |

The first of the first three that covers an input runs. A rule of the table lets the search begin further down. Rules
know the normalizer, type, layout and the number of values of a sample, never those of the batch: so a sample's result
does not depend on its batch, and runs repeat. The environment variable `NORMKIT_KERNELS` names a JSON file with rules
that are looked at before the shipped ones::

    {"rules": [{"normalizer": "batch_norm", "dtype": "float32", "layout": "contiguous", "below": 256, "use": "torch"}]}

`normalizer`, `dtype`, `layout` and `below` may be left out: the rule then holds for all. The first that fits counts.
`normkit bench --tune --out rules.json` measures such a file on the machine at hand.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from normkit.errors import NormValueError, message, nearest

__all__ = ["KERNELS", "ORDER", "Rule", "begins", "choice", "chosen", "read_rules", "refused", "tried", "use_kernel"]

ORDER = ("native", "torch", "formula")
KERNELS = (*ORDER, "reference")
VARIABLE = "NORMKIT_KERNELS"

_chosen: ContextVar[str | None] = ContextVar("normkit_kernel", default=None)


@dataclass(frozen=True)
class Rule:
    """Where the search for a kernel begins, for some inputs; None fits all.

    Attributes:
        use: a kernel of `ORDER`.
        normalizer: name of the spec.
        dtype: name of the type of the input.
        layout: `contiguous` or `channels_last`.
        below: number of values of a sample, all axes of the input but the first; the rule holds for fewer.
    """

    use: str
    normalizer: str | None = None
    dtype: str | None = None
    layout: str | None = None
    below: int | None = None

    def fits(self, normalizer: str, dtype: str, layout: str | None, values: int) -> bool:
        """Whether the rule is about such an input."""
        return (
            self.normalizer in (None, normalizer)
            and self.dtype in (None, dtype)
            and self.layout in (None, layout)
            and (self.below is None or values < self.below)
        )


# Measured with `normkit bench`; where nothing stands here, the compiled kernels are not slower.
SHIPPED: tuple[Rule, ...] = ()


@contextmanager
def use_kernel(name: str) -> Iterator[None]:
    """Within the context, run one kernel for every normalizer: `native`, `torch`, `formula` or `reference`.

    It holds for eager calls, of this thread or task, forward and backward together; what a compiler or torch.func
    looks at runs the formula in plain operations as always. `reference` computes the outputs in float64 NumPy, slice by
    slice, and has no gradients.

    Raises:
        NormValueError: for an unknown name; inside, for an input that the kernel does not cover, with the reason.

    >>> import torch, normkit.torch as nk
    >>> layer, x = nk.LayerNorm(4).eval(), torch.arange(8.0).reshape(2, 4)
    >>> with nk.use_kernel("formula"):
    ...     y = layer(x)
    >>> with nk.use_kernel("reference"), torch.no_grad():
    ...     torch.testing.assert_close(layer(x), y)
    """
    if name not in KERNELS:
        raise NormValueError(message("`use_kernel` must name a kernel", repr(name), nearest(str(name), KERNELS)))
    token = _chosen.set(name)
    try:
        yield
    finally:
        _chosen.reset(token)


def chosen() -> str | None:
    """The kernel of :func:`use_kernel`, None outside of it."""
    return _chosen.get()


def choice() -> tuple[str | None, tuple[Rule, ...]]:
    """All that :func:`tried` depends on besides the input."""
    return _chosen.get(), _rules()


def tried(kernel: str, normalizer: str, dtype: object, layout: str | None, shape: Sequence[int]) -> bool:
    """Whether this kernel may run such an input, as far as choices and rules go.

    Args:
        kernel: of `ORDER`.
        normalizer: name of the spec.
        dtype: of the input; its last name counts (`torch.float32`).
        layout: of the input, None for another.
        shape: of the input.
    """
    forced = _chosen.get()
    if forced is not None:
        return kernel == forced
    rules = _rules()
    return not rules or ORDER.index(kernel) >= ORDER.index(begins(rules, normalizer, dtype, layout, shape))


def begins(rules: Sequence[Rule], normalizer: str, dtype: object, layout: str | None, shape: Sequence[int]) -> str:
    """The kernel that is asked first."""
    values = 1
    for length in shape[1:]:
        values *= length
    name = str(dtype).rpartition(".")[2]
    return next((rule.use for rule in rules if rule.fits(normalizer, name, layout, values)), ORDER[0])


def refused(kernel: str, reason: str) -> None:
    """Raise NormValueError if the kernel was chosen by hand, for it does not cover the input; else do nothing."""
    if _chosen.get() == kernel:
        must = f'use_kernel("{kernel}") must cover the input'
        raise NormValueError(message(must, reason, "`normkit kernels` lists what covers what"))


def read_rules(path: Path) -> tuple[Rule, ...]:
    """Read a file of rules. Raises NormValueError, with the place, for what is not one."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise NormValueError(message(f"{VARIABLE} must name a JSON file of rules", f"{path} ({error})")) from error
    rules = found.get("rules") if isinstance(found, dict) else None
    if not isinstance(rules, list):
        raise NormValueError(message(f'{path}: there must be a list `"rules"`', type(found).__name__))
    return tuple(_rule(f"{path}: rule {place}", rule) for place, rule in enumerate(rules, 1))


def _rule(where: str, given: Any) -> Rule:
    known = {field.name for field in fields(Rule)}
    if not isinstance(given, dict):
        raise NormValueError(message(f"{where} must be an object with {', '.join(sorted(known))}", repr(given)))
    for name in given:
        if name not in known:
            raise NormValueError(message(f"{where}: the name must be known", repr(name), nearest(name, known)))
    if given.get("use") not in ORDER:
        hint = nearest(str(given.get("use")), ORDER)
        raise NormValueError(message(f"{where}: `use` must be a kernel", repr(given.get("use")), hint))
    layout, below = given.get("layout"), given.get("below")
    if layout not in (None, "contiguous", "channels_last"):
        raise NormValueError(message(f"{where}: `layout` must be contiguous or channels_last", repr(layout)))
    for name in ("normalizer", "dtype"):
        if not isinstance(given.get(name), str | None):
            raise NormValueError(message(f"{where}: `{name}` must be a name", repr(given[name])))
    if below is not None and (not isinstance(below, int) or isinstance(below, bool) or below < 1):
        raise NormValueError(message(f"{where}: `below` must be a number of values >= 1", repr(below)))
    return Rule(**given)


@functools.cache
def _rules() -> tuple[Rule, ...]:
    path = os.environ.get(VARIABLE)
    return (*(read_rules(Path(path)) if path else ()), *SHIPPED)
