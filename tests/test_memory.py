"""``max_memory``: passes are cut to fit, batches too where not even one variant fits."""

from __future__ import annotations

import pytest
import torch
from helpers import (
    CASES,
    CPU,
    assert_close,
    batch_of,
    make_batches,
    one_thread,  # noqa: F401 - autouse
    run_engine,
)

from singe import engine
from singe.data import halved
from singe.memory import PeakMemory


def test_a_batch_that_does_not_fit_is_halved(monkeypatch):
    case = CASES["residual"]
    model, batches = case.model(), case.batches((9,))
    sizes = []
    add = engine.FusedEngine._add_gradients

    def spy(self, variants, batch, *args):
        sizes.append((len(variants), batch.size))
        return add(self, variants, batch, *args)

    monkeypatch.setattr(engine.FusedEngine, "_add_gradients", spy)
    whole = run_engine(model, batches)
    assert set(sizes) == {(6, 9)}, "two groups of three nodes share a pass"
    sizes.clear()
    cut = run_engine(model, batches, max_memory=60_000)
    assert {size for _, size in sizes} < set(range(1, 6))
    assert_close(cut.scores, whole.scores, 1e-12)


def test_halves_are_the_batch():
    batch = batch_of(make_batches((6,), (7,))[0])
    first, second = halved(batch)
    assert (first.size, second.size) == (3, 4)
    assert torch.equal(torch.cat([first.args[0], second.args[0]]), batch.args[0])
    assert torch.equal(torch.cat([first.labels, second.labels]), batch.labels)


def test_a_batch_that_cannot_be_taken_apart_stays_whole():
    case = CASES["mlp"]
    x, y = case.batches((5,))[0]
    batch = batch_of({"input": x, "labels": y, "weight": 2.0})
    assert halved(batch) is None

    class Weighted(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = case.model()

        def forward(self, input, weight):
            return weight * self.body(input)

    data = [{"input": x, "labels": y, "weight": 2.0}]
    small = run_engine(Weighted(), data, max_memory=1)
    assert_close(small.scores, run_engine(Weighted(), data).scores, 1e-12)


def test_peak_memory_is_seen():
    with PeakMemory(CPU) as peak:
        block = torch.ones(50_000_000)
        del block
    if peak.bytes is None:
        pytest.skip("this system does not tell its peak memory")
    assert 180e6 < peak.bytes < 400e6
