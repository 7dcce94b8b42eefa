"""A run that can be cut off at any sample or evaluation, and goes on from its folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import make_batches, randomise
from helpers_networks import vgg
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import singe

BATCHES = make_batches((3, 8, 8), (4, 4, 4), dtype=torch.float32)


class Power(BaseException):
    """The power is cut: nothing catches this."""


def network() -> nn.Module:
    torch.manual_seed(0)
    model = randomise(vgg((8, 10, 9), 12))
    model[12] = nn.Sequential(nn.Flatten(), nn.Dropout(0.1))
    return model


def loader(after: int = 10**9) -> DataLoader:
    return DataLoader(Cut(after), batch_size=5, shuffle=True)


def compress(model: nn.Module, folder=None, **options) -> singe.CompressReport:
    options = {
        "macs": 0.5, "rounds": 2, "finetune_steps": 6, "train": loader(), "calibrate": BATCHES,
        "evaluate": BATCHES, "ema": 0.9, "resume": folder is not None, "progress": False,
    } | options  # fmt: skip
    if folder is not None and "finetune" not in options:
        options["checkpoint_every"] = 2
    return singe.compress(model, checkpoint=folder, **options)


class Cut(TensorDataset):
    """Cuts the power when the n-th sample is read."""

    def __init__(self, after: int) -> None:
        super().__init__(torch.cat([b[0] for b in BATCHES]), torch.cat([b[1] for b in BATCHES]))
        self.left = after

    def __getitem__(self, index):
        self.left -= 1
        if self.left < 0:
            raise Power
        return super().__getitem__(index)


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, nesterov=True),
    "adamw": lambda p: torch.optim.AdamW(p, 1e-2, amsgrad=True),
}


SCHEDULERS = {
    "one_cycle": lambda o, steps: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=steps + 1),
    "warm_up": lambda o, steps: torch.optim.lr_scheduler.SequentialLR(
        o, [torch.optim.lr_scheduler.LinearLR(o, total_iters=2),
            torch.optim.lr_scheduler.CosineAnnealingLR(o, steps)], [2],
    ),
}  # fmt: skip


class Evaluate:
    """Cuts the power at the n-th evaluation."""

    def __init__(self, left: int) -> None:
        self.left = left

    def __call__(self, model: nn.Module) -> float:
        self.left -= 1
        if self.left < 0:
            raise Power
        return 1.0


def interrupted(folder: Path) -> None:
    with pytest.raises(Power):
        compress(network(), folder, evaluate=Evaluate(4))
