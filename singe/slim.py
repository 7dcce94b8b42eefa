"""Attention that works with any number of heads, for modules whose own code does not.

``nn.MultiheadAttention`` and torchvision's Swin take the width of their input for that of all heads,
and read their weights without calling the layers that hold them, where a gate would sit. A slim class
is a subclass with the same parameters under the same names; a module takes it on by :func:`take_slim`.
"""

from __future__ import annotations

import importlib
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import skip_init

from singe.attention import REGISTRY

TORCHVISION = "torchvision.models.swin_transformer"


class SlimMultiheadAttention(nn.MultiheadAttention):
    """``nn.MultiheadAttention`` with ``num_heads * head_dim`` unlike ``embed_dim``.

    Arguments, layouts and masks are those of torch's class. ``in_proj_weight`` is
    [3 * num_heads * head_dim, embed_dim] and ``out_proj.weight`` [embed_dim, num_heads * head_dim].
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        if is_causal and attn_mask is None:
            raise RuntimeError("is_causal is a hint about attn_mask; pass the mask as well")
        is_batched = query.dim() == 3
        q, k, v = (
            x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
            for x in self._projected(query, key, value)
        )  # [B, H, L, d]
        mask = _merged(attn_mask, key_padding_mask, q)
        dropout = self.dropout if self.training else 0.0
        weights: Tensor | None = None
        if need_weights or hasattr(self, "in_proj"):  # torch.vmap has no rule for CPU kernels
            similarity = (q * self.head_dim**-0.5) @ k.transpose(-2, -1)
            weights = (similarity if mask is None else similarity + mask).softmax(-1)
            weights = F.dropout(weights, dropout) if dropout else weights
            out = weights @ v
        else:
            out = F.scaled_dot_product_attention(q, k, v, mask, dropout)
        out = F.linear(
            out.transpose(1, 2).flatten(2), self.out_proj.weight, self.out_proj.bias
        )  # [B, L, E]
        if not need_weights:
            weights = None
        elif weights is not None:
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights if is_batched else weights.squeeze(0)
        if not is_batched:
            return out.squeeze(0), weights
        return (out if self.batch_first else out.transpose(0, 1)), weights

    def _projected(self, *inputs: Tensor) -> list[Tensor]:
        """q, k and v, each [B, L, H d]; an input that is all three is read once."""
        own = partial(F.linear, weight=self.in_proj_weight, bias=self.in_proj_bias)
        project = getattr(self, "in_proj", own)  # a private copy has it as a layer
        done = {id(x): project(self._batch_first(x)) for x in inputs}
        return [done[id(x)].chunk(3, -1)[part] for part, x in enumerate(inputs)]

    def _batch_first(self, x: Tensor) -> Tensor:
        if x.dim() == 2:
            return x.unsqueeze(0)
        return x if self.batch_first else x.transpose(0, 1)


def _merged(attn_mask: Tensor | None, padding: Tensor | None, q: Tensor) -> Tensor | None:
    """Both masks as one that is added to the similarities, broadcastable to [B, H, L, S]."""
    merged: Tensor | None = None
    if attn_mask is not None:
        merged = _added(attn_mask, q)
        if merged.dim() == 3:  # [B H, L, S]
            merged = merged.unflatten(0, (-1, q.shape[1]))
    if padding is not None:
        padding = padding if padding.dim() == 2 else padding.unsqueeze(0)
        columns = _added(padding, q)[:, None, None]
        merged = columns if merged is None else merged + columns
    return merged


def _added(mask: Tensor, like: Tensor) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(like.dtype)
    zeros = torch.zeros(mask.shape, dtype=like.dtype, device=like.device)
    return zeros.masked_fill(mask, -torch.inf)


def slim_of(module: nn.Module) -> type[nn.Module] | None:
    """The slim class of a module; None where its own does, or it is no attention."""
    kind = type(module)
    if kind in REGISTRY:
        return REGISTRY[kind].slim
    if kind in (nn.MultiheadAttention, SlimMultiheadAttention):
        return SlimMultiheadAttention
    if kind.__module__ == TORCHVISION and "WindowAttention" in kind.__name__:
        return getattr(importlib.import_module("singe.slim_swin"), f"Slim{kind.__name__}", None)
    return kind if kind.__module__ == "singe.slim_swin" else None


def take_slim(module: nn.Module) -> None:
    """Give a module its slim class, if there is one; parameters and attributes stay."""
    slim = slim_of(module)
    if slim is None or type(module) is slim:
        return
    module.__dict__.pop("forward", None)  # a private copy's guard against torch's fast path
    module.__class__ = slim
    if isinstance(module, SlimMultiheadAttention):
        # What torch's encoder layers ask before they hand the weights to their own kernel.
        module._qkv_same_embed_dim = False


def open_attention(module: Any) -> None:
    """Let an attention module of a private copy call all layers that a gate may sit in."""
    take_slim(module)
    if isinstance(module, SlimMultiheadAttention) and not hasattr(module, "in_proj"):
        layer = skip_init(nn.Linear, 1, 1, bias=False)  # without drawing from the user's generator
        layer.weight, layer.bias = module.in_proj_weight, module.in_proj_bias
        layer.out_features, layer.in_features = layer.weight.shape
        module.in_proj = layer
    elif hasattr(module, "is_open"):
        module.is_open = True
