"""Invariant 1: the fused engine computes the definition.

Tolerances: in float64 the engines differ by the order of their sums, 1e-9 is far above that. In
float32 they may differ by 1e-4: besides rounding, a ReLU whose input lies within rounding of its
kink is open in one engine and closed in the other, which moves a gradient by one position's share.
Errors are relative L2 norms over the units of a group.
"""

from __future__ import annotations

import warnings
from collections import Counter

import pytest
import torch
from helpers import (
    CPU,
    assert_close,
    make_batches,
    one_thread,  # noqa: F401 - autouse
    relative_error,
    run_engine,
)
from helpers_networks import CASES, Branching, Case, residual
from helpers_random import Network, networks
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import singe
from singe.data import first_batch
from singe.units import find_groups

FLOAT64, FLOAT32 = 1e-9, 1e-4
# criterion, path, norm, p: everything that is distinct. The endpoint criteria have no path, `signed`
# no norm, and `outside` differs from `inside` where nodes are summed.
OPTIONS = [
    *(
        (criterion, path, norm, p)
        for criterion in ("singe", "ig")
        for path in ("layer", "neuron", "network")
        for norm in ("inside", "outside")
        for p in (1, 2, "sum")
    ),
    *(("signed", path, "inside", 1) for path in ("layer", "neuron", "network")),
    *((criterion, "layer", "inside", p) for criterion in ("taylor", "gradient") for p in (1, 2, "sum")),
    *(("singe", path, "inside", "fisher") for path in ("layer", "neuron", "network")),
    ("taylor", "layer", "inside", "fisher"),
    ("ablation", "neuron", "inside", 1),
]  # fmt: skip


def assert_engines_agree(model, batches, tolerance, graph=None, stacked=True, **options):
    """Both engines, the same graph, the same scores; returns the fused result."""
    graph = graph or find_groups(model, first_batch(batches, CPU))
    fused = run_engine(model, batches, graph=graph, **options)
    naive = run_engine(model, batches, graph=graph, engine="naive", **options)
    assert fused.n_samples == naive.n_samples
    assert fused.meta["stacked"] is stacked, "the variants did not run in one pass"
    assert_close(fused.scores, naive.scores, tolerance)
    assert (fused.completeness is None) == (naive.completeness is None)
    return fused


@pytest.mark.parametrize(("path", "p"), [("layer", 1), ("neuron", 1), ("layer", "fisher")])
@pytest.mark.parametrize("name", CASES)
def test_every_layer_type(name, path, p):
    case = CASES[name]
    model, batches = case.model(), case.batches()
    graph = find_groups(model, first_batch(batches, CPU))
    # A group that was left out would not be compared: only the output may be.
    assert all("output" in why for why in graph.rejected.values()), graph.rejected
    result = assert_engines_agree(model, batches, FLOAT64, graph, path=path, p=p)
    assert all(scores.norm() > 0 for scores in result.scores.values())


@pytest.mark.parametrize("name", ["residual", "pre_activation", "group_norm", "tokens", "sigmoid"])
def test_every_layer_type_in_float32(name):
    case = CASES[name]
    model, batches = case.model(dtype=torch.float32), case.batches(dtype=torch.float32)
    assert_engines_agree(model, batches, FLOAT32)


class Everything(nn.Sequential):
    """Coupled rows, a norm that does not fold, and an activation that needs input gates."""

    def __init__(self) -> None:
        super().__init__(*residual()[:4], nn.BatchNorm2d(5), nn.Sigmoid(), residual()[-1])


@pytest.fixture(scope="module")
def everything():
    case = Case(Everything, (3, 4, 4))
    model, batches = case.model(), case.batches((2, 1))
    graph = find_groups(model, first_batch(batches, CPU))
    assert {m.kind for g in graph.groups for m in g.members} == {"rows", "norm", "input"}
    return model, batches, graph


@pytest.mark.parametrize(("criterion", "path", "norm", "p"), OPTIONS)
def test_every_option(everything, criterion, path, norm, p):
    model, batches, graph = everything
    assert_engines_agree(
        model, batches, FLOAT64, graph, criterion=criterion, path=path, norm=norm, p=p
    )


@settings(max_examples=25)
@given(
    network=networks(),
    option=st.sampled_from(OPTIONS),
    objective=st.sampled_from(["cross_entropy", "kl"]),
    sizes=st.sampled_from([(3,), (1, 2), (2, 1, 2)]),
)
def test_random_networks(network: Network, option, objective, sizes):
    criterion, path, norm, p = option
    if objective == "kl" and criterion in ("taylor", "gradient"):
        objective = "cross_entropy"  # kl has no gradient at mu = 1: both would be rounding only
    assert_engines_agree(
        network.model(), network.batches(sizes), FLOAT64,
        criterion=criterion, path=path, norm=norm, p=p, objective=objective, quadrature=2,
    )  # fmt: skip


@settings(max_examples=10)
@given(network=networks(), path=st.sampled_from(["layer", "neuron", "network"]))
def test_random_networks_in_float32(network: Network, path):
    model, batches = network.model(torch.float32), network.batches((3, 2), torch.float32)
    assert_engines_agree(model, batches, FLOAT32, path=path, quadrature=2)


def test_gates_that_share_a_pass_do_not_matter():
    """With memory for a single variant the passes are cut differently, the scores are not."""
    case = CASES["pre_activation"]
    model, batches = case.model(), case.batches()
    together = run_engine(model, batches, path="neuron")
    alone = run_engine(model, batches, path="neuron", max_memory=1)
    assert together.meta["variants_per_pass"] > 1
    assert alone.meta["variants_per_pass"] == 1
    assert_close(alone.scores, together.scores, 1e-12)


