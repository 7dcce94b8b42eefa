"""Random small networks, for property tests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from helpers import make_batches, randomise
from helpers_networks import ACTIVATIONS, Concat, Head, Residual
from hypothesis import strategies as st
from torch import Tensor, nn


@dataclass(frozen=True)
class Network:
    """A random small network: everything that decides it, so that a failure can be repeated."""

    dims: int
    blocks: tuple[str, ...]
    width: int
    activation: str
    seed: int

    def model(self, dtype: torch.dtype = torch.float64) -> nn.Module:
        torch.manual_seed(self.seed)
        conv: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[self.dims - 1]
        norm: Any = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[self.dims - 1]
        act, width = ACTIVATIONS[self.activation], self.width
        layers: list[nn.Module] = [conv(3, width, 3, padding=1), act()]
        channels = width
        for block in self.blocks:
            if block == "conv":
                layers += [conv(channels, width, 3, padding=1), act()]
            elif block == "conv_norm":
                layers += [conv(channels, width, 3, 2, 1, bias=False), norm(width), act()]
            elif block == "pre":
                layers += [norm(channels), act(), conv(channels, width, 1)]
            elif block == "group_norm":
                width = 2 * self.width
                layers += [conv(channels, width, 3, padding=1), nn.GroupNorm(2, width), act()]
            elif block == "grouped":
                width = 2 * self.width
                layers += [conv(channels, width, 1), act()]
                layers += [conv(width, width, 3, padding=1, groups=2), act()]
            elif block == "depthwise":
                layers += [conv(channels, width, 1), norm(width), act()]
                layers += [conv(width, width, 3, padding=1, groups=width), act()]
            elif block == "residual":
                width = channels
                inner = [conv(width, self.width + 1, 1, bias=False), norm(self.width + 1), act()]
                layers += [Residual(nn.Sequential(*inner, conv(self.width + 1, width, 1)))]
            elif block == "concat":
                layers += [Concat(nn.Sequential(conv(channels, self.width, 1), act()))]
                width = channels + self.width
            channels, width = width, self.width
        model = nn.Sequential(*layers, Head(channels))
        return randomise(model.to(dtype), self.seed)

    def batches(
        self, sizes: Sequence[int] = (3, 2), dtype: torch.dtype = torch.float64
    ) -> list[tuple[Tensor, Tensor]]:
        return make_batches((3, *(5,) * self.dims), sizes, self.seed, dtype)


BLOCKS = (
    "conv", "conv_norm", "pre", "group_norm", "grouped", "depthwise", "residual", "concat",
)  # fmt: skip


def networks(
    activations: Sequence[str] = tuple(ACTIVATIONS), blocks: Sequence[str] = BLOCKS
) -> st.SearchStrategy[Network]:
    """Random small convolutional networks."""
    return st.builds(
        Network,
        dims=st.integers(1, 3),
        blocks=st.lists(st.sampled_from(blocks), min_size=1, max_size=2).map(tuple),
        width=st.integers(2, 4),
        activation=st.sampled_from(activations),
        seed=st.integers(0, 2**16),
    )
