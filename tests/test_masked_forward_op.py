"""The masked forward as an operator: the formula, its gradients, vmap, what it saves, dispatch, errors."""

from __future__ import annotations

import itertools
import subprocess
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from helpers_masked import (
    BACKWARD,
    DEVICE,
    FORWARD,
    LITERAL,
    RESIDUALS,
    assert_same_gradients,
    inputs,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from singe.errors import KernelError
from singe.kernels import masked_forward as op
from singe.kernels.masked_forward import ACTIVATIONS, masked_forward


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def literal(y: Tensor, gate: Tensor, scale: Any, shift: Any, residual: Any, act: str) -> Tensor:
    if scale is not None:
        y = scale[:, None] * y
    if shift is not None:
        y = y + shift[:, None]
    out = (gate[:, None] if gate.dim() == 2 else gate)[..., None] * y
    return LITERAL[act](out if residual is None else out + residual)


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_autograd_equals_the_formula(act: str) -> None:
    both = [True, False]
    for shared, kind, affine, of_samples in itertools.product(both, RESIDUALS, both, both):
        _, y, gate, scale, shift, residual = inputs(
            (3, 2, 4, 5), torch.float64, False, shared, kind, affine, of_samples
        )
        leaves = [t.requires_grad_() for t in (y, gate, residual) if t is not None]
        found = masked_forward(y, gate, scale, shift, residual, act)
        wanted = literal(y, gate, scale, shift, residual, act)
        assert_same_gradients(found, wanted, leaves)


@pytest.mark.parametrize("of_samples", [False, True])
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_gradcheck(act: str, of_samples: bool) -> None:
    _, y, gate, scale, shift, residual = inputs(
        (2, 2, 3, 2), torch.float64, residual="full", of_samples=of_samples
    )
    for t in (y, gate, residual):
        t.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda y, g, r: masked_forward(y, g, scale, shift, r, act), (y, gate, residual)
    )


@pytest.mark.parametrize("last", [False, True], ids=["major", "last"])
def test_opcheck(last: bool) -> None:
    for act, shared, kind in [("identity", True, "none"), ("silu", False, "shared")]:
        args = inputs((2, 2, 3, 5), last=last, y_shared=shared, residual=kind, of_samples=shared)
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
    "gate": ({"gate": torch.ones(2, 3, 3)}, r"gate must be \[2, 3\] or \[2, 2, 3\]"),
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


def test_a_triton_that_cannot_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """As without a C compiler: torch serves, a warning says why; a full card is no such reason."""

    def kernels_that_raise(said: str) -> Any:
        def start(*_: Any) -> None:
            raise RuntimeError(said)

        module = ModuleType("kernels")
        module.masked_forward = start  # type: ignore[attr-defined]
        return module

    cpu = torch.device("cpu")
    kernels = kernels_that_raise("Failed to find C compiler")
    with pytest.warns(UserWarning, match="runs on plain torch.*cpu.*Failed to find C compiler"):
        assert not op._works(kernels, cpu)
    assert not op._works(kernels, cpu)  # and says so once
    with pytest.raises(RuntimeError, match="out of memory"):
        op._works(kernels_that_raise("CUDA error: out of memory"), cpu)
    kernels = op._triton()
    if kernels is not None and kernels.interpreted():
        assert op._works(kernels, cpu)
    monkeypatch.setattr(op, "_triton", lambda: kernels)
    for works in (True, False):
        monkeypatch.setattr(op, "_works", lambda *_, works=works: works)
        assert op.backend(torch.device("cuda")) is (kernels if works else None)


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


@pytest.mark.parametrize("of_samples", [False, True])
@pytest.mark.parametrize("inner", [1, 2])
def test_vmap_is_a_loop(inner: int, of_samples: bool) -> None:
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
                ((inner, *([2] * of_samples), 4), gate_dim),
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
            assert_same_gradients(found, wanted, list(tensors))


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
