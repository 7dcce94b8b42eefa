"""Adapters to what comes with torch, and Captum's way of asking."""

from __future__ import annotations

import sys

import pytest
import torch
from helpers import (
    clone,
    make_batches,
    one_thread,  # noqa: F401 - autouse
    relative_error,
)
from helpers_networks import CASES
from helpers_trained import torchvision_models, trained_resnet20
from torch import nn
from torch.nn.utils import prune
from torch.nn.utils.fusion import fuse_conv_bn_eval

import singe
from singe.adapters import captum, channel_scores, modelopt, required, torch_ao, torch_prune


def case(name: str):
    model, batches = CASES[name].model(), CASES[name].batches()
    return model, batches[0][0], batches


def resnet20_scores():
    model = trained_resnet20()
    batches = make_batches((3, 16, 16), (4,), classes=10)
    return model, batches[0][0], singe.score(model, batches, path="network", progress=False)


# ---------------------------------------------------------------------- torch.nn.utils.prune


def test_ln_structured_removes_the_lowest_of_a_layer():
    model, _, batches = case("vgg")
    scores = singe.score(model, batches, criterion="signed", path="neuron", progress=False)
    assert float(min(v.min() for v in scores.values())) < 0, "signed scores, which |.| would mix up"
    for name, values in scores.items():
        layer = model.get_submodule(name)
        importance = torch_prune.importance_scores(scores, model, name)
        prune.ln_structured(
            layer, "weight", amount=2, n=float("inf"), dim=0, importance_scores=importance
        )
        masked = (layer.weight_mask.flatten(1).sum(1) == 0).nonzero().view(-1)
        assert masked.tolist() == sorted(values.argsort()[:2].tolist())


@pytest.mark.parametrize("ranking", ["local", "global"])
@pytest.mark.parametrize(
    "name", ["vgg", "residual", "depthwise", "grouped", "pre_activation", "sigmoid", "pad_same"]
)
def test_masks_compute_what_pruning_computes(name, ranking):
    model, inputs, batches = case(name)
    scores = singe.score(model, batches, progress=False)
    masked, pruned = clone(model), clone(model)
    mask = torch_prune.local_structured if ranking == "local" else torch_prune.global_structured
    chosen = mask(masked, scores, inputs, amount=0.4)
    assert sum(map(len, chosen.values())) > 0
    singe.prune(pruned, singe.Plan(chosen), inputs)
    assert relative_error(masked(inputs), pruned(inputs)) < 1e-12
    assert any(n.endswith("weight_orig") for n, _ in masked.named_parameters())


def test_global_masks_are_the_lowest_of_all():
    model, inputs, scores = resnet20_scores()
    chosen = torch_prune.global_structured(model, scores, inputs, amount=0.3)
    flat = sorted(
        (float(v), name, u)
        for name, values in scores.items()
        for u, v in enumerate(values)
        if u != int(values.argmax())
    )
    count = round(0.3 * sum(map(len, scores.values())))
    assert {(n, u) for n, units in chosen.items() for u in units} == {
        (n, u) for _, n, u in flat[:count]
    }
    for name, units in chosen.items():
        block, norm = name.rsplit(".", 1)[0], name.replace("conv", "bn")
        rows = model.get_submodule(name).weight.flatten(1)
        assert not rows[units].any()
        assert not model.get_submodule(norm).bias[units].any(), block


@pytest.mark.parametrize("amount", [0.2, 0.5])
def test_as_many_are_masked_as_were_asked_for(amount):
    model, inputs, batches = case("vgg")
    scores = singe.score(model, batches, criterion="random")
    chosen = torch_prune.global_structured(model, scores, inputs, amount)
    assert sum(map(len, chosen.values())) == round(amount * sum(map(len, scores.values())))


def test_masks_on_a_torchvision_network():
    torch.manual_seed(0)
    model = torchvision_models().resnet18(weights=None, num_classes=10).double().eval()
    batches = make_batches((3, 32, 32), (2,), classes=10)
    scores = singe.score(model, batches, criterion="taylor", progress=False)
    masked = clone(model)
    chosen = torch_prune.global_structured(
        masked, scores, batches[0][0], amount=0.3, max_pruning_ratio=0.8
    )
    singe.prune(model, singe.Plan(chosen), batches[0][0])
    assert relative_error(masked(batches[0][0]), model(batches[0][0])) < 1e-9


