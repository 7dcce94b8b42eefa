"""Attention heads as units, for every way of writing attention that is claimed to work.

All parameters are random, tables of relative positions included: with those at zero a test would not
see heads that change places.
"""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from helpers import (
    assert_close,
    assert_unchanged,
    batch_of,
    clone,
    make_batches,
    mean_loss,
    one_thread,  # noqa: F401 - autouse
    run_engine,
    snapshot,
)
from helpers_attention import (
    FAMILIES,
    TOKENS,
    WIDTH,
    Fused,
    Torchs,
    Unusual,
    UnusualSlim,
    encoder,
    in_blocks,
)
from helpers_heads import (
    EXACT,
    assert_a_plan_works,
    assert_engines_agree,
    assert_gates_are_removals,
    scored,
)
from torch import nn

import singe
from singe.attention import unregister_attention
from singe.cost import CostModel, count
from singe.network import Network, set_gates
from singe.removal import kept_elements, remove_units, take
from singe.units import find_groups


@pytest.mark.parametrize("name", FAMILIES)
def test_gating_a_head_is_removing_it(name):
    assert_gates_are_removals(FAMILIES[name])


@pytest.mark.parametrize("path", ["layer", "network", "neuron"])
@pytest.mark.parametrize("name", FAMILIES)
def test_fused_equals_the_definition(name, path):
    assert_engines_agree(FAMILIES[name], path=path, quadrature=2)


@pytest.mark.parametrize("criterion", ["ig", "signed", "taylor", "ablation"])
@pytest.mark.parametrize("name", ["fused", "grouped", "torch"])
def test_other_criteria(name, criterion):
    assert_engines_agree(FAMILIES[name], criterion=criterion, path="neuron")


@pytest.mark.parametrize("name", ["fused", "grouped", "torchvision_vit"])
def test_signed_is_the_damage_of_removal(name):
    """Invariant 2, against physical removal itself."""
    family = FAMILIES[name]
    model, batches = family.model(), family.batches()
    graph = find_groups(model, batch_of(batches[0]))
    signed = run_engine(model, batches, criterion="signed", path="neuron", quadrature=64,
                        layers=list(family.heads))  # fmt: skip
    full = mean_loss(model, batches)
    for group in (g for g in graph.groups if g.heads is not None):
        for unit in range(group.n_units):
            small = clone(model)
            remove_units(small, batch_of(batches[0]), [(group, [unit])])
            damage = mean_loss(small, batches) - full
            assert signed.scores[group.name][unit].item() == pytest.approx(damage, rel=1e-5)


def test_what_a_head_is_made_of():
    """``W_u`` is its value rows with their bias: magnitude says so."""
    family = FAMILIES["fused"]
    model = family.model()
    scores = singe.score(model, family.batches(), criterion="magnitude", progress=False)
    qkv = model.blocks[1].attn.qkv
    rows = torch.cat([qkv.weight, qkv.bias[:, None]], 1).detach().abs().sum(1)[24:]
    assert torch.allclose(scores["blocks.1.attn.qkv"], rows.view(3, 4).sum(1).float())


@pytest.mark.parametrize("name", ["fused", "torch", "torchvision_swin"])
def test_reduced_precision_keeps_the_scores(name):
    """bfloat16 has 8 bits: single scores move by up to a few of its roundings (4e-3)."""
    family = FAMILIES[name]
    batches = [(x.float(), y) for x, y in family.batches()]
    options = {"path": "network", "layers": list(family.heads), "progress": False}
    full = singe.score(family.model().float(), batches, **options)
    low = singe.score(family.model().float(), batches, autocast=torch.bfloat16, **options)
    assert_close(low, full, 2e-2)


# ---------------------------------------------------------------------- plans


@pytest.mark.parametrize("name", FAMILIES)
def test_a_plan_from_end_to_end(name, tmp_path):
    assert_a_plan_works(FAMILIES[name], tmp_path)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_cost_of_removal_is_foreseen(name):
    """Parameters exactly; MACs but for activations, as the count of the pruned network has them."""
    family = FAMILIES[name]
    model, batch = family.model(), batch_of(family.batches()[0])
    graph = find_groups(model, batch)
    cost = CostModel(model, graph, batch)
    groups = [group for group in graph.groups if group.heads is not None]
    small = clone(model)
    remove_units(small, batch, [(group, [0]) for group in groups])
    macs, params = count(small, batch)
    foreseen = cost({group.name: 1 for group in groups})
    assert foreseen["params"] == params
    assert foreseen["macs"] == pytest.approx(macs, rel=0.02)
    assert macs < cost({})["macs"]


