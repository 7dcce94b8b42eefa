"""Where memory ends on the way: nothing counts twice, progress adds up, and none is held afterwards."""

from __future__ import annotations

import pytest
import torch
from helpers import (
    CPU,
    assert_close,
    batch_of,
    one_thread,  # noqa: F401 - autouse
    run_engine,
)
from helpers_networks import CASES

from singe.data import read_batches
from singe.engine import FusedEngine
from singe.request import Request
from singe.sweep import Sweep
from singe.units import find_groups


@pytest.mark.parametrize("path", ["layer", "neuron", "network"])
def test_what_was_added_of_a_job_is_not_added_again_in_pieces(path, monkeypatch):
    """The rest of the job and all that follow go on in halves of the batch: the whole is not run again."""
    case = CASES["residual"]
    model, data = case.model(), case.batches((10, 11))
    options = {"path": path, "quadrature": 4}
    whole = run_engine(model, data, **options)
    add, record, added, recorded = Sweep.add, Sweep.record, [], []

    def two_and_no_more(self, variants, batch, *rest):
        if batch.size > 5 and (len(variants) > 1 or len(added) >= 2):
            recorded.clear()
            raise torch.OutOfMemoryError("CUDA out of memory")
        add(self, variants, batch, *rest)
        added.append(batch.size)

    def noted(self, batch):
        recorded.append(batch.size)
        return record(self, batch)

    monkeypatch.setattr(Sweep, "add", two_and_no_more)
    monkeypatch.setattr(Sweep, "record", noted)
    tight = run_engine(model, data, **options)
    assert added[:2] == [10, 10]
    assert max(added[2:]) <= 5
    assert 0 < max(recorded) <= 5
    assert_close(tight.scores, whole.scores, 1e-12)


@pytest.mark.parametrize("path", ["layer", "neuron", "network"])
def test_a_batch_that_cannot_be_cut_goes_on_where_memory_is_there_again(path, monkeypatch):
    """A few of its samples were recorded in between, to see whether it can."""
    case, lacks, add = CASES["residual"], iter([True]), Sweep.add
    model, data = case.model(), case.batches((16, 16))

    def objective(outputs, batch):
        return outputs.square().mean() * (1 + outputs[0, 0] ** 2)

    options = {"path": path, "objective": objective, "quadrature": 2}
    whole = run_engine(model, data, **options)

    def limited(self, variants, *rest):
        if len(variants) > 1 or next(lacks, False):
            raise torch.OutOfMemoryError("CUDA out of memory")
        add(self, variants, *rest)

    monkeypatch.setattr(Sweep, "add", limited)
    assert_close(run_engine(model, data, **options).scores, whole.scores, 1e-12)
    assert next(lacks, None) is None


@pytest.mark.parametrize("max_memory", [60_000, None])
def test_progress_comes_to_the_whole(max_memory, monkeypatch):
    """Of batches that are cut before anything runs, and of those where memory ends on the way."""
    case, add = CASES["residual"], Sweep.add
    model, data = case.model(), case.batches((10, 11))
    graph = find_groups(model, batch_of(data[0]))

    def limited(self, variants, batch, *rest):
        if batch.size > 5 and max_memory is None:
            raise torch.OutOfMemoryError("CUDA out of memory")
        add(self, variants, batch, *rest)

    monkeypatch.setattr(Sweep, "add", limited)
    engine, told = FusedEngine(model, graph, Request().definition, max_memory), []
    engine.run(read_batches(data, CPU), told.append)
    assert sum(told) == pytest.approx(2 * engine.variants_per_batch())


def test_nothing_of_the_last_batch_is_held_afterwards():
    case = CASES["residual"]
    model, data = case.model(), case.batches()
    engine = FusedEngine(model, find_groups(model, batch_of(data[0])), Request().definition)
    engine.run(read_batches(data, CPU))
    assert not engine.network.cache.outputs
    assert engine.network.cache.bytes == 0
