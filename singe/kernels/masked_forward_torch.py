"""The torch reference of the masked forward and its backward: the definition, and the CPU path.

Shapes are those of :mod:`singe.kernels.masked_forward`, which checks them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

OptTensor = Tensor | None

_aten = torch.ops.aten
# name -> (in-place activation, (grad, pre, out) -> grad * act'(pre)); identity does nothing.
_ACTS: dict[str, Any] = {
    "identity": None,
    "relu": (_aten.relu_, lambda g, x, o: _aten.threshold_backward(g, x, 0, grad_input=o)),
    "relu6": (
        lambda x: _aten.hardtanh_(x, 0, 6),
        lambda g, x, o: _aten.hardtanh_backward(g, x, 0, 6, grad_input=o),
    ),
    "leaky_relu": (
        lambda x: _aten.leaky_relu_(x, 0.01),
        lambda g, x, o: _aten.leaky_relu_backward(g, x, 0.01, False, grad_input=o),
    ),
    "gelu": (_aten.gelu_, lambda g, x, o: _aten.gelu_backward(g, x, grad_input=o)),
    "silu": (_aten.silu_, lambda g, x, o: _aten.silu_backward(g, x, grad_input=o)),
    # Written out: on a GPU torch multiplies by a sixth in float32, in float64 too (3e-8 off).
    "hardswish": (
        lambda x: x.mul_((x + 3).clamp_(0, 6)).div_(6),
        lambda g, x, o: _aten.hardswish_backward(g, x, out=o),
    ),
}
ACTIVATIONS = tuple(_ACTS)
# Elements of one temporary of the torch reference: 2 MB in float32 stay in a core's cache, and a
# loop over variants of 2^14 elements is overhead only (0.50 against 0.19 ms for 16 of them).
_CHUNK = 1 << 19


def is_channels_last(*candidates: Tensor) -> bool:
    """Layout of the first dense tensor among them; channel-major if none is."""
    for t in candidates:
        if t.is_contiguous():
            return False
        if t.transpose(2, 3).is_contiguous():
            return True
    return False


def empty_like_layout(
    like: Tensor, leading: int, channels_last: bool, dtype: torch.dtype | None = None
) -> Tensor:
    _, batch, channels, spatial = like.shape
    if channels_last:  # not a transpose: a view made in an op cannot be written in place later
        strides = (batch * channels * spatial, channels * spatial, 1, channels)
        return like.new_empty_strided((leading, batch, channels, spatial), strides, dtype=dtype)
    return like.new_empty((leading, batch, channels, spatial), dtype=dtype)


def dense(t: Tensor, channels_last: bool) -> Tensor:
    return t.transpose(2, 3).contiguous().transpose(2, 3) if channels_last else t.contiguous()


def scalar_or(t: Tensor) -> Tensor:
    """An expanded scalar as the 0-dim tensor it is, anything else unchanged."""
    expanded = all(n == 1 or s == 0 for n, s in zip(t.shape, t.stride(), strict=True))
    return t.as_strided((), ()) if expanded and t.numel() else t


def _pre_activation(
    y: Tensor,  # [V or 1, B, C, X]
    slope: Tensor,  # [V, 1 or B, C, 1]
    offset: OptTensor,  # [V, 1 or B, C, 1]
    residual: OptTensor,  # [V or 1, B, C, X] or 0-dim
    out: Tensor,  # [V, B, C, X]
) -> None:
    if residual is not None and residual.dim() == 4:
        torch.addcmul(residual, y, slope, out=out)
    else:
        torch.mul(y, slope, out=out)
        # The engine's probe is an exact zero: reading it saves a pass.
        if residual is not None and (residual.device.type != "cpu" or residual.item() != 0):
            out.add_(residual)
    # addcmul(offset, y, slope) would save a pass, but torch does not vectorise it when two of
    # three operands are broadcast along the rows: 1.9 against 1.0 ms for mul and add_.
    if offset is not None:
        out.add_(offset)


def _fold(gate: Tensor, scale: OptTensor, shift: OptTensor) -> tuple[Tensor, OptTensor]:
    """gate * (scale * y + shift) = slope * y + offset; both [V, 1 or B, C, 1]."""
    gate = (gate if gate.dim() == 3 else gate[:, None])[..., None]
    slope = gate if scale is None else gate * scale[:, None]
    return slope, None if shift is None else gate * shift[:, None]


def masked_forward_reference(
    y: Tensor,
    gate: Tensor,
    scale: OptTensor,
    shift: OptTensor,
    residual: OptTensor,
    act: str,
    out: OptTensor = None,
) -> Tensor:
    """The op in torch: the CPU path, and what the Triton kernel is tested against."""
    if out is None:
        out = empty_like_layout(y, gate.shape[0], is_channels_last(y))
    work = out if out.dtype == gate.dtype else torch.empty_like(out, dtype=gate.dtype)
    residual = None if residual is None else scalar_or(residual)
    _pre_activation(y, *_fold(gate, scale, shift), residual, work)
    if act != "identity":
        _ACTS[act][0](work)
    return out if work is out else out.copy_(work)


def _adjoint(
    grad: Tensor,
    y: Tensor,
    gate: Tensor,
    scale: OptTensor,
    shift: OptTensor,
    residual: OptTensor,
    act: str,
    channels_last: bool,
) -> Tensor:
    """grad * act'(pre), [V, B, C, X], in the dtype of gate."""
    if act == "identity":
        return grad.to(gate.dtype)
    pre = empty_like_layout(y, gate.shape[0], channels_last, gate.dtype)
    residual = None if residual is None else scalar_or(residual)
    _pre_activation(y, *_fold(gate, scale, shift), residual, pre)
    return _ACTS[act][1](grad.to(gate.dtype), pre, pre)


