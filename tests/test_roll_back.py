"""What comes back: the last good round, or where there is none or something fails the model as it came."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    assert_unchanged,
    clone,
    one_thread,  # noqa: F401 - autouse
    snapshot,
)
from helpers_loop import BATCHES, OPTIONS, network, same_weights

import singe


def test_a_metric_that_is_no_number_is_below_any_floor():
    values = iter([0.9, 0.9, math.nan])
    report = singe.compress(
        network(), macs=0.7, evaluate=lambda m: next(values), accuracy_floor=0.8, **OPTIONS
    )
    assert "was nan, below accuracy_floor=0.8" in report.stopped


@pytest.mark.parametrize("ema", [None, 0.9])
def test_below_the_floor_the_last_good_round_comes_back(ema):
    model, after = network(), []
    metrics = iter([1.0, 0.9, 0.95, 0.8, 0.85, 0.5, 0.6])
    report = singe.compress(
        model, macs=0.4, evaluate=lambda m: next(metrics), accuracy_floor=0.7, ema=ema,
        on_round=lambda *_: after.append(clone(model)), **{**OPTIONS, "rounds": 4},
    )  # fmt: skip
    assert len(report.rounds) == 2
    assert report.metric_after == 0.85
    assert report.abandoned.metric_finetuned == 0.6
    assert "after round 3 was 0.6000, below accuracy_floor=0.7" in report.stopped
    assert "after round 2" in report.stopped
    assert report.macs_after == report.rounds[1].macs > report.abandoned.macs
    assert [model[i].out_channels for i in (0, 4, 8)] == [
        after[1][i].out_channels for i in (0, 4, 8)
    ]
    if ema is None:
        assert same_weights(model, after[1])
    fresh = network()
    singe.prune(fresh, report.plan, BATCHES[0][0])
    fresh.load_state_dict(model.state_dict())
    torch.optim.SGD(model.parameters(), 0.1)  # an ordinary module
    F.cross_entropy(model.train()(BATCHES[0][0]), BATCHES[0][1]).backward()


@pytest.mark.parametrize(
    "options", [{"macs": 0.4}, {"macs": 0.4, "ema": 0.9}, {"channels": 1.0, "ema": 0.9}], ids=str
)
def test_a_first_round_below_the_floor_gives_the_model_as_it_was(options):
    model = network()
    before = snapshot(model)
    metrics = iter([1.0, 0.2, 0.3])
    report = singe.compress(
        model, evaluate=lambda m: next(metrics), accuracy_floor=0.7, **OPTIONS, **options
    )
    assert report.rounds == []
    assert dict(report.plan) == {}
    assert report.macs_after == report.macs_before
    assert report.metric_after == 1.0
    assert_unchanged(model, before, versions=False)


def test_the_average_of_the_last_good_round_comes_back():
    """Also where the round after it removed nothing, so that no tensor was made anew."""
    expected, model = network(), network()
    options = {"channels": 1.0, "ema": 0.9, **OPTIONS}
    singe.compress(expected, **{**options, "rounds": 1})
    metrics = iter([1.0, 0.9, 0.95, 0.5, 0.6])
    report = singe.compress(
        model, evaluate=lambda m: next(metrics), accuracy_floor=0.7, **{**options, "rounds": 3}
    )
    assert len(report.rounds) == 1
    assert same_weights(model, expected)


def test_gradients_that_a_finetune_function_has_added_to_come_back():
    model = network()
    F.cross_entropy(model(BATCHES[0][0]), BATCHES[0][1]).backward()
    before = snapshot(model)

    def finetune(m, stage):
        F.cross_entropy(m(BATCHES[1][0]), BATCHES[1][1]).backward()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        singe.compress(model, channels=1.0, finetune=finetune, **OPTIONS)
    assert_unchanged(model, before, versions=False)
