"""Score, prune and fine-tune a trained ResNet-20 on CIFAR-10.

    python examples/cifar10/prune.py [--macs 0.5] [--criterion singe] [--path network]

Data and weights are looked for in ``$SINGE_DATA`` and in ``../shared`` next to the checkout, see cifar10.py.
About 10 minutes on two CPU cores with the defaults. Writes the pruned network,
for ``singe.load_pruned(cifar10.CifarResNet(3), "out/...")``, and what became of it in every round.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import cifar10
import torch

import singe
from singe.evaluation import accuracy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--depth", type=int, default=20, choices=(20, 56))
    parser.add_argument("--macs", type=float, default=0.5)
    parser.add_argument("--criterion", default="singe")
    parser.add_argument("--path", default="network")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--finetune-steps", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--test-images", type=int, default=5000)
    parser.add_argument("--out", type=Path, default=Path("out"))
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = cifar10.trained(args.depth).to(device)
    x, y = cifar10.images("train")
    test_x, test_y = cifar10.images("test")
    test = cifar10.batches(test_x[: args.test_images], test_y[: args.test_images], 250)
    report = singe.compress(
        model,
        train=cifar10.Augmented(x[2048:], y[2048:], 128, args.seed),
        calibrate=cifar10.batches(x[:512], y[:512], 64),
        evaluate=lambda m: accuracy(m, test),
        macs=args.macs,
        rounds=args.rounds,
        finetune_steps=args.finetune_steps,
        criterion=args.criterion,
        path=args.path,
        lr=0.02,
    )
    args.out.mkdir(parents=True, exist_ok=True)
    name = f"resnet{args.depth}-{args.criterion}-{args.path}-{args.macs:g}"
    singe.save_pruned(model, args.out / name, report.plan)
    (args.out / f"{name}.json").write_text(json.dumps(report.to_dict(), indent=1))
    print(
        f"accuracy {report.metric_before:.1%} -> {report.metric_after:.1%}, MACs "
        f"{report.macs_before:.3g} -> {report.macs_after:.3g}, parameters "
        f"{report.params_before:,} -> {report.params_after:,}; see {args.out}/{name}.*"
    )


if __name__ == "__main__":
    main()
