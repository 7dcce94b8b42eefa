"""The masked forward: Triton against torch, torch against the formula, and the op's contract.

Without a GPU the kernels run in Triton's interpreter (tests/conftest.py), on one they run there.
"""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from singe.errors import KernelError
from singe.kernels import masked_forward as op
from singe.kernels.masked_forward import ACTIVATIONS, masked_forward

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


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


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
) -> list[Any]:
    """[grad, y, gate, scale, shift, residual]"""
    v, *slab = shape
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    b, c, x = slab
    scalar = torch.tensor(0.3, device=DEVICE, dtype=dtype)
    return [
        slabs(v, (b, c, x), dtype, last),
        slabs(1 if y_shared else v, (b, c, x), dtype, last),
        torch.rand(v, c, device=DEVICE, dtype=wide),
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


@needs_triton
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_triton_equals_torch(act: str, dtype: torch.dtype) -> None:
    # Half of the product for each act and dtype, the other half for the next: about 1 s each.
    half = (ACTIVATIONS.index(act) + list(TOLERANCES).index(dtype)) % 2
    for i, (last, kind) in enumerate(itertools.product([False, True], RESIDUALS)):
        shared = (i + half) % 2 == 0
        args = inputs((3, 2, 5, 7), dtype, last, shared, kind, affine=last == shared)
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
    ],
    ids=str,
)
def test_triton_equals_torch_for_every_tile(shape: tuple[int, int, int, int], last: bool) -> None:
    for act, shared, kind in [("identity", True, "full"), ("silu", False, "shared")]:
        args = inputs(shape, torch.float32, last, shared, kind)
        assert_same(run("triton", args, act), run("torch", args, act), (act, shared, kind))


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
)
def test_triton_equals_torch_anywhere(
    shape: tuple[int, int, int, int], act: str, dtype: torch.dtype, **options: Any
) -> None:
    args = inputs(shape, dtype, **options)
    assert_same(run("triton", args, act), run("torch", args, act))


@needs_triton
@pytest.mark.parametrize("act", ["identity", "relu"])
def test_each_gradient_alone(act: str) -> None:
    args = inputs((2, 2, 3, 5), residual="shared")
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
        args = inputs((2, 3, 4, 5), residual="full", y_shared=False)
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
            args = inputs((2, 2, 5, 33), last=last, residual=kind)
            for result in run(name, args, act):
                assert not result.isnan().any()
    finally:
        torch.use_deterministic_algorithms(before)


@needs_triton
@pytest.mark.parametrize("name", ["torch", "triton"])
def test_same_bits_again(name: str) -> None:
    for last in (False, True):
        args = inputs((4, 3, 17, 33), last=last, residual="shared")
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


@needs_triton
@pytest.mark.parametrize("name", ["torch", "triton"])
def test_empty_batch(name: str) -> None:
    out, grad_y, grad_residual, grad_gate = run(name, inputs((2, 0, 3, 4), residual="full"), "relu")
    assert out.shape == (2, 0, 3, 4)
    assert grad_y.shape == (1, 0, 3, 4)
    assert grad_residual.shape == (2, 0, 3, 4)
    assert grad_gate.shape == (2, 3)
    assert not grad_gate.any()


@contextmanager
def program(pid: int) -> Iterator[None]:
    """The interpreter runs one program as number `pid`, and refuses int32 overflows."""
    from triton.runtime.interpreter import interpreter_builder as builder

    before = builder.options.debug
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder, "set_grid_idx", lambda *_: setattr(builder, "grid_idx", (pid, 0, 0)))
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
    with program(rows - 1):
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


@needs_triton
def test_too_long_a_row_is_refused() -> None:
    row = torch.empty(1, 1, 1, 2**31, device="meta")
    with pytest.raises(KernelError, match="too long"):
        op._triton()._configuration(row, False)


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


