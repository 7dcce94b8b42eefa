"""Comparisons are made in full float32, and the user's settings come back."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

from singe.memory import is_out_of_memory
from singe.tf32 import full_float32

cudnn: Any = torch.backends.cudnn


@full_float32()
def fail_inside() -> None:
    if hasattr(cudnn, "fp32_precision"):
        assert cudnn.conv.fp32_precision == cudnn.rnn.fp32_precision == "ieee"
    else:
        assert not cudnn.allow_tf32
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


def test_products_may_be_left_as_they_are():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with full_float32(products=False):
            assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


# In a process of its own: what is set once cannot be made unset by torch's older names.
SETTINGS = """
import sys, torch
from singe.tf32 import full_float32

backends = torch.backends
owners = [backends, backends.cudnn, backends.cudnn.conv, backends.cudnn.rnn, backends.cuda.matmul]
exec(sys.argv[1])
before = [owner.fp32_precision for owner in owners]
with full_float32():
    assert backends.cudnn.conv.fp32_precision == backends.cudnn.rnn.fp32_precision == "ieee"
    assert backends.cuda.matmul.fp32_precision != "tf32"
assert [owner.fp32_precision for owner in owners] == before
"""


@pytest.mark.skipif(not hasattr(cudnn, "fp32_precision"), reason="torch before 2.9")
@pytest.mark.parametrize(
    "first",
    [
        "pass",
        "backends.cudnn.conv.fp32_precision = 'tf32'",
        "backends.cuda.matmul.fp32_precision = 'tf32'",
        "backends.cudnn.fp32_precision = 'tf32'",
        "backends.fp32_precision = 'tf32'",
        "backends.fp32_precision = 'ieee'",
    ],
)
def test_what_was_inherited_is_inherited_again(first):
    later = "backends.fp32_precision = 'ieee'\nassert backends.cudnn.conv.fp32_precision == 'ieee'"
    inherits = "cudnn" not in first
    program = SETTINGS + (later if inherits else "")
    done = subprocess.run([sys.executable, "-c", program, first], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


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
