"""Weight scores inside torch's own pruners: exactly the weights our ranking names are masked."""

from __future__ import annotations

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
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)

import singe
from singe.adapters import torch_ao, torch_prune, torch_pruning, weight_tables


def score(model, batches, **options):
    return singe.score(model, batches, granularity="weight", progress=False, **options)


@pytest.fixture(scope="module")
def resnet20():
    model = trained_resnet20().float()
    batches = make_batches((3, 16, 16), (4,), dtype=torch.float32, classes=10)
    return model, score(model, batches, path="network", quadrature=2)


@pytest.fixture(scope="module")
def mobilenet():
    """Depthwise convolutions, a classifier, and channels without any relation to 4."""
    torch.manual_seed(0)
    model = torchvision_models().mobilenet_v2(weights=None, num_classes=10).eval()
    batches = make_batches((3, 32, 32), (2,), dtype=torch.float32, classes=10)
    return model, score(model, batches, criterion="taylor")


NETWORKS = ["resnet20", "mobilenet"]


def masks_of(model):
    return {
        name: layer.weight_mask
        for name, layer in model.named_modules()
        if hasattr(layer, "weight_mask")
    }


def assert_lowest(mask, table, count):
    """``count`` entries are masked, and no score that stays lies below one that goes."""
    gone = table[mask == 0]
    assert len(gone) == count
    assert float(gone.max()) <= float(table[mask != 0].min())


# ---------------------------------------------------------------------- torch.nn.utils.prune


@pytest.mark.parametrize("network", NETWORKS)
def test_global_unstructured(network, request):
    model, scores = request.getfixturevalue(network)
    masked = clone(model)
    importance = torch_prune.weight_importance(scores, masked)
    prune.global_unstructured(list(importance), prune.L1Unstructured, importance, amount=0.7)
    masks = masks_of(masked)
    assert {f"{name}.weight" for name in masks} == set(scores)
    every = torch.cat([masks[name.removesuffix(".weight")].flatten() for name in scores])
    table = torch.cat([values.flatten() for values in scores.values()])
    assert_lowest(every, table, round(0.7 * len(table)))
    before, after = dict(model.named_parameters()), dict(masked.named_modules())
    for name, mask in masks.items():
        assert torch.equal(after[name].weight, before[f"{name}.weight"] * mask)


def test_a_second_call_masks_more_of_the_same_ranking(resnet20):
    model, scores = resnet20
    masked = clone(model)
    convs = {
        key: values
        for key, values in torch_prune.weight_importance(scores, masked).items()
        if isinstance(key[0], nn.Conv2d)
    }
    total = sum(values.numel() for values in convs.values())
    for amount in (1000, 500):
        prune.global_unstructured(list(convs), prune.L1Unstructured, convs, amount=amount)
        convs = {  # masked layers are found again
            key: values
            for key, values in torch_prune.weight_importance(scores, masked).items()
            if key in convs
        }
    masks = torch.cat([layer.weight_mask.flatten() for layer, _ in convs])
    assert len(masks) == total
    assert_lowest(masks, torch.cat([v.flatten() for v in convs.values()]), 1500)
    assert not hasattr(masked.linear, "weight_mask"), "an entry that was dropped is spared"


@pytest.mark.parametrize("network", NETWORKS)
def test_l1_unstructured_layer_by_layer(network, request):
    model, scores = request.getfixturevalue(network)
    masked = clone(model)
    for (layer, name), values in torch_prune.weight_importance(scores, masked).items():
        prune.l1_unstructured(layer, name, amount=0.5, importance_scores=values)
        assert_lowest(layer.weight_mask, values, round(0.5 * values.numel()))


