"""The whole engine on a CUDA device: the same scores as the definition gives on the CPU."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import batch_of, make_batches, randomise, relative_error
from helpers_networks import residual
from torch import nn

import singe
from singe.data import as_batch
from singe.units import find_groups

pytestmark = pytest.mark.gpu

OPTIONS = [
    {"path": "layer"},
    {"path": "network"},
    {"path": "neuron"},
    {"path": "layer", "p": 2, "norm": "outside"},
    {"path": "layer", "p": "sum"},
    {"path": "layer", "p": "fisher"},
    {"criterion": "taylor", "p": "fisher"},
    {"criterion": "signed", "path": "neuron"},
    {"criterion": "taylor"},
    {"criterion": "ablation"},
    {"granularity": "weight", "path": "layer"},
    {"granularity": "weight", "path": "neuron", "criterion": "ig", "norm": "outside"},
    {"granularity": "weight", "criterion": "magnitude"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
def test_equals_the_definition_on_the_cpu(
    monkeypatch: pytest.MonkeyPatch, options: dict, channels_last: bool
) -> None:
    """1e-3 in float32: cuDNN's convolutions (TF32 off) round differently, ReLU kinks flip."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    model = randomise(residual())
    data = make_batches((3, 8, 8), [8, 8], dtype=torch.float32)
    expected = singe.score(copy.deepcopy(model).double(),
                           [(x.double(), y) for x, y in data], engine="naive", **options)  # fmt: skip
    model = model.cuda()
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
    scores = singe.score(model, data, **options)
    again = singe.score(model, data, **options)
    assert list(scores) == list(expected)
    for name in scores:
        torch.testing.assert_close(scores[name], expected[name], rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(scores[name], again[name], rtol=1e-5, atol=1e-7)


# bfloat16 keeps 8 bits (on a CPU up to 1.4e-2 here), the others only sum in another order.
@pytest.mark.parametrize(
    ("options", "tolerance"),
    [({"autocast": torch.bfloat16}, 0.1), ({"compile": True}, 1e-3), ({"max_memory": 1}, 1e-3)],
    ids=str,
)
def test_other_ways_to_the_same_scores(
    monkeypatch: pytest.MonkeyPatch, options: dict, tolerance: float
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    model = randomise(residual()).cuda()
    data = make_batches((3, 8, 8), [8] * 5, dtype=torch.float32)
    plain = singe.score(model, data, path="network")
    found = singe.score(model, data, path="network", **options)
    for name in plain:
        assert relative_error(found[name], plain[name]) <= tolerance, name


@pytest.mark.parametrize("tf32", [False, True])
def test_the_groups_do_not_depend_on_the_precision_of_convolutions(
    monkeypatch: pytest.MonkeyPatch, tf32: bool
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", tf32)
    model, x = randomise(residual()), torch.randn(2, 3, 8, 8)
    expected = [g.name for g in find_groups(model, batch_of(x)).groups]
    graph = find_groups(model.cuda(), as_batch(x, 0, torch.device("cuda")))
    assert [g.name for g in graph.groups] == expected
    assert torch.backends.cudnn.allow_tf32 is tf32


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.qkv, self.out = nn.Linear(8, 16), nn.Linear(16, 48), nn.Linear(16, 16)
        self.mlp, self.head = nn.Linear(16, 24), nn.Linear(24, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 4)).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return self.head(self.mlp(x).relu().mean(1))


def test_attention_equals_the_definition() -> None:
    torch.manual_seed(0)
    model, x = Attention(), torch.randn(6, 5, 8)
    data = [(x, torch.arange(6) % 4)]
    expected = singe.score(
        copy.deepcopy(model).double(), [(x.double(), data[0][1])], engine="naive"
    )
    scores = singe.score(model.cuda(), data)
    for name in expected:
        torch.testing.assert_close(scores[name], expected[name], rtol=1e-3, atol=1e-5)


def test_compress_on_the_gpu() -> None:
    model = randomise(residual()).cuda()
    data = make_batches((3, 8, 8), [8, 8, 8, 8], dtype=torch.float32)
    report = singe.compress(model, train=data, macs=0.6, rounds=2, finetune_steps=4, progress=False)
    assert report.macs_after <= 0.6 * report.macs_before
    assert all(p.is_cuda for p in model.parameters())
    assert torch.isfinite(model(data[0][0].cuda())).all()


def test_a_latency_budget_on_the_gpu() -> None:
    """Wide enough for its layers to decide; what the plan promises is what it has measured."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 512, 3), nn.ReLU(), nn.Conv2d(512, 512, 3), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 4)).cuda()
    x = torch.randn(2, 3, 56, 56, device="cuda")
    scores = singe.score(model, [(x, torch.arange(2, device="cuda"))], progress=False)
    timing = singe.Timing(batch_size=64, runs=11)
    plan = singe.plan(model, scores, x, latency=0.7, timing=timing)
    assert 0 < plan.meta["after"]["latency"] <= plan.meta["target"]["latency"]
    assert plan.n_units > 0
    report = singe.prune(model, plan, x)
    assert report.macs_after < report.macs_before


def test_a_model_on_two_devices_is_refused() -> None:
    model = residual()
    model[0].cuda()
    with pytest.raises(singe.ModelError, match=r"on cpu, cuda:0; move the model to one device"):
        singe.score(model, make_batches((3, 8, 8), [8], dtype=torch.float32), progress=False)


def test_a_default_device_has_no_say() -> None:
    model, data = residual(), make_batches((3, 8, 8), [8, 8], dtype=torch.float32)
    expected = singe.score(model, data, progress=False)
    with torch.device("cuda"):
        scores = singe.score(model, data, progress=False)
    assert all(torch.equal(scores[name], values) for name, values in expected.items())
