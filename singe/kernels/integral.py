"""The gradient-variation integral: one pass over the gradients of all nodes.

``score[c] += sum_s omega[s] * || weight[c] * grad[s, c] ||_p``

The op ``torch.ops.singe.accumulate`` has a compiled CPU and a compiled CUDA implementation
(csrc/) and the torch reference below, which takes over where the compiled one is missing.
``SINGE_INTEGRAL=native`` or ``=torch`` forces one of them.
"""

from __future__ import annotations

import os
import warnings
from typing import Literal

import torch
from torch import Tensor

from singe.errors import KernelError
from singe.kernels import native

Norm = Literal[1, 2, "sum"]

# Codes of csrc/integral.h.
DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}
NORM_CODES = {"sum": 0, "1": 1, "2": 2}


def accumulate(
    score: Tensor,  # [C]
    grad: Tensor,  # [S, C, K]
    weight: Tensor | None,  # [C, K]
    omega: Tensor,  # [S]
    p: Norm = 1,
) -> None:
    """Adds ``sum_s omega[s] * norm_k(weight[c, k] * grad[s, c, k])`` to ``score[c]``, in place.

    Every row is summed in float64 in one fixed order: the same bits on every run on a machine,
    whatever the number of threads. NaN anywhere in a channel makes its score NaN.

    Args:
      score: [C], contiguous, sharing no memory with the others. float64 if ``grad`` is, else
        float32.
      grad: [S, C, K], float32, float64, float16 or bfloat16; copied first if not contiguous.
        Nothing is differentiated through this op.
      weight: [C, K] in the dtype of ``grad``, or None for all ones.
      omega: [S], weights of the nodes, in the dtype of ``score``.
      p: 1 for ``sum |x|``, 2 for ``sqrt(sum x^2)``, ``"sum"`` for ``|sum x|``.

    Raises:
      KernelError: a shape, dtype, device or ``p`` that is not offered, overlapping memory, or
        ``SINGE_INTEGRAL=native`` where the compiled implementation cannot be used.
    """
    name = str(p)
    if name not in NORM_CODES:
        raise KernelError(f'p is {p!r}; it can be 1, 2 or "sum"')
    torch.ops.singe.accumulate.default(
        score, grad.detach(), None if weight is None else weight.detach(), omega.detach(), name
    )


def accumulate_reference(
    score: Tensor, grad: Tensor, weight: Tensor | None, omega: Tensor, p: Norm | str = 1
) -> None:
    """The same in plain torch, in float64: the definition, and the fallback on every device.

    Takes one node at a time, so that it needs memory for 2 [C, K] in float64 and no more.
    """
    total = score.to(torch.float64)
    for node, factor in zip(grad, omega.to(torch.float64), strict=True):
        x = node.to(torch.float64)
        if weight is not None:
            x = x * weight
        if p in (1, "1"):
            norm = x.abs().sum(-1)
        elif p in (2, "2"):
            norm = x.square().sum(-1).sqrt()
        else:
            norm = x.sum(-1).abs()
        total = total + factor * norm
    score.copy_(total)


