"""Inputs of the masked forward, and how its implementations are run and compared."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from singe.kernels import masked_forward as op

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FORWARD = torch.ops.singe.masked_forward
BACKWARD = torch.ops.singe.masked_forward_backward

# (rtol, atol). Both sides compute in float32 and round once, in another order of operations.
# float16: one ulp is 2^-10. bfloat16: 2^-7, and the interpreter truncates where torch rounds
# to nearest. float64: about 130 summed terms of size 1.
TOLERANCES = {
    torch.float32: (1e-5, 2e-5),
    torch.float16: (2**-10, 2e-5),
    torch.bfloat16: (2**-7, 2e-5),
    torch.float64: (1e-12, 1e-12),
}
RESIDUALS = ["none", "shared", "full", "scalar of 1", "scalar of V"]
LITERAL: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "relu": F.relu,
    "relu6": F.relu6,
    "leaky_relu": lambda x: F.leaky_relu(x, 0.01),
    "gelu": F.gelu,
    "silu": F.silu,
    "hardswish": F.hardswish,
}
needs_triton = pytest.mark.skipif(op._triton() is None, reason="triton is not installed")


def slabs(leading: int, shape: tuple[int, ...], dtype: torch.dtype, last: bool) -> Tensor:
    """Random [leading, B, C, X] in one of the two layouts."""
    b, c, x = shape
    data = torch.randn(leading, b, x, c) if last else torch.randn(leading, b, c, x)
    data = data.to(DEVICE, dtype)
    return data.transpose(2, 3) if last else data


def inputs(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype = torch.float32,
    last: bool = False,
    y_shared: bool = True,
    residual: str = "none",
    affine: bool = True,
    of_samples: bool = False,
) -> list[Any]:
    """[grad, y, gate, scale, shift, residual]; the gate [V, C], or [V, B, C] ``of_samples``."""
    v, *slab = shape
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    b, c, x = slab
    scalar = torch.tensor(0.3, device=DEVICE, dtype=dtype)
    return [
        slabs(v, (b, c, x), dtype, last),
        slabs(1 if y_shared else v, (b, c, x), dtype, last),
        torch.rand(v, *([b] * of_samples), c, device=DEVICE, dtype=wide),
        torch.randn(c, device=DEVICE, dtype=wide) if affine else None,
        torch.randn(c, device=DEVICE, dtype=wide) if affine else None,
        {
            "none": None,
            "shared": slabs(1, (b, c, x), dtype, last),
            "full": slabs(v, (b, c, x), dtype, last),
            "scalar of 1": scalar.expand(1, b, c, x),
            "scalar of V": scalar.expand(v, b, c, x),
        }[residual],
    ]


@contextmanager
def backend(name: str) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SINGE_KERNELS", name)
        yield


def run(name: str, args: list[Any], act: str, needs: list[bool] | None = None) -> list[Tensor]:
    """[out, grad_y, grad_residual, grad_gate] of one implementation."""
    needs = needs or [True, args[5] is not None, True]
    with backend(name):
        return [FORWARD(*args[1:], act), *BACKWARD(*args, act, needs)]


def assert_same(actual: list[Tensor], wanted: list[Tensor], case: object = "") -> None:
    """Each output on its own, with the tolerance of the dtype of the op."""
    rtol, atol = TOLERANCES[wanted[0].dtype]
    for name, a, w in zip(
        ("out", "grad_y", "grad_residual", "grad_gate"), actual, wanted, strict=True
    ):
        if w.dtype == torch.float32:  # grad_gate is float32 also with 16-bit inputs
            rtol, atol = TOLERANCES[torch.float32]
        assert a.stride() == w.stride()
        torch.testing.assert_close(
            a, w, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n} {case}: {m}"
        )


def assert_same_gradients(found: Tensor, wanted: Tensor, leaves: list[Tensor]) -> None:
    """Two outputs of the same leaves, and the gradients of a random weighting of each."""
    torch.testing.assert_close(found, wanted)
    weight = torch.randn_like(wanted)
    for own, other in zip(
        torch.autograd.grad((found * weight).sum(), leaves),
        torch.autograd.grad((wanted * weight).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(own, other)
