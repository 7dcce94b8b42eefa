"""A unit that is removed and one whose gate is closed are the same, and what removal keeps of tensors."""

from __future__ import annotations

import pytest
import torch
from helpers import (
    CPU,
    assert_unchanged,
    batch_of,
    clone,
    one_thread,  # noqa: F401 - autouse
    randomise,
    snapshot,
)
from helpers_networks import CASES
from helpers_trained import torchvision_models, trained_resnet20
from torch import nn

import singe
from singe.data import first_batch
from singe.network import Network, set_gates
from singe.removal import kept_elements, remove_units, take
from singe.units import find_groups


def gated_and_removed(model: nn.Module, x: torch.Tensor, **target) -> float:
    """Largest difference of the outputs, relative to the largest output."""
    data = [(x, torch.zeros(len(x), dtype=torch.long))]
    scores = singe.score(model, data, criterion="random", progress=False)
    plan = singe.plan(model, scores, x, ranking="local", **target)
    graph = find_groups(model, batch_of(x), layers=list(scores))
    gated = Network(model, graph.groups, graph.folds)
    set_gates(gated, [(g, plan[g.name]) for g in graph.groups if g.name in plan], 0.0)
    pruned = clone(model)
    singe.prune(pruned, plan, x)
    with torch.no_grad():
        closed, removed = gated(batch_of(x)), pruned(x)
        change = float((removed - model(x)).abs().max() / removed.abs().max())
        assert change > 1e-3, "removing these units does nothing: the test would see no mistake"
    return float((closed - removed).abs().max() / removed.abs().max())


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_pruned_outputs_equal_gated_outputs(name):
    torch.manual_seed(0)
    model = randomise(getattr(torchvision_models(), name)(weights=None, num_classes=10))
    assert gated_and_removed(model, torch.randn(2, 3, 32, 32), channels=0.5) <= 1e-5


def test_pruned_outputs_equal_gated_outputs_of_a_trained_network():
    model = trained_resnet20().float()
    assert gated_and_removed(model, torch.randn(4, 3, 32, 32), params=0.4) <= 1e-5


@pytest.mark.parametrize("name", ["vgg", "residual", "depthwise", "pre_activation", "grouped"])
def test_which_elements_removal_keeps(name):
    """Every parameter and buffer of the pruned model is those elements of the original."""
    case = CASES[name]
    model = case.model()
    batch = first_batch(case.batches(), CPU)
    removals = [(g, [0, g.n_units // 2][: g.n_units - 1]) for g in find_groups(model, batch).groups]
    before = snapshot(model)
    kept = kept_elements(model, batch, removals)
    assert_unchanged(model, before)
    pruned = clone(model)
    remove_units(pruned, batch, removals)
    for name, tensor in pruned.state_dict().items():
        assert torch.equal(take(model.state_dict()[name], kept[name]), tensor), name
    cut = sum(t.shape != model.state_dict()[n].shape for n, t in pruned.state_dict().items())
    assert cut > 1
