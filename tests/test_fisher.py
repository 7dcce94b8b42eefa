"""p="fisher": the derivative along a gate of every sample, squared, averaged and rooted."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    CPU,
    assert_close,
    make_batches,
    one_thread,  # noqa: F401 - autouse
    run_engine,
)
from helpers_networks import CASES
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import singe
from singe.data import first_batch, read_batches
from singe.engine import FusedEngine
from singe.gates import unregister_layer
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

    def hidden(self, x: Tensor) -> Tensor:
        return self.norm(self.up(x))

    def forward(self, x: Tensor) -> Tensor:
        rows = self.down(F.gelu(self.hidden(x.flatten(0, 1))))
        return rows.unflatten(0, x.shape[:2]).mean(1)


class SequenceFirst(Windows):
    """The first dimension inside is the sequence, which may be as long as the batch."""

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.hidden(x.transpose(0, 1)))).mean(0)


class OneBranchSequenceFirst(Windows):
    """At one of two gates of every unit only."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.other = None, nn.Linear(5, 8)

    def hidden(self, x: Tensor) -> Tensor:
        return self.up(x.transpose(0, 1)).transpose(0, 1) + self.other(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.hidden(x))).mean(1)


class Crosstalk(Windows):
    """A little of one sample's signal reaches another."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.gelu(self.hidden(x))
        return self.down(hidden + 0.03 * hidden.flip(0)).mean(1)


def as_defined(model: nn.Module, batches: list, **options):
    """The fused result, set against the definition."""
    fused = run_engine(model, batches, p="fisher", **options)
    naive = run_engine(model, batches, engine="naive", p="fisher", **options)
    assert_close(fused.scores, naive.scores, 1e-9)
    return fused


def build(kind: type[nn.Module], dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return kind().to(dtype).eval()


@pytest.mark.parametrize("size", [3, 4, 6])  # the sequence has 4 positions
@pytest.mark.parametrize("kind", [Windows, SequenceFirst, OneBranchSequenceFirst, Crosstalk])
def test_where_the_samples_gates_reach_others_every_sample_is_differentiated(kind, size):
    model, batches = build(kind), make_batches((4, 5), (size, size), classes=4)
    with pytest.warns(UserWarning, match="a backward pass for every sample"):
        fused = as_defined(model, batches)
    assert fused.meta["sample_gates"] is False


def test_a_little_crosstalk_is_seen_in_float32():
    model = build(Crosstalk, torch.float32)
    batches = make_batches((4, 5), (6,), classes=4, dtype=torch.float32)
    with pytest.warns(UserWarning, match="a backward pass for every sample"):
        run_engine(model, batches, p="fisher")


@pytest.mark.filterwarnings("ignore:p='fisher' takes")
def test_a_batch_without_gradients_proves_nothing():
    def objective(outputs: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(outputs, batch[1], reduction="none", ignore_index=3)

    model, batches = build(OneBranchSequenceFirst), make_batches((4, 5), (4, 4, 4), classes=3)
    batches[0] = (batches[0][0], torch.full((4,), 3))
    fused = as_defined(model, batches, objective=objective)
    assert fused.meta["sample_gates"] is False


class Padded(Windows):
    """As many windows of 4 as the length of the batch asks for."""

    def forward(self, x: Tensor) -> Tensor:
        padded = F.pad(x, (0, 0, 0, -x.shape[1] % 4))
        rows = self.down(F.gelu(self.hidden(padded.reshape(-1, 4, 5)))).mean(1)
        return rows.unflatten(0, (len(x), -1)).mean(1)


@pytest.mark.filterwarnings("ignore:p='fisher' takes")
@pytest.mark.parametrize("lengths", [(4, 10, 3, 10), (10, 4, 4, 10)])
def test_every_shape_of_batch_is_looked_at(lengths):
    batches = [make_batches((n, 5), (6,), classes=4, seed=n)[0] for n in lengths]
    as_defined(build(Padded), batches)


def test_what_was_found_is_part_of_the_state():
    """Else a resumed run, which asks another batch, might sum in another order."""
    model = build(Windows)
    batches = make_batches((4, 5), (6,), classes=4)
    graph = find_groups(model, first_batch(batches, CPU))
    engines = [FusedEngine(model, graph, Request(p="fisher").definition) for _ in range(2)]
    with pytest.warns(UserWarning, match="a backward pass for every sample"):
        engines[0].run(read_batches(batches, CPU))
    engines[1].load_state(*engines[0].state())
    assert list(engines[1].sweep.sample_gates.known.values()) == [False]


@pytest.mark.parametrize("path", ["layer", "neuron", "network"])
def test_a_loss_that_depends_on_other_samples(path):
    """Of sample n's own loss the derivative, whatever else moves it."""

    def contrastive(outputs: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        similar = outputs @ outputs.T
        return F.cross_entropy(similar, batch[1].argsort(), reduction="none")

    case = CASES["mlp"]
    model, batches = case.model(), case.batches((4, 4))
    with pytest.warns(UserWarning, match="a backward pass for every sample"):
        fused = as_defined(model, batches, objective=contrastive, path=path)
    assert all(scores.norm() > 0 for scores in fused.scores.values())


@pytest.mark.parametrize("engine", ["fused", "naive"])
def test_a_mean_does_not_tell_the_samples_apart(engine):
    case = CASES["mlp"]
    options = {"objective": lambda outputs, batch: F.cross_entropy(outputs, batch[1])}
    with pytest.raises(singe.OptionError, match=r"p='fisher' needs.*return one loss per sample"):
        singe.score(
            case.model(), case.batches(), p="fisher", engine=engine, progress=False, **options
        )


class Squeezed(nn.Module):
    """Cannot take a batch of one; and takes a flag beside its tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(5, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor, flag: bool = False) -> Tensor:
        return self.down(self.up(x).relu()).squeeze() * (2 if flag else 1)


def test_batches_are_never_cut():
    model = build(Squeezed)
    ((x, y),) = make_batches((5,), (6,), classes=4)
    batches = [{"x": x, "flag": True, "labels": y}]
    fused = singe.score(model, batches, p="fisher", progress=False)
    assert fused.meta["sample_gates"] is True
    naive = singe.score(model, batches, p="fisher", engine="naive", progress=False)
    assert_close(dict(fused), dict(naive), 1e-6)  # as scores are: float32


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(8, dtype=torch.float64) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


@pytest.mark.filterwarnings("ignore:p='fisher' takes")
def test_a_registered_gate_that_does_not_expect_a_row_per_sample():
    def gate(module, forward, x, gate):
        assert gate.numel() == x.shape[-1]
        return forward(x) * gate

    singe.register_layer(Scaled, parameters={"scale": 0}, gate=gate, channel_dim=-1)
    try:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 8), Scaled(), nn.ReLU(), nn.Linear(8, 4)).double()
        batches = make_batches((5,), (6, 6), classes=4)
        fused = as_defined(model, batches)
    finally:
        unregister_layer(Scaled)
    assert fused.meta["sample_gates"] is False


def test_elsewhere_one_backward_pass_serves_the_whole_batch():
    case = CASES["residual"]
    assert run_engine(case.model(), case.batches((6, 6)), p="fisher").meta["sample_gates"] is True


def test_a_small_memory_gives_the_same():
    case = CASES["residual"]
    model, batches = case.model(), case.batches((6, 6))
    whole = run_engine(model, batches, p="fisher").scores
    assert_close(run_engine(model, batches, p="fisher", max_memory=30_000).scores, whole, 1e-9)


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


@pytest.mark.parametrize("criterion", ["signed", "ablation", "random"])
def test_criteria_without_a_norm_do_not_mind(criterion):
    case = CASES["mlp"]
    model, batches = case.model(), case.batches()
    options = {"criterion": criterion, "norm": "outside", "path": "neuron", "progress": False}
    found = singe.score(model, batches, p="fisher", **options)
    assert torch.equal(found["0"], singe.score(model, batches, p=1, **options)["0"])
