"""PyTorch tensors through the compiled kernels: one call forward, one backward, activation and residual sum included.

Saved for the backward pass are the input (which the layer before keeps anyway), the residual if an activation follows,
gamma and beta, and three numbers a statistic. The input of the activation is computed again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from normkit.core import formula
from normkit.core.formula import Moments
from normkit.core.plan import NormPlan
from normkit.core.spec import NormSpec
from normkit.kernels import registry
from normkit.kernels.native import (
    ACTIVATIONS,
    PER_VALUE,
    TYPES,
    Geometry,
    Layout,
    available,
    evaluation,
    geometry,
    instruction_set,
    missing,
)
from normkit.torch._buffers import watched
from normkit.torch._layout import CHANNELS_LAST, layout_of

__all__ = [
    "Case",
    "Normalized",
    "Part",
    "add_normalize",
    "adds",
    "covers",
    "covers_shared",
    "decide",
    "decide_shared",
    "evaluate",
    "keep",
    "known",
    "like",
    "normalize",
    "signature",
    "statistics_of",
    "threads",
    "twice",
]

_native = available()
_DTYPES = {torch.float32: TYPES["float32"], torch.bfloat16: TYPES["bfloat16"]}
_SET = instruction_set()
_ALONE = 1 << 16  # values below which a second thread costs more than it saves
_HUGE = 32 << 20  # bytes; glibc maps what is larger anew for every allocation, whatever its threshold has grown to
_CASES = 4096  # that are remembered; a network has one for every layer and shape


@dataclass(frozen=True, slots=True)
class Case:
    """What is decided about a call by its arguments and the kinds of its tensors, whatever values these hold.

    Attributes:
        spec, plan: of the normalizer.
        numbers: the geometry, see `kernels.native`.
        found: the same for statistics of the input; None where they are given.
        activation: behind it.
        kind, act: their numbers in the kernels.
        direct: whether gamma and beta are read where they lie.
        writes: whether the kernels write the running statistics.
        huge: whether huge pages are asked for.
    """

    spec: NormSpec
    plan: NormPlan
    numbers: tuple[int, ...]
    found: Geometry | None
    activation: str | None
    kind: int
    act: int
    direct: bool
    writes: bool
    huge: bool


class Normalized(NamedTuple):
    """What a kernel gave: the output, and variance, mean and rest of the mean of every statistic."""

    y: Tensor
    statistics: Tensor
    found: Geometry

    def moments(self) -> list[Moments]:
        """The same as for the formula."""
        var, mean, rest = self.statistics.unbind()
        found = self.found
        return [Moments((mean + rest).reshape(found.kept), var.reshape(found.kept), found.values, found.values)]


_known: dict[tuple[Any, ...], Case] = {}


def signature(question: tuple[Any, ...], x: Tensor, *others: Tensor | None) -> tuple[Any, ...] | None:
    """All that a `Case` depends on, None where more than eager autograd is watching.

    `question` are the other arguments. Checking these and choosing a kernel anew takes longer than the kernel itself
    does on a small tensor.
    """
    if watched() or forward_ad._current_level >= 0 or _native is None:
        return None
    if type(x) is not Tensor or x.layout is not torch.strided:
        return None
    kinds = [registry.choice(), question, x.dtype, x.device, x.shape, x.stride()]
    for t in others:
        kinds.append(None if t is None else (type(t), t.dtype, t.device, t.shape, t.stride()))
    return tuple(kinds)


def known(key: tuple[Any, ...] | None) -> Case | None:
    """The case of such a call, if there has been one."""
    return None if key is None else _known.get(key)


def decide(
    key: tuple[Any, ...] | None,
    spec: NormSpec,
    p: NormPlan,
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    activation: str | None,
    residual: Tensor | None,
    kept: Mapping[str, Tensor] | None = None,
    number: Tensor | None = None,
    *,
    given: bool = False,
) -> Case | None:
    """The case of a call, None if no kernel covers it. `kept` and `number` are to follow, or `given` and followed.

    It is remembered under its signature `key`, for :func:`known`.

    The caller has made sure that nothing but eager autograd is watching.
    """
    layout = layout_of(x)
    if not registry.tried("native", "batch_norm" if given else spec.name, x.dtype, layout, x.shape):
        return None
    found: Geometry | tuple[int, ...] | str
    if given and kept is not None:
        found = _covers_given(layout, x, kept["mean"], kept["var"], gamma, beta, residual)
    else:
        found = covers(spec, p, x, gamma, beta, residual)
    if isinstance(found, str):
        registry.refused("native", found)
        return None
    own, numbers = (found, found.numbers) if isinstance(found, Geometry) else (None, found)
    writes = own is not None and kept is not None and _writes(spec, own, kept, number)
    case = _case(spec, p, numbers, own, activation, x, gamma, beta, writes=writes)
    if key is not None:
        if len(_known) >= _CASES:
            _known.clear()
        _known[key] = case
    return case


def decide_shared(
    spec: NormSpec, p: NormPlan, x: Tensor, gamma: Tensor | None, beta: Tensor | None, activation: str | None
) -> Case:
    """The case of a part of a batch that :func:`covers_shared` lets pass: its statistics are found, and later given."""
    numbers: tuple[int, ...] = ()  # without values there is nothing to walk
    layout = layout_of(x)
    if x.numel() and layout is not None:
        found = geometry(spec.name, p, tuple(x.shape), layout)
        assert not isinstance(found, str), found
        numbers = found.numbers
    return _case(spec, p, numbers, None, activation, x, gamma, beta, writes=False)


def _case(
    spec: NormSpec,
    p: NormPlan,
    numbers: tuple[int, ...],
    found: Geometry | None,
    activation: str | None,
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    *,
    writes: bool,
) -> Case:
    direct = all(t is None or (t.dtype == torch.float32 and t.is_contiguous()) for t in (gamma, beta))
    kinds = _DTYPES[x.dtype], ACTIVATIONS[activation], direct, writes, x.nbytes > _HUGE
    return Case(spec, p, numbers, found, activation, *kinds)


def normalize(
    case: Case, x: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float, residual: Tensor | None
) -> Normalized:
    """Return act(norm(x) + residual) in the type of x and the statistics of x."""
    statistics = _room(case)
    y: Tensor = _Normalize.apply(x, residual, _whole(case, gamma), beta, statistics, case, eps)
    return Normalized(y, statistics, case.found)  # type: ignore[arg-type]  # which is there, unless it is given


def add_normalize(
    case: Case, x: Tensor, residual: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Return norm(x + residual) and x + residual, rounded before it is normalized; for `adds` alone."""
    y, total = _AddNormalize.apply(x, residual, _whole(case, gamma), beta, case, eps)
    return y, total