@pytest.mark.parametrize("name", ["fused", "torch", "torchvision_swin"])
def test_a_failure_leaves_the_model_as_it_was(name, monkeypatch):
    model, x, scores = scored(FAMILIES[name])
    before, kinds = snapshot(model), [type(m) for m in model.modules()]
    expected = model(x)
    removed = singe.removal.remove_heads
    done: list[str] = []

    def fail(target: nn.Module, heads: Any, units: Any) -> None:
        removed(target, heads, units)
        done.append(heads.module)
        if target is model:
            raise KeyboardInterrupt

    monkeypatch.setattr("singe.removal.remove_heads", fail)
    with pytest.raises(KeyboardInterrupt):
        singe.prune(model, singe.Plan({group: [0] for group in scores.meta["heads"]}), x)
    assert done
    assert [type(m) for m in model.modules()] == kinds
    assert_unchanged(model, before, versions=False)
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("name", ["fused", "grouped", "transposed", "torch", "torchvision_swin_v2"])
def test_where_every_element_came_from(name):
    """What optimizer states follow: tables of heads and packed weights included."""
    family = FAMILIES[name]
    model, batch = family.model(), batch_of(family.batches()[0])
    graph = find_groups(model, batch)
    removals = [(group, [1]) for group in graph.groups]
    kept = kept_elements(model, batch, removals)
    before = {k: v.clone() for k, v in (*model.named_parameters(), *model.named_buffers())}
    remove_units(model, batch, removals)
    after = dict((*model.named_parameters(), *model.named_buffers()))
    assert kept.keys() == after.keys()
    for key, value in after.items():
        assert torch.equal(take(before[key], kept[key]), value), key


@pytest.mark.parametrize("name", ["torch", "torch_layer", "torchvision_vit", "torchvision_swin"])
def test_pruned_models_travel(name, tmp_path):
    """Copies, pickles, saved folders and torch's own inference kernels see the same network."""
    model, x, scores = scored(FAMILIES[name])
    fresh = clone(model)
    singe.prune(model, singe.Plan({group: [0] for group in scores.meta["heads"]}), x)
    expected = model(x)
    assert torch.equal(copy.deepcopy(model)(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), expected)
    with torch.inference_mode():
        assert torch.allclose(model(x), expected, rtol=1e-12)
    singe.save_pruned(model, tmp_path / "small")
    assert torch.equal(singe.load_pruned(fresh, tmp_path / "small")(x), expected)


@pytest.mark.parametrize("name", ["apart", "grouped", "torch", "torchvision_vit"])
def test_the_loop_down_to_one_head(name):
    """Rounds of scoring, pruning and fine-tuning; the plan of the whole run gives the same shapes."""
    family = FAMILIES[name]
    model, batches = family.model().float(), family.batches()
    batches = [(x.float(), y) for x, y in batches]
    original = clone(model)
    report = singe.compress(
        model, train=batches, calibrate=batches, evaluate=batches, channels=0.6, rounds=3,
        max_pruning_ratio=1.0, max_keep={group: 1 / units for group, units in family.heads.items()},
        finetune_steps=2, final_steps=2, path="network", progress=False,
    )  # fmt: skip
    left = {name: units - len(report.plan.get(name, ())) for name, units in family.heads.items()}
    assert set(left.values()) == {1}
    singe.prune(original, report.plan, batches[0][0])
    shapes = {key: value.shape for key, value in original.state_dict().items()}
    assert {key: value.shape for key, value in model.state_dict().items()} == shapes
    original.load_state_dict(model.state_dict())
    assert torch.equal(original.eval()(batches[0][0]), model.eval()(batches[0][0]))


# ---------------------------------------------------------------------- who is asked, who is refused


def test_layers_and_ignore_choose():
    family = FAMILIES["grouped"]
    model, batch = family.model(), batch_of(family.batches()[0])
    for layer in ("v_proj", "q_proj"):
        chosen = find_groups(model, batch, layers=[f"blocks.0.attn.{layer}"])
        assert [group.name for group in chosen.groups] == ["blocks.0.attn.v_proj"]
    left = find_groups(model, batch, ignore=["blocks.0.attn", "blocks.1.attn"])
    assert [group.name for group in left.groups] == ["blocks.0.up", "blocks.1.up"]
    assert "is in `ignore`" in left.rejected["blocks.0.attn.v_proj"]


