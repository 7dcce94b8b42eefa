"""Invariants 2 and 8: on the neuron path the integral is the true damage of removal, and bounds it.

``signed`` integrates dL/dmu from 1 to 0, so by the fundamental theorem it equals the ablation
``L(0) - L(1)``. For smooth networks Gauss-Legendre converges exponentially: 64 nodes in float64 leave
less than 1e-6 of it.
"""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
from helpers import (
    CPU,
    assert_close,
    clone,
    make_batches,
    mean_loss,
    one_thread,  # noqa: F401 - autouse
    relative_error,
    run_engine,
)
from helpers_networks import CASES, SMOOTH, mlp
from helpers_random import Network, networks
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import singe
from singe.data import first_batch
from singe.units import find_groups

SMOOTH_CASES = ["tokens", "twice", "sigmoid", "softplus"]


@pytest.mark.parametrize("engine", ["fused", "naive"])
@pytest.mark.parametrize("name", SMOOTH_CASES)
def test_signed_is_ablation_at_64_nodes(name, engine):
    case = CASES[name]
    model, batches = case.model(), case.batches()
    options = {"path": "neuron", "engine": engine}
    signed = run_engine(model, batches, criterion="signed", quadrature=64, **options)
    ablation = run_engine(model, batches, criterion="ablation", engine=engine)
    assert_close(signed.scores, ablation.scores, 1e-6)


@pytest.mark.parametrize(
    "norm", [lambda: nn.LayerNorm(6), lambda: nn.GroupNorm(2, 6)], ids=["layer norm", "group norm"]
)
def test_four_nodes_integrate_a_whole_group_under_a_norm(norm):
    """Gates that fall together leave a norm's statistics as they are: the path is smooth down to zero."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), norm(), nn.SiLU(), nn.Linear(6, 3)).double()
    batches = [(torch.randn(16, 4).double(), torch.randint(0, 3, (16,)))]
    scores = singe.score(model, batches, criterion="signed", path="layer", progress=False)
    gone = copy.deepcopy(model)
    nn.init.zeros_(gone[3].weight)  # nothing of the group arrives
    damage = mean_loss(gone, batches) - mean_loss(model, batches)
    assert abs(float(scores.completeness["0"])) <= 0.01 * abs(damage)


@settings(max_examples=10)
@given(network=networks(SMOOTH, ("conv", "conv_norm", "pre", "grouped", "depthwise", "concat")))
def test_signed_is_ablation_on_random_smooth_networks(network: Network):
    model, batches = network.model(), network.batches((3,))
    graph = find_groups(model, first_batch(batches, CPU))
    signed = run_engine(
        model, batches, graph=graph, criterion="signed", path="neuron", quadrature=64
    )
    ablation = run_engine(model, batches, graph=graph, criterion="ablation")
    assert_close(signed.scores, ablation.scores, 1e-6)


def test_the_gap_closes_as_nodes_grow():
    """Geometrically: every doubling gains more than a digit until float64 is exhausted."""
    torch.manual_seed(0)
    model, batches = mlp(nn.Tanh).double(), make_batches((6,), (8,))
    truth = run_engine(model, batches, criterion="ablation").scores["0"]
    gaps = []
    for nodes in (1, 2, 4, 8):
        signed = run_engine(model, batches, criterion="signed", path="neuron", quadrature=nodes)
        gaps.append(relative_error(signed.scores["0"], truth))
    assert all(after < before / 10 for before, after in pairwise(gaps)), gaps


@pytest.mark.parametrize("engine", ["fused", "naive"])
def test_completeness_is_reported_per_unit(engine):
    """``scores.completeness`` is signed - ablation, with few nodes, so that there is a gap."""
    case = CASES["residual"]
    model, batches = case.model(), case.batches()
    options = {"path": "neuron", "engine": engine, "progress": False}
    signed = singe.score(model, batches, criterion="signed", quadrature=1, **options)
    ablation = singe.score(model, batches, criterion="ablation", **options)
    assert signed.completeness is not None
    assert list(signed.completeness) == list(signed)
    for name, gap in signed.completeness.items():
        expected = signed[name] - ablation[name]
        assert expected.abs().max() > 1e-4, "nothing to see: choose fewer nodes"
        # The right side is a difference of float32 scores of order 0.1.
        assert torch.allclose(gap.float(), expected, rtol=1e-4, atol=1e-6), name


@pytest.mark.parametrize("engine", ["fused", "naive"])
def test_completeness_of_whole_groups(engine):
    """Layer path: the group's units together; network path: everything together."""
    model, batches = CASES["mlp"].model(), CASES["mlp"].batches()
    model = nn.Sequential(model[0], nn.Tanh(), model[2], nn.Tanh(), model[4])
    run = {"criterion": "signed", "quadrature": 2, "engine": engine}
    layer = run_engine(model, batches, path="layer", **run)
    network = run_engine(model, batches, path="network", **run)
    base = mean_loss(model, batches)
    damage = {}
    for name, rows in {"0": [0], "2": [2], "network": [0, 2]}.items():
        off = mlp_without(model, rows)
        damage[name] = mean_loss(off, batches) - base
    assert layer.completeness.keys() == {"0", "2"}
    for name in ("0", "2"):
        expected = layer.scores[name].sum() - damage[name]
        assert layer.completeness[name].shape == (1,)
        assert layer.completeness[name].item() == pytest.approx(expected.item(), rel=1e-5)
    expected = sum(scores.sum() for scores in network.scores.values()) - damage["network"]
    assert network.completeness.keys() == {"network"}
    assert network.completeness["network"].item() == pytest.approx(expected.item(), rel=1e-5)


def test_only_signed_reports_completeness():
    case = CASES["mlp"]
    scores = singe.score(case.model(), case.batches(), progress=False)
    assert scores.completeness is None


@settings(max_examples=15)
@given(network=networks(), nodes=st.integers(1, 4), engine=st.sampled_from(["fused", "naive"]))
def test_singe_bounds_signed(network: Network, nodes, engine):
    """Neuron path, p = 1: the integral of |D_u| is at least |the integral of its sum|."""
    model, batches = network.model(), network.batches((3,))
    graph = find_groups(model, first_batch(batches, CPU))
    options = {"path": "neuron", "quadrature": nodes, "engine": engine, "graph": graph}
    singe_scores = run_engine(model, batches, criterion="singe", p=1, **options).scores
    signed = run_engine(model, batches, criterion="signed", **options).scores
    for name, bound in singe_scores.items():
        # Equality is possible where a unit has a single entry: leave room for rounding.
        assert (bound >= signed[name].abs() * (1 - 1e-12) - 1e-15).all(), name


@torch.no_grad()
def mlp_without(model, layers):
    """A copy whose named linear layers put out zero."""
    off = clone(model)
    for index in layers:
        off[index].weight.zero_()
        off[index].bias.zero_()
    return off
