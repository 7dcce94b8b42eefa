"""Invariant 1 on real architectures: the fused engine computes the definition.

Float64: the engines differ by the order of their sums, 1e-9. Float32: 1e-4 where the network is
smooth. In a ReLU network no float32 engine can promise that: where an input lies within rounding of
the kink, another order of summation opens or closes it. With 64 images the definition itself, run in
float32, is 4.7e-4 (relative L2 of a group) from the definition in float64 on the trained ResNet-20.
"""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import (
    CPU,
    assert_close,
    make_batches,
    one_thread,  # noqa: F401 - autouse
    randomise,
    run_engine,
)
from helpers_trained import torchvision_models, trained_resnet20
from torch import nn
from torch.nn import functional as F

from singe.data import first_batch
from singe.units import find_groups

FLOAT64, FLOAT32 = 1e-9, 1e-4
KINKS = 2e-3  # relative L2 of a group; a few flipped ReLUs of 8 images, 3e-4 measured


def both(model, batches, graph, **options):
    """Scores of both engines."""
    fused = run_engine(model, batches, graph=graph, **options)
    assert fused.meta["stacked"]
    return fused.scores, run_engine(model, batches, graph=graph, engine="naive", **options).scores


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "mobilenet_v2", "densenet121"])
def test_torchvision(name):
    """Every group on the network path; six on the layer path, and the smallest one unit by unit."""
    torch.manual_seed(0)
    model = getattr(torchvision_models(), name)(weights=None, num_classes=10)
    model = randomise(model.double())
    batches = make_batches((3, 32, 32), (2,), classes=10)
    graph = find_groups(model, first_batch(batches, CPU))
    fused, naive = both(model, batches, graph, path="network", quadrature=2)
    assert len(fused) == len(graph.groups)
    assert_close(fused, naive, FLOAT64)
    chosen = [g.name for g in graph.groups[:: -(-len(graph.groups) // 6)]]
    few = find_groups(model, first_batch(batches, CPU), chosen)
    assert_close(*both(model, batches, few, path="layer", quadrature=2), FLOAT64)
    smallest = min(graph.groups, key=lambda g: g.n_units).name
    one = find_groups(model, first_batch(batches, CPU), [smallest])
    assert_close(*both(model, batches, one, path="neuron", quadrature=1), FLOAT64)


@pytest.mark.parametrize("path", ["layer", "network"])
def test_trained_resnet20(path):
    model = trained_resnet20()
    batches = make_batches((3, 32, 32), (3, 2), classes=10)
    graph = find_groups(model, first_batch(batches, CPU))
    assert_close(*both(model, batches, graph, path=path), FLOAT64)


@pytest.mark.parametrize("path", ["layer", "network"])
def test_float32(path, monkeypatch):
    """The trained ResNet-20 with its ReLUs replaced by a smooth activation."""
    monkeypatch.setattr(F, "relu", F.silu)
    model = trained_resnet20().float()
    batches = make_batches((3, 32, 32), (8,), dtype=torch.float32, classes=10)
    graph = find_groups(model, first_batch(batches, CPU))
    assert_close(*both(model, batches, graph, path=path), FLOAT32)


@pytest.mark.parametrize("path", ["layer", "network"])
def test_float32_with_kinks(path):
    """As near to the truth, the definition in float64, as kinks allow."""
    exact = trained_resnet20()
    model = copy.deepcopy(exact).float()
    batches = make_batches((3, 32, 32), (8,), dtype=torch.float32, classes=10)
    wide = [(x.double(), y) for x, y in batches]
    graph = find_groups(model, first_batch(batches, CPU))
    truth = run_engine(exact, wide, engine="naive", path=path).scores
    fused, naive = both(model, batches, graph, path=path)
    assert_close(fused, truth, KINKS)
    assert_close(naive, truth, KINKS)


def test_the_layout_of_the_engine_is_not_the_models():
    """Float32 images run channels-last inside; the model keeps its own layout."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.SiLU(), nn.Flatten(), nn.Linear(4 * 36, 3))
    before = model[0].weight.stride()
    run_engine(model, make_batches((3, 8, 8), (2,), dtype=torch.float32, classes=3))
    assert model[0].weight.stride() == before
