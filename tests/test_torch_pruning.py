"""Torch-Pruning's own pruners with our scores: what they remove is what our ranking names."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
import torch_pruning as tp
from helpers import (
    clone,
    make_batches,
    one_thread,  # noqa: F401 - autouse
    randomise,
)
from helpers_torch_pruning import case, heads_of, lowest, pruner_for, scores_of, units_of
from helpers_trained import torchvision_models, trained_resnet20
from torch import nn

import singe
from singe.adapters import torch_pruning as adapter
from singe.adapters.ranking import normalized
from singe.scores import Scores

NETWORKS = {
    "resnet18": 2880,
    "resnet50": 11456,
    "mobilenet_v2": 9128,
    "densenet121": 10240,
    "resnext50_32x4d": 4376,
    "convnext_tiny": 18432,
    "vit_b_16": 36864,
}


@pytest.mark.parametrize("name", NETWORKS)
def test_global_pruning_removes_the_lowest_half(name):
    torch.manual_seed(0)
    options = {"image_size": 32} if name.startswith("vit") else {}
    model = getattr(torchvision_models(), name)(weights=None, num_classes=10, **options)
    model = randomise(model)
    for head in (m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == 10):
        nn.init.normal_(head.weight)  # a vision transformer's starts at zero
    batches = make_batches((3, 32, 32), (2,), dtype=torch.float32, classes=10)
    # Heads that Torch-Pruning cannot remove would count in a ranking of everything.
    attention = [m for m in model.modules() if isinstance(m, nn.MultiheadAttention)]
    options = {"path": "network", "quadrature": 1, "ignore": attention, "progress": False}
    scores = singe.score(model, batches, **options)
    pruner = pruner_for(model, batches[0][0], adapter.importance(scores))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Torch-Pruning leaves the group")
        removed = adapter.step(pruner)
    total = sum(len(values) for values in scores.values())
    assert total >= NETWORKS[name]
    assert units_of(removed, scores) == lowest(scores, total - total // 2)
    assert model(batches[0][0]).shape == (2, 10)
    for group, units in units_of(removed, scores).items():
        before, layer = len(scores[group]), model.get_submodule(group)
        assert layer.weight.shape[0] % (before - len(units)) == 0


@pytest.mark.parametrize("name", ["fused", "wide", "apart"])
@pytest.mark.parametrize("everywhere", [True, False])
def test_heads_go_by_our_ranking(name, everywhere):
    """BasePruner removes the heads with the lowest scores, the same weights as singe.prune."""
    model, inputs, scores, options = heads_of(name)
    heads = {group: scores[group] for group in scores.meta["heads"]}
    own, other = Scores(heads, scores.groups, scores.meta, units=scores.units), clone(model)
    removed = adapter.step(
        pruner_for(model, inputs, adapter.importance(own), global_pruning=everywhere, **options)
    )
    total = sum(map(len, heads.values()))
    if everywhere:
        expected = lowest(own, total - total // 2)
    else:  # Torch-Pruning rounds up
        counts = {name: -(-len(v) // 2) for name, v in heads.items()}
        expected = {n: sorted(v.argsort()[: counts[n]].tolist()) for n, v in heads.items()}
    assert sum(map(len, removed.values())) == sum(
        len(units) * scores.units[group][group].bincount()[0] // (3 if name != "apart" else 1)
        for group, units in expected.items()
    )
    singe.prune(other, singe.Plan(expected), inputs)
    for (key, mine), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
        if ".attn." in key:
            assert torch.equal(mine, theirs), key


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("fused", {"num_heads": {}}, "give the pruner num_heads="),
        ("grouped", {}, "which Torch-Pruning cannot remove together"),
        ("torch", {"num_heads": {}}, "has no gate yet"),
    ],
)
def test_heads_that_torch_pruning_would_cut_to_pieces_are_left_alone(name, options, reason):
    model, inputs, scores, told = heads_of(name)
    layers = [layer for group in scores.meta["heads"] for layer in scores.groups[group]]
    rows = {
        key: len(value) for key, value in model.named_parameters()
        if key.startswith(tuple(layers)) and "out_proj" not in key
    }  # fmt: skip
    told = {**told, "pruning_ratio": 0.5, **options}
    with pytest.warns(UserWarning, match=reason):
        adapter.step(pruner_for(model, inputs, adapter.importance(scores), **told))
    assert rows
    assert {key: len(model.get_parameter(key)) for key in rows} == rows


def test_the_trained_resnet20_prunes_as_singe_prunes():
    """Physically the same network comes out as from our own ``singe.prune``."""
    model = trained_resnet20()
    batches = make_batches((3, 16, 16), (4,), classes=10)
    scores = singe.score(model, batches, path="network", progress=False)
    other = clone(model)
    with pytest.warns(UserWarning, match="leaves the group of 'conv1' alone"):
        removed = adapter.step(pruner_for(model, batches[0][0], adapter.importance(scores)))
    assert removed == lowest(scores, 168)
    singe.prune(other, singe.Plan(removed), batches[0][0])
    assert torch.allclose(model(batches[0][0]), other(batches[0][0]))


@pytest.mark.parametrize("name", ["grouped", "group_norm", "residual", "depthwise", "vgg"])
def test_local_pruning_takes_the_lowest_of_every_group(name):
    model, inputs, batches = case(name)
    scores = singe.score(model, batches, progress=False)
    pruner = pruner_for(model, inputs, adapter.importance(scores), global_pruning=False)
    removed = units_of(adapter.step(pruner), scores)
    for group, values in scores.items():
        count = len(values) - len(values) // 2
        assert removed[group] == sorted(values.argsort()[:count].tolist())


def test_blocks_keep_the_score_of_their_unit():
    """Torch-Pruning averages over the blocks of a grouped convolution: the unit's score comes out."""
    model, inputs, batches = case("grouped")
    scores = singe.score(model, batches, progress=False)
    importance = adapter.importance(scores)
    pruner = pruner_for(model, inputs, importance)
    for group in pruner.DG.get_all_groups(pruner.ignored_layers, pruner.root_module_types):
        root = pruner.DG._module2name[group[0].dep.target.module]
        blocks = pruner._get_channel_groups(group)
        found = importance(group).view(blocks, -1).mean(0)
        best = scores[root].argmax()
        others = torch.arange(len(found)) != best
        assert torch.allclose(found[others].float(), scores[root][others])


