"""Stages of fine-tuning: what goes on from one to the next, what each of them draws, trains and tells."""

from __future__ import annotations

import pytest
import torch
from helpers import (
    one_thread,  # noqa: F401 - autouse
)
from helpers_loop import OPTIONS, network, tuner_of
from torch import nn

import singe


def test_the_average_goes_on_over_the_stages():
    """By hand: as long as it is young it remembers less of its start."""
    model = network()
    tuner = tuner_of(model, ema=0.9)
    seen = []

    def note():
        seen.append(model[0].weight.detach().clone())

    for _ in range(2):
        tuner.start(3)
        tuner.run(after_step=note)
    expected = seen[0]
    for steps, weight in enumerate(seen[1:], 2):
        decay = min(0.9, (1 + steps) / (10 + steps))
        expected = decay * expected + (1 - decay) * weight
    torch.testing.assert_close(tuner.average["0.weight"], expected)


def test_every_stage_draws_anew():
    drawn = []

    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))

        def forward(self, x):
            drawn.append(float(torch.rand(())))
            return self.body(x)

    tuner = tuner_of(Noisy())
    for _ in range(2):
        tuner.start(3)
        tuner.run()
    assert len(set(drawn)) == 6


def test_the_loss_of_a_stage_is_that_of_its_last_tenth(monkeypatch):
    tuner = tuner_of(network())
    loss_of, losses = tuner._loss, []

    def noted(batch):
        loss = loss_of(batch)
        losses.append(float(loss.detach()))
        return loss

    monkeypatch.setattr(tuner, "_loss", noted)
    tuner.start(20)
    assert tuner.run() == pytest.approx(sum(losses[-2:]) / 2)


def test_the_scale_and_the_last_losses_go_on_from_a_state():
    tuner, other = (tuner_of(network(), autocast=torch.float16) for _ in range(2))
    tuner.start(20)
    for _ in range(19):
        tuner._one_step()
    tuner._scaler.update(128.0)
    other.load(tuner.state())
    assert other._scaler.get_scale() == 128.0
    assert other.tail == tuner.tail
    assert len(other.tail) == 1


def test_a_norm_that_is_frozen_in_a_model_in_training_stays_so():
    model = network().train()
    model[1].eval()
    before = model[1].running_mean.clone()
    singe.compress(model, channels=1.0, recalibrate=False, **OPTIONS)
    assert torch.equal(model[1].running_mean, before)
    assert not model[1].training
    assert model.training