def literal(y: Tensor, gate: Tensor, scale: Any, shift: Any, residual: Any, act: str) -> Tensor:
    if scale is not None:
        y = scale[:, None] * y
    if shift is not None:
        y = y + shift[:, None]
    out = gate[:, None, :, None] * y
    return LITERAL[act](out if residual is None else out + residual)


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_autograd_equals_the_formula(act: str) -> None:
    for shared, kind, affine in itertools.product([True, False], RESIDUALS, [True, False]):
        _, y, gate, scale, shift, residual = inputs(
            (3, 2, 4, 5), torch.float64, y_shared=shared, residual=kind, affine=affine
        )
        leaves = [t.requires_grad_() for t in (y, gate, residual) if t is not None]
        found = masked_forward(y, gate, scale, shift, residual, act)
        wanted = literal(y, gate, scale, shift, residual, act)
        torch.testing.assert_close(found, wanted)
        weight = torch.randn_like(found)
        for f, w in zip(
            torch.autograd.grad((found * weight).sum(), leaves),
            torch.autograd.grad((wanted * weight).sum(), leaves),
            strict=True,
        ):
            torch.testing.assert_close(f, w)


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_gradcheck(act: str) -> None:
    _, y, gate, scale, shift, residual = inputs((2, 2, 3, 2), torch.float64, residual="full")
    for t in (y, gate, residual):
        t.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda y, g, r: masked_forward(y, g, scale, shift, r, act), (y, gate, residual)
    )


@pytest.mark.parametrize("last", [False, True], ids=["major", "last"])
def test_opcheck(last: bool) -> None:
    for act, shared, kind in [("identity", True, "none"), ("silu", False, "shared")]:
        args = inputs((2, 2, 3, 5), last=last, y_shared=shared, residual=kind)
        for needs in ([True, kind != "none", True], [False, False, True]):
            torch.library.opcheck(BACKWARD.default, (*args, act, needs))
        for t in (args[1], args[2], args[5]):
            if t is not None:
                t.requires_grad_()
        torch.library.opcheck(FORWARD.default, (*args[1:], act))


def test_layout_of_outputs() -> None:
    for last in (False, True):
        grad, *rest = inputs((2, 3, 4, 5), last=last, residual="shared")
        out = FORWARD(*rest, "relu")
        assert out.transpose(2, 3).is_contiguous() == last
        for g in BACKWARD(grad.contiguous(), *rest, "relu", [True, True, False])[:2]:
            assert g.transpose(2, 3).is_contiguous() == last