def test_a_part_of_a_group_gets_its_own_scores():
    model, inputs, batches = case("vgg")
    scores = singe.score(model, batches, progress=False)
    importance = adapter.importance(scores)
    graph = tp.DependencyGraph().build_dependency(model, inputs)
    full = importance(graph.get_pruning_group(model[0], tp.prune_conv_out_channels, range(4)))
    part = importance(graph.get_pruning_group(model[0], tp.prune_conv_out_channels, [3, 1]))
    assert torch.equal(part, full[[3, 1]])


def test_the_reading_layer_as_root():
    """With attention Torch-Pruning roots a group at what reads the heads."""
    model, inputs, batches = case("mlp")
    scores = singe.score(model, batches, progress=False)
    importance = adapter.importance(scores)
    graph = tp.DependencyGraph().build_dependency(model, inputs)
    group = graph.get_pruning_group(model[2], tp.prune_linear_in_channels, [5, 0, 7])
    assert torch.equal(importance(group), importance.table["0"][[5, 0, 7]])


def test_isomorphic_and_per_layer_ratios():
    model, inputs, batches = case("vgg")
    scores = singe.score(model, batches, progress=False)
    pruner = pruner_for(
        model, inputs, adapter.importance(scores), isomorphic=True,
        pruning_ratio=0.5, pruning_ratio_dict={model[4]: 0.2},
    )  # fmt: skip
    removed = adapter.step(pruner)
    assert removed["4"] == [int(scores["4"].argmin())]


def test_stale_scores_are_refused_between_steps():
    model, inputs, batches = case("vgg")
    scores = singe.score(model, batches, progress=False)
    pruner = pruner_for(model, inputs, adapter.importance(scores), iterative_steps=2)
    adapter.step(pruner)
    with pytest.raises(singe.ScoresError, match="rescore=lambda"):
        pruner.step()


