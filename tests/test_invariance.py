"""Invariants 4 to 7: what must not change the scores.

All in float64. The scores differ only by the order of their sums, so 1e-9 would do; 1e-6 is what is
promised for batches.
"""

from __future__ import annotations

import pytest
import torch
from helpers import (
    assert_close,
    clone,
    one_thread,  # noqa: F401 - autouse
    run_engine,
)
from helpers_networks import CASES, Case, Head, residual
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

import singe

DATA_CRITERIA = ("singe", "ig", "signed", "taylor", "gradient", "ablation")


# ---------------------------------------------------------------------- 4: batches


@pytest.mark.parametrize("norm", ["inside", "outside"])
@pytest.mark.parametrize("criterion", DATA_CRITERIA)
@pytest.mark.parametrize("engine", ["fused", "naive"])
def test_batch_size_does_not_matter(engine, criterion, norm):
    """The norm is of the gradient of the dataset's mean: batches of 1, of 7 (the last smaller), all."""
    case = CASES["sigmoid"]
    model, count = case.model(), 15
    cuts = [[1] * count, [7, 7, 1], [count]]
    found = [
        run_engine(model, case.batches(cut), engine=engine, criterion=criterion, norm=norm).scores
        for cut in cuts
    ]
    assert_close(found[0], found[2], 1e-6)
    assert_close(found[1], found[2], 1e-6)


def test_batch_size_does_not_matter_for_a_mean_objective():
    """A user's scalar mean is weighted with the batch's size."""
    case = CASES["residual"]
    model = case.model()

    def mean_square(outputs, batch):
        return outputs.square().mean()

    found = [
        run_engine(model, case.batches(cut), objective=mean_square).scores for cut in ([9], [7, 2])
    ]
    assert_close(found[1], found[0], 1e-9)


# ---------------------------------------------------------------------- 5: order


@pytest.mark.parametrize("criterion", [*DATA_CRITERIA])
def test_permuting_channels_permutes_scores(criterion):
    case = CASES["residual"]
    model, batches = case.model(), case.batches()
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    permuted = clone(model)
    conv1, norm, _, conv2, _ = permuted[3].body
    with torch.no_grad():
        conv1.weight.copy_(conv1.weight[order])
        for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            tensor.copy_(tensor[order])
        conv2.weight.copy_(conv2.weight[:, order])
    before = run_engine(model, batches, criterion=criterion).scores
    after = run_engine(permuted, batches, criterion=criterion).scores
    expected = {**before, "3.body.0": before["3.body.0"][order]}
    assert_close(after, expected, 1e-9)
    assert not torch.allclose(before["3.body.0"], after["3.body.0"]), "all units alike: no test"


@pytest.mark.parametrize("criterion", DATA_CRITERIA)
def test_shuffling_the_data_changes_nothing(criterion):
    case = CASES["residual"]
    model, ((x, y),) = case.model(), case.batches((9,))
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    straight = [(x[:4], y[:4]), (x[4:], y[4:])]
    shuffled = [(x[order][:4], y[order][:4]), (x[order][4:], y[order][4:])]
    before = run_engine(model, straight, criterion=criterion).scores
    assert_close(run_engine(model, shuffled, criterion=criterion).scores, before, 1e-9)


# ---------------------------------------------------------------------- 6: rescaling


@settings(max_examples=10)
@given(
    factors=st.lists(st.floats(0.1, 10.0), min_size=8, max_size=8),
    path=st.sampled_from(["layer", "neuron", "network"]),
    p=st.sampled_from([1, 2, "sum", "fisher"]),
)
def test_rescaling_a_relu_network_changes_nothing(factors, path, p):
    """Rows times c, the consumer's columns over c: the same function, so the same scores."""
    case = CASES["mlp"]
    model, batches = case.model(), case.batches()
    scaled = clone(model)
    c = torch.tensor(factors, dtype=torch.float64)
    with torch.no_grad():
        scaled[0].weight.mul_(c[:, None])
        scaled[0].bias.mul_(c)
        scaled[2].weight.div_(c)
    for criterion in ("singe", "signed", "taylor", "ablation"):
        options = {"criterion": criterion, "path": path, "p": p}
        before = run_engine(model, batches, **options).scores
        assert_close(run_engine(scaled, batches, **options).scores, before, 1e-9)


def test_rescaling_changes_magnitude():
    case = CASES["mlp"]
    model, batches = case.model(), case.batches()
    scaled = clone(model)
    with torch.no_grad():
        scaled[0].weight.mul_(3)
        scaled[0].bias.mul_(3)
        scaled[2].weight.div_(3)
    before = singe.score(model, batches, criterion="magnitude", progress=False)
    after = singe.score(scaled, batches, criterion="magnitude", progress=False)
    assert torch.allclose(after["0"], 3 * before["0"])
    assert not torch.allclose(after["2"], before["2"])


# ---------------------------------------------------------------------- 7: folding


def by_layers(model, batches, **options):
    """Scores by the set of layers: which of them names the group is Torch-Pruning's choice."""
    scores = singe.score(model, batches, progress=False, **options)
    return {frozenset(scores.groups[name]): values for name, values in sorted(scores.items())}


@pytest.mark.parametrize("path", ["layer", "neuron", "network"])
@pytest.mark.parametrize("criterion", [*DATA_CRITERIA, "magnitude"])
def test_folding_the_norm_changes_nothing(criterion, path):
    model, batches = CASES["residual"].model(), CASES["residual"].batches()
    folded = clone(model)
    folded[0], folded[1] = fuse_conv_bn_eval(folded[0], folded[1]), nn.Identity()
    body = folded[3].body
    body[0], body[1] = fuse_conv_bn_eval(body[0], body[1]), nn.Identity()
    body[3], body[4] = fuse_conv_bn_eval(body[3], body[4]), nn.Identity()
    options = {"criterion": criterion, "path": path}
    before = by_layers(model, batches, **options)
    after = by_layers(folded, batches, **options)
    assert before.keys() == after.keys() == {frozenset(["0", "3.body.3"]), frozenset(["3.body.0"])}
    assert_close({name: after[name] for name in before}, before, 1e-6)  # scores are float32


def test_folding_a_linear_layers_norm_changes_nothing():
    case = CASES["vgg"]
    model, batches = case.model(), case.batches()
    folded = clone(model)
    assert isinstance(folded[9], nn.Linear)
    folded[9], folded[10] = fuse_linear_bn_eval(folded[9], folded[10]), nn.Identity()
    before = run_engine(model, batches).scores
    assert_close(run_engine(folded, batches).scores, before, 1e-9)


@pytest.mark.parametrize("training", [True, False])
def test_the_models_mode_does_not_matter(training):
    """Scores are of the network in evaluation mode, whatever mode it came in."""
    case = Case(lambda: nn.Sequential(*residual()[:4], nn.Dropout(0.5), Head(5)), (3, 6, 6))
    model, batches = case.model(), case.batches()
    before = run_engine(model.eval(), batches).scores
    assert_close(run_engine(model.train(training), batches).scores, before, 0.0)
    assert model.training is training