class Calls(TorchDispatchMode):
    """Counts the calls of each op below autograd and vmap."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))

    def of_singe(self) -> list[str]:
        return [n.split(".")[1] for n in self.names if n.startswith("singe.")]


def test_hot_path_returns_the_gradient_itself() -> None:
    _, y, gate, scale, shift, _ = inputs((3, 2, 4, 5))
    probe = torch.zeros((), device=DEVICE).expand(3, 2, 4, 5).requires_grad_()
    out = masked_forward(y, gate, scale, shift, probe)
    grad = torch.randn_like(out)
    with Calls() as calls:
        (found,) = torch.autograd.grad(out, probe, grad)
    assert found.data_ptr() == grad.data_ptr()
    assert calls.of_singe() == []


def test_only_what_is_needed_is_saved() -> None:
    def saved(act: str, *leaves: int) -> int:
        _, *rest = inputs((2, 3, 4, 50), residual="full", affine=False)
        for i in leaves:
            rest[i].requires_grad_()
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: sizes.append(t.numel()) or t, lambda t: t
        ):
            masked_forward(*rest, act)
        return sum(sizes)

    y, gate, residual, few, one = 0, 1, 4, 2 * 4, 3 * 4 * 50
    assert saved("identity", residual) == few
    assert saved("identity", y) == few
    assert saved("identity", gate) == few + one
    assert saved("relu", residual) == few + 3 * one
    # Without the values of y its gradient is still right, also from an expanded gradient.
    _, y_, gate_, *_ = inputs((2, 3, 4, 5), affine=False)
    (found,) = torch.autograd.grad(masked_forward(y_.requires_grad_(), gate_).sum(), y_)
    torch.testing.assert_close(found, gate_.sum(0)[:, None].expand(1, 3, 4, 5))


def test_double_backward_is_refused() -> None:
    _, y, gate, *_ = inputs((2, 2, 3, 4))
    out = masked_forward(y, gate.requires_grad_())
    (grad,) = torch.autograd.grad(out.square().sum(), gate, create_graph=True)
    with pytest.raises(KernelError, match="once, not twice"):
        grad.sum().backward()


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "act": ({"act": "tanh"}, "choose one of identity, relu"),
    "dims": ({"y": torch.zeros(2, 3)}, r"y must be \[V or 1, B, C, X\]"),
    "y variants": ({"y": torch.zeros(3, 2, 3, 4)}, "does not fit gate"),
    "y channels": ({"y": torch.zeros(1, 2, 5, 4)}, "does not fit gate"),
    "y dtype": ({"y": torch.zeros(1, 2, 3, 4, dtype=torch.int32)}, "offered are float32"),
    "gate dtype": ({"gate": torch.zeros(2, 3, dtype=torch.float16)}, "gate must be torch.float32"),
    "scale": ({"scale": torch.zeros(4)}, r"scale must be \[3\]"),
    "shift dtype": ({"shift": torch.zeros(3).double()}, "shift must be torch.float32"),
    "residual": ({"residual": torch.zeros(3, 2, 3, 4)}, r"must be \[1, 2, 3, 4\] or \[2, 2, 3, 4"),
    "residual dtype": ({"residual": torch.zeros(1, 2, 3, 4).half()}, "residual must be"),
    "device": ({"scale": torch.zeros(3, device="meta")}, "scale is on meta, y on cpu"),
}


@pytest.mark.parametrize("case", BAD)
def test_errors(case: str) -> None:
    change, message = BAD[case]
    good = {"y": torch.zeros(1, 2, 3, 4), "gate": torch.ones(2, 3)}
    with pytest.raises(KernelError, match=message):
        masked_forward(**good | change)


def test_errors_of_the_backward() -> None:
    args = inputs((2, 2, 3, 4))
    with pytest.raises(KernelError, match="there is no residual"):
        BACKWARD(*args, "relu", [False, True, False])
    with pytest.raises(KernelError, match=r"grad must be \[2, 2, 3, 4\]"):
        BACKWARD(args[0][:1], *args[1:], "relu", [True, False, False])


@pytest.mark.skipif(DEVICE == "cuda", reason="is about CPU tensors")
def test_dispatch_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    for mode in ("auto", "torch"):
        monkeypatch.setenv("SINGE_KERNELS", mode)
        assert op.backend(cpu) is None
    monkeypatch.setenv("SINGE_KERNELS", "cuda")
    with pytest.raises(KernelError, match="auto, triton or torch"):
        op.backend(cpu)
    monkeypatch.setenv("SINGE_KERNELS", "triton")
    kernels = op._triton()
    if kernels is not None:
        assert op.backend(cpu) is kernels
        monkeypatch.setattr(kernels, "interpreted", lambda: False)
        with pytest.raises(KernelError, match="TRITON_INTERPRET=1 set before triton was imported"):
            op.backend(cpu)
    monkeypatch.setattr(op, "_triton", lambda: None)
    with pytest.raises(KernelError, match="triton is not installed"):
        op.backend(cpu)
    monkeypatch.setenv("SINGE_KERNELS", "auto")
    assert op.backend(torch.device("cuda")) is None


def test_works_without_triton() -> None:
    script = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch; from singe.kernels.masked_forward import masked_forward\n"
        "assert masked_forward(torch.ones(1, 2, 3, 4), torch.ones(2, 3)).sum() == 48"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("act", ["identity", "gelu"])
def test_vmap_as_the_engine_uses_it(act: str, dtype: torch.dtype) -> None:
    v, b, c, x = 3, 2, 4, 5
    y = torch.randn(b, c, x, dtype=dtype, device=DEVICE)
    gates = torch.rand(v, c, dtype=dtype, device=DEVICE).requires_grad_()
    probes = torch.zeros((), dtype=dtype, device=DEVICE).expand(v, b, c, x).requires_grad_()

    def behind(gate: Tensor, probe: Tensor) -> Tensor:
        out = masked_forward(y[None], gate[None], residual=probe[None], act=act)
        assert out.shape == (1, b, c, x)
        return out[0].sin().mean((0, 2))

    with Calls() as calls:
        found = torch.vmap(behind)(gates, probes)
        grads = torch.autograd.grad(found.sum(), [gates, probes])
    assert calls.of_singe() == ["masked_forward", "masked_forward_backward"]  # for all variants
    if act == "identity":
        with Calls() as calls:
            torch.autograd.grad(torch.vmap(behind)(gates.detach(), probes).sum(), probes)
        assert calls.of_singe() == ["masked_forward"]
    wanted = torch.stack([behind(g, p) for g, p in zip(gates, probes, strict=True)])
    torch.testing.assert_close(found, wanted)
    for f, w in zip(grads, torch.autograd.grad(wanted.sum(), [gates, probes]), strict=True):
        assert f.shape == w.shape
        torch.testing.assert_close(f, w)


@pytest.mark.parametrize("inner", [1, 2])
def test_vmap_is_a_loop(inner: int) -> None:
    """Every mix of own and shared y, gate and residual, any vmapped dimension, V > 1 inside."""
    v, slab = 3, (2, 4, 5)
    scale, shift = torch.randn(4, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    for leads in itertools.product([1, inner], [1, inner]):
        for y_dim, gate_dim, r_dim in itertools.product([None, 0, 2], [None, 0, 1], [None, 0, 4]):
            if (y_dim, gate_dim, r_dim) == (None, None, None):
                continue
            tensors = []
            for shape, dim in [
                ((leads[0], *slab), y_dim),
                ((inner, 4), gate_dim),
                ((leads[1], *slab), r_dim),
            ]:
                full = list(shape)
                if dim is not None:
                    full.insert(dim, v)
                tensors.append(torch.randn(full, dtype=torch.float64, requires_grad=True))

            def call(y: Tensor, gate: Tensor, r: Tensor) -> Tensor:
                return masked_forward(y, gate, scale, shift, r, "silu")

            found = torch.vmap(call, (y_dim, gate_dim, r_dim))(*tensors)
            wanted = torch.stack(
                [
                    call(
                        *(
                            t if d is None else t.select(d, i)
                            for t, d in zip(tensors, (y_dim, gate_dim, r_dim), strict=True)
                        )
                    )
                    for i in range(v)
                ]
            )
            torch.testing.assert_close(found, wanted)
            weight = torch.randn_like(found)
            for f, w in zip(
                torch.autograd.grad((found * weight).sum(), tensors),
                torch.autograd.grad((wanted * weight).sum(), tensors),
                strict=True,
            ):
                torch.testing.assert_close(f, w)


def test_vmap_shares_what_is_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = []
    reference = op.masked_forward_reference
    monkeypatch.setenv("SINGE_KERNELS", "torch")

    def watched(y: Tensor, gate: Tensor, scale: Any, shift: Any, residual: Any, *rest: Any) -> Any:
        scalar = residual is not None and op.scalar_or(residual).dim() == 0
        shapes.append((y.shape[0], gate.shape[0], scalar))
        return reference(y, gate, scale, shift, residual, *rest)

    monkeypatch.setattr(op, "masked_forward_reference", watched)
    y, gates = torch.randn(1, 2, 4, 5), torch.rand(3, 4)
    probes = torch.zeros(()).expand(3, 2, 4, 5)
    torch.vmap(lambda g, p: masked_forward(y, g[None], residual=p[None]))(gates, probes)
    nested = torch.vmap(torch.vmap(lambda g: masked_forward(y, g[None])))(gates.expand(2, 3, 4))
    assert shapes == [(1, 3, True), (1, 6, False)]
    assert nested.shape == (2, 3, 1, 2, 4, 5)


def test_vmap_errors() -> None:
    y, gate = torch.zeros(1, 2, 3, 4), torch.ones(1, 3)
    with pytest.raises(KernelError, match="cannot be vmapped"):
        torch.vmap(lambda s: masked_forward(y, gate, s))(torch.ones(5, 3))
    with pytest.raises(KernelError, match="under vmap"):
        torch.vmap(lambda t: masked_forward(t, gate))(torch.ones(5, 2, 3, 4))