def adds(case: Case) -> bool:
    """Whether the kernel of a case can sum first: rows of one run, as of layer and RMS norm."""
    return case.found is not None and len(case.numbers) == 8 and case.numbers[-1] == PER_VALUE


def evaluate(
    case: Case,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
    residual: Tensor | None,
) -> Tensor:
    """Return act((x - mean) / sqrt(var + eps) * gamma + beta + residual)."""
    y: Tensor = _Evaluate.apply(x, residual, gamma, beta, mean, var, case, eps)
    return y


def keep(
    case: Case, done: Normalized, kept: Mapping[str, Tensor], number: Tensor | None, rate: float, *, skip: bool
) -> None:
    """Write the statistics of a batch into the running ones, where `case.writes`, and add one to `number`.

    With `skip` nothing is written where they are not finite.
    """
    statistics, found = done.statistics, done.found
    unbiased = found.values / (found.values - 1) if case.spec.tracked[1].bessel else 1.0
    written = (kept["mean"], kept["var"]) if number is None else (kept["mean"], kept["var"], number)
    mean, var = written[0].data_ptr(), written[1].data_ptr()
    count = 0 if number is None else number.data_ptr()
    _native.keep(found.statistics, *_places(statistics), mean, var, count, rate, unbiased, skip)
    torch.autograd.graph.increment_version(written)  # the kernel wrote behind autograd's back


def statistics_of(case: Case, x: Tensor) -> Tensor:
    """Variance, mean and rest of the mean of a part, of shape (3, C)."""
    statistics = torch.empty((3, x.shape[1]), dtype=torch.float32)
    how = *_places(statistics), 0.0, True, False, case.kind, ACTIVATIONS[None], threads(x)
    _native.forward(_SET, case.numbers, x.data_ptr(), 0, 0, 0, 0, 0, *how)
    return statistics


