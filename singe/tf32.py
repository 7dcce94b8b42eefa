"""TF32 switched off where numbers are compared: by default cuDNN rounds what convolutions read to 11 bits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def full_float32() -> Iterator[None]:
    """Float32 convolutions and matrix products of a GPU compute in float32 in here."""
    cudnn: Any = torch.backends.cudnn
    matmul: Any = torch.backends.cuda.matmul
    try:
        convolutions, products = cudnn.allow_tf32, torch.get_float32_matmul_precision()
    except RuntimeError:  # set by the names that torch 2.9 brought: the old ones then refuse
        owners = (cudnn.conv, cudnn.rnn, matmul)
        before = [owner.fp32_precision for owner in owners]
        try:
            for owner in owners:
                owner.fp32_precision = "ieee"
            yield
        finally:
            for owner, value in zip(owners, before, strict=True):
                owner.fp32_precision = value
        return
    try:
        if convolutions:
            cudnn.allow_tf32 = False
        if products != "highest":
            torch.set_float32_matmul_precision("highest")
        yield
    finally:
        if convolutions:
            cudnn.allow_tf32 = True
        if products != "highest":
            torch.set_float32_matmul_precision(products)
