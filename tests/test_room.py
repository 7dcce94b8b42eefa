"""How many variants and samples fit into how much memory, by hand."""

from __future__ import annotations

import pytest
import torch
from helpers import batch_of
from torch import nn

from singe import memory, units
from singe.criteria import as_criterion
from singe.definition import Definition
from singe.network import Network
from singe.objectives import as_objective
from singe.quadrature import as_quadrature
from singe.room import Room


def room_of(device, max_memory, **options):
    """Of a network of two groups: 4 rows of 3 x 9 + 1 entries, 6 rows of 4 x 9 + 1, in float32."""
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.ReLU(),
        nn.Conv2d(4, 6, 3),
        nn.ReLU(),
        nn.Conv2d(6, 2, 3),
        nn.Flatten(),
    )
    graph = units.find_groups(model, batch_of((torch.randn(2, 3, 7, 7), torch.tensor([0, 1]))))
    definition = Definition(
        as_objective("cross_entropy"), as_criterion("singe"), options.get("path", "layer"),
        as_quadrature(5), options.get("p", 1), "inside", "unit",
    )  # fmt: skip
    network = Network(model, graph.groups, graph.folds)
    return Room(network, graph.groups, definition, torch.device(device), max_memory)


ROWS = 4 * 4 * 28, 4 * 6 * 37  # bytes at one node


@pytest.mark.parametrize(
    ("options", "rows"),
    [
        ({"path": "network"}, sum(ROWS)),
        ({"path": "layer"}, max(ROWS)),
        ({"path": "neuron"}, 4 * 37),
        ({"path": "layer", "p": "sum"}, 4 * 6),
    ],
    ids=str,
)
def test_what_fits_is_counted_in_activations_and_rows(options, rows):
    record = 1_000_000
    gates_only = options.get("p") == "sum"
    sums = 5 * (4 * (4 + 6) if gates_only else sum(ROWS))
    limit = 10**7
    room = room_of("cuda", limit, **options)  # on a CPU what the caches hold is a limit of its own
    room._cache.bytes = record
    assert room.beside_sums == limit - sums
    assert room.variants() == (limit - sums - record) // (3 * record + rows)
    room.sample_bytes = 1000.0
    assert room.samples() == (limit - sums) // (4 * 1000)
    room._cache.bytes = (limit - sums) // 4 + 1  # a variant takes three times as much
    assert room.variants() == 0


def test_a_gpu_takes_more_where_nobody_gave_a_limit(monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda device: 80_000_000)
    on_cpu, on_gpu = room_of("cpu", None), room_of("cuda", None)
    assert (on_cpu.budget, on_gpu.budget) == (20_000_000, 40_000_000)
    for room in (on_cpu, on_gpu):
        room._cache.bytes = 1_000_000
    assert on_cpu.variants() == 6, "three times the record each"
    assert on_gpu.variants() == 19, "twice"


def test_rows_alone_make_no_batch_smaller():
    room = room_of("cpu", 100_000, path="network")
    room._variant_bytes, room._cache.bytes = 10**9, 1000
    assert room.variants() == 1
