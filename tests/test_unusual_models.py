"""Models and data that users have and that are easy to get wrong."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from helpers import CLASSES, assert_close, make_batches, randomise, run_engine
from helpers_networks import residual
from torch import Tensor, nn

import singe
from singe import sweep

BATCHES = make_batches((3, 8, 8), [6, 4])


class Softmax(nn.Module):
    """A group that mixes channels (softmax) beside one with a much larger effect."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 1), nn.Conv2d(3, 6, 1)
        self.ca, self.cb = nn.Conv2d(6, 4, 1), nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        large, mixed = self.ca(self.a(x).relu()), self.cb(self.b(x).softmax(1))
        return (100 * large + mixed).mean((2, 3))


class Outputs(nn.Module):
    """Returns a feature from before the norm, None and a number beside the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.c1, self.bn = nn.Conv2d(3, 5, 3, bias=False), nn.BatchNorm2d(5)
        self.c2, self.head = nn.Conv2d(5, 6, 3), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> dict:
        early = self.c1(x)
        h = self.c2(self.bn(early).relu()).relu().mean((2, 3))
        return {"logits": self.head(input=h), "early": early, "nothing": None, "number": 0.5}


class Stack(nn.Module):
    """A leaf whose argument is a list of tensors, and one that is given a number."""

    def forward(self, parts: list[Tensor]) -> Tensor:
        return torch.cat(parts, 1)


class Leaves(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c1, self.c2, self.stack = nn.Conv2d(3, 5, 3), nn.Conv2d(3, 4, 3), Stack()
        self.head = nn.Linear(9, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stack([self.c1(x).relu(), self.c2(x).relu()]).mean((2, 3)))


def test_a_wrong_gate_is_seen_beside_a_large_effect() -> None:
    scores = singe.score(Softmax().double(), BATCHES, criterion="magnitude")
    assert list(scores) == ["a"]
    assert "b" in scores.meta["rejected"]


def test_half_precision_is_checked_in_full_precision() -> None:
    scores = singe.score(Softmax().bfloat16(), [(x.bfloat16(), y) for x, y in BATCHES],
                         criterion="magnitude")  # fmt: skip
    assert list(scores) == ["a"]


def test_losses_of_half_precision_models_are_summed_in_float32() -> None:
    """A bfloat16 sum over 256 samples is a multiple of 2: every difference would be lost."""
    model = residual().float()
    data = make_batches((3, 8, 8), [256], dtype=torch.float32)
    full = singe.score(model, data, criterion="ablation")
    half = singe.score(copy.deepcopy(model).bfloat16(), [(x.bfloat16(), y) for x, y in data],
                       criterion="ablation")  # fmt: skip
    for name in full:
        assert (half[name] != 0).any()
        # 2^-8 relative rounding of the logits, largely averaged out over 256 samples.
        torch.testing.assert_close(half[name], full[name], rtol=0.2, atol=2e-3)


@pytest.mark.parametrize("model", [Outputs, Leaves], ids=lambda m: m.__name__)
def test_fused_equals_definition(model: type[nn.Module]) -> None:
    model = randomise(model().double())
    fused, naive = (run_engine(model, BATCHES, engine=e) for e in ("fused", "naive"))
    assert list(fused.scores) == list(naive.scores)
    for name in fused.scores:
        torch.testing.assert_close(fused.scores[name], naive.scores[name], rtol=1e-9, atol=0)


class Streams(nn.Module):
    """Behind a norm that a gate stands in for come layers that no gate reaches, of the same width."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = nn.Linear(6, 5), nn.LayerNorm(5)
        self.b, self.c = nn.Linear(6, 5), nn.Linear(5, 5)
        self.head = nn.Linear(10, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.cat([self.norm(self.a(x)), self.c(self.b(x).tanh())], 1))


def test_what_is_remembered_of_a_batch_is_not_mixed_up() -> None:
    torch.manual_seed(0)
    model, batches = Streams().double().eval(), make_batches((6,), (4,))
    options = {"layers": ["a"], "path": "layer"}
    naive = run_engine(model, batches, engine="naive", **options).scores
    assert_close(run_engine(model, batches, **options).scores, naive, 1e-9)


