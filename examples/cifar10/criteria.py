"""Which criterion keeps the accuracy when channels go, without any fine-tuning?

    python examples/cifar10/criteria.py [--depth 20] [--draws 3] [--samples 256]

Scores the channels between the two convolutions of every block (the groups ``layerX.Y.conv1``) of a
trained CIFAR-10 ResNet, removes the lowest 20, 35 and 50 % of them by global ranking, and measures
top-1 accuracy on test images, and the share of the MACs that is left: equal shares of channels are not equal
MACs, for which there is finetuned.py. Every draw takes other calibration images. Torch-Pruning's
importances run with their own options, which make the scores of different groups comparable in their
own way (LAMP by its quotients, the others by dividing by the mean); the package's are ranked as they are.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
from pathlib import Path
from typing import Any

import cifar10
from importances import SCORERS, by_singe

import singe
from singe.evaluation import accuracy

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from benchmarks.record import write

SETTINGS: dict[str, dict[str, Any]] = {
    "random": {"criterion": "random"},
    "magnitude, L1": {"criterion": "magnitude"},
    "taylor, p=1": {"criterion": "taylor"},
    "taylor, p=fisher": {"criterion": "taylor", "p": "fisher"},
    "singe, layer path": {"path": "layer"},
    "singe, layer path, p=sum": {"path": "layer", "p": "sum"},
    "singe, layer path, p=fisher": {"path": "layer", "p": "fisher"},
    "singe, network path": {"path": "network"},
    "singe, network path, outside": {"path": "network", "norm": "outside"},
    "singe, network path, kl": {"path": "network", "objective": "kl"},
}
PEERS = {
    "Torch-Pruning's magnitude, L1": "L1",
    "Torch-Pruning's magnitude, L2": "L2",
    "Torch-Pruning's LAMP": "LAMP",
    "Torch-Pruning's Taylor": "Taylor",
}  # label -> name in importances.py
DATA_FREE = (
    "magnitude, L1", "Torch-Pruning's magnitude, L1", "Torch-Pruning's magnitude, L2",
    "Torch-Pruning's LAMP",
)  # fmt: skip
SHARES = (0.20, 0.35, 0.50)


def lowest(scores: singe.Scores, share: float) -> singe.Plan:
    """The lowest share of all units; every group keeps its best one."""
    units = sorted(
        (float(value), name, unit)
        for name, values in scores.items()
        for unit, value in enumerate(values)
        if unit != int(values.argmax())
    )
    total = sum(len(values) for values in scores.values())
    remove: dict[str, list[int]] = {}
    for _, name, unit in units[: round(share * total)]:
        remove.setdefault(name, []).append(unit)
    return singe.Plan(remove)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--depth", type=int, default=20, choices=(20, 56))
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--test-images", type=int, default=2000)
    args = parser.parse_args()

    model = cifar10.trained(args.depth)
    x, y = cifar10.images("train")
    test_x, test_y = cifar10.images("test")
    test = cifar10.batches(test_x[: args.test_images], test_y[: args.test_images], 250)
    example = test[0][0][:1]
    base = accuracy(model, test)
    print(f"base accuracy {base:.1%}")
    rows: dict[str, Any] = {}
    scorers = {name: by_singe(**options) for name, options in SETTINGS.items()}
    scorers |= {label: SCORERS[name] for label, name in PEERS.items()}
    for name, scorer in scorers.items():
        draws, macs = [], []
        for draw in range(1 if name in DATA_FREE else args.draws):
            part = slice(draw * args.samples, (draw + 1) * args.samples)
            batches = cifar10.batches(x[part], y[part], 64)
            scores = scorer(model, batches, draw)
            accuracies, left = [], []
            for share in SHARES:
                pruned = copy.deepcopy(model)
                report = singe.prune(pruned, lowest(scores, share), example)
                accuracies.append(accuracy(pruned, test))
                left.append(report.macs_after / report.macs_before)
            draws.append(accuracies)
            macs.append(left)
        means, left = (
            [statistics.mean(column) for column in zip(*of, strict=True)] for of in (draws, macs)
        )
        rows[name] = {
            "options": SETTINGS.get(name), "draws": draws, "mean": means, "macs_left": left,
        }  # fmt: skip
        told = [f"{100 * m:7.1f} ({100 * k:.0f})" for m, k in zip(means, left, strict=True)]
        print(f"{name:30s}" + "".join(told), flush=True)
    write(
        f"criteria-resnet{args.depth}",
        {"settings": vars(args) | {"shares": SHARES}, "base": base, "criteria": rows},
    )


if __name__ == "__main__":
    main()
