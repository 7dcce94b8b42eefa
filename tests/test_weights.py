"""Scores of single weights: the definition, their sum over a unit, and plain autograd beside them."""

from __future__ import annotations

import copy
from dataclasses import replace

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
from helpers_trained import torchvision_models, trained_resnet20
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

import singe
from singe.data import first_batch
from singe.graph import Group, Member
from singe.units import find_groups
from singe.weight_groups import find_weight_groups, uncovered

FLOAT64 = 1e-9
PATHS = ("layer", "neuron", "network")
OPTIONS = [
    *((c, path, norm) for c in ("singe", "ig") for path in PATHS for norm in ("inside", "outside")),
    ("taylor", "layer", "inside"),
    ("gradient", "layer", "inside"),
]


def weights_of(model, batches, **options):
    return run_engine(model, batches, granularity="weight", **options)


def score(model, batches, **options):
    return singe.score(model, batches, granularity="weight", progress=False, **options)


def assert_engines_agree(model, batches, graph=None, **options):
    graph = graph or find_weight_groups(model, first_batch(batches, CPU))
    fused = weights_of(model, batches, graph=graph, **options).scores
    naive = weights_of(model, batches, graph=graph, engine="naive", **options).scores
    assert_close(fused, naive, FLOAT64)
    return fused


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


# ---------------------------------------------------------------------- what is scored


