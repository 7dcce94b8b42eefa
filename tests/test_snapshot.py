"""A model that is put back: its very parts, with what was in them."""

from __future__ import annotations

from collections import OrderedDict, defaultdict

import pytest
import torch
from helpers import (
    assert_unchanged,
    one_thread,  # noqa: F401 - autouse
    snapshot,
)
from helpers_loop import BATCHES, OPTIONS, network
from torch import nn

import singe
from singe.snapshot import Snapshot


def trained_model() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    model(torch.randn(5, 3)).square().sum().backward()
    model[0].bias.requires_grad_(False)
    return model


def shrink(model):
    model[0].weight = nn.Parameter(model[0].weight.detach()[:2])
    model[0].out_features = 2
    del model[1]._buffers["running_mean"], model[1].weight


def gather(model):
    for parameter in model.parameters():
        parameter.grad.add_(1.0)


def forget(model):
    model.zero_grad(set_to_none=True)
    model.requires_grad_(True)


@pytest.mark.parametrize("change", [shrink, gather, forget, nn.Module.double, nn.Module.eval])
def test_everything_comes_back_as_often_as_it_is_put_back(change):
    model = trained_model()
    before, sizes = snapshot(model), repr(model)
    kept = Snapshot(model)
    for _ in range(2):
        change(model)
        kept.restore()
        assert_unchanged(model, before, versions=False)
        assert repr(model) == sizes


class Frozen(OrderedDict):
    """Like the configurations of diffusers: none of its own methods writes."""

    def __setitem__(self, key, value):
        raise TypeError("frozen")

    update = clear = __setitem__


def test_containers_stay_the_very_ones_with_what_was_in_them():
    """Two modules may share one, and a subclass be read by its attributes."""
    model, names = trained_model(), Frozen()
    OrderedDict.__setitem__(names, "b", 1)
    OrderedDict.__setitem__(names, "a", 2)
    held = {"skips": [1, 2], "sizes": defaultdict(list, {"x": [3]}), "names": names, "seen": {4}}
    for module in model:
        module.__dict__.update(held)
    kept = Snapshot(model)
    for _ in range(2):
        held["skips"].append(5)
        del held["sizes"]["x"]
        names.move_to_end("b")
        held["seen"].clear()
        model[1].skips = []
        kept.restore()
        for module in model:
            assert all(module.__dict__[name] is value for name, value in held.items())
        assert held == {"skips": [1, 2], "sizes": {"x": [3]}, "names": names, "seen": {4}}
        assert list(names.items()) == [("b", 1), ("a", 2)]


@pytest.mark.parametrize("floor", [None, 0.5], ids=["failed", "rolled back"])
def test_hooks_can_be_taken_away_after_a_run_that_put_the_model_back(floor):
    model, metrics, calls = network(), iter([1.0, 0.0, 0.0]), []
    handle = model[0].register_forward_hook(lambda *_: calls.append(1))
    options = {"evaluate": lambda m: next(metrics)} if floor else {"on_round": stop}
    if floor:
        assert singe.compress(model, macs=0.7, accuracy_floor=floor, **OPTIONS, **options).stopped
    else:
        with pytest.raises(KeyboardInterrupt):
            singe.compress(model, macs=0.7, **OPTIONS, **options)
    handle.remove()
    calls.clear()
    model(BATCHES[0][0])
    assert calls == []


def stop(*_):
    raise KeyboardInterrupt
