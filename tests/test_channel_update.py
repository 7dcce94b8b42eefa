"""One-channel updates on the neuron path: where they apply they are exact, elsewhere they are not used.

That the scores equal the definition is checked with everything else in test_definition.py; here the
tests look at when the short cut is taken.
"""

from __future__ import annotations

import pytest
import torch
from helpers import (
    assert_close,
    make_batches,
    one_thread,  # noqa: F401 - autouse
    randomise,
    run_engine,
)
from helpers_networks import CASES, Head
from torch import nn

from singe import room
from singe.channel_update import ChannelUpdates
from singe.quadrature import trapezoid

USED = {
    "mlp": {"0", "2"},
    "conv1d": {"0"},  # "3" goes through a mean before it is read
    "conv3d": {"0"},
    "residual": {"3.body.0"},  # the stream "0" has two producers
    "depthwise": set(),
    "vgg": {"9"},  # pooling lies behind the convolutions
    "sigmoid": set(),  # maps 0 to something: gates at the input
    "tokens": {"up"},
}


@pytest.fixture(autouse=True)
def a_pass_for_every_group(monkeypatch):
    """Groups as small as these would share a pass, and then all channels run."""
    monkeypatch.setattr(room, "SHARED_PASS_BYTES", 0)


@pytest.fixture
def updates(monkeypatch):
    """Names of the groups that were updated."""
    seen = set()
    updated = ChannelUpdates.updated

    def spy(self, group, *args):
        seen.add(group.name)
        return updated(self, group, *args)

    monkeypatch.setattr(ChannelUpdates, "updated", spy)
    return seen


@pytest.mark.parametrize("name", USED)
def test_where_it_is_used(updates, name):
    case = CASES[name]
    run_engine(case.model(), case.batches(), path="neuron")
    assert updates == USED[name]


@pytest.mark.parametrize("path", ["layer", "network"])
def test_only_on_the_neuron_path(updates, path):
    run_engine(CASES["mlp"].model(), CASES["mlp"].batches(), path=path)
    assert not updates


@pytest.mark.parametrize("criterion", ["singe", "ig", "signed", "ablation"])
@pytest.mark.parametrize("name", ["mlp", "conv1d", "conv3d", "residual", "tokens"])
def test_the_short_cut_changes_nothing(monkeypatch, name, criterion):
    case = CASES[name]
    model, batches = case.model(), case.batches()
    short = run_engine(model, batches, path="neuron", criterion=criterion).scores
    monkeypatch.setattr(ChannelUpdates, "activation", lambda self, group: None)
    assert_close(
        run_engine(model, batches, path="neuron", criterion=criterion).scores, short, 1e-10
    )


def test_an_activation_that_is_not_known_is_not_guessed(updates):
    """1.0001 * relu looks like a ReLU, but not to the last bit."""

    class Nearly(nn.Module):
        def forward(self, x):
            return 1.0001 * x.relu()

    torch.manual_seed(0)
    model = randomise(
        nn.Sequential(nn.Linear(6, 5), Nearly(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 4))
    ).double()
    batches = make_batches((6,), (4,))
    fused = run_engine(model, batches, path="neuron").scores
    assert updates == {"2"}
    assert_close(fused, run_engine(model, batches, path="neuron", engine="naive").scores, 1e-9)


def test_a_layer_that_is_read_twice_is_not_updated(updates):
    class Forked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(6, 5), nn.Linear(5, 4), nn.Linear(5, 4)

        def forward(self, x):
            x = self.a(x).relu()
            return self.b(x) + self.c(x)

    torch.manual_seed(0)
    run_engine(Forked().double(), make_batches((6,), (4,)), path="neuron")
    assert not updates


class CalledTwice(nn.Module):
    """Its second layer reads the first one's channels in two calls."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 5), nn.Linear(5, 4)

    def forward(self, x):
        x = self.a(x).relu()
        return self.b(x) + self.b(2 * x)


@pytest.mark.parametrize("mode", ["circular", "reflect"])
def test_nor_is_one_that_pads_with_its_input(updates, mode):
    torch.manual_seed(0)
    padded = nn.Conv2d(5, 4, 3, padding=1, padding_mode=mode)
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), padded, nn.ReLU(), Head(4)).double()
    batches = make_batches((3, 8, 8), (4,))
    fused = run_engine(model, batches, path="neuron", layers=["0"]).scores
    naive = run_engine(model, batches, path="neuron", layers=["0"], engine="naive").scores
    assert not updates
    assert_close(fused, naive, 1e-9)


def test_nor_is_one_that_is_called_twice(updates):
    torch.manual_seed(0)
    model, batches = CalledTwice().double(), make_batches((6,), (4,))
    fused = run_engine(model, batches, path="neuron").scores
    assert not updates
    assert_close(fused, run_engine(model, batches, path="neuron", engine="naive").scores, 1e-9)


@pytest.mark.parametrize("bias", [7.0, 24.0, -24.0])
@pytest.mark.parametrize(
    "activation",
    [nn.Threshold(0.5, 0.0), nn.Hardshrink(0.5), nn.GELU(), nn.SiLU(), nn.ReLU6(), nn.ReLU()],
    ids=str,
)
def test_an_activation_is_not_mistaken_for_one_that_looks_the_same_here(activation, bias):
    """So far out each hands on nearly all that it gets, or nothing; near the end of the path it does not."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), activation, nn.Linear(5, 4)).double()
    with torch.no_grad():
        model[0].weight.mul_(0.1)
        model[0].bias.fill_(bias)
    batches, options = make_batches((6,), (8,)), {"path": "neuron", "quadrature": trapezoid(6)}
    fused = run_engine(model, batches, **options).scores
    assert_close(fused, run_engine(model, batches, engine="naive", **options).scores, 1e-9)
