"""Networks that are fine-tuned at once come out as they would alone."""

from __future__ import annotations

import copy
import gc
import itertools
import sys
from pathlib import Path

import pytest
import torch
from helpers import (
    one_thread,  # noqa: F401 - autouse
)
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples" / "cifar10"))
import finetuned
import side_by_side

import singe


def network(width: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 4),
    )  # fmt: skip


@pytest.fixture
def no_collection():
    gc.disable()
    yield
    gc.enable()


# bfloat16: an ulp is 2^-8, and on a GPU the order of sums in atomics is not the same twice.
@pytest.mark.parametrize(
    ("bf16", "tolerance"), [(False, 1e-5), (True, 2e-2)], ids=["float32", "bfloat16"]
)
@pytest.mark.usefixtures("no_collection")
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_as_each_alone(monkeypatch, device, bf16, tolerance):
    for module in (finetuned, side_by_side):
        monkeypatch.setattr(module, "DEVICE", device)
    monkeypatch.setattr(finetuned, "BF16", bf16)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    torch.manual_seed(0)
    models = [network(width).to(device) for width in (5, 8)]
    data = [
        (torch.randn(6, 3, 8, 8).to(device), torch.randint(4, (6,)).to(device)) for _ in range(5)
    ]
    for model in models:  # pruning leaves nodes of the default stream, until they are collected
        singe.prune(model, {"0": [0]}, data[0][0])
    alone = copy.deepcopy(models)
    for model in alone:
        finetuned.train(model, itertools.cycle(data), 10, 0.1)
    seen = list(side_by_side.train(models, itertools.cycle(data), 10, 0.1))
    assert seen == list(range(1, 11))
    for found, expected in zip(models, alone, strict=True):
        assert not found.training
        for name, tensor in expected.state_dict().items():
            torch.testing.assert_close(
                found.state_dict()[name], tensor, rtol=tolerance, atol=tolerance, msg=name
            )
