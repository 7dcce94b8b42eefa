"""Options of the suite, and the environment block in the JSON that pytest-benchmark writes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.record import environment, save

CELLS = pytest.StashKey[list[dict[str, Any]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("singe")
    group.addoption("--reduced", action="store_true", help="the part that fits into minutes")
    group.addoption("--rounds", type=int, default=3, help="paired rounds of every cell")
    group.addoption("--flush", type=Path, help="JSON that is written anew after every cell")
    group.addoption("--device", default="cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def rounds(request: pytest.FixtureRequest) -> int:
    return request.config.getoption("rounds")


@pytest.fixture
def device(request: pytest.FixtureRequest) -> str:
    return request.config.getoption("device")


@pytest.fixture
def reduced(request: pytest.FixtureRequest) -> bool:
    return request.config.getoption("reduced")


@pytest.fixture(autouse=True)
def flushed(request: pytest.FixtureRequest, benchmark: Any) -> Iterator[None]:
    """``--benchmark-json`` is written at the end only, so a run that is cut short leaves nothing."""
    yield
    path = request.config.getoption("flush")
    if path is None or not benchmark.extra_info:
        return
    cells = request.config.stash.setdefault(CELLS, [])
    cells.append({"name": request.node.name, "extra_info": benchmark.extra_info})
    save(path, {"environment": environment(), "benchmarks": cells})


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_json(config: Any, benchmarks: Any, output_json: dict[str, Any]) -> None:
    """Machine and commit as in every other result; not the name of the host."""
    output_json["environment"] = environment()
    for key in ("machine_info", "commit_info"):
        output_json.pop(key, None)
