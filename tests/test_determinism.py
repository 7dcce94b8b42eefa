"""Invariant 11: two runs give the same bits, on the same machine and number of threads."""

from __future__ import annotations

import pytest
import torch
from helpers import (
    one_thread,  # noqa: F401 - autouse
    run_engine,
    same_bits,
)
from helpers_networks import CASES


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("criterion", "path"),
    [
        ("singe", "layer"),
        ("singe", "neuron"),
        ("singe", "network"),
        ("signed", "layer"),
        ("ablation", "neuron"),
    ],
)
def test_two_runs_give_the_same_bits(criterion, path, threads):
    case = CASES["residual"]
    model = case.model(dtype=torch.float32)
    batches = case.batches((4, 3), dtype=torch.float32)
    torch.set_num_threads(threads)
    try:
        first, second = (
            run_engine(model, batches, criterion=criterion, path=path).scores for _ in range(2)
        )
    finally:
        torch.set_num_threads(1)
    assert list(first) == list(second)
    assert all(same_bits(first[name], second[name]) for name in first)


def test_the_global_generator_does_not_matter():
    """Scoring draws nothing from it: another seed, the same bits."""
    case = CASES["sigmoid"]
    model, batches = case.model(), case.batches()
    torch.manual_seed(1)
    first = run_engine(model, batches).scores
    torch.manual_seed(2)
    second = run_engine(model, batches).scores
    assert all(same_bits(first[name], second[name]) for name in first)