@pytest.mark.parametrize("path", ["layer", "neuron", "network"])
def test_a_model_that_vmap_cannot_run_is_run_variant_by_variant(path):
    torch.manual_seed(0)
    model = Branching().double()
    batches = make_batches((6,), (4, 3))
    with pytest.warns(UserWarning, match="one after the other.*vmap"):
        assert_engines_agree(model, batches, FLOAT64, stacked=False, path=path)


def test_a_model_that_vmap_can_run_does_not_warn():
    case = CASES["residual"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run_engine(case.model(), case.batches())


def test_the_definition_in_the_users_own_parameters():
    """``W * dL/dW`` taken from the unfolded conv and BatchNorm, with nothing of the package.

    The gate at mu scales the BatchNorm's weight and bias. The folded weight is then
    ``mu * W_f`` with ``W_f = W * gamma / sigma``, so ``W_f * dL/d(mu W_f) = W * dL/dW / mu``, and the
    folded bias ``beta - mean * gamma / sigma`` meets the gradient at the BatchNorm's output.
    """
    case = CASES["conv2d"]
    model, batches = case.model(), case.batches((5,))
    rule = singe.quadrature.gauss_legendre(3)
    found = run_engine(model, batches, layers=["0"], quadrature=rule).scores["0"]

    conv, norm = model[0], model[1]
    sigma = (norm.running_var + norm.eps).sqrt()
    x, y = batches[0]
    expected = torch.zeros(5, dtype=torch.float64)
    for mu, omega in zip(rule.nodes, rule.weights, strict=True):
        weight = conv.weight.detach().clone().requires_grad_()
        z = nn.functional.conv2d(x, weight, conv.bias, padding=1)
        z = (z - norm.running_mean.view(-1, 1, 1)) / sigma.view(-1, 1, 1)
        gated = mu * (norm.weight.view(-1, 1, 1) * z + norm.bias.view(-1, 1, 1))
        gated.retain_grad()
        nn.functional.cross_entropy(model[2:](gated), y).backward()
        rows = (weight * weight.grad / mu).detach().flatten(1).abs().sum(1)
        shift = norm.bias + (conv.bias - norm.running_mean) * norm.weight / sigma
        expected += omega * (rows + (shift * gated.grad.sum((0, 2, 3))).abs()).detach()
    assert relative_error(found, expected) <= FLOAT64


def test_the_objective_may_be_a_mean_or_per_sample():
    case = CASES["mlp"]
    model, batches = case.model(), case.batches((4, 3))

    def mean(outputs, batch):
        return nn.functional.cross_entropy(outputs, batch[1])

    def each(outputs, batch):
        return nn.functional.cross_entropy(outputs, batch[1], reduction="none")

    built_in = run_engine(model, batches).scores
    assert_close(run_engine(model, batches, objective=mean).scores, built_in, 1e-12)
    assert_close(run_engine(model, batches, objective=each).scores, built_in, 1e-12)
    naive = run_engine(model, batches, objective=mean, engine="naive").scores
    assert_close(naive, built_in, FLOAT64)


@pytest.mark.parametrize("p", [1, 2, "sum"])
def test_magnitude_is_the_norm_of_the_folded_weights(p):
    case = CASES["residual"]
    model = case.model()
    scores = singe.score(model, case.batches(), criterion="magnitude", p=p, progress=False)

    def folded(conv, norm):
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        shift = norm.bias - norm.running_mean * scale
        return torch.cat([conv.weight.flatten(1) * scale[:, None], shift[:, None]], 1)

    body = model[3].body
    expected = {
        "0": torch.cat([folded(model[0], model[1]), folded(body[3], body[4])], 1),
        "3.body.0": folded(body[0], body[1]),
    }
    for name, weight in expected.items():
        norm = weight.sum(1).abs() if p == "sum" else weight.norm(p, dim=1)
        assert relative_error(scores[name], norm) <= 1e-6  # float32


def test_random_scores_come_from_their_seed():
    case = CASES["mlp"]
    model, batches = case.model(), case.batches()

    def draw(seed):
        return singe.score(model, batches, criterion="random", seed=seed, progress=False)

    first, second, other = draw(3), draw(3), draw(4)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("criterion", ["singe", "ablation"])
def test_score_is_the_engines_result_in_float32(criterion):
    case = CASES["residual"]
    model, batches = case.model(), case.batches()
    expected = run_engine(model, batches, criterion=criterion, quadrature=4).scores
    for engine in ("fused", "naive"):
        scores = singe.score(model, batches, criterion=criterion, engine=engine, progress=False)
        assert all(t.dtype == torch.float32 for t in scores.values())
        assert_close(scores, expected, 1e-6)  # float32 results of float64 work


@pytest.mark.parametrize(
    "options",
    [{}, {"criterion": "signed"}, {"p": "fisher"}, {"path": "network", "p": "fisher"}],
    ids=str,
)
def test_triton_end_to_end(monkeypatch, options):
    """The whole engine on the Triton kernel (interpreted where there is no GPU)."""
    pytest.importorskip("triton", reason="triton is not installed")
    from singe.kernels import masked_forward_triton as kernels

    monkeypatch.setenv("SINGE_KERNELS", "triton")
    calls = Counter()

    def spy(name):
        launch = getattr(kernels, name)

        def counted(*args, **kwargs):
            calls[name] += 1
            return launch(*args, **kwargs)

        monkeypatch.setattr(kernels, name, counted)

    spy("masked_forward")
    spy("masked_forward_backward")
    case = Case(residual, (3, 4, 4))
    model, batches = case.model(dtype=torch.float32), case.batches((2,), dtype=torch.float32)
    assert_engines_agree(model, batches, FLOAT32, quadrature=2, **options)
    assert calls["masked_forward"] > 0
    assert calls["masked_forward_backward"] > 0