@pytest.mark.parametrize("ratio", [1.0, 0.8])
def test_rescoring_between_steps(ratio):
    model, inputs, batches = case("vgg")
    calls = []

    def rescore(pruned: nn.Module) -> Scores:
        calls.append(pruned[0].out_channels)
        return singe.score(pruned, batches, progress=False)

    importance = adapter.importance(rescore(model), rescore=rescore, max_pruning_ratio=ratio)
    pruner = pruner_for(model, inputs, importance, iterative_steps=3, pruning_ratio=0.6)
    before = sum(len(v) for v in importance.scores.values())
    for _ in range(3):
        adapter.step(pruner)
    assert len(calls) == 3, "once at the start, once before each later step"
    left = sum(m.out_channels for m in model.modules() if isinstance(m, nn.Conv2d))
    left += model[-4].out_features
    assert left == int(before * 0.4)


def test_scores_of_another_model_are_refused():
    model, inputs, _ = case("vgg")
    other, _, batches = case("residual")
    importance = adapter.importance(singe.score(other, batches, progress=False))
    with pytest.raises(singe.ScoresError, match="another model"):
        pruner_for(model, inputs, importance).step()


def test_equal_scores_are_refused_and_ties_are_broken_by_position():
    model, inputs, _ = case("vgg")
    with pytest.raises(singe.ScoresError, match="they rank nothing"):
        adapter.importance(scores_of(model, {"0": torch.zeros(4), "4": torch.zeros(5)}))
    # Torch-Pruning alone would take all nine zeros: every one lies at the threshold.
    values = {"0": torch.zeros(4), "4": torch.tensor([0.0, 0, 0, 0, 0]), "10": torch.rand(6) + 1}
    scores = scores_of(model, values)
    pruner = pruner_for(model, inputs, adapter.importance(scores), pruning_ratio=0.4)
    assert adapter.step(pruner) == {"0": [0, 1, 2], "4": [0, 1, 2]}


def test_nothing_pruned_is_an_error():
    model, inputs, batches = case("vgg")
    scores = singe.score(model, batches, progress=False)
    pruner = pruner_for(model, inputs, adapter.importance(scores), pruning_ratio=0.0)
    with pytest.raises(singe.BudgetError, match="removed nothing"):
        adapter.step(pruner)


def test_nothing_pruned_says_what_helps():
    model, inputs, batches = case("vgg")
    scores = singe.score(model, batches, progress=False)
    for everywhere in (True, False):
        pruner = pruner_for(
            model, inputs, adapter.importance(scores), pruning_ratio=1.0, global_pruning=everywhere
        )
        with pytest.raises(singe.BudgetError, match=r"asks for every channel.*Lower pruning_ratio"):
            adapter.step(pruner)
    pruner = pruner_for(model, inputs, adapter.importance(scores))
    adapter.step(pruner)
    with (
        pytest.warns(UserWarning, match="exceed the maximum iterative steps"),
        pytest.raises(singe.BudgetError, match=r"step 1 of iterative_steps=1.*pruner\.reset"),
    ):
        adapter.step(pruner)


@pytest.mark.parametrize("build", [dict, lambda scores: "scores.safetensors", lambda scores: None])
def test_what_is_no_scores_is_refused(build):
    model, inputs, batches = case("vgg")
    scores = singe.score(model, batches, progress=False)
    with pytest.raises(singe.OptionError, match=r"^scores must be what singe\.score returned, got"):
        adapter.importance(build(scores))
    with pytest.raises(singe.OptionError, match="rescore must be a callable"):
        adapter.importance(scores, rescore=scores)
    importance = adapter.importance(scores, rescore=lambda model: build(scores))
    pruner = pruner_for(model, inputs, importance, iterative_steps=2)
    adapter.step(pruner)
    with pytest.raises(singe.OptionError, match=r"rescore returns must be what singe\.score"):
        adapter.step(pruner)


