"""Networks that are fine-tuned at once come out as they would alone."""

from __future__ import annotations

import copy
import gc
import itertools
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import (
    one_thread,  # noqa: F401 - autouse
)
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples" / "cifar10"))
import cifar10
import finetuned
import side_by_side
from side_by_side import Progress

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
    seen = list(side_by_side.train(models, itertools.cycle(data), 10, 0.1, Progress(2)))
    assert seen == [2, 5, 8, 10]
    for found, expected in zip(models, alone, strict=True):
        assert not found.training
        for name, tensor in expected.state_dict().items():
            torch.testing.assert_close(
                found.state_dict()[name], tensor, rtol=tolerance, atol=tolerance, msg=name
            )


def test_channels_of_zeros_change_nothing(monkeypatch):
    monkeypatch.setattr(finetuned, "DEVICE", "cpu")
    monkeypatch.setattr(finetuned, "BF16", False)
    torch.manual_seed(0)
    narrow = cifar10.CifarResNet(1)
    side_by_side.resize(narrow, [13, 20, 41])
    wide = copy.deepcopy(narrow)
    side_by_side.resize(wide, [16, 24, 48])
    assert finetuned.widths(wide) == [16, 24, 48]
    data = [(torch.randn(6, 3, 16, 16), torch.randint(10, (6,))) for _ in range(5)]
    for model in (narrow, wide):
        finetuned.train(model, itertools.cycle(data), 10, 0.01)
    grown = wide.state_dict()["layer1.0.conv1.weight"][13:]
    assert grown.shape[0] == 3
    assert not grown.any()
    side_by_side.resize(wide, [13, 20, 41])
    for name, tensor in narrow.state_dict().items():
        torch.testing.assert_close(
            wide.state_dict()[name], tensor, rtol=1e-4, atol=1e-5, msg=name
        )  # sums of other lengths


class Recorded:
    """In place of an experiment: what :func:`side_by_side.run` asks of one."""

    def __init__(self, models: list[nn.Module]) -> None:
        self.models = iter(models)
        x, y = torch.randint(256, (20, 3, 32, 32), dtype=torch.uint8), torch.arange(20) % 10
        self.data = SimpleNamespace(x=x, y=y, quick=cifar10.batches(x, y, 10))

    def pruned(self, plan: Any) -> tuple[nn.Module, Any]:
        return next(self.models), plan

    def row(self, model: nn.Module, report: Any, history: Any) -> dict:
        return {"widths": finetuned.widths(model), "report": report, "history": history}


def test_networks_are_narrow_again_when_they_are_recorded(monkeypatch):
    monkeypatch.setattr(finetuned, "DEVICE", "cpu")
    monkeypatch.setattr(side_by_side, "DEVICE", "cpu")
    models = [cifar10.CifarResNet(1) for _ in range(2)]
    trained = []
    train = side_by_side.train
    monkeypatch.setattr(
        side_by_side,
        "train",
        lambda m, *a: trained.extend(map(finetuned.widths, m)) or train(m, *a),
    )
    for model, widths in zip(models, ([13, 20, 41], [8, 31, 64]), strict=True):
        side_by_side.resize(model, widths)
    job = {"seed": 0, "steps": 4, "lr": 0.01, "batch_size": 8}
    rows = list(
        side_by_side.run(
            Recorded(models), [job | {"n": n} for n in (0, 1)], ["a", "b"], Progress(2)
        )
    )
    assert trained == [[16, 24, 48], [8, 32, 64]]
    assert [(row["n"], row["report"], row["widths"]) for row in rows] == [
        (0, "a", [13, 20, 41]), (1, "b", [8, 31, 64])
    ]  # fmt: skip
    for row in rows:
        assert list(row["history"]) == [1, 2, 3, 4]
        assert row["best"] == max(row["history"].values())
        assert 0 <= row["pruned"] <= 1


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_run_that_was_ended_goes_on_where_it_was(monkeypatch, tmp_path, compiled):
    """Weights, statistics and what was seen are those of a run without a break, bit for bit."""
    monkeypatch.setattr(finetuned, "DEVICE", "cpu")
    monkeypatch.setattr(side_by_side, "DEVICE", "cpu")
    monkeypatch.setattr(side_by_side, "KEEP", 3)
    torch.manual_seed(0)
    fresh = [network(width) for width in (5, 8)]
    data = [(torch.randn(6, 3, 8, 8), torch.randint(4, (6,))) for _ in range(4)]

    def train(progress: Progress, until: int = 8) -> list[nn.Module]:
        models = copy.deepcopy(fresh)
        for step in side_by_side.train(models, itertools.cycle(data), 8, 0.1, progress, compiled):
            for history in progress.histories:
                history[step] = float(step)
            if step == until:
                break
        return models

    whole = train(without := Progress(2))
    first = Progress(2, tmp_path / "run.pt")
    first.start -= 1000
    train(first, until=4)  # kept: 3 steps
    ended = Progress(2, tmp_path / "run.pt")
    again = train(ended)
    assert ended.histories == without.histories
    assert ended.seconds() > 1000, "those of the first process count"
    for found, expected in zip(again, whole, strict=True):
        for name, tensor in expected.state_dict().items():
            assert torch.equal(found.state_dict()[name], tensor), name
