"""What depends on the length of a training: the clips of batch renormalization, and the momentum of averages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from normkit.core.constraints import Constraint, Integer, Real, check
from normkit.errors import NormValueError, message

__all__ = ["MOMENTUM", "RenormSchedule", "momentum_for"]

MOMENTUM = 0.99  # of the batch norms of Keras and of Flax


def momentum_for(steps: int | None) -> float:
    """Return the momentum of debiased averages for a training of so many steps, 0.99 at most.

    The average reaches over a tenth of the training, and over ten steps at least, as PyTorch's does.
    """
    return MOMENTUM if steps is None else min(MOMENTUM, max(0.9, 1 - 10 / steps))


@dataclass(frozen=True)
class RenormSchedule:
    """Clips of batch renormalization as a function of the training step (arXiv:1702.03275, section 4.2).

    Until step `start` r_max = 1 and d_max = 0, which is batch norm. Then r_max rises linearly to its end value at step
    `r_end`, and d_max at step `d_end`. Defaults are the paper's, for a run of about 130 000 steps; for other lengths
    use :meth:`for_steps`, since with the paper's step numbers a short run would never leave batch norm.
    """

    r_max: float = 3.0
    d_max: float = 5.0
    start: int = 5_000
    r_end: int = 40_000
    d_end: int = 25_000

    CONSTRAINTS: ClassVar[dict[str, Constraint]] = {
        "r_max": Real(1.0),
        "d_max": Real(0.0),
        "start": Integer(0),
        "r_end": Integer(0),
        "d_end": Integer(0),
    }

    def __post_init__(self) -> None:
        check("RenormSchedule", self.CONSTRAINTS, {name: getattr(self, name) for name in self.CONSTRAINTS})
        if min(self.r_end, self.d_end) < self.start:
            got = f"start={self.start}, r_end={self.r_end}, d_end={self.d_end}"
            raise NormValueError(message("RenormSchedule: `r_end` and `d_end` must not come before `start`", got))

    @classmethod
    def for_steps(cls, steps: int, *, r_max: float = 3.0, d_max: float = 5.0) -> RenormSchedule:
        """Scale the paper's schedule to a run of `steps`: batch norm to 4 %, d rises to 19 %, r to 31 % of it."""
        check("RenormSchedule.for_steps", {"steps": Integer(1)}, {"steps": steps})
        return cls(r_max, d_max, round(0.04 * steps), round(0.31 * steps), round(0.19 * steps))

    def at(self, xp: Any, step: Any) -> tuple[Any, Any]:
        """Return (r_max, d_max) at a training step: the number of updates made before this batch."""

        def opened(end: int) -> Any:
            if end == self.start:
                return xp.where(step >= end, step * 0.0 + 1.0, step * 0.0)
            return xp.clip((step - self.start) / (end - self.start), 0.0, 1.0)

        return 1.0 + (self.r_max - 1.0) * opened(self.r_end), self.d_max * opened(self.d_end)