def test_the_scores_themselves_are_no_importance():
    model, inputs, batches = case("vgg")
    scores = singe.score(model, batches, progress=False)
    with pytest.raises(singe.OptionError, match=r"importance=singe.*\.importance\(scores\)"):
        adapter.step(pruner_for(model, inputs, scores))


def test_groups_without_scores():
    model, inputs, batches = case("vgg")
    scores = singe.score(model, batches, layers=["0"], progress=False)
    importance = adapter.importance(scores)
    with pytest.warns(UserWarning, match="leaves the group of '4' alone"):
        removed = adapter.step(pruner_for(model, inputs, importance))
    assert list(removed) == ["0"]
    assert "4" in importance.skipped
    model, inputs, _ = case("vgg")
    with pytest.raises(singe.ScoresError, match="has no scores"):
        pruner_for(model, inputs, adapter.importance(scores, missing="error")).step()


def test_old_forks():
    """Before 1.3: other arguments, items without root indices, groups that do not know their graph."""
    model, inputs, batches = case("vgg")
    scores = singe.score(model, batches, progress=False)
    graph = tp.DependencyGraph().build_dependency(model, inputs)
    group = graph.get_pruning_group(model[4], tp.prune_conv_out_channels, range(5))
    expected = adapter.importance(scores)(group)
    old = [OldItem((item.dep, item.idxs)) for item in group]
    with pytest.raises(singe.OptionError, match="does not know its model"):
        adapter.importance(scores)(old)
    found = adapter.importance(scores, model)(old, ch_groups=1, consecutive_groups=1)
    assert torch.equal(found, expected)


class OldItem(tuple):
    """(dependency, indices)."""


@pytest.mark.parametrize(
    "how", ["sum", "standarization", "mean", "max", "gaussian", "sentinel_0.5", "lamp", None]
)
def test_normalizers_are_torch_prunings(how):
    values = torch.rand(7, generator=torch.Generator().manual_seed(0))
    if how == "sentinel_0.5":  # Torch-Pruning's takes the element *numbered* by a rank: not copied
        expected = values / (values.sort().values[3] + 1e-8)
    else:
        peer = tp.importance.GroupMagnitudeImportance(normalizer=how)
        expected = peer._normalize(values.clone(), how)
    assert torch.allclose(normalized(values, how), expected)


@pytest.mark.parametrize("reduction", ["sum", "mean", "max", "prod", "first", "gate"])
def test_group_reductions(reduction):
    """Two scored groups that a pruner couples: here by a hand-made group over both."""
    model, inputs, _ = case("mlp")
    values = {"0": torch.arange(1.0, 9), "2": torch.arange(2.0, 9)}
    scores = scores_of(model, values)
    importance = adapter.importance(scores, group_reduction=reduction)
    graph = tp.DependencyGraph().build_dependency(model, inputs)
    first = graph.get_pruning_group(model[0], tp.prune_linear_out_channels, range(7))
    second = graph.get_pruning_group(model[2], tp.prune_linear_out_channels, range(7))
    first.add_dep(second[0].dep, second[0].idxs)
    first[len(first) - 1].root_idxs = list(range(7))
    a, b = importance.table["0"][:7], importance.table["2"]
    expected = {
        "sum": a + b, "mean": (a + b) / 2, "max": torch.maximum(a, b), "prod": a * b,
        "first": a, "gate": b,
    }[reduction]  # fmt: skip
    assert torch.allclose(importance(first), expected)


@pytest.mark.parametrize(
    "options",
    [
        {"group_reduction": "median"},
        {"group_reduction": None},
        {"missing": "ignore"},
        {"max_pruning_ratio": 0},
        {"round_to": 0},
    ],
)
def test_options_are_checked(options):
    with pytest.raises(singe.OptionError):
        adapter.importance(scores_of(case("vgg")[0], {"0": torch.rand(4)}), **options)


def test_the_adapter_knows_nothing_of_the_engine():
    for file in Path(adapter.__file__).parent.glob("*.py"):
        assert "singe.engine" not in file.read_text()
