"""Models with a part that torch.compile has wrapped: what is measured with hooks sees its layers."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import (
    CPU,
    one_thread,  # noqa: F401 - autouse
)
from helpers_budget import graph_of
from torch import nn

import singe
from singe.cost import CostModel, count
from singe.data import example_batch
from singe.latency import Stopwatch, Timing
from singe.modes import eager
from singe.original import Original
from singe.snapshot import Snapshot

IMAGES = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))
DATA = [(IMAGES, torch.arange(8) % 4)] * 2


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        self.features.extend([nn.Conv2d(8, 6, 3), nn.ReLU()])
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        return self.head(self.features(x).mean((2, 3)))


@pytest.fixture
def models():
    """The same network as it is, and with a part that is compiled and was in use."""
    torch.manual_seed(0)
    plain = Model().eval()
    compiled = copy.deepcopy(plain)
    compiled.features = torch.compile(compiled.features, backend="eager")
    for samples in (8, 5, 3, 2):  # an ordinary life; the code of every kind of pass is kept
        compiled.train()(IMAGES[:samples]).sum().backward()
        with torch.no_grad():
            compiled.eval()(IMAGES[:samples])
    compiled.zero_grad()
    state = {
        k.replace("features.", "features._orig_mod."): t for k, t in plain.state_dict().items()
    }
    compiled.load_state_dict(state)
    yield plain, compiled
    torch._dynamo.reset()


def names(found) -> list[str]:
    return sorted(name.replace("_orig_mod.", "") for name in found)


def test_their_cost_is_that_of_the_model_as_it_is(models):
    plain, compiled = models
    batch = example_batch(IMAGES[:2], CPU)
    assert count(compiled, batch) == count(plain, batch)
    costs = [CostModel(model, *graph_of(model, IMAGES[:2])) for model in models]
    assert names(costs[1]._layers) == names(costs[0]._layers)
    timed = [Stopwatch(m, batch, Timing(runs=1, warmup=0)).layer_seconds(m) for m in models]
    assert names(timed[1]) == names(timed[0]) == ["features.0", "features.3", "head"]


@pytest.mark.parametrize("share", [0.8, 0.5])
def test_they_are_planned_and_pruned_like_the_model_as_it_is(models, share):
    plans = [
        singe.plan(m, singe.score(m, DATA, progress=False), IMAGES, macs=share) for m in models
    ]
    assert list(plans[1].values()) == list(plans[0].values())
    assert plans[1].meta["after"]["macs"] == plans[0].meta["after"]["macs"]
    reports = [singe.prune(model, plan, IMAGES) for model, plan in zip(models, plans, strict=True)]
    assert reports[1].macs_after == reports[0].macs_after


def test_their_layers_are_visited_in_the_order_of_calls(models):
    class Turned(nn.Module):
        """What stands first is called last."""

        def __init__(self, features: nn.Module) -> None:
            super().__init__()
            self.last, self.features, self.head = nn.Linear(6, 4), features, nn.Linear(4, 4)

        def forward(self, x):
            return self.head(self.last(self.features(x).mean((2, 3))))

    model = Turned(models[1].features).eval()
    graph, batch = graph_of(model, IMAGES[:2])
    with Snapshot(model) as snapshot:
        original = Original(model, snapshot, graph, batch, None)
        order = original.in_order_of_calls(g.name for g in graph.groups)
    assert [name.replace("_orig_mod.", "") for name in order] == [
        "features.0",
        "features.3",
        "last",
    ]


def test_one_of_two_threads_that_leaves_first_does_not_compile_for_the_other(models):
    graphs = []

    def backend(module, example_inputs):
        graphs.append(module)
        return module.forward

    square = torch.compile(lambda x: x * x, backend=backend)
    first, second = eager(), eager()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    square(IMAGES)
    assert not graphs
    second.__exit__(None, None, None)
    square(IMAGES)
    assert len(graphs) == 1
