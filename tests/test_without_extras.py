"""The package imports and scores where Triton or the compiled core is missing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = """
import sys
for name in sys.argv[1:]:
    sys.modules[name] = None
import torch
import singe
torch.manual_seed(0)
torch.set_num_threads(1)
model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.ReLU(), torch.nn.Linear(5, 3))
batches = [(torch.randn(4, 6), torch.tensor([0, 1, 2, 0]))]
for options in ({}, {"path": "neuron", "p": 2}, {"criterion": "signed"}):
    print(*singe.score(model, batches, progress=False, **options)["0"].tolist())
assert not any(sys.modules.get(name) for name in sys.argv[1:])
"""


def numbers(*blocked: str) -> list[float]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for name in ("SINGE_KERNELS", "SINGE_INTEGRAL", "TRITON_INTERPRET"):
        environment.pop(name, None)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *blocked],
        env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [float(word) for word in done.stdout.split()]


@pytest.mark.parametrize(
    "blocked", [["triton"], ["singe._core"], ["triton", "singe._core"]], ids="+".join
)
def test_scores_are_the_same_without(blocked):
    found, expected = numbers(*blocked), numbers()
    assert len(found) == 15
    assert found == pytest.approx(expected, rel=1e-6)  # float32, another order of sums
