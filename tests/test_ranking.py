"""Scores as libraries that cut at a threshold need them: what a group keeps stands above all others."""

from __future__ import annotations

import pytest
import torch

import singe
from singe.adapters.ranking import ranking


def test_the_best_of_every_group_is_above_what_others_keep():
    scores = {"a": torch.tensor([10.0, 11.0, 12.0]), "b": torch.tensor([1.0, 2.0, 3.0])}
    found = ranking(scores, keep={"a": 2, "b": 1})
    best = min(values.max() for values in found.values())
    assert found["a"][1] < best, "kept, but not the best"
    assert found["a"][1] > max(found["a"][0], found["b"][1])


def test_normalizers_that_make_nan_are_refused():
    with pytest.raises(singe.ScoresError, match="NaN or infinity"):
        ranking({"a": torch.zeros(3), "b": torch.rand(3)}, normalizer="mean")
    for wrong, message in (
        ("softmax", "unknown normalizer"), (5, "unknown normalizer 5"),
        ("sentinel_x", r"must lie in \[0, 1\], got 'x'"), ("sentinel_2", "got 2.0"),
        ("sentinel_-3", "got -3.0"),
    ):  # fmt: skip
        with pytest.raises(singe.OptionError, match=message):
            ranking({"a": torch.rand(3)}, normalizer=wrong)
