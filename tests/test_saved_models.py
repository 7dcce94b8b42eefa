"""Models that were saved and loaded: what comes back, and what stays as the fresh model had it."""

from __future__ import annotations

import pytest
import torch
from helpers import (
    one_thread,  # noqa: F401 - autouse
)
from torch import Tensor, nn

import singe
from singe.errors import ModelError
from singe.export import load_pruned, save_pruned
from singe.scores import fingerprint

X = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))


class Tied(nn.Module):
    """Two layers of so many outputs that share their weight."""

    def __init__(self, outputs: int = 5) -> None:
        super().__init__()
        self.first, self.middle = nn.Linear(6, 8), nn.Linear(8, 8)
        self.drop = nn.Dropout(0.5, inplace=True)
        self.out, self.again = nn.Linear(8, outputs), nn.Linear(8, outputs, bias=False)
        self.again.weight = self.out.weight

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.drop(self.middle(self.first(x).relu()).relu())
        return self.out(hidden) + self.again(hidden)


def saved(folder, outputs: int = 5) -> nn.Module:
    torch.manual_seed(0)
    model = Tied(outputs).eval()
    singe.prune(model, {"first": [1, 4]}, X)
    save_pruned(model, folder)
    return model


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_and_switches_of_the_fresh_model_stay(tmp_path, training):
    saved(tmp_path)
    fresh = Tied().train(training)
    fresh.drop.inplace = False
    load_pruned(fresh, tmp_path)
    assert all(module.training is training for module in fresh.modules())
    assert fresh.drop.inplace is False


def test_tied_heads_of_more_classes_become_narrow_together(tmp_path):
    model = saved(tmp_path)
    wide = load_pruned(Tied(9).eval(), tmp_path)
    assert wide.again.weight is wide.out.weight
    assert wide.out.out_features == wide.again.out_features == 5
    assert torch.equal(wide(X), model(X))


def test_a_plan_that_removes_nothing_is_carried_out_already(tmp_path):
    model = Tied()
    known = {"fingerprint": fingerprint(model)}
    assert save_pruned(model, tmp_path, singe.Plan({}, known))["plan"].is_file()
    with pytest.raises(ModelError, match="still has all that the plan removes"):
        save_pruned(model, tmp_path, singe.Plan({"first": [1]}, known))
