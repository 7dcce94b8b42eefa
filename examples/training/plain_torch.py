"""Prune in rounds with a training loop of your own, and continue after an interruption.

    python examples/training/plain_torch.py [--folder run] [--steps 60]

About half a minute on two CPU cores, on scikit-learn's digits. Interrupt it and start it again: it goes on
from the newest checkpoint in the folder.
"""

from __future__ import annotations

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import singe
from singe.demo import DigitsNet


def data() -> tuple[DataLoader, list, list]:
    """Shuffled training batches, calibration batches, test batches."""
    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    y = torch.tensor(digits.target)
    train = DataLoader(TensorDataset(x[:1200], y[:1200]), batch_size=64, shuffle=True)
    return train, [(x[:256], y[:256])], [(x[1200:], y[1200:])]


def train_for(model: nn.Module, loader: DataLoader, steps: int, lr: float) -> float:
    """Any loop will do: this one is AdamW with a warm-up. Returns the last loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    model.train()
    done, loss = 0, torch.zeros(())
    while done < steps:
        for x, y in loader:
            loss = nn.functional.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            done += 1
            if done == steps:
                break
    return float(loss.detach())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", default="run")
    parser.add_argument("--steps", type=int, default=60)
    args = parser.parse_args()

    torch.manual_seed(0)  # a run is continued with the same original weights
    train, calibrate, test = data()
    model = DigitsNet()
    train_for(model, train, 4 * args.steps, lr=0.01)
    report = singe.compress(
        model, train=train, calibrate=calibrate, evaluate=test, macs=0.4, rounds=4,
        ranking="cost", accuracy_floor=0.8, finetune_steps=args.steps,
        finetune=lambda m, stage: train_for(m, stage.train, stage.steps, lr=0.003),
        checkpoint=args.folder, resume=True,
    )  # fmt: skip
    print(report.plan)
    print(
        f"accuracy {report.metric_before:.1%} -> {report.metric_after:.1%}, MACs "
        f"{report.macs_before:.3g} -> {report.macs_after:.3g}; see {args.folder}/"
    )


if __name__ == "__main__":
    main()
