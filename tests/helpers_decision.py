"""A network that is sure of nearly every sample, for the tests of early decision."""

from __future__ import annotations

import torch
from helpers import make_batches
from helpers_networks import Case
from torch import nn


class Confident(nn.Module):
    """A network with large logits: it is sure of nearly every sample, as trained networks are."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x):
        return 25 * self.body(x)


def fitted(build, shape, samples=48, wrong=6):
    """A model and data of which all but ``wrong`` labels are what the model says."""
    model = Case(lambda: Confident(build()), shape).model(dtype=torch.float32)
    x, _ = make_batches(shape, (samples,), dtype=torch.float32)[0]
    with torch.no_grad():
        labels = model(x).argmax(1)
    labels[:wrong] = (labels[:wrong] + 1) % 4
    return model, [(x[i : i + 10], labels[i : i + 10]) for i in range(0, samples, 10)]