def test_running_out_of_memory_half_way_counts_nothing_twice(monkeypatch) -> None:
    model = randomise(residual().double())
    expected = singe.score(model, BATCHES)
    real, calls = sweep.row_gradients, []

    def limited(*arguments):
        calls.append(arguments)
        if len(calls) == 2:  # the second layer of a group: the first one's gradients are done
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(*arguments)

    monkeypatch.setattr(sweep, "row_gradients", limited)
    scores = singe.score(model, BATCHES)
    assert scores.meta["variants_per_pass"] < expected.meta["variants_per_pass"]
    for name in expected:
        torch.testing.assert_close(scores[name], expected[name])


def test_computed_and_shared_weights_are_left_out_with_the_reason() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 5, 1), nn.ReLU(), nn.utils.parametrizations.weight_norm(nn.Conv2d(5, 5, 1)),
        nn.ReLU(), nn.Conv2d(5, 5, 1), nn.ReLU(), nn.Conv2d(5, 5, 1), nn.ReLU(),
        nn.Conv2d(5, 6, 1), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 64, 4),
    )  # fmt: skip
    model[6].weight = model[4].weight
    scores = singe.score(model.double(), BATCHES)
    assert set(scores) <= {"0", "8"}
    reasons = " ".join(scores.meta["rejected"].values())
    assert "computes its weight" in reasons
    assert "shares a parameter" in reasons


def test_wrappers_are_seen_through() -> None:
    model = randomise(residual().double())
    expected = singe.score(model, BATCHES)
    for wrapped in (nn.DataParallel(model), torch.compile(model, backend="eager")):
        scores = singe.score(wrapped, BATCHES)
        assert list(scores) == list(expected)
        scores.check(model)


def test_a_model_made_in_inference_mode() -> None:
    with torch.inference_mode():
        model = residual().double()
        data = make_batches((3, 8, 8), [6])
        scores = singe.score(model, data)
    assert len(scores) > 0


def test_pooling_and_activations_do_not_make_a_plan_overshoot() -> None:
    model = nn.Sequential(nn.Conv2d(3, 32, 1), nn.ReLU(), nn.AvgPool2d(3, 1, 1),
                          nn.MaxPool2d(3, 1, 1), nn.Conv2d(32, 4, 1))  # fmt: skip
    x = torch.randn(4, 3, 8, 8)
    y = torch.randint(4, (4, 8, 8))
    plan = singe.plan(model, singe.score(model, [(x, y)], criterion="magnitude"), x, macs=0.5)
    share = plan.meta["after"]["macs"] / plan.meta["before"]["macs"]
    assert 0.5 - 1 / 32 < share <= 0.5


class Pooled(nn.Module):
    """Global pooling as a function, as many models write it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 5, 3, padding=1), nn.Conv2d(5, 6, 3, padding=1)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.adaptive_avg_pool2d(self.b(self.a(x).relu()).relu(), 1).flatten(1))


def test_global_pooling_is_no_reason_to_warn():
    data = make_batches((3, 8, 8), [4, 4], dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        singe.score(Pooled().eval(), data, progress=False)


class Overwriting(nn.Module):
    """What the first layers read is gone when their gradients are taken."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.in_place = in_place
        self.up, self.down, self.head = nn.Linear(6, 5), nn.Linear(5, 6), nn.Linear(6, 4)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, x):
        x = 1.5 * x[:, None]
        for block in (lambda x: self.down(self.up(x).relu()), lambda x: self.attention(x, x, x)[0]):
            y = block(x)
            if self.in_place:
                x += 1
            else:
                x = x + 1
            x = x + y
        return self.head(x[:, 0])


@pytest.mark.parametrize("path", ["layer", "neuron", "network"])
def test_inputs_that_are_written_over(path):
    torch.manual_seed(0)
    model, plain = Overwriting(True).double().eval(), Overwriting(False).double().eval()
    plain.load_state_dict(model.state_dict())
    batches = make_batches((6,), (4, 3))
    scores, expected = (
        singe.score(m, batches, path=path, quadrature=2, progress=False) for m in (model, plain)
    )
    assert {"up", "attention"} <= set(expected)
    assert all(torch.allclose(scores[n], expected[n], rtol=1e-6) for n in expected)