def test_magnitude_is_the_librarys_own_ranking(mobilenet):
    model, _ = mobilenet
    ours, theirs = clone(model), clone(model)
    batches = make_batches((3, 32, 32), (2,), dtype=torch.float32, classes=10)
    scores = score(model, batches, criterion="magnitude")
    importance = torch_prune.weight_importance(scores, ours)
    prune.global_unstructured(list(importance), prune.L1Unstructured, importance, amount=0.6)
    parameters = [(theirs.get_submodule(name.removesuffix(".weight")), "weight") for name in scores]
    prune.global_unstructured(parameters, prune.L1Unstructured, amount=0.6)
    expected = masks_of(theirs)
    assert all(torch.equal(mask, expected[name]) for name, mask in masks_of(ours).items())


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8)])
@pytest.mark.parametrize("network", NETWORKS)
def test_n_of_m(network, n, m, request):
    model, scores = request.getfixturevalue(network)
    masked = clone(model)
    layers = torch_prune.n_of_m(masked, scores, n, m)
    masks = masks_of(masked)
    assert set(layers) == set(masks)
    assert layers == [
        name.removesuffix(".weight") for name, t in scores.items() if t.shape[1] % m == 0
    ]
    assert 0 < len(layers) < len(scores), "stems and depthwise layers are left whole"
    for name, mask in masks.items():
        table = scores[f"{name}.weight"]
        for start in range(0, table.shape[1], m):
            block, kept = table[:, start : start + m], mask[:, start : start + m]
            assert bool((kept.sum(1) == n).all())
            lowest_kept = block.where(kept == 1, torch.inf).amin(1)
            highest_gone = block.where(kept == 0, -torch.inf).amax(1)
            assert bool((highest_gone <= lowest_kept).all())


def test_blocks_lie_along_the_inputs_at_every_position_of_a_kernel():
    table = torch.rand(4, 8, 3, 2, generator=torch.Generator().manual_seed(0))
    blocks = table.unflatten(1, (2, 4))
    kept = weight_tables.n_of_m_mask(table, 2, 4).unflatten(1, (2, 4)) == 1
    assert bool((kept.sum(2) == 2).all())
    lowest_kept, highest_gone = blocks.where(kept, 2).amin(2), blocks.where(~kept, -1).amax(2)
    assert bool((highest_gone < lowest_kept).all())


def test_transposed_convolutions_are_masked_but_not_cut_into_blocks():
    model = nn.Sequential(
        nn.Conv2d(4, 8, 1), nn.Tanh(), nn.ConvTranspose2d(8, 4, 2), nn.Flatten(), nn.Linear(64, 4)
    ).double()
    scores = score(model, make_batches((4, 3, 3), (2,)))
    assert torch_prune.n_of_m(clone(model), scores) == ["0", "4"]
    layers = torch_ao.weight_config(scores, model, (1, 4))
    assert [layer["tensor_fqn"] for layer in layers] == ["0.weight", "4.weight"]
    importance = torch_prune.weight_importance(scores, model)
    prune.l1_unstructured(model[2], "weight", 0.5, importance[model[2], "weight"])
    assert_lowest(model[2].weight_mask, scores["2.weight"], 64)


def test_of_equal_scores_the_earlier_inputs_stay():
    mask = weight_tables.n_of_m_mask(torch.zeros(1, 4))
    assert mask.tolist() == [[1, 1, 0, 0]]


