"""Peers in NumPy that start quickly: one that is right, and others that are not."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import numpy as np

from normkit.benchmarking import exact
from normkit.core import formula
from normkit.core.plan import plan


class Runner:
    """The formula in float32; `change` may spoil what it returns."""

    def __init__(self, case, given, change=None, before=None):
        self.case, self.given, self.change, self.before = case, given, change, before

    def step(self):
        if self.before is not None:
            self.before()
        case, numbers = self.case, self.given
        sizes = {"group": (("g", case.groups),), "batch": (("c", case.channels),), "instance": (("c", case.channels),)}
        p = plan(case.spec, len(case.shape), sizes.get(case.norm, (("*c", case.shape[-1:]),)))
        x, dy, gamma = (np.array(values, dtype=np.float32) for values in (numbers.x, numbers.dy, numbers.gamma))
        beta = None if numbers.beta is None else np.array(numbers.beta)
        eps = case.spec.eps
        if not case.training:
            kept = {"mean": numbers.mean, "var": numbers.var}
            z = formula.evaluate(np, case.spec, p, x, kept, gamma, beta, eps=eps)
            return {"y": exact.activated(case.activation, z)[0]}
        z, moments = formula.normalize(np, case.spec, p, x, gamma, beta, eps=eps)
        y, slope = exact.activated(case.activation, z)
        gradients = formula.backward(np, case.spec, p, dy * slope.astype("f4"), x, gamma, beta, moments, eps=eps)
        found = {"y": y, "dx": gradients.x, "dgamma": gradients.gamma}
        return found if beta is None else {**found, "dbeta": gradients.beta}

    def outputs(self, result):
        return result if self.change is None else self.change(self.case, self.given, dict(result))


def right(case, given):
    return Runner(case, given)


class Copy:
    def __init__(self, case, given):
        self.x = np.array(given.x)
        self.y = self.x.copy()

    def step(self):
        np.copyto(self.y, self.x)
        return {"y": self.y}

    def outputs(self, result):
        return result


def copy(case, given):
    return Copy(case, given)


class Least(Copy):
    def step(self):
        return {"y": self.x.copy()}


def least(case, given):
    return Least(case, given)


def _spoiled(change):
    return lambda case, given: Runner(case, given, change)


def _with(name, function):
    return lambda case, given, found: {**found, name: function(case, given, found[name])}


# What a step may get wrong, in one output each.
one_value = _spoiled(_with("y", lambda case, given, y: np.where(np.arange(y.size).reshape(y.shape) == 7, y + 1e-2, y)))
no_activation = _spoiled(_with("y", lambda case, given, y: y - 0.01 * (y == 0)))
constant_statistics = _spoiled(_with("dx", lambda case, given, dx: dx + 0.01 * np.sign(given.dy)))
sign_of_gamma = _spoiled(_with("dgamma", lambda case, given, dgamma: np.abs(dgamma)))
mean_instead_of_sum = _spoiled(_with("dbeta", lambda case, given, dbeta: dbeta * 0.9))
not_finite = _spoiled(_with("dx", lambda case, given, dx: np.where(dx == dx.max(), np.nan, dx)))
wrong_shape = _spoiled(_with("y", lambda case, given, y: y[:1]))
incomplete = _spoiled(lambda case, given, found: {name: v for name, v in found.items() if name != "dgamma"})
LIES = (
    "one_value", "no_activation", "constant_statistics", "sign_of_gamma", "mean_instead_of_sum", "not_finite",
    "wrong_shape", "incomplete",
)  # fmt: skip


def dies(case, given):
    os.kill(os.getpid(), signal.SIGKILL)


def raises(case, given):
    raise ValueError("does not do\nthat")


def _wait():
    Path(os.environ["BENCH_PID"]).write_text(str(os.getpid()))
    time.sleep(60)


def hangs(case, given):
    return Runner(case, given, before=_wait)


def hangs_on_large(case, given):
    return Runner(case, given, before=_wait if case.shape[0] > 4 else None)


class Large:
    """Allocates 48 MB, more than glibc ever takes from the heap of its own accord."""

    def step(self):
        return np.ones(12 << 20, dtype=np.float32)


def large(case, given):
    runner = Runner(case, given)
    runner.timed, runner.step_once = Large(), runner.step
    first = runner.step()
    runner.step = runner.timed.step
    runner.outputs = lambda result: first
    return runner