class Part(NamedTuple):
    """A part of a batch, as kernels read it, and the statistics of the whole. Autograd sees nothing of it."""

    case: Case
    x: Tensor
    residual: Tensor | None
    gamma: Tensor | None
    beta: Tensor | None
    statistics: Tensor
    eps: float

    @classmethod
    def of(cls, case: Case, x: Tensor, residual: Tensor | None, *others: Any) -> Part:
        """Of tensors in any order and type that :func:`covers_shared` lets pass."""
        gamma, beta, statistics, eps = others
        if not case.direct:
            gamma, beta = _single(gamma), _single(beta)
        return cls(case, x, None if residual is None else like(residual, x), gamma, beta, statistics, eps)

    def normalize(self) -> Tensor:
        """Return act(norm(x) + residual)."""
        y = _empty_like(self.x, self.case)
        _native.forward(_SET, self.case.numbers, *self._tensors(), y.data_ptr(), 0, *self._settings())
        return y

    def sums(self, dy: Tensor) -> Tensor:
        """Of shape (2, C): of the gradient before the activation, and of that times the normalized input.

        `dy` lies as x does.
        """
        into = torch.empty((2, self.x.shape[1]), dtype=torch.float32)
        first, second = (part.data_ptr() for part in into)
        tensors = dy.data_ptr(), *self._tensors()
        _native.backward(_SET, self.case.numbers, *tensors, 0, 0, second, first, 0, *self._settings())
        return into

    def gradient(
        self, dy: Tensor, averages: Tensor, *, for_x: bool, for_residual: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """The gradients of x and of the residual before an activation, from the averages of `sums` over the whole."""
        dx, dresidual = (_empty_like(self.x, self.case) if wanted else None for wanted in (for_x, for_residual))
        first, second = (part.data_ptr() for part in averages)
        tensors = dy.data_ptr(), *self._tensors(), _address(dx), _address(dresidual)
        how = *_places(self.statistics), self.eps, self.case.kind, self.case.act, threads(self.x)
        _native.gradient(_SET, self.case.numbers, *tensors, first, second, *how)
        return dx, dresidual

    def _tensors(self) -> tuple[int, ...]:
        return self.x.data_ptr(), _address(self.residual), _address(self.gamma), _address(self.beta)

    def _settings(self) -> tuple[Any, ...]:
        return _settings(self.case, self.x, _places(self.statistics), self.eps)


def _writes(spec: NormSpec, found: Geometry, kept: Mapping[str, Tensor], number: Tensor | None) -> bool:
    """Whether the kernel that writes running statistics covers these: no groups to be merged, no other types."""
    return (
        [t.name for t in spec.tracked] == ["mean", "var"]
        and found.values > 1
        and (number is None or (number.dtype == torch.int64 and number.device.type == "cpu"))
        and all(
            t.dtype == torch.float32 and t.device.type == "cpu" and t.is_contiguous() and t.numel() == found.statistics
            for t in kept.values()
        )
    )


def _room(case: Case) -> Tensor:
    """For the variance of every statistic, and mean and rest of the mean where there is one."""
    found: Any = case.found
    return torch.empty((3 if case.spec.center else 1, found.statistics), dtype=torch.float32)


def _whole(case: Case, gamma: Tensor | None) -> Tensor | None:
    """The gain itself: 1 + w not in half precision, which has no room for both."""
    return gamma if gamma is None or case.spec.gain == "w" else gamma.float() + 1.0


class _Normalize(torch.autograd.Function):
    """Statistics of the input, which the forward pass fills."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        gamma: Tensor | None,
        beta: Tensor | None,
        statistics: Tensor,
        case: Case,
        eps: float,
    ) -> Tensor:
        y = _forward(case, x, residual, gamma, beta, _places(statistics), eps)
        ctx.save_for_backward(x, residual if case.act else None, gamma, beta, statistics)
        ctx.normalizer = case, eps, residual is not None
        ctx.set_materialize_grads(False)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return (None,) * 7
        x, residual, gamma, beta, statistics = ctx.saved_tensors
        case, eps, summed = ctx.normalizer
        needs = ctx.needs_input_grad[:4]
        if torch.is_grad_enabled():
            return *twice(needs, _again(case, eps), dy, x, residual, gamma, beta, case, summed), None, None, None
        places = _places(statistics)
        return *_backward(needs, case, dy, x, residual, gamma, beta, places, eps, summed), None, None, None


def _again(case: Case, eps: float) -> Callable[[Tensor, Tensor | None, Tensor | None], Tensor]:
    """The same by plain operations."""
    plain = replace(case.spec, gain="w")  # gamma is whole here
    return lambda x, gamma, beta: formula.normalize(torch, plain, case.plan, x, gamma, beta, eps=eps)[0]


class _AddNormalize(torch.autograd.Function):
    """Two outputs, norm(x + residual) and the sum, which is kept instead of its summands."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor, gamma: Tensor | None, beta: Tensor | None, case: Case, eps: float
    ) -> tuple[Tensor, Tensor]:
        total, statistics = _empty_like(x, case), _room(case)
        y = _forward(case, x, residual, gamma, beta, _places(statistics), eps, total)
        ctx.save_for_backward(total, gamma, beta, statistics)
        ctx.normalizer = case, eps
        ctx.set_materialize_grads(False)
        return y, total

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dtotal: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return dtotal, dtotal, None, None, None, None
        total, gamma, beta, statistics = ctx.saved_tensors
        case, eps = ctx.normalizer
        for_x, for_residual, for_gamma, for_beta, *_ = ctx.needs_input_grad
        needs = for_x or for_residual, False, for_gamma, for_beta
        if torch.is_grad_enabled():
            dx, _, dgamma, dbeta = twice(needs, _again(case, eps), dy, total, None, gamma, beta, case, False)
            dx = dtotal if dx is None else dx if dtotal is None else dx + dtotal
        else:
            dx, _, dgamma, dbeta = _backward(
                needs, case, dy, total, None, gamma, beta, _places(statistics), eps, False, dtotal
            )
        return dx if for_x else None, dx if for_residual else None, dgamma, dbeta, None, None


