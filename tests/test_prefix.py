"""What lies before the gates is computed once per batch: what is done with it later changes nothing."""

from __future__ import annotations

import pytest
import torch
from helpers import (
    assert_close,
    make_batches,
    one_thread,  # noqa: F401 - autouse
    run_engine,
)
from torch import nn

from singe import room


class InPlace(nn.Module):
    """Writes into what a layer gave, in front of two groups."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(6, 5), nn.Linear(5, 4)
        self.a, self.b = (
            nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 5)) for _ in range(2)
        )

    def forward(self, x):
        x = self.stem(x)
        x *= 2
        return self.head(x + self.a(x) + self.b(x))


class Add(nn.Module):
    """A leaf of two inputs."""

    def forward(self, x, other):
        return x + other


class ByKeyword(nn.Module):
    """What depends on the gates reaches a leaf by keyword, beside what does not."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.add, self.head = (
            nn.Linear(6, 5),
            nn.Linear(5, 7),
            Add(),
            nn.Linear(5, 4),
        )
        self.down = nn.Linear(7, 5)

    def forward(self, x):
        x = self.stem(x)
        return self.head(self.add(x, other=self.down(self.a(x).relu())).tanh())


@pytest.mark.parametrize("path", ["layer", "neuron"])
@pytest.mark.parametrize(
    ("build", "layers"),
    [(InPlace, ["a.0", "b.0"]), (ByKeyword, ["a"])],
    ids=["in place", "keyword"],
)
def test_fused_equals_definition(build, layers, path, monkeypatch):
    """In a pass for every group, on several batches: the first one shows what is written into."""
    monkeypatch.setattr(room, "SHARED_PASS_BYTES", 0)
    torch.manual_seed(0)
    model, batches = build().double().eval(), make_batches((6,), (4, 4, 4))
    options = {"layers": layers, "path": path}
    expected = run_engine(model, batches, engine="naive", **options).scores
    assert_close(run_engine(model, batches, **options).scores, expected, 1e-9)
