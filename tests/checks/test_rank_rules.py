"""NK9xx: on evidence made by hand, and in two processes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch")
import torch.distributed as dist  # noqa: E402
import torch.multiprocessing as mp  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn.parallel import DistributedDataParallel  # noqa: E402

import normkit  # noqa: E402
from normkit.checks.evidence import Data, Evidence, Layer  # noqa: E402
from normkit.checks.rule import RULES  # noqa: E402
from normkit.core.record import NormRecord  # noqa: E402


def call(model, x):
    """A forward pass of the user's: the flow of data, which takes longest to read, is not looked at."""
    return model(x)


def _work(rank: int, folder: str) -> None:
    """Train on data that differs from process to process, check, recalibrate, check again."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = DistributedDataParallel(
        nn.Sequential(nn.BatchNorm1d(3, momentum=0.5), nn.Linear(3, 1)), broadcast_buffers=False
    )
    generator = torch.Generator().manual_seed(rank)
    # Batches of unequal number: a check that ran collective calls for each would wait for ever.
    data = [torch.randn(6, 3, generator=generator) + 2 * rank for _ in range(3 + rank)]
    for x in data[:3]:
        model(x).square().mean().backward()
    own = model.module[0].running_mean.clone()
    before = normkit.check(model, data, select=["NK9"], forward=call)
    kept = bool(torch.equal(own, model.module[0].running_mean))
    normkit.recalibrate(model, data)
    after = normkit.check(model, data, select=["NK901"], forward=call)
    torch.save(([f.code for f in before.findings], before.findings[0].evidence, own, kept, len(after.findings)),
               f"{folder}/{rank}.pt")  # fmt: skip
    dist.destroy_process_group()


def test_two_processes(tmp_path):
    mp.spawn(_work, (str(tmp_path),), nprocs=2)
    results = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2)]
    for codes, evidence, _, kept, left in results:
        assert codes == ["NK901", "NK902"]
        # Means 2 apart, of which 1 - 0.5^3 has come in; variances near 1, with as much to come from 1.
        assert evidence["distance"] == pytest.approx(2 * (1 - 0.5**3), rel=0.5)
        assert kept, "every process keeps what it had"
        assert not left, "recalibrating gives all the same"
    assert not torch.equal(results[0][2], results[1][2])


def test_one_process_is_not_asked():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    found = normkit.check(model, [torch.randn(4, 3)], select=["NK9"])
    assert found.rules == ()
    assert not found.findings


def seen(**options):
    kept = {"mean": np.zeros(4), "var": np.ones(4)}
    layer = Layer("norm", "BatchNorm1d", NormRecord("batch", (4,), 1, 1e-5, rate=0.1, kept=kept), training=True)
    given = Evidence("torch", "Net", (layer,), data=Data((4,), batch_size=4), processes=2, ranks={"norm": 0.04})
    return replace(given, **options)


def test_by_hand_the_noise_of_the_last_update_is_healthy():
    assert not RULES["NK901"](seen())
    (finding,) = RULES["NK901"](seen(ranks={"norm": 0.41}))
    assert (finding.severity, finding.path) == ("warning", "norm")
    assert finding.fix.line == "normkit.recalibrate(model, data)"
    assert finding.fix.others == ("normkit.sync(model)",)


def test_by_hand_small_batches_without_synchronization():
    (finding,) = RULES["NK902"](seen())
    assert finding.words == "statistics of 4 samples, while 2 processes have 8"
    assert finding.fix.line == "normkit.sync(model)"
    assert not RULES["NK902"](seen(data=Data((8,), batch_size=8)))
    layer = seen().layers[0]
    assert not RULES["NK902"](seen(layers=(replace(layer, kind="SyncBatchNorm"),)))
    assert not RULES["NK902"](seen(layers=(replace(layer, frozen=True),)))
