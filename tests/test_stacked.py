"""The gate of a layer's rows inside and outside ``torch.vmap``: always the same formula."""

from __future__ import annotations

import pytest
import torch
from helpers import (
    one_thread,  # noqa: F401 - autouse
)
from helpers_masked import assert_same_gradients
from torch import Tensor

from singe import stacked
from singe.network import gate_rows

B, C, V = 2, 3, 4
SHAPES = {1: [(B, C), (B, C, 5), (B, C, 4, 5)], -1: [(B, C), (B, 5, C), (B, 4, 5, C)]}
CASES = [(dim, shape) for dim, shapes in SHAPES.items() for shape in shapes]


def literal(y: Tensor, gate: Tensor, probe: Tensor | None, dim: int) -> Tensor:
    shape = [1] * y.dim()
    shape[dim] = C
    if gate.dim() == 2:
        shape[0] = B
    out = gate.view(shape) * y
    return out if probe is None else out + probe


def values(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("of_samples", [False, True])
@pytest.mark.parametrize(("dim", "shape"), CASES)
def test_one_setting(dim, shape, of_samples):
    torch.manual_seed(0)
    y, probe = values(*shape), values(*shape)
    gate = values(*([B] * of_samples), C)
    assert not stacked.in_one_vmap()
    found = gate_rows(y, gate, probe, dim)
    assert_same_gradients(found, literal(y, gate, probe, dim), [y, gate, probe])


@pytest.mark.parametrize("y_dim", [None, 0, 1, -1])
@pytest.mark.parametrize("with_probe", [False, True])
@pytest.mark.parametrize(("dim", "shape"), CASES)
def test_all_settings_at_once(dim, shape, with_probe, y_dim):
    """``y`` the same for all of them, or different along any of its dimensions."""
    torch.manual_seed(0)
    y = values(*shape) if y_dim is None else values(V, *shape).movedim(0, y_dim)
    gate, probe = values(V, C), values(V, *shape) if with_probe else None
    inside = []

    def one(y, gate, probe):
        inside.append((stacked.in_one_vmap(), stacked.differs(y)))
        return gate_rows(y, gate, probe, dim)

    dims = (y_dim, 0, 0 if with_probe else None)
    found = torch.vmap(one, dims)(y, gate, probe)
    assert inside == [(True, y_dim is not None)]
    each = [y] * V if y_dim is None else y.unbind(y_dim)
    probes = [None] * V if probe is None else probe.unbind(0)
    wanted = torch.stack(
        [literal(a, g, p, dim) for a, g, p in zip(each, gate, probes, strict=True)]
    )
    assert_same_gradients(found, wanted, [t for t in (y, gate, probe) if t is not None])


def test_inside_another_transform():
    """A model may use vmap itself: the op's own rule serves there."""
    torch.manual_seed(0)
    y, gate = values(5, V, B, C, 3), values(V, C)

    def one(y, gate):
        assert not stacked.in_one_vmap()
        return gate_rows(y, gate, None, 1)

    found = torch.vmap(torch.vmap(one), (0, None))(y, gate)
    assert_same_gradients(found, gate[None, :, None, :, None] * y, [y, gate])


def test_a_vmap_of_the_models_own():
    """Where the package runs none, in checks and in the definition: the gate is the same for all."""
    torch.manual_seed(0)
    y, gate = values(V, B, C, 3), values(C)
    found = torch.vmap(lambda t: gate_rows(t, gate, None, 1))(y)
    assert_same_gradients(found, gate[:, None] * y, [y, gate])


def test_there_and_back():
    x = torch.randn(3, 4, 5)

    def one(t):
        whole = stacked.of_all(t)
        assert whole.shape == (4, 3, 5)
        return stacked.of_each(2 * whole)

    assert torch.equal(torch.vmap(one, 1)(x), 2 * x.movedim(1, 0))
    assert torch.equal(stacked.of_all(x), x[None])
