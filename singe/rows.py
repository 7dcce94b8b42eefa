"""The weight of a layer as rows, one per output channel.

Convolutions and linear layers keep them like that: [C_out, C_in / groups, *k]. Transposed convolutions keep
[C_in, C_out / groups, *k]; cut into the groups' blocks and turned over it is the same.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def rows_of(module: Any, weight: Tensor) -> Tensor:
    """[C_out, C_in / groups, *k] of a layer's weight, or of something in its shape."""
    return turned_over(weight, module.groups) if isinstance(module, TRANSPOSED) else weight


def weight_of(module: Any, rows: Tensor) -> Tensor:
    """What :func:`rows_of` was given."""
    return turned_over(rows, module.groups) if isinstance(module, TRANSPOSED) else rows


def turned_over(weight: Tensor, groups: int) -> Tensor:
    """[a, b / groups, *k] -> [b, a / groups, *k]; twice is nothing."""
    return weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