def test_heads_that_read_the_width_of_the_input_are_left_out_until_they_are_taught():
    torch.manual_seed(0)
    model, batch = encoder(Unusual)().double().eval(), batch_of(make_batches(TOKENS, (3,))[0])
    assert not [g for g in find_groups(model, batch).groups if g.heads]
    described = {"proj": "out", "qkv": "everything", "heads": "parts", "sizes": ("parts",)}
    try:
        singe.register_attention(Unusual, **described, per_head={"scale": 1})
        assert (
            "removing some of its units fails"
            in (find_groups(model, batch).rejected["blocks.0.attn.everything"])
        )
        singe.register_attention(Unusual, **described, per_head={"scale": 1}, slim=UnusualSlim)
        graph = find_groups(model, batch)
        heads = [group for group in graph.groups if group.heads]
        assert [group.name for group in heads] == list(in_blocks("attn.everything", 3))
        small = clone(model)
        remove_units(small, batch, [(group, [1]) for group in heads])
        network = Network(model, graph.groups, graph.folds)
        set_gates(network, [(group, [1]) for group in heads], 0.0)
        assert torch.allclose(network(batch), batch.call(small), rtol=EXACT, atol=EXACT)
        again = find_groups(small, batch)
        assert [g.n_units for g in again.groups if g.heads] == [2, 2]
    finally:
        unregister_attention(Unusual)
    for forgotten in (model, small):
        assert not [g for g in find_groups(forgotten, batch).groups if g.heads]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"attention_type": 3, "proj": "p", "qkv": "x", "heads": "h"}, "subclass of nn.Module"),
        ({"attention_type": Unusual, "proj": "p", "heads": "h"}, "either qkv="),
        ({"attention_type": Unusual, "proj": "p", "query": "x", "heads": "h"}, "either qkv="),
        ({"attention_type": Unusual, "proj": "p", "qkv": "x"}, "either heads="),
        (
            {"attention_type": Unusual, "proj": "p", "qkv": "x", "heads": "h", "slim": Fused},
            "subclass of Unusual",
        ),
    ],
)
def test_descriptions_are_checked(arguments, message):
    with pytest.raises(singe.OptionError, match=message):
        singe.register_attention(**arguments)


def test_what_no_head_can_leave():
    class Biased(Torchs):
        def __init__(self) -> None:
            super().__init__(True)
            self.attention = nn.MultiheadAttention(WIDTH, 3, add_bias_kv=True, batch_first=True)

    torch.manual_seed(0)
    model, batch = encoder(Biased)().double().eval(), batch_of(make_batches(TOKENS, (3,))[0])
    assert "entries of their own" in find_groups(model, batch).rejected["blocks.0.attn.attention"]
    single = encoder(lambda: Fused(1, 12))().double().eval()
    assert "a single head" in find_groups(single, batch).rejected["blocks.0.attn.qkv"]
    patched = encoder(lambda: Torchs(True))().double().eval()
    attention = patched.blocks[0].attn.attention
    attention.forward = lambda *args, **options: type(attention).forward(
        attention, *args, **options
    )
    graph = find_groups(patched, batch)
    assert graph.rejected["blocks.0.attn.attention"] == "its forward was replaced"
    assert [g.name for g in graph.groups if g.heads] == ["blocks.1.attn.attention"]


def test_masks_close_heads():
    """torch.nn.utils.prune: the masked network computes what the pruned one does."""
    from singe.adapters import torch_prune

    for name in ("fused", "torch"):
        family = FAMILIES[name]
        model, batches = family.model(), family.batches()
        layers = [*family.heads, "blocks.0.up"]
        scores = singe.score(model, batches, layers=layers, progress=False)
        small, masked, x = clone(model), clone(model), batches[0][0]
        chosen = torch_prune.local_structured(masked, scores, x, amount=0.4)
        assert set(chosen) == set(layers)
        singe.prune(small, singe.Plan(chosen), x)
        assert torch.allclose(masked(x), small(x), rtol=EXACT, atol=EXACT)


def test_channels_know_their_head():
    from singe.adapters.channel_scores import channel_scores

    model, _, scores = scored(FAMILIES["grouped"])
    name = "blocks.0.attn.v_proj"
    low, high = scores[name]
    by_layer = channel_scores(scores, model)
    assert by_layer["blocks.0.attn.q_proj"].tolist() == [low] * 6 + [high] * 6
    assert by_layer["blocks.0.attn.k_proj"].tolist() == [low] * 2 + [high] * 2
    assert by_layer[name].tolist() == [low] * 2 + [high] * 2


def test_heads_that_leave_as_many_rows_as_one_part_had(tmp_path):
    """Two of three are gone: q, k and v have as many rows together as v had before."""
    family = FAMILIES["fused"]
    model, inputs = family.model(), family.batches()[0][0]
    scores = singe.score(model, family.batches(), progress=False)
    name = next(name for name in scores.meta["heads"] if len(scores[name]) == 3)
    plan = singe.Plan({name: [0, 1]}, {"fingerprint": scores.meta["fingerprint"]})
    rows = len(model.get_parameter(f"{name}.weight"))
    singe.prune(model, plan, inputs)
    assert len(model.get_parameter(f"{name}.weight")) == rows // 3
    singe.save_pruned(model, tmp_path, plan)
    loaded = singe.load_pruned(family.model(), tmp_path)
    assert torch.equal(loaded(inputs), model(inputs))
