"""A small network, its groups and scores of any kind, for the tests of plans."""

from __future__ import annotations

import torch
from helpers import (
    CPU,
    one_thread,  # noqa: F401 - autouse
    randomise,
)
from helpers_networks import vgg
from torch import nn

import singe
from singe.data import example_batch
from singe.scores import fingerprint
from singe.units import find_groups, small

IMAGE = (3, 8, 8)


def network(widths=(12, 16, 14), linear=20) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    return randomise(vgg(widths, linear)), torch.randn(2, *IMAGE)


def graph_of(model, x):
    batch = small(example_batch(x, CPU))
    return find_groups(model, batch), batch


def random_scores(model, x, seed=0, power=1) -> singe.Scores:
    graph, _ = graph_of(model, x)
    draw = torch.Generator().manual_seed(seed)
    values = {
        g.name: torch.rand(g.n_units, generator=draw) ** power
        * (0.2 + torch.rand(1, generator=draw))
        for g in graph.groups
    }  # fmt: skip
    layers = {g.name: g.layers for g in graph.groups}
    return singe.Scores(values, layers, {"fingerprint": fingerprint(model), "criterion": "test"})


def lost(plan, scores) -> float:
    return sum(float(scores[name][units].sum()) for name, units in plan.items())
