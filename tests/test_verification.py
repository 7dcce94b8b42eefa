"""A coupling that is wrong is found whatever the model makes of its logits, and a right one stays."""

from __future__ import annotations

import types
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from helpers import make_batches, randomise
from helpers_networks import residual
from torch import Tensor, nn

import singe
from singe.verification import distance

BATCHES = make_batches((3, 8, 8), [6], dtype=torch.float32)
LOWEST = torch.finfo(torch.float32).min


class Finished(nn.Module):
    """Logits through ``finish``; ``move`` puts the channels of ``a`` in others' places, unseen by a trace."""

    def __init__(
        self, finish: Callable[[Tensor], Tensor], move: int, autocast: bool = False
    ) -> None:
        super().__init__()
        self.finish, self.move, self.autocast = finish, move, autocast
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 3)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            x = self.a(x).roll(self.move, 1).relu()
            return self.finish(self.head(self.b(x).relu().mean((2, 3))))


def masked(value: float) -> Callable[[Tensor], Tensor]:
    return lambda logits: logits.index_fill(1, torch.tensor([3]), value)


FINISHES = {
    "float32": lambda logits: logits,
    "double": lambda logits: logits.double(),
    "bfloat16": lambda logits: logits.bfloat16(),
    "float16": lambda logits: logits.half(),
    "autocast": lambda logits: logits,
    "complex": lambda logits: torch.complex(logits, -logits),
    "masked -1e4": masked(-1e4),
    "masked -1e9": masked(-1e9),
    "masked lowest": masked(LOWEST),
    "moved by -1e4": lambda logits: logits - torch.tensor([0.0, 0.0, 0.0, 1e4]),
}


@pytest.mark.parametrize("name", FINISHES)
def test_a_wrong_coupling_is_found_whatever_becomes_of_the_logits(name: str) -> None:
    groups = []
    for move in (0, 1):
        torch.manual_seed(0)
        model = randomise(Finished(FINISHES[name], move, name == "autocast")).float().eval()
        options = {"criterion": "magnitude", "progress": False}
        scores = singe.score(model, BATCHES, **options)
        groups.append(list(scores))
        if move:
            assert "removing them differ" in scores.meta["rejected"]["a"]
    assert groups == [["a", "b"], ["b"]]


def test_a_deep_network_under_its_own_autocast_keeps_its_groups() -> None:
    torch.manual_seed(0)

    class Cast(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return self.model(x)

    model = randomise(residual()).float().eval()
    options = {"criterion": "magnitude", "progress": False}
    plain, cast = (singe.score(m, BATCHES, **options) for m in (model, Cast(model)))
    assert [f"model.{name}" for name in plain] == list(cast)


def test_distance_is_of_what_counts() -> None:
    logits = torch.tensor([[1.0, -2.0, -1e9]])
    assert distance([logits], [logits]) == 0.0
    assert distance([logits + torch.tensor([0.2, 0.0, 0.0])], [logits]) == pytest.approx(0.1)
    # Where all is so low it is no mask: energies.
    energies = torch.tensor([-3e5, -6e3])
    assert distance([energies - torch.tensor([0.0, 3e3])], [energies]) == pytest.approx(0.01)
    # NaN is far from everything, wherever it stands.
    for outputs in ([logits, logits * torch.nan], [logits * torch.nan, logits]):
        assert not distance(outputs, [logits, logits]) <= 1.0
    assert distance([torch.zeros(0)], [torch.zeros(0)]) == 0.0


def standardized(self: nn.Conv2d, x: Tensor) -> Tensor:
    weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
    return F.conv2d(x, weight, self.bias, self.stride, self.padding)


@pytest.mark.parametrize("granularity", ["unit", "weight"])
def test_a_layer_whose_forward_was_replaced_is_left_out(granularity: str) -> None:
    model = randomise(Finished(FINISHES["float32"], 0)).float().eval()
    model.a.forward = types.MethodType(standardized, model.a)
    options = {"granularity": granularity, "criterion": "taylor", "path": "layer"}
    scores = singe.score(model, BATCHES, progress=False, **options)
    assert not any(name.startswith("a") for name in scores)
    assert "whose forward was replaced" in scores.meta["rejected"]["a"]


class Unused(nn.Module):
    def __init__(self, in_training: bool = False) -> None:
        super().__init__()
        self.attention, self.in_training = (
            nn.MultiheadAttention(6, 2, batch_first=True),
            in_training,
        )
        self.a, self.head = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        if self.in_training and self.training:
            x = x + self.attention(x, x, x)[0]
        return self.head(self.a(x).relu().mean(1))


@pytest.mark.parametrize("in_training", [False, True])
@pytest.mark.parametrize("engine", ["fused", "naive"])
def test_attention_that_does_not_run_has_no_heads_to_offer(in_training: bool, engine: str) -> None:
    batches = make_batches((5, 6), [4], dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is told that the layer does not run
        scores = singe.score(Unused(in_training).eval(), batches, engine=engine, progress=False)
    assert list(scores) == ["a"]
    assert "does not run" in scores.meta["rejected"]["attention"]