def test_what_masks_cannot_do_is_refused_and_changes_nothing():
    model, inputs, batches = case("layer_norm")
    scores = singe.score(model, batches, progress=False)
    before = list(model.state_dict())
    with pytest.raises(singe.ModelError, match="statistics cannot leave"):
        torch_prune.local_structured(model, scores, inputs, amount=0.4)
    assert list(model.state_dict()) == before
    model, inputs, batches = case("vgg")
    scores = singe.score(model, batches, progress=False)
    for amount in (0.0, 1.0, 3):
        with pytest.raises(singe.OptionError, match="amount"):
            torch_prune.global_structured(model, scores, inputs, amount=amount)
    with pytest.raises(singe.BudgetError, match="at most"):
        torch_prune.global_structured(model, scores, inputs, amount=0.9, max_pruning_ratio=0.5)
    with pytest.raises(singe.ModelError, match="'1' has no scores"):
        torch_prune.importance_scores(scores, model, "1")
    with pytest.raises(singe.ScoresError, match="another model"):
        torch_prune.importance_scores(scores, case("mlp")[0], "0")
    with pytest.raises(singe.ScoresError, match="another model"):
        torch_prune.local_structured(case("residual")[0], scores, inputs, amount=0.5)


# ---------------------------------------------------------------------- torch.ao.pruning


def test_the_structured_sparsifier_removes_the_lowest():
    model, inputs, batches = case("mlp")
    scores = singe.score(model, batches, progress=False)
    expected = clone(model)
    lowest = {n: v.argsort()[: round(0.4 * len(v))].tolist() for n, v in scores.items()}
    singe.prune(expected, singe.Plan(lowest), inputs)
    sparsifier = torch_ao.sparsifier(scores, model, amount=0.4)
    sparsifier.prepare(model, torch_ao.config(scores, model))
    sparsifier.step()
    small = sparsifier.prune()
    assert [m.out_features for m in small.children() if isinstance(m, nn.Linear)] == [5, 4, 4]
    assert relative_error(small(inputs), expected(inputs)) < 1e-9


