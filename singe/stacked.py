"""Tensors inside ``torch.vmap``, where every variant sees its own: how all variants see theirs at once."""

from __future__ import annotations

from torch import Tensor
from torch._C import _functorch


def differs(x: Tensor) -> bool:
    """Whether a tensor inside a vmap differs between the variants."""
    return _functorch.is_batchedtensor(x)


def in_one_vmap() -> bool:
    """Whether this runs inside a vmap, and that in no other transform."""
    return _functorch.maybe_current_level() == 1


def of_all(x: Tensor) -> Tensor:
    """[V, *shape] of what one variant sees as ``shape``, or [1, *shape] where it is the same for all."""
    if not differs(x):
        return x.unsqueeze(0)
    return _functorch.get_unwrapped(x).movedim(_functorch.maybe_get_bdim(x), 0)


def of_each(x: Tensor) -> Tensor:
    """What :func:`of_all` gave, [V, *shape], as every variant sees it."""
    return _functorch._add_batch_dim(x, 0, 1)