class Attention(nn.Module):
    """A layer whose output projection torch reads without calling it, and one nobody calls."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(5, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.unused = nn.Linear(4, 4)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = self.embed(x).tanh()
        return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))


def test_what_cannot_be_scored_is_named_with_the_reason():
    case = Case(Attention, (3, 5))
    model, batches = case.model(), case.batches()
    scores = score(model, batches)
    assert set(scores) == {"embed.weight", "unused.weight", "head.weight"}
    assert not scores["unused.weight"].any(), "nothing depends on it"
    assert "without calling it" in scores.meta["rejected"]["attention.out_proj"]
    with pytest.raises(
        singe.ModelError, match=r"out_proj' has no weights to score: .* without calling it"
    ):
        score(model, batches, layers=["attention.out_proj"])

    computed = nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3)), nn.ReLU(), Head(4)
    )
    scores = score(computed, make_batches((3, 6, 6), (2,), dtype=torch.float32))
    assert set(scores) == {"2.linear.weight"}
    assert "computed" in scores.meta["rejected"]["0"]
    with pytest.raises(singe.ModelError, match="no weights to score"):
        score(computed[:1].append(nn.Flatten()), make_batches((3, 3, 3), (2,), dtype=torch.float32))


def test_layers_and_ignore():
    model, batches = CASES["residual"].model(), CASES["residual"].batches()
    assert set(score(model, batches, layers=["4.linear"])) == {"4.linear.weight"}
    coupled = {"0.weight", "3.body.3.weight"}
    assert set(score(model, batches, layers=[model[0]])) == coupled
    found = score(model, batches, ignore=["3.body.3"])
    assert set(found) == {"0.weight", "3.body.0.weight", "4.linear.weight"}
    assert found.meta["rejected"]["3.body.3"] == "it is in `ignore`"
    alone = score(model, batches)
    assert_close({"4.linear.weight": alone["4.linear.weight"]},
                 score(model, batches, layers=["4.linear"]), 1e-6)  # fmt: skip
    with pytest.raises(singe.ModelError, match="did you mean"):
        score(model, batches, layers=["4.linaer"])
    with pytest.raises(singe.ModelError, match="no weights to score"):
        score(model, batches, layers=["2"])


def test_a_parameter_whose_rows_are_not_all_scored_is_left_out():
    """Rows may be shared out among groups; each moves with its own."""
    model, batches = CASES["mlp"].model(), CASES["mlp"].batches()
    graph = find_weight_groups(model, first_batch(batches, CPU), layers=["0"])

    def part(name, units):
        channels = torch.tensor(units)[:, None]
        return Group(name, len(units), channels, (Member("0", "rows", channels),))

    lower, upper = part("lower", [0, 2, 4, 6]), part("upper", [1, 3, 5, 7])
    both = replace(graph, groups=(lower, upper))
    found = assert_engines_agree(model, batches, graph=both)
    assert list(found) == ["0.weight"]
    assert not torch.allclose(
        found["0.weight"], weights_of(model, batches, graph=graph).scores["0.weight"]
    )
    assert not weights_of(model, batches, graph=replace(graph, groups=(lower,))).scores
    rest = uncovered("0", model[0], [lower])
    assert rest[0].name == "0:rest"
    assert rest[0].root_channels.flatten().tolist() == [1, 3, 5, 7]


def test_a_single_layer_needs_no_removable_channels():
    model = nn.Sequential(nn.Flatten(), nn.Linear(6, 4)).double()
    batches = make_batches((6,), (3,))
    with pytest.raises(singe.ModelError, match="nothing to prune"):
        singe.score(model, batches, progress=False)
    assert score(model, batches)["1.weight"].shape == (4, 6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"criterion": "signed"}, "'signed' is about whole units"),
        ({"criterion": "ablation"}, "'ablation' is about whole units"),
        ({"p": 2}, "p=2 has no meaning"),
        ({"p": "sum"}, "p='sum' has no meaning"),
        ({"tolerance": 0.1, "pruning_ratio": 0.5}, "tolerance"),
        ({"granularity": "rows"}, r"granularity='rows' is not offered; choose from \['unit'"),
    ],
)
def test_options_without_a_meaning_are_refused(options, message):
    model, batches = CASES["mlp"].model(), CASES["mlp"].batches()
    with pytest.raises(singe.OptionError, match=message):
        singe.score(model, batches, **({"granularity": "weight", "progress": False} | options))


# ---------------------------------------------------------------------- the result


@pytest.fixture(scope="module")
def scored():
    model, batches = CASES["residual"].model(), CASES["residual"].batches()
    return model, score(model, batches, quadrature=2)


def test_a_mapping_of_parameters(scored):
    model, scores = scored
    parameters = dict(model.named_parameters())
    assert list(scores) == [name for name in parameters if name in scores], "in the model's order"
    for name, values in scores.items():
        assert values.shape == parameters[name].shape
        assert values.dtype == torch.float32
        assert values.device.type == "cpu"
    total = sum(t.numel() for t in scores.values())
    assert repr(scores) == f"WeightScores(singe, 4 parameters, {total} weights, 5 samples)"
    assert scores.meta["granularity"] == "weight"
    assert scores.stderr is not None


def test_save_and_load(scored, tmp_path):
    model, scores = scored
    scores.save(tmp_path / "w.safetensors")
    loaded = singe.WeightScores.load(tmp_path / "w.safetensors", model)
    assert list(loaded) == list(scores)
    assert all(torch.equal(loaded[name], scores[name]) for name in scores)
    assert all(torch.equal(loaded.stderr[name], scores.stderr[name]) for name in scores)
    assert loaded.meta == scores.meta
    with pytest.raises(singe.ScoresError, match="it holds singe-weight-scores-1"):
        singe.Scores.load(tmp_path / "w.safetensors")
    with pytest.raises(singe.ScoresError, match="another model"):
        singe.WeightScores.load(tmp_path / "w.safetensors", nn.Linear(2, 2))
    with pytest.raises(singe.NonFiniteError, match=r"parameter 'a\.weight'"):
        singe.WeightScores({"a.weight": torch.tensor([float("nan")])}, {})


def test_a_run_that_was_killed_goes_on_to_the_same_bits(tmp_path):
    case = CASES["residual"]
    model, batches = case.model(), case.batches((2, 2, 1))

    class Killed(list):
        broken = True

        def __iter__(self):
            for position, batch in enumerate(list.__iter__(self)):
                if self.broken and position == 2:
                    raise KeyboardInterrupt
                yield batch

    expected = score(model, batches)
    killed, path, before = Killed(batches), tmp_path / "run", snapshot(model)
    with pytest.raises(KeyboardInterrupt):
        score(model, killed, checkpoint=path)
    assert_unchanged(model, before)
    assert path.exists()
    killed.broken = False
    with pytest.raises(singe.CheckpointError, match="granularity"):
        singe.score(model, killed, checkpoint=path, progress=False)
    found = score(model, killed, checkpoint=path)
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_autocast_and_half_precision_models():
    """Nearly the float32 scores; the tolerances are a few roundings of bf16 (2^-8)."""
    case = CASES["vgg"]
    model, batches = case.model(dtype=torch.float32), case.batches(dtype=torch.float32)
    expected = score(model, batches, criterion="taylor")
    lowered = score(model, batches, criterion="taylor", autocast=torch.bfloat16)
    assert_close(lowered, expected, 0.1)
    half = [(x.bfloat16(), y) for x, y in batches]
    assert_close(score(model.bfloat16(), half, criterion="taylor"), expected, 0.2)


def test_a_torchvision_network():
    """float32, and with rows that are coupled through the residual streams."""
    torch.manual_seed(0)
    model = torchvision_models().resnet18(weights=None, num_classes=10).eval()
    batches = make_batches((3, 32, 32), (2,), dtype=torch.float32, classes=10)
    scores = score(model, batches, path="network", quadrature=2)
    expected = [n for n, p in model.named_parameters() if p.dim() > 1]
    assert list(scores) == expected
    model.double()
    wide = score(model, [(x.double(), y) for x, y in batches], path="network", quadrature=2)
    assert_close(scores, wide, 2e-2)  # a few ReLUs flip: see test_definition_real