@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("bias", [True, False])
def test_convolutions_become_smaller_before_one_that_pads(bias, padding):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=bias), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 6, 3, padding=padding, bias=bias), nn.ReLU(),
        nn.Conv2d(6, 4, 1, bias=bias), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4),
    ).double()  # fmt: skip
    if bias:
        nn.init.constant_(model[0].bias, 0.7)  # a masked channel that kept it would be seen
    batches = make_batches((3, 10, 10), (3,))
    inputs = batches[0][0]
    scores = singe.score(model, batches, layers=["0", "3"], progress=False)
    expected = clone(model)
    lowest = {n: v.argsort()[: len(v) // 2].tolist() for n, v in scores.items()}
    singe.prune(expected, singe.Plan(lowest), inputs)
    sparsifier = torch_ao.sparsifier(scores, model)
    sparsifier.prepare(model, torch_ao.config(scores, model))
    sparsifier.step()
    small = sparsifier.prune()
    widths = [m.weight.shape[:2] for m in small.modules() if isinstance(m, nn.Conv2d)]
    assert widths == [(4, 3), (3, 4), (4, 3)]
    assert relative_error(small(inputs), expected(inputs)) < 1e-12


def test_the_structured_sparsifiers_masks_on_a_torchvision_network():
    torch.manual_seed(0)
    model = torchvision_models().alexnet(weights=None, num_classes=10, dropout=0.0).eval()
    model.classifier = nn.Sequential(nn.Linear(256 * 36, 16), nn.ReLU(), nn.Linear(16, 10))
    batches = make_batches((3, 64, 64), (2,), dtype=torch.float32, classes=10)
    convs = [f"features.{i}" for i in (0, 3, 6, 8)]
    scores = singe.score(model, batches, criterion="taylor", layers=convs, progress=False)
    sparsifier = torch_ao.sparsifier(scores, model, amount=0.25)
    layers = torch_ao.config(scores, model)
    layers[0]["sparsity_level"] = 0.5
    sparsifier.prepare(model, layers)
    sparsifier.step()
    for name, values in scores.items():
        mask = model.get_submodule(name).parametrizations.weight[0].mask
        share = 0.5 if name == "features.0" else 0.25
        lowest = values.argsort()[: round(share * len(values))]
        assert (~mask).nonzero().view(-1).tolist() == sorted(lowest.tolist())
    inputs = batches[0][0]
    masked, small = model(inputs), sparsifier.prune()
    widths = [m.out_channels for m in small.modules() if isinstance(m, nn.Conv2d)]
    assert widths == [32, 144, 288, 192, 256], "the last one's channels were not scored"
    assert relative_error(small(inputs), masked) < 1e-5


def test_the_structured_sparsifier_on_the_fused_resnet20():
    """It knows no BatchNorm: fused into the convolutions, the blocks' inner layers can go."""
    model, _, _ = resnet20_scores()
    for block in [m for m in model.modules() if hasattr(m, "bn2")]:
        block.conv1, block.bn1 = fuse_conv_bn_eval(block.conv1, block.bn1), nn.Identity()
        block.conv2, block.bn2 = fuse_conv_bn_eval(block.conv2, block.bn2), nn.Identity()
    batches = make_batches((3, 16, 16), (4,), classes=10)
    scores = singe.score(model, batches, path="network", progress=False)
    sparsifier = torch_ao.sparsifier(scores, model, amount=0.5)
    sparsifier.prepare(model, torch_ao.config(scores, model))
    sparsifier.step()
    for name, values in scores.items():
        mask = model.get_submodule(name).parametrizations.weight[0].mask
        assert (~mask).nonzero().view(-1).tolist() == sorted(
            values.argsort()[: len(values) // 2].tolist()
        )


# ---------------------------------------------------------------------- Captum's way


def test_channel_relevances_and_their_delta():
    model, _, batches = case("tokens")
    x, y = batches[0]
    relevance = captum.ChannelIntegratedGradients(model, model.up)
    values, delta = relevance.attribute(x, target=y, n_steps=32, return_convergence_delta=True)
    truth = singe.score(model, [(x, y)], criterion="ablation", layers=["up"], progress=False)["up"]
    assert values.shape == delta.shape == truth.shape
    assert relative_error(values, truth) < 1e-5
    assert torch.allclose(values - truth, delta, atol=1e-6)
    in_parts = relevance.attribute(x, target=y, n_steps=32, internal_batch_size=2)
    assert relative_error(in_parts, values) < 1e-5


@pytest.mark.parametrize("method", captum.METHODS)
def test_captums_methods(method):
    model, inputs, _ = case("mlp")
    relevance = captum.ChannelIntegratedGradients(model, ["0", "2"], path="layer")
    values, delta = relevance.attribute(
        inputs, target=2, n_steps=40, method=method, return_convergence_delta=True
    )
    assert set(values) == set(delta) == {"0", "2"}
    assert all(float(d.abs()) < 0.05 for d in delta.values())


def test_captum_options_are_checked():
    model, inputs, _ = case("mlp")
    relevance = captum.ChannelIntegratedGradients(model, "0")
    assert relevance.has_convergence_delta()
    assert relevance.attribute(inputs, n_steps=3).shape == (8,), "without a target: from the output"
    with pytest.raises(singe.OptionError, match="method"):
        relevance.attribute(inputs, target=1, method="simpson")
    with pytest.raises(singe.OptionError, match="baselines"):
        relevance.attribute(inputs, inputs, target=1)
    with pytest.raises(singe.DataError, match="one class, or one for each of the"):
        relevance.attribute(inputs, target=torch.tensor([1, 2]))
    for wrong, told in ((inputs[:0], r"shape \(0, "), (5, "a int")):
        with pytest.raises(singe.DataError, match=f"inputs must be a tensor of samples.*{told}"):
            relevance.attribute(wrong, target=1)
    with pytest.raises(singe.OptionError, match="internal_batch_size must be a whole number >= 1"):
        relevance.attribute(inputs, target=1, internal_batch_size=0)
    with pytest.raises(singe.OptionError, match=r"nn\.Module"):
        captum.ChannelIntegratedGradients(lambda x: x, "0")


def test_a_share_of_nearly_all_leaves_the_best():
    model, inputs, batches = case("vgg")
    scores = singe.score(model, batches, progress=False)
    masked = torch_prune.local_structured(model, scores, inputs, amount=0.99)
    for name, values in scores.items():
        assert set(range(len(values))) - set(masked[name]) == {int(values.argmax())}


# ---------------------------------------------------------------------- plain vectors


def test_channel_scores_are_there_for_every_coupled_layer(tmp_path):
    model, _, batches = case("residual")
    scores = singe.score(model, batches, progress=False)
    by_layer = channel_scores.channel_scores(scores, model)
    assert set(by_layer) == {"0", "3.body.0", "3.body.3"}
    assert torch.equal(by_layer["0"], by_layer["3.body.3"])
    path = channel_scores.save_activation_scores(scores, model, tmp_path)
    read = torch.load(path, weights_only=True)
    assert torch.equal(read["0"]["score"], scores["0"])
    with pytest.raises(singe.OptionError, match=r"rank_0\.pth is a file"):
        channel_scores.save_activation_scores(scores, model, path)


def test_channel_scores_of_another_model_are_refused():
    model, _, batches = case("residual")
    scores = singe.score(model, batches, criterion="random")
    model.register_buffer("more", torch.zeros(1))
    with pytest.raises(singe.ScoresError, match="another model"):
        channel_scores.channel_scores(scores, model)


def test_modelopt_is_given_ranks_and_not_the_order():
    values, units = torch.tensor([0.3, -1.0, 0.2, 5.0]), torch.arange(4)
    assert modelopt._estimator(values, units)().tolist() == [3.0, 1.0, 2.0, 4.0]


def test_channels_that_go_together_share_their_score():
    model, _, batches = case("grouped")
    scores = singe.score(model, batches, progress=False)
    found = channel_scores.channel_scores(scores, model)["3"]
    assert torch.equal(found, scores["3"].repeat(2))
    assert torch.equal(channel_scores.of_layer({"3": found}, model, model[3]), found)


@pytest.mark.parametrize("wrong", [{"0": torch.rand(4)}, "scores.safetensors", None])
@pytest.mark.parametrize(
    "call",
    [
        lambda scores, model, x: channel_scores.channel_scores(scores, model),
        lambda scores, model, x: torch_prune.importance_scores(scores, model, "0"),
        lambda scores, model, x: torch_prune.local_structured(model, scores, x, amount=0.4),
        lambda scores, model, x: torch_prune.global_structured(model, scores, x, amount=0.4),
        lambda scores, model, x: torch_ao.sparsifier(scores, model),
        lambda scores, model, x: torch_ao.config(scores, model),
        lambda scores, model, x: modelopt.use(model, scores),
    ],
)
def test_what_is_no_scores_is_refused(call, wrong):
    model, inputs, _ = case("vgg")
    with pytest.raises(singe.OptionError, match=r"^scores must be what singe\.score returned, got"):
        call(wrong, model, inputs)


# ---------------------------------------------------------------------- missing libraries


@pytest.mark.parametrize("package", ["fasterai", "nni", "modelopt"])
def test_a_missing_library_is_named(package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(singe.OptionError, match=f"pip install {package}-x"):
        required(package, f"{package}-x")
    with pytest.raises(AttributeError, match="torch_pruning"):
        singe.adapters.no_such_library  # noqa: B018


def test_captum_of_containers_and_of_nothing():
    model, inputs, _ = case("vgg")
    with pytest.raises(singe.OptionError, match="layer is an empty list"):
        captum.ChannelIntegratedGradients(model, [])
    relevance = captum.ChannelIntegratedGradients(nn.Sequential(model, nn.Flatten()), "0")
    found = relevance.attribute(inputs, target=0, n_steps=2)
    assert len(found) > 1
    assert all(values.dim() == 1 for values in found.values())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_masks_in_a_mode_without_gradients(mode):
    model, inputs, batches = case("vgg")
    scores = singe.score(model, batches, progress=False)
    with mode():
        chosen = torch_prune.local_structured(clone(model), scores, inputs, amount=0.4)
    assert chosen == torch_prune.local_structured(model, scores, inputs, amount=0.4)
