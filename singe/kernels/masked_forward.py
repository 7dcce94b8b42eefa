"""The masked forward: every variant of a gated layer from one read of its activation.

    out[v,b,c,x] = act(gate[v,c] * (scale[c] * y[(v),b,c,x] + shift[c]) + residual[(v),b,c,x])

`y` and `residual` are [V, B, C, X], or [1, B, C, X] where all variants share them; gate is [V, C],
scale and shift are [C] (a folded normalisation). Two memory layouts are served without a copy: X
contiguous (channel-major) and C contiguous (channels-last, tokens); the output and all gradients
take the layout of `y`. Arithmetic is float32, or float64 for float64 inputs.

Gradients exist for y, gate and residual, once: there is no double backward. scale and shift are
frozen: they get none, also where they require it.

The environment variable SINGE_KERNELS chooses the implementation at every call: `auto` (Triton on
CUDA where it is installed, torch elsewhere), `triton` or `torch`.
"""

from __future__ import annotations

import functools
import os
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from singe.errors import KernelError

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
    "hardswish": (_aten.hardswish_, lambda g, x, o: _aten.hardswish_backward(g, x, out=o)),
}
ACTIVATIONS = tuple(_ACTS)
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# Elements of one temporary of the torch reference: 2 MB in float32 stay in a core's cache, and a
# loop over variants of 2^14 elements is overhead only (0.50 against 0.19 ms for 16 of them).
_CHUNK = 1 << 19


def _check(
    y: Tensor,
    gate: Tensor,
    scale: OptTensor,
    shift: OptTensor,
    residual: OptTensor,
    act: str,
    grad: OptTensor = None,
    needs: list[bool] | None = None,
) -> None:
    """Raises KernelError where the arguments do not fit the contract."""
    if act not in _ACTS:
        raise KernelError(f"act {act!r} is not offered; choose one of {', '.join(ACTIVATIONS)}")
    if needs and needs[1] and residual is None:
        raise KernelError("grad_residual is asked for, but there is no residual")
    if y.dim() != 4 or gate.dim() != 2:
        raise KernelError(
            f"y must be [V or 1, B, C, X] and gate [V, C], got {list(y.shape)} and "
            f"{list(gate.shape)}"
        )
    if y.dtype not in _DTYPES:
        names = ", ".join(str(d).removeprefix("torch.") for d in _DTYPES)
        raise KernelError(f"y has dtype {y.dtype}; offered are {names}")
    variants, channels = gate.shape
    slab = y.shape[1:]
    if variants == 0 or y.shape[0] not in (1, variants) or slab[1] != channels:
        raise KernelError(f"y {list(y.shape)} does not fit gate {list(gate.shape)}")
    wide = torch.float64 if y.dtype == torch.float64 else torch.float32
    for name, t, shapes, dtype in (
        ("gate", gate, [(variants, channels)], wide),
        ("scale", scale, [(channels,)], wide),
        ("shift", shift, [(channels,)], wide),
        ("residual", residual, [(1, *slab), (variants, *slab)], y.dtype),
        ("grad", grad, [(variants, *slab)], y.dtype),
    ):
        if t is None:
            continue
        if tuple(t.shape) not in shapes:
            wanted = " or ".join(str(list(shape)) for shape in shapes)
            raise KernelError(f"{name} must be {wanted}, got {list(t.shape)}")
        if t.dtype != dtype:
            raise KernelError(f"{name} must be {dtype} with y of {y.dtype}, got {t.dtype}")
        if t.device != y.device:
            raise KernelError(f"{name} is on {t.device}, y on {y.device}")


def _is_channels_last(*candidates: Tensor) -> bool:
    """Layout of the first dense tensor among them; channel-major if none is."""
    for t in candidates:
        if t.is_contiguous():
            return False
        if t.transpose(2, 3).is_contiguous():
            return True
    return False


def _empty(
    like: Tensor, leading: int, channels_last: bool, dtype: torch.dtype | None = None
) -> Tensor:
    _, batch, channels, spatial = like.shape
    if channels_last:
        return like.new_empty((leading, batch, spatial, channels), dtype=dtype).transpose(2, 3)
    return like.new_empty((leading, batch, channels, spatial), dtype=dtype)


