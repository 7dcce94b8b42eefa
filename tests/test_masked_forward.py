"""The masked forward's kernels: Triton against torch, for every layout, dtype, shape and mix of inputs.

Without a GPU the kernels run in Triton's interpreter (tests/conftest.py), on one they run there.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from helpers_masked import (
    BACKWARD,
    DEVICE,
    FORWARD,
    LITERAL,
    RESIDUALS,
    TOLERANCES,
    assert_same,
    inputs,
    needs_triton,
    run,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from singe.errors import KernelError
from singe.kernels import masked_forward as op
from singe.kernels.masked_forward import ACTIVATIONS


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@needs_triton
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_triton_equals_torch(act: str, dtype: torch.dtype) -> None:
    # Half of the product for each act and dtype, the other half for the next: about 1 s each.
    half = (ACTIVATIONS.index(act) + list(TOLERANCES).index(dtype)) % 2
    for i, (last, kind) in enumerate(itertools.product([False, True], RESIDUALS)):
        shared = (i + half) % 2 == 0
        args = inputs((3, 2, 5, 7), dtype, last, shared, kind, last == shared, i % 3 == half)
        assert_same(run("triton", args, act), run("torch", args, act), (last, shared, kind))


@needs_triton
@pytest.mark.parametrize("last", [False, True], ids=["major", "last"])
@pytest.mark.parametrize(
    "shape",
    # one element; odd; X = 1; VEC 4; VEC 16; several column tiles; more rows than one tile
    [
        (1, 1, 1, 1),
        (4, 3, 17, 33),
        (2, 5, 40, 1),
        (2, 3, 20, 196),
        (2, 2, 16, 64),
        (2, 1, 2, 1500),
        (2, 1, 150, 2),
        (2, 3, 70, 1),
    ],
    ids=str,
)
def test_triton_equals_torch_for_every_tile(shape: tuple[int, int, int, int], last: bool) -> None:
    kinds = [("identity", True, "full"), ("silu", False, "shared")]
    for (act, shared, kind), of_samples in itertools.product(kinds, [False, True]):
        args = inputs(shape, torch.float32, last, shared, kind, of_samples=of_samples)
        found = run("triton", args, act)
        assert_same(found, run("torch", args, act), (act, shared, kind, of_samples))


@needs_triton
@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    shape=st.tuples(*(st.integers(1, n) for n in (4, 4, 40, 70))),
    dtype=st.sampled_from(list(TOLERANCES)),
    act=st.sampled_from(ACTIVATIONS),
    residual=st.sampled_from(RESIDUALS),
    last=st.booleans(),
    y_shared=st.booleans(),
    affine=st.booleans(),
    of_samples=st.booleans(),
)
def test_triton_equals_torch_anywhere(
    shape: tuple[int, int, int, int], act: str, dtype: torch.dtype, **options: Any
) -> None:
    args = inputs(shape, dtype, **options)
    assert_same(run("triton", args, act), run("torch", args, act))


@needs_triton
@pytest.mark.parametrize("act", ["identity", "relu"])
def test_each_gradient_alone(act: str) -> None:
    args = inputs((2, 2, 3, 5), residual="shared", of_samples=act == "relu")
    for name in ("torch", "triton"):
        wanted = run(name, args, act)[1:]
        for needs in itertools.product([False, True], repeat=3):
            found = run(name, args, act, list(needs))[1:]
            for f, w, need in zip(found, wanted, needs, strict=True):
                assert torch.equal(f, w) if need else f.numel() == 0


@needs_triton
@pytest.mark.parametrize("name", ["torch", "triton"])
def test_one_sided_affine(name: str) -> None:
    args = inputs((2, 2, 3, 5), torch.float64)
    grad, y, gate, scale, shift, _ = args
    zeros, ones = torch.zeros_like(shift), torch.ones_like(scale)
    for found, wanted in [((scale, None), (scale, zeros)), ((None, shift), (ones, shift))]:
        assert_same(
            run(name, [grad, y, gate, *found, None], "gelu"),
            run(name, [grad, y, gate, *wanted, None], "gelu"),
        )


def strided(t: Tensor, how: str) -> Tensor:
    """The values of t (or fewer different ones) in memory that is not dense."""
    if how == "sliced":
        return torch.stack([t, t], -1)[..., 0]
    if how == "permuted":
        return t.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)
    return t[:, :1, :, :1].expand(t.shape)


@needs_triton
@pytest.mark.parametrize("how", ["sliced", "permuted", "expanded"])
@pytest.mark.parametrize("name", ["torch", "triton"])
def test_strided_inputs(name: str, how: str) -> None:
    for which, act in itertools.product(["grad", "y", "residual"], ["identity", "hardswish"]):
        args = inputs((2, 3, 4, 5), residual="full", y_shared=False, of_samples=act == "identity")
        i = {"grad": 0, "y": 1, "residual": 5}[which]
        args[i] = strided(args[i], how)
        assert not args[i].is_contiguous()
        dense = [a.contiguous() if a is not None else None for a in args]
        assert_same(run(name, args, act), run(name, dense, act), which)
    grad = torch.ones((), device=DEVICE).expand(args[0].shape)  # what .sum() sends back
    dense[0] = grad.contiguous()
    assert_same(run(name, [grad, *args[1:]], "relu"), run(name, dense, "relu"))


@needs_triton
@pytest.mark.parametrize("name", ["torch", "triton"])
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_every_output_element_is_written(act: str, name: str) -> None:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # fills torch.empty with NaN
    try:
        assert torch.empty(3, device=DEVICE).isnan().all()
        for last, kind in itertools.product([False, True], ["shared", "full", "scalar of V"]):
            args = inputs((2, 2, 5, 33), last=last, residual=kind, of_samples=kind == "full")
            for result in run(name, args, act):
                assert not result.isnan().any()
    finally:
        torch.use_deterministic_algorithms(before)


@needs_triton
@pytest.mark.parametrize("name", ["torch", "triton"])
def test_same_bits_again(name: str) -> None:
    for last, of_samples in itertools.product([False, True], repeat=2):
        args = inputs((4, 3, 17, 33), last=last, residual="shared", of_samples=of_samples)
        first = run(name, args, "silu")
        for _ in range(3):
            assert all(map(torch.equal, run(name, args, "silu"), first))


@needs_triton
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, from inf * 0 in the interpreter
@pytest.mark.parametrize("name", ["torch", "triton"])
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_kinks_and_non_finite_values_as_in_torch(act: str, name: str) -> None:
    special = [-3.0, 0.0, 3.0, 6.0, -7.0, 7.0, 1e4, -1e4, float("nan")]
    if act != "gelu":  # torch 2.13 itself: inf from its scalar code, NaN from its AVX-512 code
        special.append(float("inf"))
    y = torch.tensor(special, device=DEVICE).view(1, 1, 1, -1)
    gate = torch.ones(1, 1, device=DEVICE)
    x = y.clone().requires_grad_()
    out = LITERAL[act](x)
    (grad_y,) = torch.autograd.grad(out.sum(), x)
    found = run(name, [torch.ones_like(y), y, gate, None, None, None], act)
    torch.testing.assert_close(found[0], out, equal_nan=True, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found[1], grad_y, equal_nan=True, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shared", [True, False])
def test_gradients_of_gates_are_summed_a_few_variants_at_a_time(monkeypatch, shared: bool) -> None:
    args = inputs((5, 2, 3, 4), torch.float64, y_shared=shared)
    whole = run("torch", args, "silu")
    for variants in (1, 2, 3):
        monkeypatch.setattr("singe.kernels.masked_forward_torch._CHUNK", variants * 2 * 3 * 4)
        assert_same(run("torch", args, "silu"), whole, variants)


@needs_triton
@pytest.mark.parametrize("of_samples", [False, True])
@pytest.mark.parametrize("name", ["torch", "triton"])
def test_empty_batch(name: str, of_samples: bool) -> None:
    args = inputs((2, 0, 3, 4), residual="full", of_samples=of_samples)
    out, grad_y, grad_residual, grad_gate = run(name, args, "relu")
    assert out.shape == (2, 0, 3, 4)
    assert grad_y.shape == (1, 0, 3, 4)
    assert grad_residual.shape == (2, 0, 3, 4)
    assert grad_gate.shape == args[2].shape
    assert not grad_gate.any()


@contextmanager
def program(pid: int, of: int) -> Iterator[None]:
    """The interpreter runs one program as number `pid` of so many, and refuses int32 overflows."""
    from triton.runtime.interpreter import interpreter_builder as builder

    before = builder.options.debug
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder, "set_grid_idx", lambda *_: setattr(builder, "grid_idx", (pid, 0, 0)))
        patch.setattr(builder, "set_grid_dim", lambda *_: setattr(builder, "grid_dim", (of, 1, 1)))
        object.__setattr__(builder.options, "debug", True)
        try:
            yield
        finally:
            object.__setattr__(builder.options, "debug", before)


@needs_triton
@pytest.mark.skipif(DEVICE == "cuda", reason="on a GPU test_beyond_int32_on_gpu is the real thing")
def test_offsets_beyond_int32() -> None:
    # A slab of 2^31 + 2^20 elements; pages that no program touches are never committed.
    from singe.kernels import masked_forward_triton as kernels

    rows, cols, v = 2**21 + 2**10, 1024, 2
    constants: dict[str, Any] = {
        "CHANNELS_LAST": False, "Y_SHARED": True, "VEC": 16, "ROWS": 1, "COLS": 1024,
    }  # fmt: skip
    slab = rows * cols
    y = torch.empty(slab, dtype=torch.float16)
    big = torch.empty(v * slab, dtype=torch.float16)
    gate = torch.tensor([[1.0], [2.0]])
    sizes = (v, rows, cols // 16, 1)
    y[-cols:] = 3
    with program(rows - 1, of=rows):
        kernels.masked_forward_fwd_kernel[(1,)](
            big, y, gate, None, None, None, *sizes, ACT="identity", RESIDUAL="none", **constants
        )
        assert (big[slab - cols : slab] == 3).all()
        assert (big[-cols:] == 6).all()
        partial = torch.empty(v * rows)
        kernels.masked_forward_bwd_kernel[(1,)](
            big, y, gate, None, None, None, y, big, partial, *sizes,
            ACT="identity", RESIDUAL="none", SUM_RESIDUAL=False, **constants,
        )  # fmt: skip
        assert partial[rows - 1] == 3 * 3 * cols
        assert partial[-1] == 6 * 3 * cols
        assert (y[-cols:] == 3 * 1 + 6 * 2).all()
    # As two blocks, each of half the rows with a gate of its own.
    y[-cols:] = 3
    gates = torch.tensor([[[0.0], [1.0]], [[0.0], [2.0]]])
    sizes = (v, rows // 2, cols // 16, 1)
    with program(rows - 1, of=rows):
        kernels.masked_forward_fwd_kernel[(1,)](
            big, y, gates, None, None, None, *sizes, ACT="identity", RESIDUAL="none", **constants
        )
        assert (big[slab - cols : slab] == 3).all()
        assert (big[-cols:] == 6).all()
        partial.zero_()
        kernels.masked_forward_bwd_kernel[(1,)](
            big, y, gates, None, None, None, y, big, partial, *sizes,
            ACT="identity", RESIDUAL="none", SUM_RESIDUAL=False, **constants,
        )  # fmt: skip
        assert torch.equal(partial.nonzero().flatten(), torch.tensor([rows - 1, v * rows - 1]))
        assert (y[-cols:] == 3 * 1 + 6 * 2).all()


@needs_triton
def test_too_long_a_row_is_refused() -> None:
    row = torch.empty(1, 1, 1, 2**31, device="meta")
    with pytest.raises(KernelError, match="too long"):
        op._triton()._configuration(row, torch.ones(1, 1), False)


@pytest.mark.gpu
def test_beyond_int32_on_gpu() -> None:
    y = torch.ones(1, 2, 3, 2**28 + 7, dtype=torch.bfloat16, device="cuda")
    gate = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], device="cuda")
    out = FORWARD(y, gate, None, None, None, "relu")
    assert out.numel() > 2**31
    for v, c in itertools.product(range(2), range(3)):
        assert (out[v, :, c] == gate[v, c]).all()
    grad_y, _, grad_gate = BACKWARD(out, y, gate, None, None, None, "identity", [True, False, True])
    torch.testing.assert_close(grad_gate, gate * (2 * y.shape[3]))
    assert (grad_y[0, :, 2] == 3 * 3 + 6 * 6).all()
    del grad_y
    gates = torch.stack([gate, 7 - gate], 1)  # of both samples
    out = FORWARD(y, gates, None, None, None, "relu")
    for v, b, c in itertools.product(range(2), range(2), range(3)):
        assert (out[v, b, c] == gates[v, b, c]).all()
    *_, grad_gate = BACKWARD(out, y, gates, None, None, None, "identity", [False, False, True])
    torch.testing.assert_close(grad_gate, gates * y.shape[3])
