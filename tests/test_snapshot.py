"""A model that is put back: its very parts, with what was in them."""

from __future__ import annotations

import pytest
import torch
from helpers import (
    assert_unchanged,
    one_thread,  # noqa: F401 - autouse
    snapshot,
)
from torch import nn

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
