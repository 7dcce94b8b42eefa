"""Torch-Pruning's own pruners under limits: no group loses more than max_pruning_ratio, or nothing goes."""

from __future__ import annotations

from collections import OrderedDict
from types import SimpleNamespace

import pytest
import torch
from helpers import (
    clone,
    one_thread,  # noqa: F401 - autouse
)
from helpers_torch_pruning import case, heads_of, pruner_for, scores_of, units_of
from torch import nn

import singe
from singe.adapters import fasterai
from singe.adapters import torch_pruning as adapter
from singe.scores import Scores


def test_a_group_far_below_the_others_loses_all_but_its_best_unit():
    """Torch-Pruning alone leaves such a group whole, without a word."""
    model, inputs, _ = case("vgg")
    values = {"0": torch.tensor([1e-6, 3e-6, 2e-6, 0.0]), "4": torch.rand(5) + 1}
    scores = scores_of(model, values | {"10": torch.rand(6) + 1})
    pruner = pruner_for(model, inputs, adapter.importance(scores), pruning_ratio=0.4)
    assert adapter.step(pruner)["0"] == [0, 2, 3]
    assert model[0].out_channels == 1


@pytest.mark.parametrize(
    ("options", "kept"), [({"max_pruning_ratio": 0.5}, 2), ({"round_to": 3}, 3), ({}, 1)]
)
def test_a_floor_for_every_group(options, kept):
    model, inputs, _ = case("vgg")
    values = {"0": torch.rand(4) * 1e-3, "4": torch.rand(5) + 1, "10": torch.rand(6) + 1}
    importance = adapter.importance(scores_of(model, values), **options)
    adapter.step(pruner_for(model, inputs, importance, pruning_ratio=0.4))
    assert model[0].out_channels == kept


def far_below(options=(), **ratios):
    """A network whose first group lies below the others, a pruner, and how to see that it is whole."""
    model, inputs, _ = case("vgg")
    values = {"0": torch.rand(4) * 1e-3, "4": torch.rand(5) + 1, "10": torch.rand(6) + 1}
    importance = adapter.importance(scores_of(model, values), **ratios)
    return model, pruner_for(model, inputs, importance, **dict(options))


@pytest.mark.parametrize("global_pruning", [True, False])
@pytest.mark.parametrize("pruning_ratio", [0.4, 0.7])
def test_max_pruning_ratio_holds_or_nothing_is_removed(global_pruning, pruning_ratio):
    """Torch-Pruning itself goes on with the protected units, and ignores the ranking within a layer."""
    options = {"global_pruning": global_pruning, "pruning_ratio": pruning_ratio}
    model, pruner = far_below(options, max_pruning_ratio=0.25)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    message = "max_pruning_ratio=0.25 allows 1; nothing was removed.*all scored units 0.200 may go"
    with pytest.raises(singe.BudgetError, match=message):
        adapter.step(pruner)
    after = model.state_dict()
    assert {key: value.shape for key, value in after.items()} == {
        key: value.shape for key, value in before.items()
    }
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert pruner.current_step == 0
    assert pruner.pruning_history() == []


@pytest.mark.parametrize("ratio", [0.25, 0.4, 0.5, 0.75, 0.9])
@pytest.mark.parametrize("global_pruning", [True, False])
@pytest.mark.parametrize("name", ["grouped", "group_norm", "residual", "depthwise", "vgg"])
def test_no_group_loses_more_than_max_pruning_ratio(name, global_pruning, ratio):
    model, inputs, batches = case(name)
    scores = singe.score(model, batches, progress=False)
    importance = adapter.importance(scores, max_pruning_ratio=ratio)
    pruner = pruner_for(model, inputs, importance, global_pruning=global_pruning, pruning_ratio=0.3)
    try:
        removed = units_of(adapter.step(pruner), scores)
    except singe.BudgetError:
        assert pruner.pruning_history() == []
        assert ratio < 0.6, "there was room for rounding up"
        return
    for group, units in removed.items():
        assert len(units) <= ratio * len(scores[group])


def test_the_floor_of_round_to_holds_without_the_pruners():
    _, pruner = far_below({"global_pruning": False, "pruning_ratio": 0.7}, round_to=3)
    with pytest.raises(singe.BudgetError, match=r"round_to=3 allows .*lower round_to"):
        adapter.step(pruner)


def test_max_pruning_ratio_needs_our_step():
    """Nothing tells an importance what Torch-Pruning will remove: no step that breaks it silently."""
    model, pruner = far_below({"pruning_ratio": 0.3}, max_pruning_ratio=0.75)
    with pytest.raises(singe.OptionError, match=r"call it in place of pruner\.step"):
        pruner.step()
    assert pruner.pruning_history() == []
    pruner.reset()
    assert adapter.step(pruner)
    assert model[0].out_channels == 1


