"""One network, one pruner of Torch-Pruning, one line changed: the importance.

    python examples/cifar10/with_torch_pruning.py [--draws 3] [--samples 256]

A trained ResNet-20 loses the channels between the two convolutions of its blocks, ranked globally, until
1.5 and 2 times fewer MACs are left, in one shot and without fine-tuning. Accuracy on test images; every
draw takes other calibration images. Torch-Pruning's importances run with their default options and as
its examples feed them; each is asked once, on the whole network, and then looked up.
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cifar10
import torch
import torch_pruning as tp
from importances import Batches, Importance, hessian, inner_layers, pruner_of, table_of, taylor
from torch import Tensor, nn

import singe
from singe.adapters.torch_pruning import importance
from singe.evaluation import accuracy

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from benchmarks.record import earlier, write

NAME = "torch-pruning-resnet20"


def by_singe(
    normalizer: str | None = None, **options: Any
) -> Callable[[nn.Module, Batches], Importance]:
    def make(model: nn.Module, batches: Batches) -> Importance:
        layers = inner_layers(model)
        scores = singe.score(model, batches, layers=layers, progress=False, **options)
        return importance(scores, normalizer=normalizer)

    return make


IMPORTANCES: dict[str, tuple[bool, Callable[[nn.Module, Batches], Importance]]] = {
    "Random": (True, lambda m, b: tp.importance.RandomImportance()),
    "Magnitude": (False, lambda m, b: tp.importance.GroupMagnitudeImportance()),
    "BNScale": (False, lambda m, b: tp.importance.BNScaleImportance()),
    "LAMP": (False, lambda m, b: tp.importance.LAMPImportance()),
    "Taylor": (True, taylor),
    "Hessian": (True, hessian),
    "SInGE, network path": (True, by_singe(path="network")),
    "SInGE, network path, outside": (True, by_singe(path="network", norm="outside")),
    "SInGE, layer path": (True, by_singe(path="layer")),
    "SInGE, layer path, p=fisher": (True, by_singe(path="layer", p="fisher")),
    "SInGE, network path, normalizer=mean": (True, by_singe(path="network", normalizer="mean")),
    "SInGE, network path, outside, normalizer=mean": (
        True,
        by_singe(path="network", norm="outside", normalizer="mean"),
    ),
}
SPEEDUPS = (1.5, 2.0)


def pruned_to(
    model: nn.Module, example: Tensor, table: dict[str, Tensor | None], macs: float
) -> nn.Module:
    """The model pruned by the smallest ratio that reaches ``macs``; the ratio is found by bisection."""
    low, high, best = 0.0, 1.0, None
    for _ in range(9):
        ratio = (low + high) / 2
        candidate = copy.deepcopy(model)
        names = {module: name for name, module in candidate.named_modules()}
        lookup = lambda g, names=names: table[names[g[0].dep.target.module]]  # noqa: E731
        pruner_of(candidate, example, lookup, ratio).step()
        if tp.utils.count_ops_and_params(candidate, example)[0] <= macs:
            high, best = ratio, candidate
        else:
            low = ratio
    if best is None:
        raise RuntimeError("Torch-Pruning did not reach the target at any ratio")
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--test-images", type=int, default=2000)
    parser.add_argument("--only", default="", help="rows whose name holds this; others are kept")
    args = parser.parse_args()
    model = cifar10.trained(20)
    x, y = cifar10.images("train")
    test_x, test_y = cifar10.images("test")
    test = cifar10.batches(test_x[: args.test_images], test_y[: args.test_images], 250)
    example = test[0][0][:1]
    full, _ = tp.utils.count_ops_and_params(model, example)
    base = accuracy(model, test)
    print(f"{base:.1%} with {full / 1e6:.1f} M MACs")
    rows = earlier(NAME).get("rows", {}) if args.only else {}
    for name, (by_draw, make) in IMPORTANCES.items():
        if args.only not in name:
            continue
        draws = []
        for draw in range(args.draws if by_draw else 1):
            torch.manual_seed(draw)
            part = slice(draw * args.samples, (draw + 1) * args.samples)
            whole = copy.deepcopy(model)
            ranked = make(whole, cifar10.batches(x[part], y[part], 64))
            table = table_of(whole, example, ranked)
            cells = []
            for speedup in SPEEDUPS:
                pruned = pruned_to(model, example, table, full / speedup)
                macs, params = tp.utils.count_ops_and_params(pruned, example)
                cells.append({"accuracy": accuracy(pruned, test), "macs": macs, "params": params})
            draws.append(cells)
        means = [statistics.mean(cell["accuracy"] for cell in column)
                 for column in zip(*draws, strict=True)]  # fmt: skip
        rows[name] = {"draws": draws, "mean": means}
        print(f"{name:30s}" + "".join(f"{100 * m:7.1f}" for m in means), flush=True)
    version = importlib.metadata.version("torch-pruning")  # tp.__version__ of 1.6.1 says 1.6.0
    settings = vars(args) | {"speedups": SPEEDUPS, "torch_pruning": version}
    write(NAME, {"settings": settings, "base": base, "macs": full, "rows": rows})


if __name__ == "__main__":
    main()
