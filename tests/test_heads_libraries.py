"""Attention heads of timm and transformers: small models of every family, random weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import (
    CLASSES,
    batch_of,
    clone,
    make_batches,
    one_thread,  # noqa: F401 - autouse
)
from helpers_heads import (
    EXACT,
    Family,
    assert_a_plan_works,
    assert_engines_agree,
    assert_gates_are_removals,
    outputs_of,
)
from helpers_trained import torchvision_models
from torch import nn

import singe
from singe.conv1d import is_transposed
from singe.removal import kept_elements, remove_units, take
from singe.units import find_groups

TEXT = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 3, "vocab_size": 20}


def library(name: str) -> Any:
    if name == "timm":
        torchvision_models()  # timm needs it, and it may need help
    return pytest.importorskip(name, reason=f"{name} is not installed")


def tokens() -> list[Any]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 20, (3, 7), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    return [{"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([0, 1, 3])}]


def text() -> list[Any]:
    ids = tokens()[0]["input_ids"]
    return [{"input_ids": ids, "labels": ids.roll(-1, 1)}]


def pixels() -> list[Any]:
    return [{"pixel_values": x, "labels": y} for x, y in make_batches((3, 16, 16), (2,))]


def timm_vit() -> nn.Module:
    return library("timm").models.VisionTransformer(
        img_size=16, patch_size=8, embed_dim=12, depth=2, num_heads=3, mlp_ratio=1.0,
        num_classes=CLASSES, qk_norm=True,
    )  # fmt: skip


def timm_swin() -> nn.Module:
    return library("timm").models.SwinTransformer(
        img_size=16, patch_size=2, embed_dim=8, depths=(2, 1), num_heads=(2, 4), window_size=4,
        num_classes=CLASSES,
    )  # fmt: skip


def made(model: str, config: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        transformers = library("transformers")
        made = getattr(transformers, config)(**options)
        made.use_cache = False
        return getattr(transformers, model)(made)

    return build


def layers(pattern: str, heads: int) -> dict[str, int]:
    return {pattern.format(i): heads for i in range(2)}


FAMILIES = {
    "timm_vit": Family(timm_vit, (3, 16, 16), layers("blocks.{}.attn.qkv", 3)),
    "timm_swin": Family(
        timm_swin,
        (3, 16, 16),
        {**layers("layers.0.blocks.{}.attn.qkv", 2), "layers.1.blocks.0.attn.qkv": 4},
    ),
    "bert": Family(
        made("BertForSequenceClassification", "BertConfig", **TEXT, intermediate_size=10,
             num_labels=CLASSES),
        tokens,
        layers("bert.encoder.layer.{}.attention.self.value", 3),
    ),
    "distilbert": Family(
        made("DistilBertForSequenceClassification", "DistilBertConfig", dim=12, hidden_dim=10,
             n_layers=2, n_heads=3, vocab_size=20, num_labels=CLASSES),
        tokens,
        layers("distilbert.transformer.layer.{}.attention.v_lin", 3),
    ),
    "vit": Family(
        made("ViTForImageClassification", "ViTConfig", hidden_size=12, num_hidden_layers=2,
             num_attention_heads=3, intermediate_size=10, image_size=16, patch_size=8,
             num_labels=CLASSES),
        pixels,
        layers("vit.layers.{}.attention.v_proj", 3),
    ),
    "swin": Family(
        made("SwinForImageClassification", "SwinConfig", embed_dim=8, depths=[2, 1],
             num_heads=[2, 4], window_size=4, image_size=16, patch_size=2, num_labels=CLASSES),
        pixels,
        {
            **layers("swin.encoder.layers.0.blocks.{}.attention.v_proj", 2),
            "swin.encoder.layers.1.blocks.0.attention.v_proj": 4,
        },
    ),
    "llama": Family(
        made("LlamaForCausalLM", "LlamaConfig", **{**TEXT, "num_attention_heads": 6},
             num_key_value_heads=3, intermediate_size=10),
        text,
        layers("model.layers.{}.self_attn.v_proj", 3),
        1e-6,  # its norms
    ),
    "opt": Family(
        made("OPTForCausalLM", "OPTConfig", **TEXT, ffn_dim=10, word_embed_proj_dim=12,
             max_position_embeddings=16),
        text,
        layers("model.decoder.layers.{}.self_attn.v_proj", 3),
    ),
    "gpt2": Family(
        made("GPT2LMHeadModel", "GPT2Config", n_embd=12, n_layer=2, n_head=3, n_inner=10,
             vocab_size=20, n_positions=16, bos_token_id=1, eos_token_id=2),
        text,
        layers("transformer.h.{}.attn.c_attn", 3),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_gating_a_head_is_removing_it(name):
    assert_gates_are_removals(FAMILIES[name])


@pytest.mark.parametrize("path", ["layer", "network", "neuron"])
@pytest.mark.parametrize("name", FAMILIES)
def test_fused_equals_the_definition(name, path):
    assert_engines_agree(FAMILIES[name], path=path, quadrature=2)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_plan_from_end_to_end(name, tmp_path):
    model = assert_a_plan_works(FAMILIES[name], tmp_path)
    singe.save_pruned(model, tmp_path / "small")
    fresh = singe.load_pruned(FAMILIES[name].model(), tmp_path / "small")
    batch = FAMILIES[name].batches()[0]
    pairs = zip(outputs_of(fresh, batch), outputs_of(model, batch), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_gpt2s_matrices_stay_what_they_are():
    """Conv1D keeps its class, the layout of its weight and, where nothing was cut, its parameters."""
    family = FAMILIES["gpt2"]
    model, batch = family.model(), batch_of(family.batches()[0])
    graph = find_groups(model, batch)
    assert [g.name for g in graph.groups if not g.heads] == layers_named("mlp.c_fc")
    before = {k: v.clone() for k, v in model.named_parameters()}
    same = dict(model.named_parameters())
    kinds = [type(m) for m in model.modules()]
    removals = [(g, [0]) for g in graph.groups if ".h.0." in g.name]
    kept = kept_elements(model, batch, removals)
    remove_units(model, batch, removals)
    assert [type(m) for m in model.modules()] == kinds
    assert sum(map(is_transposed, model.modules())) == 8
    assert model.transformer.h[0].attn.c_attn.weight.shape == (12, 24)
    assert model.transformer.h[0].mlp.c_fc.weight.shape == (12, 9)
    for name, parameter in model.named_parameters():
        assert torch.equal(take(before[name], kept[name]), parameter), name
        assert (parameter is same[name]) == (parameter.shape == before[name].shape), name


def layers_named(leaf: str) -> list[str]:
    return [f"transformer.h.{i}.{leaf}" for i in range(2)]


def test_masks_close_gpt2s_heads():
    from singe.adapters import torch_prune

    family = FAMILIES["gpt2"]
    model, batches = family.model(), family.batches()
    scores = singe.score(model, batches, progress=False)
    small, masked = clone(model), clone(model)
    chosen = torch_prune.local_structured(masked, scores, family.example(), amount=0.4)
    assert set(chosen) == set(scores)
    singe.prune(small, singe.Plan(chosen), family.example())
    pairs = zip(outputs_of(masked, batches[0]), outputs_of(small, batches[0]), strict=True)
    assert all(torch.allclose(a, b, rtol=EXACT, atol=EXACT) for a, b in pairs)
