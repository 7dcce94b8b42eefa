"""Weight gradients of gated rows, from the adjoint at the gate and what the layer was called with."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from singe.rows import TRANSPOSED, turned_over


def row_gradients(module: Any, x: Tensor, adjoint: Tensor) -> list[Tensor | list[Tensor]]:
    """Gradient with respect to every scaled row of a conv or linear, for every variant.

    Args:
        module: Conv1d/2d/3d, ConvTranspose1d/2d/3d or Linear.
        x: what it was called with: [V, B, C_in, *X] (conv) or [V, B, *, C_in] (linear).
        adjoint: gradient of the summed loss behind the gate: [V, B, C, *Y] or [V, B, *, C].

    Returns:
        What lies side by side in a row: its weights, [C, K] for each of the V variants; and its bias,
        [C, 1], if the module has one. Put together they would be a copy as large as the weights.
    """
    if isinstance(module, nn.Linear):
        weight: Tensor | list[Tensor] = _linear(x, adjoint)
    else:
        groups = int(module.groups)
        weight = [_conv(module, a, b, groups) for a, b in zip(x, adjoint, strict=True)]
    return [weight] if module.bias is None else [weight, _bias(module, adjoint)]


def channels_of(module: Any, adjoint: Tensor, channels: Tensor) -> Tensor:
    """Each variant's own channels of an adjoint: [V, B, C, *Y] and int64 [V, m] -> [V, B, m, *Y]."""
    if isinstance(module, nn.Linear):
        index = channels.view(len(channels), *[1] * (adjoint.dim() - 2), -1)
        return adjoint.gather(-1, index.expand(*adjoint.shape[:-1], -1))
    return torch.stack([a[:, rows] for a, rows in zip(adjoint, channels, strict=True)])


def unit_row_gradients(module: Any, x: Tensor, adjoint: Tensor, channels: Tensor) -> Tensor:
    """The same where variant v asks for its rows ``channels[v]`` only.

    Args:
        adjoint: of these rows alone, see :func:`channels_of`: [V, B, m, *Y] or [V, B, *, m].
        channels: int64 [V, m].

    Returns:
        [V, m, K], the bias as last column if the module has one.
    """
    if isinstance(module, nn.Linear):
        return _with_bias(module, _linear(x, adjoint), adjoint)
    if module.groups == 1 and x.stride(0) == 0:  # one input for all: their rows side by side
        rows_of_all = adjoint.transpose(0, 1).flatten(1, 2)  # [B, V m, *Y]
        weight = _conv(module, x[0], rows_of_all, groups=1)
        return _with_bias(module, weight.unflatten(0, channels.shape), adjoint)
    parts = []
    for x_v, a_v, rows in zip(x, adjoint, channels, strict=True):
        if module.groups == 1:
            parts.append(_conv(module, x_v, a_v, groups=1))
        else:  # every row sees only its own block of inputs
            width = module.in_channels // module.groups
            block = rows // (module.out_channels // module.groups)
            seen = (block[:, None] * width + torch.arange(width, device=rows.device)).flatten()
            parts.append(_conv(module, x_v[:, seen], a_v, groups=len(rows)))
    return _with_bias(module, torch.stack(parts), adjoint)


def _linear(x: Tensor, adjoint: Tensor) -> Tensor:
    return adjoint.flatten(1, -2).transpose(1, 2) @ x.flatten(1, -2)


def _conv(module: Any, x: Tensor, adjoint: Tensor, groups: int) -> Tensor:
    """[rows, C_in / groups * k...] for one variant; the number of rows is the adjoint's."""
    padding = module.padding
    if isinstance(padding, str) or module.padding_mode != "zeros":
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        x = F.pad(x, module._reversed_padding_repeated_twice, mode=mode)
        padding = (0,) * len(module.kernel_size)
    transposed = isinstance(module, TRANSPOSED)
    ends = (x.shape[1], adjoint.shape[1]) if transposed else (adjoint.shape[1], x.shape[1])
    shape = (ends[0], ends[1] // groups, *module.kernel_size)
    like = adjoint.new_empty(()).expand(shape)
    extra = [0] * (x.dim() - 2)
    if transposed:  # given by the module, or by an ``output_size``
        plain = _plain_output(module, x)
        extra = [real - size for real, size in zip(adjoint.shape[2:], plain, strict=True)]
    gradient = torch.ops.aten.convolution_backward(
        adjoint,
        x,
        like,
        None,
        module.stride,
        padding,
        module.dilation,
        transposed,
        extra,
        groups,
        [False, True, False],
    )[1]
    return (turned_over(gradient, groups) if transposed else gradient).flatten(1)


def _plain_output(module: Any, x: Tensor) -> list[int]:
    """Size of what a transposed convolution gives without output padding."""
    numbers = (x.shape[2:], module.stride, module.padding, module.dilation, module.kernel_size)
    return [(n - 1) * s - 2 * p + d * (k - 1) + 1 for n, s, p, d, k in zip(*numbers, strict=True)]


def _with_bias(module: Any, weight: Tensor, adjoint: Tensor) -> Tensor:
    return weight if module.bias is None else torch.cat([weight, _bias(module, adjoint)], 2)


def _bias(module: Any, adjoint: Tensor) -> Tensor:
    """[V, C, 1]."""
    channel = adjoint.dim() - 1 if isinstance(module, nn.Linear) else 2
    others = [d for d in range(1, adjoint.dim()) if d != channel]
    return adjoint.sum(others).unsqueeze(2)
