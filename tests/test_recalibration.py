"""BatchNorm's running statistics after a removal."""

from __future__ import annotations

import weakref

import pytest
import torch
from helpers import (
    batch_of,
    clone,
    one_thread,  # noqa: F401 - autouse
)
from helpers_loop import BATCHES, OPTIONS, network, same_weights
from torch import nn

import singe
from singe.recalibration import recalibrate
from singe.tuner import Tuner


def test_recalibration_sets_the_statistics_of_the_calibration_data():
    model = network()
    data = [batch_of(b) for b in BATCHES]
    weights = [p.detach().clone() for p in model.parameters()]
    assert recalibrate(model, data)
    with torch.no_grad():
        outputs = [model[0](x) for x, _ in BATCHES]
    means = torch.stack([o.mean((0, 2, 3)) for o in outputs]).mean(0)
    assert torch.allclose(model[1].running_mean, means, atol=1e-6)
    assert model[1].momentum == 0.1
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), weights, strict=True))
    assert not any(m.training for m in model.modules())


def test_recalibration_weighs_batches_by_their_samples():
    """However the data is cut: the mean of all samples, also of a norm that runs twice in a pass."""
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(4)
    model = nn.Sequential(norm, nn.Linear(4, 4, bias=False), norm).eval()
    nn.init.eye_(model[1].weight)
    x = torch.randn(10, 4)
    assert recalibrate(
        model, [batch_of((x[:8], torch.zeros(8))), batch_of((x[8:], torch.zeros(2)))]
    )
    mean = [x[:8].mean(0), x[8:].mean(0)]
    # What the second call of each batch sees is normalised: its mean is 0.
    expected = (8 * mean[0] + 2 * mean[1]) / 20
    assert torch.allclose(norm.running_mean, expected, atol=1e-6)
    assert norm.momentum == 0.1


def test_recalibration_drops_nothing_out():
    """Also of a model that came in training mode, and leaves in it."""
    conv, norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
    model = nn.Sequential(conv, nn.Dropout(0.5), norm).train()
    without = clone(model).eval()
    batches = [batch_of(b) for b in BATCHES]
    assert recalibrate(model, batches)
    assert recalibrate(without, batches)
    assert same_weights(model, without)
    assert all(module.training for module in model.modules())


def test_recalibration_on_batches_of_one_sample():
    """Passed over beside larger ones; alone they count, where they have a variance."""
    conv = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).eval()
    alone, beside, plain = clone(conv), clone(conv), clone(conv)
    ones = [batch_of((BATCHES[0][0][i : i + 1], BATCHES[0][1][i : i + 1])) for i in range(3)]
    whole = [batch_of(b) for b in BATCHES]
    assert recalibrate(beside, [*whole, ones[0]])
    assert recalibrate(plain, whole)
    assert same_weights(beside, plain)
    assert recalibrate(alone, ones)
    with torch.no_grad():
        mean = alone[0](BATCHES[0][0][:3]).mean((0, 2, 3))
    assert torch.allclose(alone[1].running_mean, mean, atol=1e-6)
    flat = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)).eval()
    before = clone(flat)
    one = batch_of((torch.randn(1, 4), torch.zeros(1, dtype=torch.long)))
    with pytest.warns(UserWarning, match="give them two samples or more"):
        assert not recalibrate(flat, [one])
    assert same_weights(flat, before)
    assert flat[1].momentum == before[1].momentum
    assert not any(m.training for m in flat.modules())


def test_recalibration_reaches_the_average(monkeypatch):
    calls = []
    restart = Tuner.restart_statistics
    monkeypatch.setattr(Tuner, "restart_statistics", lambda t: (calls.append(t), restart(t)))
    options = {**OPTIONS, "rounds": 3, "finetune_steps": 1, "macs": 0.6, "ema": 0.9}
    singe.compress(network(), **options)
    assert len(calls) == 3
    singe.compress(network(), recalibrate=False, **options)
    assert len(calls) == 3


def test_recalibration_can_be_left_out():
    with_it, without = network(), network()
    options = {**OPTIONS, "finetune_steps": 0, "rounds": 1, "macs": 0.6}
    singe.compress(with_it, **options)
    report = singe.compress(without, recalibrate=False, **options)
    pruned = network()
    singe.prune(pruned, report.plan, BATCHES[0][0])
    assert same_weights(without, pruned)
    assert torch.equal(with_it[0].weight, without[0].weight)
    assert not torch.equal(with_it[1].running_mean, without[1].running_mean)


@pytest.mark.parametrize("how", ["wrapped", "in place", "a part"])
def test_recalibration_leaves_a_compiled_model_compiled(how):
    """Its hooks and momenta, another for every batch, would have it compiled anew until torch gives up."""
    graphs = []

    def backend(module, example_inputs):
        graphs.append(module)
        return module.forward

    class Model(nn.Module):  # torch does not look into a bare Sequential that is compiled in place
        def __init__(self):
            super().__init__()
            self.body = network()

        def forward(self, x):
            return self.body(x)

    model = Model()
    if how == "wrapped":
        model = torch.compile(model, backend=backend)
    elif how == "in place":
        model.compile(backend=backend)
    else:
        model.body = torch.compile(model.body, backend=backend)
    model(BATCHES[0][0])
    assert len(graphs) == 1
    assert recalibrate(model, [batch_of(b) for b in BATCHES * 4])
    model(BATCHES[1][0])
    assert len(graphs) == 1


def test_a_failure_in_the_data_leaves_the_statistics():
    def broken():
        yield batch_of(BATCHES[0])
        raise OSError("gone")

    model, before = network(), network()
    with pytest.raises(OSError, match="gone"):
        recalibrate(model, broken())
    assert same_weights(model, before)
    assert model[1].momentum == before[1].momentum


def test_recalibration_reads_batch_by_batch():
    held = []

    def batches():
        for x, y in BATCHES:
            batch = batch_of((x.clone(), y))
            held.append(weakref.ref(batch.args[0]))
            yield batch
            del batch
            assert sum(ref() is not None for ref in held) <= 2

    assert recalibrate(network(), batches())


def test_norms_that_the_data_does_not_reach_keep_their_statistics():
    """One norm per domain: the other domain's is not of the calibration data."""

    class Domains(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)
            self.norms = nn.ModuleList([nn.BatchNorm2d(4), nn.BatchNorm2d(4)])
            self.domain = 0

        def forward(self, x):
            return self.norms[self.domain](self.conv(x))

    model = Domains()
    for model.domain in (1, 0):
        model(2 * BATCHES[0][0] + model.domain)
    model.eval()
    before = [{k: t.clone() for k, t in norm.named_buffers()} for norm in model.norms]
    assert recalibrate(model, [batch_of(b) for b in BATCHES])
    after = [dict(norm.named_buffers()) for norm in model.norms]
    assert not torch.equal(before[0]["running_mean"], after[0]["running_mean"])
    assert all(torch.equal(before[1][k], after[1][k]) for k in before[1])
