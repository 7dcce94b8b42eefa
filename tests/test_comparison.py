"""Agreement between scorings, and the integrand of single units."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import (
    one_thread,  # noqa: F401 - autouse
)
from torch import nn

import singe
from singe.comparison import compare, spearman
from singe.errors import OptionError, ScoresError
from singe.integrand import along_the_path, telling_units

BATCHES = [(torch.randn(8, 5, generator=torch.Generator().manual_seed(1)), torch.arange(8) % 3)]


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 3)
    ).eval()


def scored(**options):
    return singe.score(model(), BATCHES, progress=False, **options)


def by_hand(values, groups=("a",), fingerprint="f"):
    tensors = {g: torch.tensor(v) for g, v in zip(groups, values, strict=True)}
    return singe.Scores(tensors, {g: (g,) for g in groups}, {"fingerprint": fingerprint})


def test_spearman_by_hand_and_with_ties():
    assert spearman(np.array([1.0, 2.0, 3.0]), np.array([10.0, 20.0, 30.0])) == pytest.approx(1)
    assert spearman(np.array([1.0, 2.0, 3.0]), np.array([9.0, 5.0, 1.0])) == pytest.approx(-1)
    # Ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4: covariance 4.5 of variances 4.5 and 5.
    tied = spearman(np.array([1.0, 2.0, 2.0, 3.0]), np.array([1.0, 2.0, 3.0, 4.0]))
    assert tied == pytest.approx(4.5 / np.sqrt(4.5 * 5))
    assert spearman(np.ones(3), np.arange(3.0)) == 0.0


def test_spearman_equals_scipy():
    stats = pytest.importorskip("scipy.stats")
    draw = np.random.default_rng(0)
    for _ in range(5):
        a, b = draw.integers(0, 6, 30).astype(float), draw.normal(size=30)
        assert spearman(a, b) == pytest.approx(stats.spearmanr(a, b).statistic)


def test_overlap_counts_the_lowest():
    first = by_hand([[1.0, 2.0, 3.0], [4.0, 5.0]], ("a", "b"))
    second = by_hand([[5.0, 1.0, 2.0], [3.0, 4.0]], ("a", "b"))
    found = compare({"one": first, "two": second}, share=0.4)
    assert found["overlap"] == [[1.0, 0.5], [0.5, 1.0]]  # {0, 1} against {1, 2}
    assert found["units"] == 5
    assert found["spearman_groups"][0][1] == pytest.approx((-0.5 + 1.0) / 2)


def test_one_scoring_agrees_with_itself_whatever_its_scale():
    scores = scored()
    scaled = singe.Scores({g: 3 * v for g, v in scores.items()}, scores.groups, scores.meta)
    found = compare({"a": scores, "b": scaled, "random": scored(criterion="random")}, 0.5)
    assert found["spearman"][0][1] == pytest.approx(1)
    assert found["overlap"][0][1] == 1.0
    assert found["spearman"][0][2] < 0.99


def test_scorings_that_cannot_be_compared():
    one = by_hand([[1.0, 2.0]])
    with pytest.raises(OptionError, match="at least two"):
        compare({"one": one})
    with pytest.raises(OptionError, match="share"):
        compare({"one": one, "two": one}, share=1.0)
    with pytest.raises(ScoresError, match="different models"):
        compare({"one": one, "two": by_hand([[1.0, 2.0]], fingerprint="g")})
    with pytest.raises(ScoresError, match=r"different groups, e\.g\. 'b'"):
        compare({"one": one, "two": by_hand([[1.0, 2.0], [1.0]], ("a", "b"))})


@pytest.mark.parametrize("path", ["layer", "network"])
def test_the_area_under_the_integrand_is_the_score(path):
    rule = singe.quadrature.gauss_legendre(4)
    scores = scored(path=path, quadrature=rule)
    units = {"0": [0, 3], "2": [6]}
    plan = singe.Plan({"0": [3]})
    found = along_the_path(model(), BATCHES, units, plan, nodes=rule.nodes, path=path)
    assert [(u["group"], u["unit"], u["removed"]) for u in found["units"]] == [
        ("0", 0, False), ("0", 3, True), ("2", 6, False),
    ]  # fmt: skip
    for unit in found["units"]:
        area = float(np.dot(rule.weights, unit["values"]))
        assert area == pytest.approx(float(scores[unit["group"]][unit["unit"]]), rel=1e-5)
    assert found["is_score"]


@pytest.mark.parametrize("criterion", ["magnitude", "taylor", "signed"])
def test_criteria_without_a_path_are_shown_along_the_layer_path(criterion):
    found = along_the_path(
        model(), BATCHES, {"0": [1]}, {}, nodes=(0.5, 1.0), criterion=criterion, path="neuron"
    )
    assert (found["criterion"], found["path"]) == ("singe", "layer")
    assert not found["is_score"]
    assert all(v > 0 for v in found["units"][0]["values"])


def test_the_far_end_of_the_path_may_be_silent():
    """At mu = 0 the network path has no gradient left; that is drawn, not warned about."""
    found = along_the_path(
        nn.Sequential(nn.Linear(5, 6, bias=False), nn.ReLU(), nn.Linear(6, 3)).eval(), BATCHES,
        {"0": [1]}, {}, nodes=(0.0, 1.0), path="network",
    )  # fmt: skip
    at_zero, at_one = found["units"][0]["values"]
    assert at_zero == 0.0 < at_one


def test_telling_units_are_on_both_sides_of_the_cut():
    scores = by_hand([[4.0, 1.0, 3.0, 2.0, 5.0], [1.0, 2.0], [1.0, 2.0, 3.0]], ("a", "b", "c"))
    found = telling_units(scores, {"a": [1, 3, 2], "c": [0]})
    assert found == {"a": [1, 3, 4], "c": [0, 2]}
    assert telling_units(scores, {}, groups=1) == {"a": [2, 4]}
    with pytest.raises(OptionError, match="at least one unit"):
        along_the_path(model(), BATCHES, {}, {})
