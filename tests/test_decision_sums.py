"""What early decision is told, and what is left of units that were settled on the way."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from helpers import (
    one_thread,  # noqa: F401 - autouse
)
from helpers_decision import fitted
from helpers_networks import mlp
from torch import Tensor

import singe
from singe import engine
from singe.decision import EarlyDecision

OPTIONS = {"tolerance": 0.5, "pruning_ratio": 0.3, "path": "neuron", "progress": False}


@dataclass
class Look:
    """What a decision was told, and which units it had settled then."""

    totals: dict[str, Tensor]
    own: dict[str, Tensor]
    settled: dict[str, Tensor]


@pytest.fixture
def looks(monkeypatch):
    seen, update = [], EarlyDecision.update

    def noted(self, totals, own, size, left):
        settled = update(self, totals, own, size, left)
        seen.append(Look(*({n: t.clone() for n, t in d.items()} for d in (totals, own, settled))))
        return settled

    monkeypatch.setattr(EarlyDecision, "update", noted)
    return seen


def test_totals_are_the_sum_of_what_every_look_adds(looks):
    """An ablation is a mean over samples, so totals add up, whatever was settled on the way."""
    model, batches = fitted(mlp, (6,))
    batches = [(x.double(), y) for x, y in batches]
    singe.score(model.double(), batches, criterion="ablation", **OPTIONS)
    sums = {n: torch.zeros_like(t) for n, t in looks[0].totals.items()}
    open_still = {n: torch.ones_like(t, dtype=torch.bool) for n, t in sums.items()}
    assert len(looks) > 4
    for look in looks:
        for name, total in sums.items():
            total += look.own[name] * open_still[name]
            torch.testing.assert_close(look.totals[name], total, rtol=1e-9, atol=1e-9)
            open_still[name] = ~look.settled[name]
    assert any(bool(settled.any()) for settled in looks[-2].settled.values())


def test_what_a_settled_unit_has_not_seen_adds_nothing(looks, monkeypatch):
    monkeypatch.setattr(EarlyDecision, "consistent", lambda self, totals: totals)
    model, batches = fitted(mlp, (6,))
    early = singe.score(model, batches, **OPTIONS)
    assert any(bool(settled.any()) for settled in looks[-2].settled.values())
    for name, values in early.items():
        expected = (looks[-1].totals[name] / early.meta["samples"]).float()
        torch.testing.assert_close(values, expected, rtol=1e-5, atol=1e-8)


def test_samples_are_hard_for_a_divergence_where_the_gates_are_half_open(monkeypatch):
    """With open gates nothing has moved, and every sample would be as easy as the next."""
    model, batches = fitted(mlp, (6,))
    given, sort = [], engine.hardest_first
    monkeypatch.setattr(
        engine, "hardest_first", lambda data, losses: given.extend(losses) or sort(data, losses)
    )
    singe.score(model, batches, objective="kl", **OPTIONS)
    assert float(torch.cat(given).max()) > 1e-3