def masked_forward_backward_reference(
    grad: Tensor,
    y: Tensor,
    gate: Tensor,
    scale: OptTensor,
    shift: OptTensor,
    residual: OptTensor,
    act: str,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """The backward op in torch: (grad_y, grad_residual, grad_gate), empty where not needed."""
    channels_last = is_channels_last(y, grad)
    variants = gate.shape[0]
    adj = _adjoint(grad, y, gate, scale, shift, residual, act, channels_last)
    grad_y, grad_residual, grad_gate = y.new_empty(0), y.new_empty(0), gate.new_empty(0)
    if needs[0]:
        slope, _ = _fold(gate, scale, None)
        grad_y = empty_like_layout(y, y.shape[0], channels_last)
        if y.shape[0] == variants:
            torch.mul(adj, slope, out=grad_y)
        else:
            # One slab accumulates in cache; adj * slope for all variants is never stored.
            same = adj.dtype == y.dtype
            total = grad_y if same else empty_like_layout(y, 1, channels_last, adj.dtype)
            torch.mul(adj[:1], slope[:1], out=total)
            for v in range(1, variants):
                total.addcmul_(adj[v], slope[v])
            if not same:
                grad_y.copy_(total)
    if needs[1]:
        assert residual is not None
        if residual.shape[0] == variants and act != "identity" and adj.dtype == y.dtype:
            grad_residual = adj  # a buffer of this function, in the layout of y
        else:
            grad_residual = empty_like_layout(y, residual.shape[0], channels_last)
            grad_residual.copy_(adj if residual.shape[0] == variants else adj.sum(0, keepdim=True))
    if needs[2]:
        grad_gate = _grad_gate(adj, y, scale, shift, (3,) if gate.dim() == 3 else (1, 3))
    return grad_y, grad_residual, grad_gate


def _grad_gate(
    adj: Tensor, y: Tensor, scale: OptTensor, shift: OptTensor, over: tuple[int, ...]
) -> Tensor:
    value = y.to(adj.dtype)
    if scale is not None:
        value = value * scale[:, None]
    if shift is not None:
        value = value + shift[:, None]
    step = max(1, _CHUNK // max(1, y[0].numel()))
    sums = [
        # The split depends on the shape alone: same bits for the same number of threads.
        torch.mul(part, value if value.shape[0] == 1 else value[v : v + step]).sum(over)
        for v, part in zip(range(0, adj.shape[0], step), adj.split(step), strict=True)
    ]
    return torch.cat(sums)
