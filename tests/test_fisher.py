"""p="fisher": the derivative along a gate of every sample, squared, averaged and rooted."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    CASES,
    CPU,
    assert_close,
    make_batches,
    one_thread,  # noqa: F401 - autouse
    run_engine,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import singe
from singe.data import first_batch
from singe.engine import FusedEngine
from singe.quadrature import as_quadrature
from singe.request import Request
from singe.units import find_groups


def by_hand(model: nn.Sequential, batches: list[tuple[Tensor, Tensor]], mus, omegas) -> Tensor:
    """Of the first layer of an MLP, one sample at a time, from the gate's own derivative."""
    score = torch.zeros(model[0].out_features, dtype=torch.float64)
    samples = [(x, y) for xs, ys in batches for x, y in zip(xs, ys, strict=True)]
    for mu, omega in zip(mus, omegas, strict=True):
        squares = torch.zeros_like(score)
        for x, y in samples:
            gate = torch.full_like(score, mu).requires_grad_()
            logits = model[1:](gate * model[0](x[None]))
            (derivative,) = torch.autograd.grad(F.cross_entropy(logits, y[None]), gate)
            squares += derivative.square()
        score += omega * (squares / len(samples)).sqrt()
    return score


@pytest.mark.parametrize("criterion", ["singe", "taylor"])
def test_it_is_what_it_says(criterion):
    case = CASES["mlp"]
    model, batches = case.model(), case.batches((3, 4))
    rule = as_quadrature(3)
    mus, omegas = (rule.nodes, rule.weights) if criterion == "singe" else ([1.0], [1.0])
    found = run_engine(model, batches, criterion=criterion, quadrature=3, p="fisher").scores
    assert_close({"0": found["0"]}, {"0": by_hand(model, batches, mus, omegas)}, 1e-9)


@settings(max_examples=10)
@given(
    seed=st.integers(0, 100),
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    path=st.sampled_from(["layer", "neuron", "network"]),
)
def test_no_less_than_the_derivative_of_the_mean(seed, sizes, path):
    """Jensen: the root mean square over samples is at least the absolute mean, node by node."""
    case = CASES["residual"]
    model, batches = case.model(seed), case.batches(sizes)
    each = run_engine(model, batches, path=path, p="fisher").scores
    mean = run_engine(model, batches, path=path, p="sum").scores
    for name in each:
        assert (each[name] >= mean[name] * (1 - 1e-9)).all()


def test_one_sample_has_no_other_to_cancel_it():
    case = CASES["residual"]
    model, batches = case.model(), case.batches((1,))
    each = run_engine(model, batches, p="fisher").scores
    assert_close(each, run_engine(model, batches, p="sum").scores, 1e-9)


@pytest.mark.parametrize("path", ["layer", "network"])
def test_cutting_the_data_otherwise_changes_nothing(path):
    case = CASES["group_norm"]
    model = case.model()
    ((x, y),) = case.batches((7,))
    whole = run_engine(model, [(x, y)], path=path, p="fisher").scores
    for sizes in ([1] * 7, [3, 4]):
        parts = list(zip(x.split(sizes), y.split(sizes), strict=True))
        assert_close(run_engine(model, parts, path=path, p="fisher").scores, whole, 1e-9)


class Windows(nn.Module):
    """The positions of a sample become rows of the batch, as in attention over windows."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(5, 8), nn.LayerNorm(8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, 1)
        return self.down(F.gelu(self.norm(self.up(rows)))).unflatten(0, x.shape[:2]).mean(1)


class SequenceFirst(Windows):
    """The first dimension inside is the sequence, which may be as long as the batch."""

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.norm(self.up(x.transpose(0, 1))))).mean(0)


class AcrossTheBatch(Windows):
    """What one sample gives depends on the others."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - 0.5 * x.mean(0, keepdim=True))


@pytest.mark.parametrize("size", [3, 4, 6])  # the sequence has 4 positions
@pytest.mark.parametrize("kind", [Windows, SequenceFirst, AcrossTheBatch])
def test_where_the_first_dimension_is_not_the_batch_samples_run_one_by_one(kind, size):
    torch.manual_seed(0)
    model = kind().double().eval()
    batches = make_batches((4, 5), (size, size), classes=4)
    graph = find_groups(model, first_batch(batches, CPU))
    request = Request(p="fisher")
    engine = FusedEngine(model, graph, request.definition)
    assert not engine.own_gates(first_batch(batches, CPU))
    fused = run_engine(model, batches, graph=graph, p="fisher").scores
    naive = run_engine(model, batches, graph=graph, engine="naive", p="fisher").scores
    assert_close(fused, naive, 1e-9)


def test_elsewhere_a_pass_serves_the_whole_batch():
    case = CASES["residual"]
    model, batches = case.model(), case.batches((6, 6))
    first = first_batch(batches, CPU)
    engine = FusedEngine(model, find_groups(model, first), Request(p="fisher").definition)
    assert engine.own_gates(first)


def test_a_small_memory_gives_the_same():
    case = CASES["residual"]
    model, batches = case.model(), case.batches((6, 6))
    whole = run_engine(model, batches, p="fisher").scores
    assert_close(run_engine(model, batches, p="fisher", max_memory=30_000).scores, whole, 1e-9)


def test_samples_that_cannot_be_told_apart():
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = CASES["mlp"].model()

        def forward(self, x: Tensor, scale: Tensor) -> Tensor:
            return self.body(x) * scale

    ((x, y),) = CASES["mlp"].batches((3,))
    batch = {"x": x, "scale": torch.ones(1, dtype=x.dtype), "labels": y}
    for engine in ("fused", "naive"):
        with pytest.raises(singe.DataError, match="batch 0 cannot be taken apart"):
            singe.score(Shared(), [batch], p="fisher", engine=engine, progress=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"criterion": "ig"}, "criterion='ig' does not take; use 'singe' or 'taylor'"),
        ({"criterion": "magnitude"}, "criterion='magnitude' does not take"),
        ({"norm": "outside"}, "norm='inside'"),
        ({"path": "neuron", "tolerance": 0.1, "pruning_ratio": 0.5}, "leave it at None"),
        ({"granularity": "weight"}, "p='fisher' has no meaning for a single weight"),
    ],
)
def test_what_it_does_not_go_with(options, message):
    case = CASES["mlp"]
    with pytest.raises(singe.OptionError, match=message):
        singe.score(case.model(), case.batches(), p="fisher", progress=False, **options)