def test_torchs_own_2_of_4_compression_takes_the_masked_weights(resnet20):
    """Half the values and two bits each for their places: nothing is lost, of the dense weight much is."""
    model, scores = resnet20
    masked = clone(model)
    torch_prune.n_of_m(masked, scores)
    for source, is_kept in ((masked, True), (model, False)):
        weight = source.layer3[1].conv1.weight.detach()
        rows = weight.movedim(1, -1).flatten(1).half()  # [C_out, k * C_in], as in channels-last
        values, places = sparse_semi_structured_from_dense_cutlass(rows)
        assert values.shape == (64, 9 * 64 // 2)
        again = sparse_semi_structured_to_dense_cutlass(values, places)
        assert torch.equal(again, rows) is is_kept


# ---------------------------------------------------------------------- torch.ao.pruning


@pytest.mark.parametrize("network", NETWORKS)
def test_the_sparsifier_makes_2_of_4(network, request):
    model, scores = request.getfixturevalue(network)
    sparse, expected = clone(model), clone(model)
    sparsifier = torch_ao.weight_sparsifier(scores, sparse, 1.0, (1, 4), zeros_per_block=2)
    layers = torch_ao.weight_config(scores, sparse, (1, 4))
    sparsifier.prepare(sparse, layers)
    sparsifier.step()
    names = torch_prune.n_of_m(expected, scores, 2, 4)
    assert [layer["tensor_fqn"] for layer in layers] == [f"{name}.weight" for name in names]
    sparsifier.squash_mask()
    for name in names:
        found, wanted = sparse.get_submodule(name).weight, expected.get_submodule(name).weight
        assert torch.equal(found, wanted), name
    x = make_batches((3, 32, 32), (2,), dtype=torch.float32)[0][0]
    assert relative_error(sparse(x), expected(x)) < 1e-6


@pytest.mark.parametrize(("level", "shape", "zeros"), [(0.5, (1, 1), None), (0.25, (2, 4), None)])
def test_the_sparsifier_masks_the_lowest_blocks(resnet20, level, shape, zeros):
    model, scores = resnet20
    sparse = clone(model)
    sparsifier = torch_ao.weight_sparsifier(scores, sparse, level, shape, zeros)
    sparsifier.prepare(sparse, torch_ao.weight_config(scores, sparse, shape))
    sparsifier.step()
    assert len(sparsifier.groups) > 15
    for group in sparsifier.groups:
        mask = group["module"].parametrizations.weight[0].mask
        table = scores[group["tensor_fqn"]]
        assert mask.shape == table.shape
        rows = [weight_tables.by_inputs(t.float()) for t in (mask, table)]
        kept, means = (torch.nn.functional.avg_pool2d(t[None], shape)[0] for t in rows)
        assert set(kept.unique().tolist()) == {0.0, 1.0}, "whole blocks"
        assert_lowest(kept, means, round(level * means.numel()))


def test_a_layer_can_have_its_own_level(resnet20):
    model, scores = resnet20
    sparse = clone(model)
    sparsifier = torch_ao.weight_sparsifier(scores, sparse)
    layers = torch_ao.weight_config(scores, sparse)
    layers[0]["sparsity_level"], layers[1]["sparsity_level"] = 0.0, 1.0
    sparsifier.prepare(sparse, layers)
    sparsifier.step()
    first, second, third = (group["module"].parametrizations.weight[0].mask
                            for group in sparsifier.groups[:3])  # fmt: skip
    assert bool((first == 1).all())
    assert bool((second == 0).all())
    assert float(third.float().mean()) == pytest.approx(0.5, abs=1e-3)


# ---------------------------------------------------------------------- what is refused


def test_scores_that_do_not_fit():
    model, batches = CASES["vgg"].model(), CASES["vgg"].batches()
    weights = score(model, batches, criterion="magnitude")
    units = singe.score(model, batches, criterion="magnitude", progress=False)
    for call in (torch_prune.weight_importance, torch_ao.weight_config, torch_ao.weight_sparsifier):
        with pytest.raises(singe.ScoresError, match="granularity='weight'"):
            call(units, model)
        with pytest.raises(singe.ScoresError, match=r"has scores of shape.*another model"):
            call(weights, CASES["mlp"].model())
    inputs = batches[0][0]
    for call in (
        lambda: singe.plan(model, weights, inputs, macs=0.5),
        lambda: torch_prune.global_structured(model, weights, inputs, amount=0.3),
        lambda: torch_prune.local_structured(model, weights, inputs, amount=0.3),
        lambda: torch_ao.sparsifier(weights, model),
        lambda: torch_pruning.importance(weights),
    ):
        with pytest.raises(singe.ScoresError, match="granularity='unit'"):
            call()
    with pytest.raises(singe.OptionError, match="4 of 4"):
        torch_prune.n_of_m(model, weights, 4, 4)
    with pytest.raises(singe.OptionError, match="3 inputs cannot be cut"):
        weight_tables.n_of_m_mask(weights["0.weight"])
    assert not masks_of(model)
    sparsifier = torch_ao.weight_sparsifier(score(model, batches, layers=["0"]), model)
    sparsifier.prepare(model, [{"tensor_fqn": "4.weight"}])
    with pytest.raises(singe.ModelError, match="'4' has no scores"):
        sparsifier.step()
