"""torchvision's window attention with any number of heads.

Shifted windows as in Swin (arXiv 2103.14030) and Swin v2 (arXiv 2111.09883).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.swin_transformer import (
    ShiftedWindowAttention,
    ShiftedWindowAttentionV2,
)


class SlimShiftedWindowAttention(ShiftedWindowAttention):
    """[B, H, W, C] -> [B, H, W, C].

    Attributes:
        is_open: whether it calls its layers, so that gates in them are seen. Otherwise it reads their
            weights, as torchvision's class does: Torch-Pruning then couples the same layers before and
            after heads have gone.
    """

    is_open = False

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        rows, columns = self.window_size
        x = F.pad(x, (0, 0, 0, -width % columns, 0, -height % rows))
        size = x.shape[1:3]
        shift = [
            0 if window >= whole else step
            for window, whole, step in zip(self.window_size, size, self.shift_size, strict=True)
        ]
        if any(shift):
            x = x.roll((-shift[0], -shift[1]), (1, 2))
        windows = _cut(x, rows, columns)  # [B, windows, N, C]
        q, k, v = (
            t.unflatten(-1, (self.num_heads, -1)).transpose(2, 3) for t in self._projected(windows)
        )  # [B, windows, heads, N, d]
        similarity = self._similarity(q, k) + self.get_relative_position_bias()
        if any(shift):
            similarity = similarity + self._forbidden(size, shift, x)
        attention = F.dropout(similarity.softmax(-1), self.attention_dropout, self.training)
        attention = attention.to(v.dtype)  # the table of positions may have more precision
        out = self._linear(self.proj, (attention @ v).transpose(2, 3).flatten(3))
        out = F.dropout(out, self.dropout, self.training)
        out = _joined(out, rows, columns, size[1] // columns)
        if any(shift):
            out = out.roll((shift[0], shift[1]), (1, 2))
        return out[:, :height, :width].contiguous()

    def _projected(self, windows: Tensor) -> tuple[Tensor, ...]:
        return self._linear(self.qkv, windows).chunk(3, -1)

    def _linear(self, layer: nn.Linear, x: Tensor) -> Tensor:
        return layer(x) if self.is_open else F.linear(x, layer.weight, layer.bias)

    def _similarity(self, q: Tensor, k: Tensor) -> Tensor:
        return (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)

    def _forbidden(self, size: torch.Size, shift: list[int], like: Tensor) -> Tensor:
        """[windows, 1, N, N]: -100 between positions that were no neighbours before the roll."""
        label = torch.zeros(*size, dtype=torch.int64, device=like.device)
        for dim in (0, 1):
            if shift[dim]:
                place = torch.arange(size[dim], device=like.device)
                part = (place >= size[dim] - self.window_size[dim]).long()
                part = part + (place >= size[dim] - shift[dim])
                label = 3 * label + part.view(-1, *[1] * (1 - dim))
        labels = _cut(label[None, ..., None], *self.window_size)[0, :, :, 0]  # [windows, N]
        differ = labels[:, None, :] != labels[:, :, None]
        return differ.to(like.dtype).mul(-100.0).unsqueeze(1)


class SlimShiftedWindowAttentionV2(SlimShiftedWindowAttention, ShiftedWindowAttentionV2):
    """The same with cosine similarities, and keys without a bias."""

    def _projected(self, windows: Tensor) -> tuple[Tensor, ...]:
        q, k, v = super()._projected(windows)
        bias = self.qkv.bias
        return (q, k, v) if bias is None else (q, k - bias.chunk(3)[1], v)

    def _similarity(self, q: Tensor, k: Tensor) -> Tensor:
        cosine = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
        return cosine * self.logit_scale.clamp(max=math.log(100.0)).exp()


def _cut(x: Tensor, rows: int, columns: int) -> Tensor:
    """[B, H, W, C] -> [B, windows, rows * columns, C]."""
    x = x.unflatten(2, (-1, columns)).unflatten(1, (-1, rows))
    return x.permute(0, 1, 3, 2, 4, 5).flatten(3, 4).flatten(1, 2)


def _joined(x: Tensor, rows: int, columns: int, across: int) -> Tensor:
    """:func:`_cut` undone, for so many windows side by side."""
    x = x.unflatten(2, (rows, columns)).unflatten(1, (-1, across))
    return x.permute(0, 1, 3, 2, 4, 5).flatten(3, 4).flatten(1, 2)
