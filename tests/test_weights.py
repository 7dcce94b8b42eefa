"""Scores of single weights: the definition, their sum over a unit, and plain autograd beside them."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    CPU,
    assert_close,
    assert_unchanged,
    make_batches,
    one_thread,  # noqa: F401 - autouse
    relative_error,
    run_engine,
    snapshot,
)
from helpers_networks import CASES, Case, Head
from helpers_random import Network, networks
from helpers_trained import trained_resnet20
from helpers_weights import FLOAT64, assert_engines_agree, score, weights_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

import singe
from singe.data import first_batch
from singe.units import find_groups

PATHS = ("layer", "neuron", "network")
OPTIONS = [
    *((c, path, norm) for c in ("singe", "ig") for path in PATHS for norm in ("inside", "outside")),
    ("taylor", "layer", "inside"),
    ("gradient", "layer", "inside"),
]


# ---------------------------------------------------------------------- the definition


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", CASES)
def test_every_layer_type(name, path):
    case = CASES[name]
    model = case.model()
    found = assert_engines_agree(model, case.batches(), path=path)
    expected = {f"{n}.weight": m for n, m in model.named_modules() if isinstance(m, ROWS)}
    assert set(found) == set(expected), "every convolution and linear layer, the output included"
    for key, values in found.items():
        assert values.shape == expected[key].weight.shape
        assert values.norm() > 0
        assert bool((values >= 0).all())


ROWS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


class Decoder(nn.Module):
    """Transposed convolutions: strided, grouped, with a BatchNorm behind, with an ``output_size``."""

    def __init__(self, dims: int) -> None:
        super().__init__()
        up = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[dims - 1]
        norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims - 1]
        self.up1 = up(3, 4, 3, stride=2, padding=1, output_padding=1, bias=False)
        self.norm = norm(4)
        self.up2 = up(4, 6, 2, stride=2, groups=2)
        self.up3 = up(6, 6, 3, groups=6, dilation=2)
        self.up4 = up(6, 5, 2, stride=3)
        self.head = Head(5)

    def forward(self, x):
        x = self.norm(self.up1(x)).tanh()
        x = self.up3(self.up2(x).tanh()).tanh()
        size = [3 * n + 1 for n in x.shape[2:]]
        return self.head(self.up4(x, output_size=size).tanh())


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_transposed_convolutions(dims, path):
    case = Case(lambda: Decoder(dims), (3, *(2,) * dims))
    model, batches = case.model(), case.batches()
    found = assert_engines_agree(model, batches, path=path, quadrature=2)
    layers = ["up1", "up2", "up3", "up4", "head.linear"]
    assert list(found) == [f"{name}.weight" for name in layers]
    assert all(values.norm() > 0 for values in found.values())
    magnitude = score(model, batches, criterion="magnitude")
    for name, values in found.items():
        weight = model.get_parameter(name)
        assert values.shape == weight.shape
        assert relative_error(magnitude[name], weight.abs()) <= 1e-6  # float32
    taylor = weights_of(model, batches, criterion="taylor").scores
    x, y = (torch.cat(part) for part in zip(*batches, strict=True))
    parameters = [model.get_parameter(name) for name in taylor]
    grads = torch.autograd.grad(F.cross_entropy(model(x), y), parameters)
    for name, weight, grad in zip(taylor, parameters, grads, strict=True):
        assert relative_error(taylor[name], (weight * grad).abs()) <= FLOAT64


@pytest.mark.parametrize(("criterion", "path", "norm"), OPTIONS)
def test_every_option(criterion, path, norm):
    case = CASES["pre_activation"]
    assert_engines_agree(
        case.model(), case.batches((2, 1)), criterion=criterion, path=path, norm=norm
    )


@settings(max_examples=20)
@given(network=networks(), option=st.sampled_from(OPTIONS))
def test_random_networks(network: Network, option):
    criterion, path, norm = option
    assert_engines_agree(
        network.model(), network.batches((1, 2)),
        criterion=criterion, path=path, norm=norm, quadrature=2,
    )  # fmt: skip


@pytest.mark.parametrize("path", ["layer", "network"])
def test_trained_resnet20(path):
    model = trained_resnet20()
    found = assert_engines_agree(model, make_batches((3, 16, 16), (2,), classes=10), path=path,
                                 quadrature=2)  # fmt: skip
    assert len(found) == 20, "19 convolutions and the classifier, though only 9 groups have units"


@pytest.mark.parametrize("path", ["layer", "network"])
def test_the_definition_in_the_users_own_parameters(path):
    """Weight x gradient at scaled BatchNorms, with nothing of the package; and the sum over a unit.

    Every layer of these groups has a BatchNorm behind it. The gates at mu scale its weight and bias, so
    with respect to the folded weight ``mu W_f`` weight times gradient is ``W * dL/dW / mu``. The
    entry of the folded bias, ``shift * dL/d(mu shift)``, completes the unit's score.
    """
    case = CASES["residual"]
    model, batches = case.model(), case.batches((5,))
    body = model[3].body
    layers = {"0": model[1], "3.body.0": body[1], "3.body.3": body[4]}
    groups = {"0": ["0", "3.body.3"], "3.body.0": ["3.body.0"]}
    rule = singe.quadrature.gauss_legendre(3)
    options = {"path": path, "quadrature": rule, "layers": list(groups)}
    found = weights_of(model, batches, **options).scores
    units = run_engine(model, batches, **options).scores
    assert set(found) == {f"{name}.weight" for name in layers}

    weights = {name: torch.zeros_like(model.get_submodule(name).weight) for name in layers}
    shifts = {name: torch.zeros(len(weight)) for name, weight in weights.items()}
    sets = list(groups.values()) if path == "layer" else [list(layers)]
    x, y = batches[0]
    for moving in sets:
        for mu, omega in zip(rule.nodes, rule.weights, strict=True):
            scaled = copy.deepcopy(model)
            norms = {n: scaled.get_submodule(_name_of(model, layers[n])) for n in moving}
            with torch.no_grad():
                for norm in norms.values():
                    norm.weight *= mu
                    norm.bias *= mu
            F.cross_entropy(scaled(x), y).backward()
            for name, norm in norms.items():
                weight = scaled.get_submodule(name).weight
                weights[name] += omega * (weight * weight.grad / mu).detach().abs()
                own = layers[name]
                shift = (
                    own.bias - own.running_mean * own.weight / (own.running_var + own.eps).sqrt()
                )
                shifts[name] = shifts[name] + omega * (shift * norm.bias.grad).detach().abs()
    for name, expected in weights.items():
        assert relative_error(found[f"{name}.weight"], expected) <= FLOAT64
    for group, names in groups.items():
        total = sum(found[f"{n}.weight"].flatten(1).sum(1) + shifts[n] for n in names)
        assert relative_error(total, units[group]) <= FLOAT64


def _name_of(model, module):
    return next(name for name, one in model.named_modules() if one is module)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "build",
    [
        lambda: nn.Sequential(
            nn.Conv2d(3, 6, 3, bias=False), nn.Tanh(), nn.Conv2d(6, 8, 3, groups=2, bias=False),
            nn.SiLU(), nn.Conv2d(8, 8, 1, groups=8, bias=False), nn.SiLU(), Head(8),
        ),
        lambda: nn.Sequential(
            nn.Conv2d(3, 5, 1, bias=False), nn.Tanh(), nn.Flatten(),
            nn.Linear(180, 6, bias=False), nn.SiLU(), nn.Linear(6, 4),
        ),
    ],
)  # fmt: skip
def test_without_biases_and_norms_the_sum_over_a_unit_is_its_score(build, path):
    case = Case(build, (3, 6, 6))
    model, batches = case.model(), case.batches()
    graph = find_groups(model, first_batch(batches, CPU))
    options = {"path": path, "graph": graph}
    units = run_engine(model, batches, **options).scores
    weights = weights_of(model, batches, **options).scores
    for group in graph.groups:
        total = torch.zeros(group.n_units, dtype=torch.float64)
        for member in group.rows:
            rows = weights[f"{member.name}.weight"].flatten(1).sum(1)
            total += rows[member.channels].sum(1)
        assert relative_error(total, units[group.name]) <= FLOAT64
    assert set(weights) == {f"{m.name}.weight" for g in graph.groups for m in g.rows}


# ---------------------------------------------------------------------- plain autograd


@pytest.mark.parametrize(
    "name", ["conv2d", "grouped", "depthwise", "residual", "tokens", "twice", "pad_reflect", "vgg"]
)
def test_at_the_end_of_the_path_it_is_plain_autograd(name):
    case = CASES[name]
    model, batches = case.model(), case.batches((4, 3))
    taylor = weights_of(model, batches, criterion="taylor").scores
    gradient = weights_of(model, batches, criterion="gradient").scores
    magnitude = score(model, batches, criterion="magnitude")
    x, y = (torch.cat(part) for part in zip(*batches, strict=True))
    parameters = dict(model.named_parameters())
    grads = torch.autograd.grad(F.cross_entropy(model(x), y), [parameters[key] for key in taylor])
    for key, grad in zip(taylor, grads, strict=True):
        weight = parameters[key].detach()
        assert relative_error(taylor[key], (weight * grad).abs()) <= FLOAT64
        assert relative_error(gradient[key], grad.abs()) <= FLOAT64
        assert relative_error(magnitude[key], weight.abs()) <= 1e-6  # float32


def test_folding_changes_nothing():
    """``singe`` and ``taylor`` are the same for the weights of a convolution with its BatchNorm fused."""
    model, batches = CASES["residual"].model(), CASES["residual"].batches()
    fused = copy.deepcopy(model)
    fused[0], fused[1] = fuse_conv_bn_eval(model[0], model[1]), nn.Identity()
    body = fused[3].body
    body[0], body[1] = fuse_conv_bn_eval(body[0], body[1]), nn.Identity()
    body[3], body[4] = fuse_conv_bn_eval(body[3], body[4]), nn.Identity()
    for options in ({"path": "layer"}, {"path": "network", "norm": "outside"},
                    {"criterion": "taylor"}):  # fmt: skip
        expected = weights_of(model, batches, **options).scores
        assert_close(weights_of(fused, batches, **options).scores, expected, FLOAT64)


# ---------------------------------------------------------------------- invariants


@pytest.mark.parametrize("path", PATHS)
def test_the_cut_into_batches_does_not_matter(path):
    case = CASES["residual"]
    model = case.model()
    whole = weights_of(model, case.batches((6,)), path=path).scores
    for sizes in ((1,) * 6, (5, 1), (2, 2, 2)):
        cut = weights_of(model, case.batches(sizes), path=path, n_batches=len(sizes)).scores
        assert_close(cut, whole, FLOAT64)
    small = weights_of(model, case.batches((6,)), path=path, max_memory=1).scores
    assert_close(small, whole, FLOAT64)


@pytest.mark.parametrize("criterion", ["singe", "magnitude", "random"])
def test_the_model_is_not_touched(criterion):
    case = CASES["pre_activation"]
    model, batches = case.model().train(), case.batches()
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    before = snapshot(model)
    score(model, batches, criterion=criterion)
    assert_unchanged(model, before)


def test_standard_errors_are_those_of_scoring_again_without_each_batch():
    case = CASES["residual"]
    model, batches = case.model(), case.batches((3, 2, 4, 3))
    result = weights_of(model, batches, n_batches=4)
    sizes = [len(y) for _, y in batches]
    for key, theta in result.scores.items():
        h = torch.tensor([sum(sizes) / s for s in sizes], dtype=torch.float64)
        h = h.view(-1, *[1] * theta.dim())
        without = torch.stack([
            weights_of(model, batches[:i] + batches[i + 1 :]).scores[key]
            for i in range(len(batches))
        ])  # fmt: skip
        center = len(sizes) * theta - ((1 - 1 / h) * without).sum(0)
        pseudo = h * theta - (h - 1) * without
        expected = ((pseudo - center).square() / (h - 1)).mean(0).sqrt()
        assert relative_error(result.stderr[key], expected) <= 1e-8


def test_random_scores_come_from_their_seed():
    model, batches = CASES["mlp"].model(), CASES["mlp"].batches()
    first, again, other = (
        score(model, batches, criterion="random", seed=seed) for seed in (3, 3, 4)
    )
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not any(torch.equal(first[key], other[key]) for key in first)
    assert first["0.weight"].unique().numel() == first["0.weight"].numel()
