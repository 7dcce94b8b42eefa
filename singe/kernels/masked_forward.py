"""The masked forward: every variant of a gated layer from one read of its activation.

    out[v,b,c,x] = act(gate[v,(b),c] * (scale[c] * y[(v),b,c,x] + shift[c]) + residual[(v),b,c,x])

`y` and `residual` are [V, B, C, X], or [1, B, C, X] where all variants share them; gate is [V, C], or
[V, B, C] where every sample has its own; scale and shift are [C] (a folded normalisation). Two memory
layouts are served without a copy: X contiguous (channel-major) and C contiguous (channels-last, tokens);
the output and all gradients take the layout of `y`. Arithmetic is float32, or float64 for float64 inputs.

Gradients exist for y, gate and residual, once: there is no double backward. scale and shift are
frozen: they get none, also where they require it.

The environment variable SINGE_KERNELS chooses the implementation at every call: `auto` (Triton on
CUDA where it is installed and runs, torch elsewhere), `triton` or `torch`.
"""

from __future__ import annotations

import functools
import os
import warnings
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from singe.errors import KernelError
from singe.kernels.masked_forward_torch import (
    ACTIVATIONS,
    OptTensor,
    dense,
    empty_like_layout,
    is_channels_last,
    masked_forward_backward_reference,
    masked_forward_reference,
    scalar_or,
)

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


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
    if act not in ACTIVATIONS:
        raise KernelError(f"act {act!r} is not offered; choose one of {', '.join(ACTIVATIONS)}")
    if needs and needs[1] and residual is None:
        raise KernelError("grad_residual is asked for, but there is no residual")
    if y.dim() != 4 or gate.dim() not in (2, 3):
        raise KernelError(
            f"y must be [V or 1, B, C, X] and gate [V, C] or [V, B, C], got {list(y.shape)} and "
            f"{list(gate.shape)}"
        )
    if y.dtype not in _DTYPES:
        names = ", ".join(str(d).removeprefix("torch.") for d in _DTYPES)
        raise KernelError(f"y has dtype {y.dtype}; offered are {names}")
    variants, channels = gate.shape[0], gate.shape[-1]
    slab = y.shape[1:]
    if variants == 0 or y.shape[0] not in (1, variants) or slab[1] != channels:
        raise KernelError(f"y {list(y.shape)} does not fit gate {list(gate.shape)}")
    wide = torch.float64 if y.dtype == torch.float64 else torch.float32
    for name, t, shapes, dtype in (
        ("gate", gate, [(variants, channels), (variants, *slab[:2])], wide),
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


@functools.cache
def _triton() -> ModuleType | None:
    try:
        import triton  # noqa: F401
    except ImportError:
        return None
    from singe.kernels import masked_forward_triton

    return masked_forward_triton


@functools.cache
def _works(kernels: ModuleType, device: torch.device) -> bool:
    """Whether a kernel starts there: Triton needs a C compiler, Python's headers and a GPU it knows."""
    one = torch.ones(1, 1, 1, 1, device=device)
    gate = one.view(1, 1)
    try:
        kernels.masked_forward(
            torch.empty_like(one), one, gate, None, None, None, "identity", False
        )
    except Exception as error:  # of a subprocess, a compiler or a driver
        if "out of memory" in str(error):
            raise  # says nothing, and is not remembered
        message = f"{type(error).__name__}: {error}"
        warnings.warn(
            f"the masked forward runs on plain torch: Triton cannot start a kernel on {device} ({message})",
            stacklevel=4,
        )
        return False
    return True


def backend(device: torch.device) -> ModuleType | None:
    """The module with the launchers, or None for the torch reference."""
    mode = os.environ.get("SINGE_KERNELS", "auto")
    if mode not in ("auto", "triton", "torch"):
        raise KernelError(f"SINGE_KERNELS={mode!r}; it may be auto, triton or torch")
    if mode == "torch" or (mode == "auto" and device.type != "cuda"):
        return None
    kernels = _triton()
    if mode == "auto":
        return kernels if kernels is not None and _works(kernels, device) else None
    if kernels is None:
        raise KernelError("SINGE_KERNELS=triton, but triton is not installed: pip install triton")
    if device.type != "cuda" and not kernels.interpreted():
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
    residual = scalar_or(residual)
    return residual if residual.dim() == 0 else dense(residual, channels_last)


def _forward(
    y: Tensor, gate: Tensor, scale: OptTensor, shift: OptTensor, residual: OptTensor, act: str
) -> Tensor:
    _check(y, gate, scale, shift, residual, act)
    kernels = backend(y.device)
    channels_last = is_channels_last(y)
    out = empty_like_layout(y, gate.shape[0], channels_last)
    if kernels is None:
        return masked_forward_reference(y, gate, scale, shift, residual, act, out)
    kernels.masked_forward(
        out,
        dense(y, channels_last),
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
    channels_last = is_channels_last(y, grad)
    leading = 1 if residual is None else residual.shape[0]
    return (
        empty_like_layout(y, y.shape[0], channels_last) if needs[0] else y.new_empty(0),
        empty_like_layout(y, leading, channels_last) if needs[1] else y.new_empty(0),
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
    kernels = backend(y.device)
    if kernels is None:
        return masked_forward_backward_reference(grad, y, gate, scale, shift, residual, act, needs)
    outputs = _backward_outputs(grad, y, gate, residual, needs)
    if not any(needs):
        return outputs
    channels_last = is_channels_last(y, grad)
    kernels.masked_forward_backward(
        dense(grad, channels_last),
        dense(y, channels_last) if act != "identity" or needs[2] else None,
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
    return empty_like_layout(y, gate.shape[0], is_channels_last(y))


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
    own = gate.dim() - (gate_dim is not None)
    if y.dim() != 4 + (y_dim is not None) or own not in (2, 3):
        raise KernelError(
            "under vmap, y must be [V or 1, B, C, X] and gate [V, C] or [V, B, C] per example"
        )
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
    gate: Tensor,  # [V, C] or [V, B, C]
    scale: OptTensor = None,  # [C]
    shift: OptTensor = None,  # [C]
    residual: OptTensor = None,  # [V or 1, B, C, X]
    act: str = "identity",
) -> Tensor:  # [V, B, C, X]
    """act(gate * (scale * y + shift) + residual) for all variants in one launch."""
    return torch.ops.singe.masked_forward(y, gate, scale, shift, residual, act)