class _Evaluate(torch.autograd.Function):
    """Statistics that are given, and constants of the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        gamma: Tensor | None,
        beta: Tensor | None,
        mean: Tensor,
        var: Tensor,
        case: Case,
        eps: float,
    ) -> Tensor:
        if any(ctx.needs_input_grad):  # buffers may change before the backward pass
            mean, var = mean.clone(), var.clone()
            ctx.save_for_backward(x, residual if case.act else None, gamma, beta, mean, var)
            ctx.normalizer = case, eps, residual is not None
            ctx.set_materialize_grads(False)
        return _forward(case, x, residual, gamma, beta, (var.data_ptr(), mean.data_ptr(), 0), eps)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return (None,) * 8
        x, residual, gamma, beta, mean, var = ctx.saved_tensors
        case, eps, summed = ctx.normalizer
        needs = ctx.needs_input_grad[:4]
        if torch.is_grad_enabled():
            shape = (1, -1, *(1,) * (x.dim() - 2))

            def again(x: Tensor, gamma: Tensor | None, beta: Tensor | None) -> Tensor:
                y = (x - mean.reshape(shape)) * torch.rsqrt(var + eps).reshape(shape)
                y = y if gamma is None else y * gamma.reshape(shape)
                return y if beta is None else y + beta.reshape(shape)

            return *twice(needs, again, dy, x, residual, gamma, beta, case, summed), None, None, None, None
        places = var.data_ptr(), mean.data_ptr(), 0
        return *_backward(needs, case, dy, x, residual, gamma, beta, places, eps, summed), None, None, None, None


def _forward(
    case: Case,
    x: Tensor,
    residual: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    places: tuple[int, int, int],
    eps: float,
    total: Tensor | None = None,
) -> Tensor:
    y = _empty_like(x, case)
    if not case.direct:
        gamma, beta = _single(gamma), _single(beta)
    if residual is not None:
        residual = like(residual, x)
    _native.forward(
        _SET,
        case.numbers,
        x.data_ptr(),
        _address(residual),
        _address(gamma),
        _address(beta),
        y.data_ptr(),
        _address(total),
        *_settings(case, x, places, eps),
    )
    return y


def _settings(case: Case, x: Tensor, places: tuple[int, int, int], eps: float) -> tuple[Any, ...]:
    """What both passes are told behind the tensors."""
    return *places, eps, case.spec.center, case.found is None, case.kind, case.act, threads(x)


def _backward(
    needs: Sequence[bool],
    case: Case,
    dy: Tensor,
    x: Tensor,
    residual: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    places: tuple[int, int, int],
    eps: float,
    summed: bool,
    dtotal: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of x, residual, gamma and beta."""
    for_x, for_residual, for_gamma, for_beta = needs
    dy = like(dy, x)
    if residual is not None:
        residual = like(residual, x)
    own_gamma, own_beta = (gamma, beta) if case.direct else (_single(gamma), _single(beta))
    if dtotal is not None:
        dtotal = like(dtotal, x)
    dx = _empty_like(x, case) if for_x else None
    dresidual = None
    if summed and for_residual:  # without an activation the gradient goes through the sum as it is
        dresidual = _empty_like(x, case) if case.act else dy
    dgamma = torch.empty(gamma.shape, dtype=torch.float32) if gamma is not None and for_gamma else None
    dbeta = torch.empty(beta.shape, dtype=torch.float32) if beta is not None and for_beta else None
    _native.backward(
        _SET,
        case.numbers,
        dy.data_ptr(),
        x.data_ptr(),
        _address(residual),
        _address(own_gamma),
        _address(own_beta),
        _address(dx),
        _address(dresidual) if case.act else 0,
        _address(dgamma),
        _address(dbeta),
        _address(dtotal),
        *_settings(case, x, places, eps),
    )
    if not case.direct:
        dgamma = None if dgamma is None or gamma is None else dgamma.to(gamma.dtype)
        dbeta = None if dbeta is None or beta is None else dbeta.to(beta.dtype)
    return dx, dresidual, dgamma, dbeta


