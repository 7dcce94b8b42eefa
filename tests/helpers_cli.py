"""A tiny model and data for the commands, and two ways to run them."""

from __future__ import annotations

import sys

import pytest
from typer.testing import CliRunner

from singe import cli

FACTORY = """
import torch
from torch import nn

def make():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 4),
    )
"""

LOADER = """
import torch
def make(): return [(torch.randn(4, 3, 8, 8), torch.arange(4))] * 3
def parts(): return {"calibrate": make()}
def grey(): return [(torch.randn(4, 1, 8, 8), torch.arange(4))]
"""


def run(*words: object) -> str:
    """Standard output of a command that must succeed."""
    done = CliRunner().invoke(cli.app, [str(w) for w in words])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done.stdout


def run_main(monkeypatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["singe", *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return int(stop.value.code or 0)


MODEL = ("net.py:make", "--device", "cpu")

DATA = ("--data", "data.npz", "--batch-size", 16)
