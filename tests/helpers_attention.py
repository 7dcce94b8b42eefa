"""Small models with attention, written in every way that is claimed to work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from helpers import CLASSES
from helpers_heads import Family
from helpers_trained import torchvision_models
from torch import Tensor, nn

WIDTH = 12


class Fused(nn.Module):
    """timm's way: one layer for q, k and v."""

    def __init__(self, heads: int = 3, size: int = 4) -> None:
        super().__init__()
        self.num_heads, self.head_dim = heads, size
        self.qkv = nn.Linear(WIDTH, 3 * heads * size)
        self.proj = nn.Linear(heads * size, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        split = (3, self.num_heads, self.head_dim)
        q, k, v = self.qkv(x).unflatten(-1, split).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class GroupedQueries(nn.Module):
    """Llama's way: three query heads for every key/value head; sizes from the widths."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.head_dim, self.num_key_value_groups = 2, 3
        self.q_proj = nn.Linear(WIDTH, 12, bias=bias)
        self.k_proj = nn.Linear(WIDTH, 4, bias=bias)
        self.v_proj = nn.Linear(WIDTH, 4, bias=bias)
        self.o_proj = nn.Linear(12, WIDTH, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        k, v = (t.repeat_interleave(self.num_key_value_groups, 1) for t in (k, v))
        attention = (q @ k.transpose(-2, -1) * self.head_dim**-0.5).softmax(-1)
        return self.o_proj((attention @ v).transpose(1, 2).flatten(2))


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_attention_heads, self.attention_head_size, self.all_head_size = 4, 3, 12
        self.query, self.key = nn.Linear(WIDTH, 12), nn.Linear(WIDTH, 12)
        self.value = nn.Linear(WIDTH, 12)

    def forward(self, x: Tensor) -> Tensor:
        shape = (self.num_attention_heads, self.attention_head_size)
        q, k, v = (
            layer(x).unflatten(-1, shape).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return out.reshape(*x.shape[:2], self.all_head_size)


class Outer(nn.Module):
    """BERT's way: the projection lies in another module."""

    def __init__(self) -> None:
        super().__init__()
        self.self, self.output = Inner(), nn.Module()
        self.output.dense = nn.Linear(12, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.output.dense(self.self(x))


class Conv1D(nn.Module):
    """transformers' linear layer with weight [C_in, C_out], for where transformers is not installed."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight, self.bias = nn.Parameter(torch.rand(nx, nf)), nn.Parameter(torch.rand(nf))

    def forward(self, x: Tensor) -> Tensor:
        out = torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight)
        return out.view(*x.shape[:-1], self.nf)


Conv1D.__module__ = "transformers.pytorch_utils"


class Transposed(nn.Module):
    """GPT-2's way, with such layers, and the split by a number of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.split_size = 3, 4, 12
        self.c_attn, self.c_proj = Conv1D(36, WIDTH), Conv1D(WIDTH, 12)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            t.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for t in self.c_attn(x).split(self.split_size, 2)
        )
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(out.transpose(1, 2).flatten(2))


class Torchs(nn.Module):
    def __init__(self, batch_first: bool, bias: bool = True) -> None:
        super().__init__()
        options = {"batch_first": batch_first, "bias": bias}
        self.attention = nn.MultiheadAttention(WIDTH, 3, **options)

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.attention.batch_first else x.transpose(0, 1)
        mask = torch.ones(len(x) if not self.attention.batch_first else x.shape[1], 1).bool()
        causal = ~mask.expand(-1, len(mask)).tril()
        out, weights = self.attention(x, x, x, attn_mask=causal)
        assert weights is not None
        return out if self.attention.batch_first else out.transpose(0, 1)


class Crossed(nn.Module):
    """Keys and values from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 3, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x[:, :2] * 2, x[:, :2].tanh(), need_weights=False)[0]


class Unusual(nn.Module):
    """Written like nobody else's, with a scale for every head, and the width of all heads by name."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = 3
        self.everything = nn.Linear(WIDTH, 36, bias=False)
        self.out = nn.Linear(12, WIDTH)
        self.scale = nn.Parameter(torch.rand(1, 3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.everything(x).unflatten(-1, (3, self.parts, -1)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q * self.scale, k, v).transpose(1, 2)
        return self.out(out.reshape(x.shape))  # no other width but that of the input


class UnusualSlim(Unusual):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.everything(x).unflatten(-1, (3, self.parts, -1)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q * self.scale, k, v).transpose(1, 2)
        return self.out(out.flatten(2))


class Block(nn.Module):
    """Attention and a feed-forward layer, each with its norm and a way around it."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(WIDTH), attention
        self.norm2, self.up = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 6)
        self.down = nn.Linear(6, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Encoder(nn.Module):
    """Blocks over [B, N, 5] tokens."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.embed, self.blocks = nn.Linear(5, WIDTH), nn.Sequential(*blocks)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.embed(x)).mean(1))


def encoder(attention: Callable[[], nn.Module], blocks: int = 2) -> Callable[[], nn.Module]:
    return lambda: Encoder(*(Block(attention()) for _ in range(blocks)))


def torchs_layers(**options: Any) -> Callable[[], nn.Module]:
    layer = {"dim_feedforward": 6, "dropout": 0.0, "batch_first": True, **options}
    return lambda: Encoder(*(nn.TransformerEncoderLayer(WIDTH, 3, **layer) for _ in range(2)))


def vision_transformer() -> nn.Module:
    options = {"image_size": 16, "patch_size": 8, "num_layers": 2, "num_heads": 3}
    return torchvision_models().VisionTransformer(
        **options, hidden_dim=12, mlp_dim=10, num_classes=CLASSES
    )


def swin(version: str) -> nn.Module:
    models = torchvision_models().swin_transformer
    options: dict[str, Any] = {"patch_size": [2, 2], "embed_dim": 8, "num_classes": CLASSES}
    if version == "2":
        options |= {
            "block": models.SwinTransformerBlockV2,
            "downsample_layer": models.PatchMergingV2,
        }
    return models.SwinTransformer(
        **options, depths=[2, 1], num_heads=[2, 4], window_size=[4, 4], stochastic_depth_prob=0.0
    )


def in_blocks(name: str, heads: int) -> dict[str, int]:
    return {f"blocks.{i}.{name}": heads for i in range(2)}


TOKENS = (4, 5)
FAMILIES = {
    "fused": Family(encoder(Fused), TOKENS, in_blocks("attn.qkv", 3)),
    "wide": Family(encoder(lambda: Fused(2, 5)), TOKENS, in_blocks("attn.qkv", 2)),
    "grouped": Family(encoder(GroupedQueries), TOKENS, in_blocks("attn.v_proj", 2)),
    "no_bias": Family(encoder(lambda: GroupedQueries(False)), TOKENS, in_blocks("attn.v_proj", 2)),
    "apart": Family(encoder(Outer), TOKENS, in_blocks("attn.self.value", 4)),
    "transposed": Family(encoder(Transposed), TOKENS, in_blocks("attn.c_attn", 3)),
    "torch": Family(encoder(lambda: Torchs(True)), TOKENS, in_blocks("attn.attention", 3)),
    "sequence_first": Family(
        encoder(lambda: Torchs(False, False)), TOKENS, in_blocks("attn.attention", 3)
    ),
    "crossed": Family(encoder(Crossed), TOKENS, in_blocks("attn.attention", 3)),
    "torch_layer": Family(torchs_layers(), TOKENS, in_blocks("self_attn", 3)),
    "norm_first": Family(
        torchs_layers(norm_first=True, activation="gelu"), TOKENS, in_blocks("self_attn", 3)
    ),
    "torchvision_vit": Family(
        vision_transformer,
        (3, 16, 16),
        {f"encoder.layers.encoder_layer_{i}.self_attention": 3 for i in range(2)},
    ),
    "torchvision_swin": Family(
        lambda: swin("1"),
        (3, 16, 16),
        {"features.1.0.attn.qkv": 2, "features.1.1.attn.qkv": 2, "features.3.0.attn.qkv": 4},
    ),
    "torchvision_swin_v2": Family(
        lambda: swin("2"),
        (3, 16, 16),
        {"features.1.0.attn.qkv": 2, "features.1.1.attn.qkv": 2, "features.3.0.attn.qkv": 4},
    ),
}