def twice(
    needs: Sequence[bool],
    again: Any,
    dy: Tensor,
    x: Tensor,
    residual: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    case: Case,
    summed: bool,
) -> list[Tensor | None]:
    """The gradients by plain operations, which can be differentiated again."""
    from normkit.torch.functional import ACTIVATIONS as FUNCTIONS

    own = [None if t is None else t.view_as(t) for t in (x, residual, gamma, beta)]
    wide = [None if t is None else t.float() for t in own]
    y = again(wide[0], wide[2], wide[3])
    if wide[1] is not None:
        y = y + wide[1]
    if case.activation is not None:
        y = FUNCTIONS[case.activation](y)
    wanted = [t for t, need in zip(own, needs, strict=True) if need and t is not None]
    found = iter(torch.autograd.grad(y, wanted, dy.float(), create_graph=True))
    gradients = [next(found) if need and t is not None else None for t, need in zip(own, needs, strict=True)]
    if summed and needs[1] and residual is None:
        gradients[1] = dy
    return gradients


def covers(
    spec: NormSpec, p: NormPlan, x: Tensor, gamma: Tensor | None, beta: Tensor | None, residual: Tensor | None = None
) -> Geometry | str:
    """The geometry of a case, or why no compiled kernel covers it."""
    layout = layout_of(x)
    reason = _unfit(layout, x, residual, gamma, beta)
    if reason or layout is None:
        return reason
    found = geometry(spec.name, p, tuple(x.shape), layout)
    return missing() if _native is None and not isinstance(found, str) else found


def _covers_given(
    layout: Layout | None,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
) -> tuple[int, ...] | str:
    """The same, where the statistics are given."""
    reason = _unfit(layout, x, residual, gamma, beta)
    if reason or layout is None:
        return reason
    if not x.numel():
        return "an empty input"
    if any(t.dtype != torch.float32 or not t.is_contiguous() or t.device.type != "cpu" for t in (mean, var)):
        return "running statistics that are not contiguous float32"
    return missing() if _native is None else evaluation(tuple(x.shape), layout)


def covers_shared(x: Tensor, gamma: Tensor | None, beta: Tensor | None, residual: Tensor | None = None) -> str:
    """Why the halves cannot take such a part of a batch, whatever its layout and size; empty if they can."""
    return _unfit("contiguous", x, residual, gamma, beta) or (missing() if _native is None else "")


def _unfit(layout: Layout | None, x: Tensor, residual: Tensor | None, *affine: Tensor | None) -> str:
    """Why no kernel can take such tensors; empty if one can."""
    if x.device.type != "cpu":
        return f"an input on {x.device.type}"
    if x.dtype not in _DTYPES:
        return f"an input of {str(x.dtype)[6:]}"
    if layout is None:
        return "an input that is neither contiguous nor channels_last"
    if residual is not None and (residual.dtype != x.dtype or residual.device != x.device):
        return "a residual of another type or device"
    if any(t is not None and (t.device.type != "cpu" or t.dtype not in _DTYPES) for t in affine):
        return "gamma or beta of a type that is neither float32 nor bfloat16"
    return ""


def _empty_like(x: Tensor, case: Case) -> Tensor:
    y = torch.empty_like(x)
    if case.huge:
        _native.want_huge_pages(y.data_ptr(), x.nbytes)
    return y


def like(t: Tensor, x: Tensor) -> Tensor:
    """In the type and order of the input."""
    if t.dtype != x.dtype:
        t = t.to(x.dtype)
    if t.stride() == x.stride():
        return t
    return t.contiguous() if x.is_contiguous() else t.contiguous(memory_format=CHANNELS_LAST[x.dim()])


def _single(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.detach().float().contiguous()


def _places(statistics: Tensor) -> tuple[int, int, int]:
    """Addresses of variance, mean and the rest of the mean; 0 where nothing is centred."""
    first, step = statistics.data_ptr(), 4 * statistics.shape[1]
    return (first, first + step, first + 2 * step) if statistics.shape[0] == 3 else (first, 0, 0)


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def threads(x: Tensor) -> int:
    """How many threads a kernel uses on such a tensor."""
    return 1 if x.numel() < _ALONE else torch.get_num_threads()
