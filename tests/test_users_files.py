"""A model's or a loader's own file: what it prints, what fails in it, and what options say to it."""

from __future__ import annotations

import importlib
import json
import sys

import pytest
from helpers import (
    one_thread,  # noqa: F401 - autouse
)
from helpers_cli import DATA, FACTORY, LOADER, MODEL, run, run_main

from singe import cli
from singe.errors import ModelError

pytestmark = pytest.mark.usefixtures("inside")

NOISY = """
import warnings
print("imported")
""" + LOADER.replace("def make():", "def make(): print('made');")

SCRIPT = (
    """
import argparse
parser = argparse.ArgumentParser()
parser.add_argument("--epochs", type=int, default=3)
args = parser.parse_args()
"""
    + FACTORY
    + """
def ends():
    raise SystemExit(0)
"""
)

FAILS = """
import warnings
import torch

class Lazy:
    def __iter__(self):
        yield {}["label_map"]

class Late:
    def __iter__(self):
        warnings.warn("slow")
        import far_neighbour
        yield far_neighbour.BATCH

def lazy(): return Lazy()
def late(): return Late()
"""


def test_what_it_prints_is_no_result(place, monkeypatch, capsys):
    (place / "noisy.py").write_text(NOISY)
    words = ("score", *MODEL, "--data", "noisy.py:make", "--criterion", "taylor", "--out", "s.st")
    assert run_main(monkeypatch, *words, "--json") == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["scores"] == "s.st"
    assert captured.err.splitlines()[:2] == ["imported", "made"]
    assert run_main(monkeypatch, *words) == 0
    assert capsys.readouterr().out.startswith("imported\nmade\n")


def test_a_script_does_not_see_the_command_line_and_cannot_end_the_program(place):
    (place / "script.py").write_text(SCRIPT)
    run("score", "script.py:make", *DATA, "--device", "cpu", "--criterion", "magnitude")
    with pytest.raises(ModelError, match=r"script.py:ends ended the program \(exit status 0\)"):
        run("score", "script.py:ends", *DATA, "--device", "cpu")


def test_an_error_in_it_is_told_with_its_place(place, monkeypatch, capsys):
    (place / "fails.py").write_text(FAILS)
    words = ("score", *MODEL, "--data", "fails.py:lazy", "--out", "s.st")
    assert run_main(monkeypatch, *words) == 2
    line = 1 + FAILS.splitlines().index('        yield {}["label_map"]')
    said = capsys.readouterr().err
    assert said == f"error: {place / 'fails.py'}:{line}, in __iter__: KeyError: 'label_map'\n"


def test_an_error_in_a_neighbour_in_a_worker_or_of_the_system_has_its_place_too(
    place, monkeypatch, capsys
):
    (place / "near.py").write_text(
        "def label(i): return {}[i]\ndef table(): return open('labels.csv')\n"
    )
    (place / "far.py").write_text("""
import torch
from torch.utils.data import DataLoader, Dataset
import near
class Rows(Dataset):
    def __len__(self): return 8
    def __getitem__(self, i): return torch.randn(3, 8, 8), near.label(i)
class Table:
    def __iter__(self): yield near.table()
def workers(): return DataLoader(Rows(), 4, num_workers=1)
def alone(): return DataLoader(Rows(), 4)
def table(): return Table()
""")
    for name, said in (
        ("workers", "near.py:1, in label: KeyError: 0"),
        ("alone", "near.py:1, in label: KeyError: 0"),
        ("table", "near.py:2, in table: FileNotFoundError: [Errno 2] No such file"),
    ):
        assert (
            run_main(monkeypatch, "score", *MODEL, "--data", f"far.py:{name}", "--out", "s.st") == 2
        )
        assert capsys.readouterr().err.startswith(f"error: {place}/{said}"), name


def test_an_error_of_ours_under_a_forward_of_theirs_is_a_bug(monkeypatch):
    def fails(*_, **__):
        raise KeyError("ours")

    monkeypatch.setattr("singe.cost._describe", fails)
    words = ("prune", *MODEL, *map(str, DATA), "--macs", "0.5", "--criterion", "magnitude")
    monkeypatch.setattr(sys, "argv", ["singe", *words, "--dry-run"])
    with pytest.raises(KeyError, match="ours"):
        cli.main()


def test_an_error_elsewhere_is_a_bug(monkeypatch):
    def fails(*_, **__):
        raise KeyError("ours")

    monkeypatch.setattr(importlib.import_module("singe.cli.score"), "run_score", fails)
    monkeypatch.setattr(sys, "argv", ["singe", "score", *MODEL, *map(str, DATA), "--out", "s.st"])
    with pytest.raises(KeyError, match="ours"):
        cli.main()


def test_it_may_import_late_and_its_warnings_are_notices(place, monkeypatch, capsys):
    (place / "sub").mkdir()
    (place / "sub" / "fails.py").write_text(FAILS)
    (place / "sub" / "far_neighbour.py").write_text(
        "import torch\nBATCH = (torch.randn(4, 3, 8, 8), torch.arange(4))\n"
    )
    words = (
        "score",
        *MODEL,
        "--data",
        "sub/fails.py:late",
        "--criterion",
        "taylor",
        "--out",
        "s.st",
    )
    assert run_main(monkeypatch, *words) == 0
    assert capsys.readouterr().err == "warning: slow\n"
    assert run_main(monkeypatch, *words, "--quiet") == 0
    assert capsys.readouterr().err == ""


def test_options_without_a_say_are_told(place, monkeypatch, capsys):
    (place / "loader.py").write_text(LOADER)
    words = ("score", *MODEL, "--criterion", "taylor", "--out", "s.st", "--workers", 3, "--std", 9)
    assert run_main(monkeypatch, *words, "--data", "loader.py:make", "--calibration", 4) == 0
    assert capsys.readouterr().err == "--std, --workers: no say in loader.py:make\n"
    words = ("score", *MODEL, "--criterion", "magnitude", "--out", "s.st", "--batch-size", 3)
    assert run_main(monkeypatch, *words, "--image-size", 8) == 0
    assert capsys.readouterr().err == "--batch-size: no say in inputs without data\n"
