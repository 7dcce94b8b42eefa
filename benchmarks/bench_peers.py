"""Peers on the same work: seconds to scores of the same groups on the same images (``make bench``).

- Torch-Pruning's ``TaylorImportance`` (one backward of the mean loss) and ``HessianImportance`` (one
  backward per sample), then the importance of every group.
- Captum's ``LayerConductance`` and ``InternalInfluence`` with as many steps as there are nodes, layer by
  layer, summed to one number per channel: the nearest published path integrals. Their path is that
  of the input, ours that of the channel: the comparison is of cost alone.
- ``singe`` with its layer and network paths, and its ``taylor``.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch_pruning as tp
from torch import Tensor

from benchmarks.models import Work, work
from benchmarks.record import median_ratio, seconds, summary
from benchmarks.scoring import sweep

NODES = 4
# Images, groups: all of the trained network; a few of the large one.
SIZES: dict[str, tuple[int, int | None]] = {"resnet20": (64, None), "resnet50": (2, 6)}


def torch_pruning(todo: Work, hessian: bool) -> list[Tensor]:
    """Importance of every group, as its documentation computes it."""
    model = copy.deepcopy(todo.model)
    importance = tp.importance.HessianImportance() if hessian else tp.importance.TaylorImportance()
    graph = tp.DependencyGraph().build_dependency(model, todo.batches[0][0][:2])
    if hessian:
        importance.zero_grad()
    for x, y in todo.batches:
        losses = F.cross_entropy(model(x), y, reduction="none")
        if not hessian:
            (losses.sum() / todo.images).backward()
            continue
        for loss in losses:
            model.zero_grad()
            loss.backward(retain_graph=True)
            importance.accumulate_grad(model)
    found = []
    for name in todo.layers:
        layer = model.get_submodule(name)
        prune = graph.get_pruner_of_module(layer).prune_out_channels
        found.append(
            importance(graph.get_pruning_group(layer, prune, list(range(len(layer.weight)))))
        )
    return found


def captum(todo: Work, method: str) -> list[Tensor]:
    """Attribution of every channel: the mean over images of the sum over its pixels."""
    from captum.attr import InternalInfluence, LayerConductance

    model = copy.deepcopy(todo.model)
    kind = {"LayerConductance": LayerConductance, "InternalInfluence": InternalInfluence}[method]
    found = []
    for name in todo.layers:
        attribution = kind(model, model.get_submodule(name))
        total: Tensor | float = 0.0
        for x, y in todo.batches:
            part = attribution.attribute(x, target=y, n_steps=NODES, method="gausslegendre")
            total = total + part.detach().flatten(2).sum((0, 2))
        found.append(total / todo.images)
    return found


@pytest.mark.parametrize("model", list(SIZES))
def test_peers(benchmark, model, rounds, device):
    pytest.importorskip("captum", reason="captum is not installed: pip install '.[bench]'")
    images, groups = SIZES[model]
    if device == "cuda":
        images = 64
    todo = work(model, images, images, device, groups)
    sweeps: dict[str, list[float]] = {}  # of the calls, the part that is no search for groups

    def ours_of(name: str, path: str, **options: Any) -> list[Tensor]:
        scores = sweep(todo, path, NODES, **options)
        sweeps.setdefault(name, []).append(scores.meta["seconds"]["sweep"])
        return list(scores.values())

    others: dict[str, Callable[[], list[Tensor]]] = {
        "Torch-Pruning TaylorImportance": lambda: torch_pruning(todo, hessian=False),
        "Torch-Pruning HessianImportance": lambda: torch_pruning(todo, hessian=True),
        "Captum LayerConductance": lambda: captum(todo, "LayerConductance"),
        "Captum InternalInfluence": lambda: captum(todo, "InternalInfluence"),
        "singe taylor": lambda: ours_of("singe taylor", "layer", criterion="taylor"),
        "singe network path": lambda: ours_of("singe network path", "network"),
    }
    ours = "singe layer path"
    times: dict[str, list[float]] = {name: [] for name in (*others, ours)}
    units = [group.n_units for group in todo.graph().groups]
    for name, run in others.items():  # warm, and worth timing only if it gives a score per unit
        assert [len(scores) for scores in run()] == units, name
    sweeps.clear()

    def everyone_else() -> None:
        for name, run in others.items():
            times[name].append(seconds(run))

    def run_ours() -> None:
        times[ours].append(seconds(lambda: ours_of(ours, "layer")))

    benchmark.group = f"peers, {model}"
    with torch.enable_grad():
        benchmark.pedantic(run_ours, setup=everyone_else, rounds=rounds)
    summaries = {name: summary(spent) for name, spent in times.items()}
    benchmark.extra_info.update(
        todo.describe()
        | {
            "nodes": NODES,
            "seconds": summaries,
            "sweep_seconds": {name: statistics.median(spent) for name, spent in sweeps.items()},
            "over ours": {name: median_ratio(summaries, name, ours) for name in others},
        }
    )
