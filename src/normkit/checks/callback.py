"""`normkit.check` in the middle of a training, once: a week is long, and the first steps tell."""

from __future__ import annotations

import importlib
import logging
import warnings
from typing import Any

from normkit.checks.engine import check
from normkit.checks.findings import Diagnosis
from normkit.core.constraints import Constraint, Integer, OneOf
from normkit.core.constraints import check as checked
from normkit.errors import MissingExtraError, NormRuntimeError, message

__all__ = ["CheckOnce"]

_LOG = logging.getLogger("normkit")
_AFTER = 20  # steps: updates are counted, parameters have moved, and next to nothing is lost yet


class CheckOnce:
    """Check a model once, after some steps of its training.

    Call it after every step: `callback(model, step)`. The check leaves the model and the random numbers as they are, so
    that the training goes on as it would have done. An error or a warning of the check is a `UserWarning`; with
    `on_error="raise"` an error ends the training. A healthy model is a line in the log `normkit`.

    Args:
        data: as `normkit.check`; a few batches of the training will do.
        after: the number of the step, counted from 1, after which to check.
        on_error: "warn" or "raise".
        options: further arguments of `normkit.check`: `loss`, `optimizer`, `limits`.

    Attributes:
        diagnosis: what was found; None before.

    Raises NormTypeError or NormValueError for other arguments, those of `normkit.check` when it is called.

    Example:
        >>> import torch
        >>> from normkit.checks.callback import CheckOnce
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4), torch.nn.ReLU())
        >>> callback = CheckOnce(torch.randn(64, 3), after=2)
        >>> for step in range(1, 4):
        ...     callback(model, step)  # after loss.backward() and optimizer.step()
        >>> callback.diagnosis.healthy
        True
    """

    def __init__(self, data: Any, after: int = _AFTER, on_error: str = "warn", **options: Any) -> None:
        constraints: dict[str, Constraint] = {"after": Integer(1), "on_error": OneOf(("warn", "raise"))}
        checked("CheckOnce", constraints, {"after": after, "on_error": on_error})
        self._data, self._after, self._on_error = data, after, on_error
        self._options = {"show_progress": False, **options}
        self.diagnosis: Diagnosis | None = None

    def __call__(self, model: Any, step: int) -> None:
        """Check after the step, if it is time and was not done before. Raises NormRuntimeError if asked to."""
        if self.diagnosis is not None or step < self._after:
            return
        found = self.diagnosis = check(model, self._data, **self._options)
        if found.errors and self._on_error == "raise":
            raise NormRuntimeError(f"step {step}: {found}")
        if found.healthy:
            _LOG.info("step %d: %s", step, found.sentence)
        else:
            warnings.warn(f"step {step}: {found}", UserWarning, stacklevel=2)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any, **__: Any) -> None:
        """The hook of Lightning: check its module after `trainer.global_step` steps."""
        self(pl_module, trainer.global_step)

    def as_lightning(self) -> Any:
        """A `lightning.pytorch.Callback` that does it. Raises MissingExtraError where Lightning is not installed."""
        try:
            base: Any = importlib.import_module("lightning.pytorch").Callback
        except ImportError as error:
            must = "this callback needs lightning, which is not installed"
            raise MissingExtraError(message(must, hint="pip install lightning")) from error
        callback = self

        class LightningCheckOnce(base):
            def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any, **__: Any) -> None:
                callback.on_train_batch_end(trainer, pl_module)

        return LightningCheckOnce()

    def as_keras(self) -> Any:
        """A `keras.callbacks.Callback` that checks after the first epoch that ends at the step or later.

        Only then are the variables of the model those of the training with every backend.
        """
        base: Any = importlib.import_module("keras").callbacks.Callback
        callback = self

        class KerasCheckOnce(base):
            step = 0

            def on_train_batch_end(self, *_: Any, **__: Any) -> None:
                self.step += 1

            def on_epoch_end(self, *_: Any, **__: Any) -> None:
                callback(self.model, self.step)

        return KerasCheckOnce()
