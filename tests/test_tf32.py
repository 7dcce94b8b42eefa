"""Comparisons are made in full float32, and the user's settings come back."""

from __future__ import annotations

import pytest
import torch

from singe.memory import is_out_of_memory
from singe.tf32 import full_float32


@full_float32()
def fail_inside() -> None:
    assert not torch.backends.cudnn.allow_tf32
    assert torch.get_float32_matmul_precision() == "highest"
    raise ZeroDivisionError


@pytest.mark.parametrize("convolutions", [True, False])
@pytest.mark.parametrize("products", ["highest", "high", "medium"])
def test_settings_come_back_also_after_an_error(monkeypatch, convolutions, products):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", convolutions)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(products)
    try:
        with pytest.raises(ZeroDivisionError):
            fail_inside()
        assert torch.backends.cudnn.allow_tf32 is convolutions
        assert torch.get_float32_matmul_precision() == products
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(
    "text",
    [
        "CUDA error: out of memory",
        "CUDA driver error: out of memory",
        "Triton Error [CUDA]: out of memory",
        "singe: CUDA: out of memory (kernels built for 80, 90)",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "GET was unable to find an engine to execute this computation",
    ],
)
def test_libraries_without_working_memory_are_out_of_memory(text):
    assert is_out_of_memory(RuntimeError(f"{text}: see the log"))
    assert not is_out_of_memory(RuntimeError("shapes do not match"))
