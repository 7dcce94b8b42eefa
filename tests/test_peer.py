"""Invariant 9: `taylor` with p = 1 is Torch-Pruning's, where both define the same thing.

That is a group whose only producer is a bias-free conv or linear without a normalisation: elsewhere
W_u also holds the folded bias, and coupled producers are not added up by ``group_reduction="first"``.
"""

from __future__ import annotations

import pytest
import torch
import torch_pruning as tp
from helpers import (
    CLASSES,
    make_batches,
    one_thread,  # noqa: F401 - autouse
    relative_error,
)
from helpers_networks import Head
from torch import nn

import singe


def plain_conv() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, bias=False),
        nn.ReLU(),
        nn.Conv2d(6, 5, 3, bias=False),
        nn.ReLU(),
        Head(5),
    )


def plain_linear() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(6, 8, bias=False), nn.ReLU(), nn.Linear(8, 7, bias=False), nn.Tanh(),
        nn.Linear(7, CLASSES),
    )  # fmt: skip


@pytest.mark.parametrize("engine", ["fused", "naive"])
@pytest.mark.parametrize(("build", "shape"), [(plain_conv, (3, 8, 8)), (plain_linear, (6,))])
def test_taylor_is_torch_prunings(build, shape, engine):
    torch.manual_seed(0)
    model, batches = build().double(), make_batches(shape, (5, 5))
    found = singe.score(model, batches, criterion="taylor", engine=engine, progress=False)

    for x, y in batches:  # the gradient of the mean over batches of equal size
        (nn.functional.cross_entropy(model(x), y) / len(batches)).backward()
    graph = tp.DependencyGraph().build_dependency(model, batches[0][0])
    peer = tp.importance.TaylorImportance(group_reduction="first", normalizer=None)
    assert list(found) == ["0", "2"]
    for name in found:
        layer = model.get_submodule(name)
        group = graph.get_pruning_group(
            layer,
            graph.get_pruner_of_module(layer).prune_out_channels,
            list(range(len(found[name]))),
        )
        # Both are float32 in the end.
        assert relative_error(found[name], peer(group)) <= 1e-6
