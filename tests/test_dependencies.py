"""Networks whose channels Torch-Pruning's graph leads astray: what can be pruned is found, and soon."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from helpers import one_thread  # noqa: F401 - autouse
from torch import nn

import singe


class Shuffle(nn.Module):
    def forward(self, x):
        b, c, h, w = x.shape
        return x.view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w)


class Folded(nn.Module):
    """A map becomes tokens and a map again before the head flattens it."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8 * side**2, 3)

    def forward(self, x):
        y = self.conv(x)
        tokens = torch.relu(y.flatten(2).transpose(1, 2))
        return self.head(tokens.transpose(1, 2).reshape(y.shape).flatten(1))


@pytest.mark.parametrize("side", [4, 16])
def test_only_what_gives_rows_flattens(side):
    """Other views before a flattened head kept the tracer busy without end, from 5 x 5 on."""
    head = nn.Linear(6 * side**2, 3)
    shuffled = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), Shuffle(), nn.Flatten(), head)
    batches = [(torch.randn(2, 3, side, side), torch.tensor([0, 1]))]
    with pytest.raises(singe.ModelError, match=r"0: removing some of its units fails"):
        singe.score(shuffled, batches, criterion="taylor", progress=False)
    assert list(singe.score(Folded(side), batches, criterion="taylor", progress=False)) == ["conv"]


class Attended(nn.Module):
    """Channel attention, then spatial attention on the mean and the largest of the channels (CBAM)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.down, self.up = nn.Conv2d(3, 6, 3), nn.Linear(6, 4), nn.Linear(4, 6)
        self.where, self.next = nn.Conv2d(2, 1, 3, padding=1), nn.Conv2d(6, 12, 1)
        self.head = nn.Linear(12, 3)

    def forward(self, x):
        x = torch.relu(self.conv(x))
        weights = torch.sigmoid(self.up(torch.relu(self.down(x.mean((2, 3))))))
        x = x * weights.view(*weights.shape, 1, 1)
        both = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
        return self.head(self.next(x * torch.sigmoid(self.where(both))).mean((2, 3)))


def test_spatial_attention_leaves_the_rest_prunable():
    model, x = Attended().eval(), torch.randn(2, 3, 6, 6)
    scores = singe.score(model, [(x, torch.tensor([0, 1]))], criterion="taylor", progress=False)
    assert list(scores) == ["down", "next"]
    assert any("cannot be followed" in why for why in scores.meta["rejected"].values())


class Widening(nn.Module):
    """Blocks that add their input to the first of their channels (ReXNet)."""

    def __init__(self, widths: range) -> None:
        super().__init__()
        pairs = pairwise(widths)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, a + 4, 1), nn.ReLU(), nn.Conv2d(a + 4, b, 1))
            for a, b in pairs
        )
        self.head = nn.Linear(widths[-1], 2)

    def forward(self, x):
        for block in self.blocks:
            y, width = block(x), x.shape[1]
            x = torch.cat([y[:, :width] + x, y[:, width:]], 1)
        return self.head(x.mean((2, 3)))


def test_channels_that_come_back_without_end_leave_the_rest_prunable():
    model, x = Widening(range(4, 31, 3)).eval(), torch.randn(2, 4, 3, 3)
    scores = singe.score(model, [(x, torch.tensor([0, 1]))], criterion="taylor", progress=False)
    assert list(scores) == [f"blocks.{i}.0" for i in range(8)]
    assert any("comes back to the same layers" in why for why in scores.meta["rejected"].values())


class AsConvolution(nn.Module):
    """The head is a 1 x 1 convolution on the flattened map."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 6, 3, padding=1)
        self.head = nn.Conv2d(6 * 16, 10, 1)

    def forward(self, x):
        x = torch.relu(self.last(torch.relu(self.first(x))))
        return self.head(x.view(len(x), -1, 1, 1)).flatten(1)


def test_a_flattened_map_may_keep_two_dimensions_of_one():
    batches = [(torch.randn(2, 3, 4, 4), torch.tensor([0, 1]))]
    scores = singe.score(AsConvolution().eval(), batches, criterion="taylor", progress=False)
    assert list(scores) == ["first", "last"]