def _check(score: Tensor, grad: Tensor, weight: Tensor | None, omega: Tensor, p: str) -> None:
    """Everything that shapes, dtypes and devices tell: also run on fake tensors."""
    if p not in NORM_CODES:
        raise KernelError(f'p is {p!r}; it can be "1", "2" or "sum"')
    if grad.dim() != 3:
        raise KernelError(f"grad has shape {list(grad.shape)}; expected [S, C, K]")
    if grad.dtype not in DTYPE_CODES:
        raise KernelError(
            f"grad is {grad.dtype}; expected float32, float64, float16 or bfloat16: convert it"
        )
    wide = torch.float64 if grad.dtype == torch.float64 else torch.float32
    nodes, channels, size = grad.shape
    expected: list[tuple[str, Tensor, tuple[int, ...], torch.dtype]] = [
        ("score", score, (channels,), wide),
        ("omega", omega, (nodes,), wide),
    ]
    if weight is not None:
        expected.append(("weight", weight, (channels, size), grad.dtype))
    for name, tensor, shape, dtype in expected:
        if tensor.shape != shape:
            raise KernelError(
                f"{name} has shape {list(tensor.shape)}; grad of shape {list(grad.shape)} "
                f"([S, C, K]) needs {list(shape)}"
            )
        if tensor.dtype != dtype:
            raise KernelError(
                f"{name} is {tensor.dtype}; grad in {grad.dtype} needs {dtype}: convert it"
            )
        if tensor.device != grad.device:
            raise KernelError(
                f"{name} is on {tensor.device}, grad on {grad.device}; move them to one device"
            )
    if not score.is_contiguous():
        raise KernelError(
            "score is not contiguous, and a copy would lose the result: pass a contiguous "
            "tensor and copy from it"
        )
    if score.requires_grad:
        raise KernelError("score requires grad, but is changed in place: pass score.detach()")


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Whether two contiguous tensors share memory."""
    a_start, b_start = a.data_ptr(), b.data_ptr()
    return a_start < b_start + b.nbytes and b_start < a_start + a.nbytes


def _run(
    score: Tensor, grad: Tensor, weight: Tensor | None, omega: Tensor, p: str, problem: str
) -> None:
    """Runs the compiled implementation, or the torch one if there is a ``problem`` with it."""
    _check(score, grad, weight, omega, p)
    grad, omega = grad.contiguous(), omega.contiguous()
    weight = None if weight is None else weight.contiguous()
    for name, tensor in (("grad", grad), ("weight", weight), ("omega", omega)):
        if tensor is not None and _overlap(score, tensor):
            raise KernelError(f"score shares memory with {name}: pass {name}.clone()")

    forced = os.environ.get("SINGE_INTEGRAL", "")
    if forced not in ("", "native", "torch"):
        raise KernelError(f'SINGE_INTEGRAL is {forced!r}; it can be "native", "torch" or unset')
    if forced == "native" and problem:
        raise KernelError(f"SINGE_INTEGRAL=native, but: {problem}")
    core = native.core()
    if core is None or problem or forced == "torch":
        accumulate_reference(score, grad, weight, omega, p)
        return

    arguments = (
        score.data_ptr(),
        grad.data_ptr(),
        0 if weight is None else weight.data_ptr(),
        omega.data_ptr(),
        *grad.shape,
        DTYPE_CODES[grad.dtype],
        NORM_CODES[p],
    )
    if grad.is_cuda:
        index = grad.device.index
        # Here and not by the caller: traced code must not bake a stream in.
        stream = torch.cuda.current_stream(index).cuda_stream
        core.accumulate_cuda(*arguments, index, stream)
    else:
        core.accumulate_cpu(*arguments, torch.get_num_threads())


def _cpu(score: Tensor, grad: Tensor, weight: Tensor | None, omega: Tensor, p: str) -> None:
    _run(score, grad, weight, omega, p, native.cpu_problem())


def _cuda(score: Tensor, grad: Tensor, weight: Tensor | None, omega: Tensor, p: str) -> None:
    device = grad.device if grad.is_cuda else score.device  # a mix of devices is _check's to tell
    problem = native.cuda_problem(device.index or 0)
    if problem and not os.environ.get("SINGE_INTEGRAL"):
        warnings.warn(f"the integral runs on plain torch: {problem}", stacklevel=2)
    _run(score, grad, weight, omega, p, problem)


# Library.define + impl costs 3 us a call, @torch.library.custom_op 19 us.
_library = torch.library.Library("singe", "FRAGMENT")
_library.define(
    "accumulate(Tensor(a!) score, Tensor grad, Tensor? weight, Tensor omega, str p) -> ()"
)
_library.impl("accumulate", _cpu, "CPU")
_library.impl("accumulate", _cuda, "CUDA")
torch.library.register_fake("singe::accumulate", _check, lib=_library)
