"""NK9xx: several processes that train together."""

from __future__ import annotations

from collections.abc import Iterator

from normkit.checks.evidence import Evidence
from normkit.checks.findings import Finding, Fix, number
from normkit.checks.rule import Limits, rule

_ONLY = ("torch",)  # whose processes each hold a model


@rule("NK901", "processes keep different statistics", "layers", "ranks", limits={"distance": 0.1}, frameworks=_ONLY)
def different_statistics(seen: Evidence, limits: Limits) -> Iterator[Finding]:
    """Under DistributedDataParallel every process keeps statistics of its own batches.

    Those of the first process win at the next forward pass, or, with `broadcast_buffers=False`, each evaluates by its
    own: the model that is saved has seen a part of the data, and validation differs from process to process. Compared
    are kept means, before any forward pass: their distance between two processes, over the channels, in deviations. A
    last update that differs is healthy (at a momentum of 0.1 and 16 values some 0.04), more than `distance` is not.
    Every process has to call `normkit.check`.
    """
    for layer in seen.layers:
        distance = seen.ranks.get(layer.path, 0.0)
        if distance > limits["distance"]:
            words = f"kept means of {seen.processes} processes lie {number(distance)} deviations apart"
            line = f"normkit.recalibrate({seen.name}, {seen.data_name})"
            fix = Fix(line, verb="recalibrate", safe=True, others=(f"normkit.sync({seen.name})",))
            cause = "every process keeps statistics of its own"
            yield Finding("warning", layer.path, words, {"distance": distance}, fix, cause, 2.0)


@rule("NK902", "small batches per process", "layers", "data", "ranks", limits={"samples": 8}, frameworks=_ONLY)
def small_batches(seen: Evidence, limits: Limits) -> Iterator[Finding]:
    """Statistics of a batch norm are those of one process's batch, however large the batch of all is.

    Said where a process has fewer than `samples` samples and a norm does not synchronize. `normkit.sync` takes the
    statistics over all processes, on any device and for batches of unequal sizes.
    """
    data = seen.data
    assert data is not None
    samples = data.batch_size or max(data.sizes, default=0)
    if not 0 < samples < limits["samples"]:
        return
    for layer in seen.layers:
        if layer.record.kind in ("batch", "sync") and not layer.frozen and not layer.synchronized:
            words = f"statistics of {samples} samples, while {seen.processes} processes have {samples * seen.processes}"
            values = {"samples": samples, "processes": seen.processes}
            yield Finding("warning", layer.path, words, values, Fix(f"normkit.sync({seen.name})"))
