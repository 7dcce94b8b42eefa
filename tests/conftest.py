"""Without a GPU every Triton kernel runs in Triton's interpreter, which must be asked for first."""

from __future__ import annotations

import os
import sys

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    # Read when triton is imported and again by each @triton.jit, so before either.
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_configure() -> None:
    if os.environ.get("SINGE_REQUIRE_GPU") == "1" and (problem := gpu_problem()):
        raise pytest.UsageError(f"SINGE_REQUIRE_GPU=1, but {problem}")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device, and torch finds none")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


def gpu_problem() -> str:
    """Why tests on a GPU would be skipped or test something else, or an empty string."""
    from singe.kernels import native

    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    try:
        torch.ones(1, device="cuda")  # a tool around the process can refuse the device just here
    except RuntimeError as error:
        return f"torch cannot use the CUDA device: {error}"
    return native.cuda_problem(0)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with ``net.py`` and ``data.npz``: four classes of brightness, easy to learn."""
    from helpers_cli import FACTORY

    folder = tmp_path_factory.mktemp("work")
    (folder / "net.py").write_text(FACTORY)
    draw = np.random.default_rng(0)
    y = draw.integers(0, 4, 120)
    x = draw.integers(0, 60, (120, 8, 8, 3)) + 50 * y[:, None, None, None]
    np.savez(folder / "data.npz", x=x.astype(np.uint8), y=y)
    return folder


@pytest.fixture
def inside(place, monkeypatch):
    """The command runs there; what it leaves behind of its files goes."""
    monkeypatch.chdir(place)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr("singe.cli.users_files.FOLDERS", set())