@pytest.mark.parametrize("name", ["fused", "wide", "apart"])
@pytest.mark.parametrize("everywhere", [True, False])
def test_max_pruning_ratio_of_heads(name, everywhere):
    """A refused step leaves the pruner's numbers of heads; a step that may be taken counts as one."""
    model, inputs, scores, options = heads_of(name)
    heads = {group: scores[group] for group in scores.meta["heads"]}
    own = Scores(heads, scores.groups, scores.meta, units=scores.units)
    removed = {}
    for ratio in (0.2, 0.8):
        importance = adapter.importance(own, max_pruning_ratio=ratio)
        options = {**options, "num_heads": dict(options["num_heads"])}
        pruner = pruner_for(model, inputs, importance, global_pruning=everywhere, **options)
        before = dict(pruner.num_heads)
        if ratio == 0.2:
            with pytest.raises(singe.BudgetError, match="allows 0"):
                adapter.step(pruner)
            assert pruner.num_heads == before
            assert pruner.out_channel_groups.items() >= before.items()
        else:
            removed = adapter.step(pruner)
            assert pruner.num_heads != before
    assert removed


def test_the_look_ahead_changes_nothing():
    """Torch-Pruning moves what it knows of concatenated channels as it removes them."""
    model, inputs, batches = case("pre_activation")
    other = clone(model)
    scores = singe.score(model, batches, progress=False)
    free = adapter.importance(scores)
    held = adapter.importance(scores, max_pruning_ratio=0.95)
    removed = adapter.step(pruner_for(model, inputs, free))
    assert len(removed) > 1
    assert adapter.step(pruner_for(other, inputs, held)) == removed
    assert torch.equal(model(inputs), other(inputs))


def test_max_pruning_ratio_is_refused_for_fasterai():
    """It steps a pruner of its own, which asks a function around ours."""
    scores = scores_of(case("vgg")[0], {"0": torch.rand(4)})
    pruner = SimpleNamespace(pruner=SimpleNamespace(importance=None))
    with pytest.raises(singe.OptionError, match="max_pruning_ratio holds in"):
        fasterai.use(pruner, scores, max_pruning_ratio=0.5)
    assert pruner.pruner.importance is None


def test_round_to():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)
    )
    scores = scores_of(model, {"0": torch.rand(16), "2": torch.rand(16)})
    importance = adapter.importance(scores, round_to=8)
    adapter.step(pruner_for(model, torch.randn(2, 6), importance, round_to=8))
    assert {model[0].out_features, model[2].out_features} <= {8, 16}


def test_a_step_that_was_refused_can_be_tried_again():
    model, inputs, batches = case("vgg")
    importance = adapter.importance(singe.score(model, batches, progress=False))
    pruner = pruner_for(model, inputs, importance, iterative_steps=3)
    adapter.step(pruner)
    with pytest.raises(singe.ScoresError, match="rescore=lambda"):
        adapter.step(pruner)
    assert pruner.current_step == 1
    pruner.importance = adapter.importance(singe.score(model, batches, progress=False))
    adapter.step(pruner)
    assert pruner.current_step == 2


@pytest.mark.parametrize("name", ["upsample", "output_up"])
def test_a_group_that_is_left_alone_is_told_of_whatever_its_name(name):
    model = nn.Sequential(
        OrderedDict(
            [
                ("enc", nn.Conv2d(3, 6, 3)),
                ("relu", nn.ReLU()),
                ("mid", nn.Conv2d(6, 5, 3)),
                (name, nn.ConvTranspose2d(5, 4, 2)),
                ("head", nn.Conv2d(4, 2, 1)),
            ]
        )
    )
    x = torch.randn(2, 3, 8, 8)
    scores = singe.score(model, [x], objective="kl", progress=False)
    pruner = pruner_for(model, x, adapter.importance(scores), ignored_layers=[model.head])
    with pytest.warns(UserWarning, match=f"leaves the group of '{name}' alone"):
        adapter.step(pruner)


def test_a_forks_pruner_counts_no_heads():
    model, inputs, batches = case("vgg")
    pruner = pruner_for(
        model, inputs, adapter.importance(singe.score(model, batches, progress=False))
    )
    told = ("step", "pruning_history", "importance", "current_step", "iterative_steps")
    fork = SimpleNamespace(**{name: getattr(pruner, name) for name in told})
    assert adapter.step(fork)
