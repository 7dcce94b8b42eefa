"""Which criterion keeps the accuracy when single weights are masked, without any fine-tuning?

    python examples/cifar10/weights.py [--draws 3] [--samples 256]

Scores every weight of the convolutions of a trained CIFAR-10 ResNet-20, masks the lowest 50, 70 and
80 % of them with ``torch.nn.utils.prune.global_unstructured``, or two of every four inputs (2:4; the
first convolution has three inputs and stays whole), and measures top-1 accuracy on test images. Every
draw takes other calibration images.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
from pathlib import Path
from typing import Any

import cifar10
from torch import nn
from torch.nn.utils import prune

import singe
from singe.adapters import torch_prune
from singe.evaluation import accuracy

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from benchmarks.record import write

SETTINGS: dict[str, dict[str, Any]] = {
    "random": {"criterion": "random"},
    "magnitude": {"criterion": "magnitude"},
    "taylor, abs(w x grad)": {"criterion": "taylor"},
    "singe, network path": {"path": "network"},
    "singe, network path, outside": {"path": "network", "norm": "outside"},
    "singe, network path, kl": {"path": "network", "objective": "kl"},
    "singe, layer path": {"path": "layer"},
}
SHARES = (0.5, 0.7, 0.8)


def masked(model: nn.Module, scores: singe.WeightScores, share: float | None) -> nn.Module:
    """A copy with the lowest share of all scored weights masked, or 2 of 4 with None."""
    copied = copy.deepcopy(model)
    if share is None:
        torch_prune.n_of_m(copied, scores, n=2, m=4)
    else:
        importance = torch_prune.weight_importance(scores, copied)
        prune.global_unstructured(list(importance), prune.L1Unstructured, importance, amount=share)
    return copied


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--test-images", type=int, default=2000)
    args = parser.parse_args()

    model = cifar10.trained(20)
    x, y = cifar10.images("train")
    test_x, test_y = cifar10.images("test")
    test = cifar10.batches(test_x[: args.test_images], test_y[: args.test_images], 250)
    convs = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    base = accuracy(model, test)
    print(f"base accuracy {base:.1%}; columns: {SHARES} masked, 2:4")
    rows: dict[str, Any] = {}
    for name, options in SETTINGS.items():
        draws, seconds = [], []
        for draw in range(1 if name == "magnitude" else args.draws):
            part = slice(draw * args.samples, (draw + 1) * args.samples)
            batches = cifar10.batches(x[part], y[part], 64)
            scores = singe.score(
                model, batches, granularity="weight", layers=convs, seed=draw, **options
            )
            seconds.append(scores.meta["seconds"]["sweep"])
            draws.append([accuracy(masked(model, scores, s), test) for s in (*SHARES, None)])
        means = [statistics.mean(column) for column in zip(*draws, strict=True)]
        rows[name] = {"options": options, "draws": draws, "mean": means, "seconds": seconds}
        print(f"{name:30s}" + "".join(f"{100 * m:7.1f}" for m in means), flush=True)
    write(
        "weights-resnet20",
        {"settings": vars(args) | {"shares": SHARES}, "base": base, "criteria": rows},
    )


if __name__ == "__main__":
    main()