def _dense(t: Tensor, channels_last: bool) -> Tensor:
    return t.transpose(2, 3).contiguous().transpose(2, 3) if channels_last else t.contiguous()


def _scalar_or(t: Tensor) -> Tensor:
    """An expanded scalar as the 0-dim tensor it is, anything else unchanged."""
    expanded = all(n == 1 or s == 0 for n, s in zip(t.shape, t.stride(), strict=True))
    return t.as_strided((), ()) if expanded and t.numel() else t


def _pre_activation(
    y: Tensor,  # [V or 1, B, C, X]
    slope: Tensor,  # [V, 1, C, 1]
    offset: OptTensor,  # [V, 1, C, 1]
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
    """gate * (scale * y + shift) = slope * y + offset; both [V, 1, C, 1]."""
    slope = gate if scale is None else gate * scale
    offset = None if shift is None else (gate * shift)[:, None, :, None]
    return slope[:, None, :, None], offset


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
        out = _empty(y, gate.shape[0], _is_channels_last(y))
    work = out if out.dtype == gate.dtype else torch.empty_like(out, dtype=gate.dtype)
    residual = None if residual is None else _scalar_or(residual)
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
    pre = _empty(y, gate.shape[0], channels_last, gate.dtype)
    residual = None if residual is None else _scalar_or(residual)
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
    channels_last = _is_channels_last(y, grad)
    variants = gate.shape[0]
    adj = _adjoint(grad, y, gate, scale, shift, residual, act, channels_last)
    grad_y, grad_residual, grad_gate = y.new_empty(0), y.new_empty(0), gate.new_empty(0)
    if needs[0]:
        slope, _ = _fold(gate, scale, None)
        grad_y = _empty(y, y.shape[0], channels_last)
        if y.shape[0] == variants:
            torch.mul(adj, slope, out=grad_y)
        else:
            # One slab accumulates in cache; adj * slope for all variants is never stored.
            same = adj.dtype == y.dtype
            total = grad_y if same else _empty(y, 1, channels_last, adj.dtype)
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
            grad_residual = _empty(y, residual.shape[0], channels_last)
            grad_residual.copy_(adj if residual.shape[0] == variants else adj.sum(0, keepdim=True))
    if needs[2]:
        grad_gate = _grad_gate(adj, y, scale, shift)
    return grad_y, grad_residual, grad_gate


def _grad_gate(adj: Tensor, y: Tensor, scale: OptTensor, shift: OptTensor) -> Tensor:
    value = y.to(adj.dtype)
    if scale is not None:
        value = value * scale[:, None]
    if shift is not None:
        value = value + shift[:, None]
    step = max(1, _CHUNK // max(1, y[0].numel()))
    sums = [
        # The split depends on the shape alone: same bits for the same number of threads.
        torch.mul(part, value if value.shape[0] == 1 else value[v : v + step]).sum((1, 3))
        for v, part in zip(range(0, adj.shape[0], step), adj.split(step), strict=True)
    ]
    return torch.cat(sums)


@functools.cache
def _triton() -> ModuleType | None:
    try:
        import triton  # noqa: F401
    except ImportError:
        return None
    from singe.kernels import masked_forward_triton

    return masked_forward_triton


def _backend(device: torch.device) -> ModuleType | None:
    """The module with the launchers, or None for the torch reference."""
    mode = os.environ.get("SINGE_KERNELS", "auto")
    if mode not in ("auto", "triton", "torch"):
        raise KernelError(f"SINGE_KERNELS={mode!r}; it may be auto, triton or torch")
    if mode == "torch" or (mode == "auto" and device.type != "cuda"):
        return None
    kernels = _triton()
    if mode == "auto" or (kernels is not None and device.type == "cuda"):
        return kernels
    if kernels is None:
        raise KernelError("SINGE_KERNELS=triton, but triton is not installed: pip install triton")
    if not kernels.interpreted():
        raise KernelError(
            "SINGE_KERNELS=triton on CPU tensors needs TRITON_INTERPRET=1 set before triton was "
            "imported"
        )
    return kernels


def _contiguous(t: OptTensor) -> OptTensor:
    return None if t is None else t.contiguous()


def _dense_residual(residual: OptTensor, channels_last: bool) -> OptTensor:
    if residual is None:
        return None
    residual = _scalar_or(residual)
    return residual if residual.dim() == 0 else _dense(residual, channels_last)


def _forward(
    y: Tensor, gate: Tensor, scale: OptTensor, shift: OptTensor, residual: OptTensor, act: str
) -> Tensor:
    _check(y, gate, scale, shift, residual, act)
    kernels = _backend(y.device)
    channels_last = _is_channels_last(y)
    out = _empty(y, gate.shape[0], channels_last)
    if kernels is None:
        return masked_forward_reference(y, gate, scale, shift, residual, act, out)
    kernels.masked_forward(
        out,
        _dense(y, channels_last),
        gate.contiguous(),
        _contiguous(scale),
        _contiguous(shift),
        _dense_residual(residual, channels_last),
        act,
        channels_last,
    )
    return out


def _backward_outputs(
    grad: Tensor, y: Tensor, gate: Tensor, residual: OptTensor, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    channels_last = _is_channels_last(y, grad)
    leading = 1 if residual is None else residual.shape[0]
    return (
        _empty(y, y.shape[0], channels_last) if needs[0] else y.new_empty(0),
        _empty(y, leading, channels_last) if needs[1] else y.new_empty(0),
        gate.new_empty(gate.shape) if needs[2] else gate.new_empty(0),
    )


def _backward(
    grad: Tensor,
    y: Tensor,
    gate: Tensor,
    scale: OptTensor,
    shift: OptTensor,
    residual: OptTensor,
    act: str,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    _check(y, gate, scale, shift, residual, act, grad, needs)
    kernels = _backend(y.device)
    if kernels is None:
        return masked_forward_backward_reference(grad, y, gate, scale, shift, residual, act, needs)
    outputs = _backward_outputs(grad, y, gate, residual, needs)
    if not any(needs):
        return outputs
    channels_last = _is_channels_last(y, grad)
    kernels.masked_forward_backward(
        _dense(grad, channels_last),
        _dense(y, channels_last) if act != "identity" or needs[2] else None,
        gate.contiguous(),
        _contiguous(scale),
        _contiguous(shift),
        _dense_residual(residual, channels_last) if act != "identity" else None,
        *(out if need else None for out, need in zip(outputs, needs, strict=True)),
        act,
        channels_last,
        y.shape[0] == 1,
    )
    return outputs


# Library.define costs 3.5 us per call where @custom_op costs 14 to 19.
_library = torch.library.Library("singe", "FRAGMENT")
_library.define(
    "masked_forward(Tensor y, Tensor gate, Tensor? scale, Tensor? shift, Tensor? residual, "
    "str act) -> Tensor"
)
_library.define(
    "masked_forward_backward(Tensor grad, Tensor y, Tensor gate, Tensor? scale, Tensor? shift, "
    "Tensor? residual, str act, bool[3] needs) -> (Tensor, Tensor, Tensor)"
)
_library.impl("masked_forward", _forward, "CompositeExplicitAutograd")
_library.impl("masked_forward_backward", _backward, "CompositeExplicitAutograd")


@torch.library.register_fake("singe::masked_forward", lib=_library)
def _forward_fake(
    y: Tensor, gate: Tensor, scale: OptTensor, shift: OptTensor, residual: OptTensor, act: str
) -> Tensor:
    _check(y, gate, scale, shift, residual, act)
    return _empty(y, gate.shape[0], _is_channels_last(y))


@torch.library.register_fake("singe::masked_forward_backward", lib=_library)
def _backward_fake(
    grad: Tensor,
    y: Tensor,
    gate: Tensor,
    scale: OptTensor,
    shift: OptTensor,
    residual: OptTensor,
    act: str,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    _check(y, gate, scale, shift, residual, act, grad, needs)
    return _backward_outputs(grad, y, gate, residual, needs)


def _needs(ctx: Any) -> list[bool]:
    return [ctx.needs_input_grad[i] for i in (0, 4, 1)]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    y, gate, scale, shift, residual, act = inputs
    need_y, need_residual, need_gate = _needs(ctx)
    curved = act != "identity" and (need_y or need_gate or need_residual)
    ctx.act = act
    ctx.shapes = y.shape, None if residual is None else residual.shape
    ctx.save_for_backward(
        y if curved or need_gate else None, gate, scale, shift, residual if curved else None
    )


def _backward_formula(ctx: Any, grad: Tensor) -> tuple[OptTensor, ...]:
    y, gate, scale, shift, residual = ctx.saved_tensors
    y_shape, residual_shape = ctx.shapes
    need_y, need_residual, need_gate = _needs(ctx)
    passed = None
    if need_residual and ctx.act == "identity" and residual_shape[0] == grad.shape[0]:
        # The engine's hot path: the adjoint at the gate is the incoming gradient itself.
        passed, need_residual = grad, False
    needs = [need_y, need_residual, need_gate]
    if not any(needs):
        return None, None, None, None, passed, None
    # Where y or residual was not saved, its values do not matter: a stored scalar has its shape.
    if y is None:
        y = grad.new_zeros(()).expand(y_shape)
    if residual is None and residual_shape is not None:
        residual = grad.new_zeros(()).expand(residual_shape)
    grads = torch.ops.singe.masked_forward_backward(
        grad, y, gate, scale, shift, residual, ctx.act, needs
    )
    grad_y, grad_residual, grad_gate = (
        g if need else None for g, need in zip(grads, needs, strict=True)
    )
    return grad_y, grad_gate, None, None, grad_residual if passed is None else passed, None


def _no_double_backward(ctx: Any, *grads: Tensor) -> Any:
    raise KernelError("singe::masked_forward can be differentiated once, not twice")


def _merge_variants(t: Tensor, dim: int | None, outer: int, inner: int) -> Tensor:
    """A vmapped [n, ...] as [outer * inner, ...]; what all variants share stays [1, ...]."""
    if dim is None and t.dim() == 4 and t.shape[0] == 1:
        return t
    t = t.unsqueeze(0) if dim is None else t.movedim(dim, 0)
    # Views, but for a mix of shared and own variants inside a vmap, which is copied.
    return t.expand(outer, inner, *t.shape[2:]).flatten(0, 1)


def _vmap(
    info: Any,
    in_dims: tuple[int | None, ...],
    y: Tensor,
    gate: Tensor,
    scale: OptTensor,
    shift: OptTensor,
    residual: OptTensor,
    act: str,
) -> tuple[Tensor, int]:
    y_dim, gate_dim, scale_dim, shift_dim, residual_dim, _ = in_dims
    if scale_dim is not None or shift_dim is not None:
        raise KernelError("scale and shift cannot be vmapped: fold them into y or the gate")
    outer = info.batch_size
    inner = gate.shape[0] if gate_dim != 0 else gate.shape[1]
    if y.dim() != 4 + (y_dim is not None) or gate.dim() != 2 + (gate_dim is not None):
        raise KernelError("under vmap, y must be [V or 1, B, C, X] and gate [V, C] per sample")
    out = torch.ops.singe.masked_forward(
        _merge_variants(y, y_dim, outer, inner),
        _merge_variants(gate, gate_dim, outer, inner),
        scale,
        shift,
        None if residual is None else _merge_variants(residual, residual_dim, outer, inner),
        act,
    )
    return out.unflatten(0, (outer, inner)), 0


torch.library.register_autograd(
    "singe::masked_forward", _backward_formula, setup_context=_save, lib=_library
)
torch.library.register_autograd("singe::masked_forward_backward", _no_double_backward, lib=_library)
torch.library.register_vmap("singe::masked_forward", _vmap, lib=_library)


def masked_forward(
    y: Tensor,  # [V or 1, B, C, X]
    gate: Tensor,  # [V, C]
    scale: OptTensor = None,  # [C]
    shift: OptTensor = None,  # [C]
    residual: OptTensor = None,  # [V or 1, B, C, X]
    act: str = "identity",
) -> Tensor:  # [V, B, C, X]
    """act(gate * (scale * y + shift) + residual) for all variants in one launch."""
    return torch.ops.singe.masked_forward(y, gate, scale, shift, residual, act)
