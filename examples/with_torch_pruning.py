"""Torch-Pruning's published example, run twice; only the importance line differs.

    python examples/with_torch_pruning.py [--model resnet18]

The example of its README: half of the channels of a torchvision ResNet-18, widths rounded to multiples
of 8, output layer kept. Weights are random here (nothing is downloaded), so the lines show MACs,
parameters and the change of the output, no accuracy; for that see examples/cifar10/with_torch_pruning.py.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import sys
from pathlib import Path
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn

import singe

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import benchmarks.architectures  # noqa: F401 - lets torchvision load beside a CPU-only torch


def published(model: nn.Module, example_inputs: Tensor, imp: Any) -> None:
    """Everything but the importance, as published."""
    ignored_layers = [
        m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == 1000
    ]
    pruner = tp.pruner.BasePruner(
        model,
        example_inputs,
        importance=imp,
        pruning_ratio=0.5,
        ignored_layers=ignored_layers,
        round_to=8,
    )
    before, base_params = tp.utils.count_ops_and_params(model, example_inputs)
    pruner.step()
    after, params = tp.utils.count_ops_and_params(model, example_inputs)
    print(f"  MACs {before / 1e9:.2f} G -> {after / 1e9:.2f} G, "
          f"parameters {base_params / 1e6:.2f} M -> {params / 1e6:.2f} M")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--size", type=int, default=224)
    args = parser.parse_args()
    torch.manual_seed(0)
    models = importlib.import_module("torchvision.models")
    original = getattr(models, args.model)(weights=None).eval()
    example_inputs = torch.randn(1, 3, args.size, args.size)
    calibration = torch.randn(8, 3, args.size, args.size)

    for title in ("Torch-Pruning's magnitude", "SInGE"):
        model = copy.deepcopy(original)
        if title == "SInGE":
            scores = singe.score(model, [calibration], objective="kl", path="network")
            imp = singe.adapters.torch_pruning.importance(scores, round_to=8)
        else:
            imp = tp.importance.GroupMagnitudeImportance(p=2)
        print(title)
        published(model, example_inputs, imp)
        with torch.no_grad():
            p, q = original(calibration).softmax(1), model(calibration).softmax(1)
        print(f"  KL(original || pruned) {(p * (p / q).log()).sum(1).mean():.3g}")


if __name__ == "__main__":
    main()
