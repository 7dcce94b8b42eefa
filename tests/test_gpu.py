"""The whole engine on a CUDA device: the same scores as the definition gives on the CPU."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import make_batches, randomise
from helpers_networks import residual

import singe

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
def test_equals_the_definition_on_the_cpu(options: dict, channels_last: bool) -> None:
    """1e-3 in float32: cuDNN's convolutions (TF32 off) round differently, ReLU kinks flip."""
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
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


def test_compress_on_the_gpu() -> None:
    model = randomise(residual()).cuda()
    data = make_batches((3, 8, 8), [8, 8, 8, 8], dtype=torch.float32)
    report = singe.compress(model, train=data, macs=0.6, rounds=2, finetune_steps=4, progress=False)
    assert report.macs_after <= 0.6 * report.macs_before
    assert all(p.is_cuda for p in model.parameters())
    assert torch.isfinite(model(data[0][0].cuda())).all()
