"""Prune in rounds, each fine-tuned by a Lightning Trainer.

    pip install lightning
    python examples/training/lightning_trainer.py [--steps 60]

About half a minute on two CPU cores, on scikit-learn's digits.
"""

from __future__ import annotations

import argparse
import logging
import warnings

import lightning
import torch
from plain_torch import data, train_for
from torch import Tensor, nn

import singe
from singe.demo import DigitsNet


class Classifier(lightning.LightningModule):
    """Trains the network it is given, in place."""

    def __init__(self, network: nn.Module, lr: float) -> None:
        super().__init__()
        self.network, self.lr = network, lr

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self.network(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), self.lr, weight_decay=0.01)


def finetune(network: nn.Module, stage: singe.Stage) -> float:
    """What ``singe.compress`` calls after every removal."""
    trainer = lightning.Trainer(
        max_steps=stage.steps, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, gradient_clip_val=1.0,
    )  # fmt: skip
    trainer.fit(Classifier(network, lr=0.003), stage.train)
    return float(trainer.callback_metrics.get("loss", float("nan")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    args = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")

    torch.manual_seed(0)
    train, calibrate, test = data()
    model = DigitsNet()
    train_for(model, train, 4 * args.steps, lr=0.01)
    report = singe.compress(
        model, train=train, calibrate=calibrate, evaluate=test, macs=0.4, rounds=3,
        ranking="cost", finetune_steps=args.steps, finetune=finetune,
    )  # fmt: skip
    print(
        f"accuracy {report.metric_before:.1%} -> {report.metric_after:.1%}, MACs "
        f"{report.macs_before:.3g} -> {report.macs_after:.3g}"
    )


if __name__ == "__main__":
    main()
