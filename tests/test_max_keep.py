"""``max_keep``: what goes whatever the target stays gone, and is counted."""

from __future__ import annotations

import pytest
import torch
from helpers import (
    one_thread,  # noqa: F401 - autouse
    randomise,
)
from helpers_budget import network, random_scores
from helpers_networks import residual

import singe


def test_a_maximum_goes_whatever_the_target():
    model, x = network()
    scores = random_scores(model, x)
    plan = singe.plan(model, scores, x, macs=1.0, max_keep=0.75)
    assert {n: len(u) for n, u in plan.items()} == {"0": 3, "4": 4, "8": 4, "13": 5}
    # Containers name what is inside them.
    torch.manual_seed(0)
    model = randomise(residual())
    inside = singe.plan(model, random_scores(model, x), x, macs=1.0, max_keep={"3": 0.7})
    assert {n: len(u) for n, u in inside.items()} == {"0": 2, "3.body.0": 2}


def test_a_maximum_holds_under_rounding():
    model, x = network()
    scores = random_scores(model, x)
    plan = singe.plan(model, scores, x, macs=1.0, max_keep=0.7, round_to=4)
    for name, values in scores.items():
        assert len(values) - len(plan.get(name, [])) <= 0.7 * len(values), name


@pytest.mark.parametrize("share", [0.75, 0.9])
def test_what_a_maximum_took_does_not_come_back(share):
    """Not even where the last unit left room for it."""
    model, x = network()
    scores = random_scores(model, x)
    plan = singe.plan(model, scores, x, macs=0.4, max_keep={"13": share}, max_pruning_ratio=0.9)
    assert len(scores["13"]) - len(plan["13"]) <= share * len(scores["13"])


def test_what_a_maximum_alone_takes_is_counted():
    model, x = network()
    plan = singe.plan(model, random_scores(model, x), x, macs=1.0, max_keep=0.75)
    report = singe.prune(model, plan, x)
    assert plan.meta["after"]["macs"] == report.macs_after < report.macs_before
