"""TF32 switched off where numbers are compared: by default cuDNN rounds what convolutions read to 11 bits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch


@contextmanager
def full_float32(products: bool = True) -> Iterator[None]:
    """Float32 convolutions of a GPU compute in float32 in here, and matrix products, if ``products``.

    What was inherited is inherited again afterwards: a setting made once is not one for good.
    """
    with ExitStack() as undo:
        _full_convolutions(undo)
        if products:
            _full_products(undo)
        yield


def _full_convolutions(undo: ExitStack) -> None:
    cudnn: Any = torch.backends.cudnn
    # Since torch 2.9, whose old names refuse where the new ones were used.
    if hasattr(cudnn, "fp32_precision"):
        for owner in (cudnn, cudnn.conv, cudnn.rnn):  # the last two follow the first, or were set
            _set_full(owner, undo)
    elif cudnn.allow_tf32:
        cudnn.allow_tf32 = False
        undo.callback(setattr, cudnn, "allow_tf32", True)


def _full_products(undo: ExitStack) -> None:
    matmul: Any = torch.backends.cuda.matmul
    try:
        before = torch.get_float32_matmul_precision()
    except RuntimeError:  # set by the names that torch 2.9 brought
        _set_full(matmul, undo)
        return
    if before != "highest":
        torch.set_float32_matmul_precision("highest")
        undo.callback(torch.set_float32_matmul_precision, before)


def _set_full(owner: Any, undo: ExitStack) -> None:
    before = owner.fp32_precision
    if before != "ieee":
        owner.fp32_precision = "ieee"
        undo.callback(_put_back, owner, before)


def _put_back(owner: Any, value: str) -> None:
    owner.fp32_precision = "none"  # as its owner says, which may be all that was said
    if owner.fp32_precision != value:
        owner.fp32_precision = value
