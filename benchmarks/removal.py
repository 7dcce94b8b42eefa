"""Closing a gate against removing the unit, for literally every unit of real architectures.

    python -m benchmarks.removal [--models resnet18 ...] [--pixels 32]

The loss with the unit's gate at 0 is what ``criterion="ablation"`` reports; the other side is the
loss of the model with the unit sliced out by Torch-Pruning. Float64, random weights, norms with
random statistics of both signs, so that a forgotten shift shows. ``make test`` checks halves of all
groups and a sample of single units; this takes about half an hour for all four models.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import singe
from benchmarks.record import ROOT, write
from singe.data import as_batch
from singe.dependencies import build_dependency_graph
from singe.graph import Group, private_copy
from singe.units import find_groups

sys.path.insert(0, str(ROOT / "tests"))
from helpers import randomise
from helpers_trained import torchvision_models

MODELS = ("resnet18", "mobilenet_v2", "densenet121", "resnet50")


@contextmanager
def restored(modules: list[nn.Module]) -> Iterator[None]:
    """Put back what pruning changes: parameters, buffers and the recorded widths."""

    def shallow(value: Any) -> Any:
        return value.copy() if isinstance(value, dict | list) else value

    before = [{k: shallow(v) for k, v in m.__dict__.items()} for m in modules]
    try:
        yield
    finally:
        for module, state in zip(modules, before, strict=True):
            module.__dict__.clear()
            module.__dict__.update(state)


def removed_losses(model: nn.Module, x: Tensor, y: Tensor, group: Group) -> list[float]:
    """The loss without unit u, for every u of the group."""
    twin = private_copy(model, trainable=True)
    graph = build_dependency_graph(twin, as_batch((x, y), 0, x.device))
    root = twin.get_submodule(group.name)
    prune = graph.get_pruner_of_module(root).prune_out_channels
    losses = []
    for channels in group.root_channels.tolist():
        coupled = graph.get_pruning_group(root, prune, channels)
        with restored([item.dep.target.module for item in coupled]):
            coupled.prune()
            with torch.no_grad():
                losses.append(float(F.cross_entropy(twin(x), y)))
    return losses


def check(name: str, pixels: int) -> dict[str, Any]:
    """Largest relative difference between the two losses over all units of a model."""
    torch.manual_seed(0)
    model = getattr(torchvision_models(), name)(weights=None, num_classes=10)
    model = randomise(model.double())
    x = torch.randn(1, 3, pixels, pixels, dtype=torch.float64)
    y = torch.tensor([3])
    start = time.perf_counter()
    with torch.no_grad():
        full = float(F.cross_entropy(model(x), y))
    graph = find_groups(model, as_batch((x, y), 0, x.device))
    worst, units, moved = 0.0, 0, 0
    for group in graph.groups:
        scores = singe.score(
            model, [(x, y)], criterion="ablation", layers=[group.name], progress=False
        )
        removed = torch.tensor(removed_losses(model, x, y, group), dtype=torch.float64)
        gated = scores[group.name].double() + full
        worst = max(worst, float(((gated - removed) / removed).abs().max()))
        units += group.n_units
        moved += int(((removed - full).abs() > 1e-6 * full).sum())
    return {
        "groups": len(graph.groups),
        "left_out": graph.rejected,
        "units": units,
        "units_whose_removal_changes_the_loss": moved,
        "largest_relative_difference": worst,
        "seconds": time.perf_counter() - start,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--pixels", type=int, default=32)
    args = parser.parse_args()
    found = {}
    for name in args.models:
        found[name] = check(name, args.pixels)
        print(name, found[name], flush=True)
        write("removal", {"settings": vars(args), "models": found})


if __name__ == "__main__":
    main()
