"""The demo with tiny budgets: its structure, its targets and its picture, not its accuracies."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest
import torch

from singe import cli, demo, demo_report
from singe.errors import OptionError

pytest.importorskip("sklearn", reason="the demo needs scikit-learn")
pytest.importorskip("matplotlib", reason="the demo needs matplotlib")

TINY = demo.Settings(seeds=2, macs=0.6, rounds=2, train_steps=12, finetune_steps=2, calibration=64)


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    heard: list[str] = []
    threads = torch.get_num_threads()
    found = demo.run_demo(TINY, "cpu", heard.append)
    assert len(heard) == demo.count_steps(TINY)
    assert torch.get_num_threads() == threads
    return found


def test_every_criterion_meets_the_target(result):
    assert json.loads(json.dumps(result)) == result
    assert {run["criterion"] for run in result["runs"]} == {"unpruned", *demo.CRITERIA}
    assert len(result["runs"]) == TINY.seeds * (1 + len(demo.CRITERIA))
    full = {run["seed"]: run for run in result["runs"] if run["criterion"] == "unpruned"}
    for run in result["runs"]:
        before = full[run["seed"]]
        assert 0 <= run["accuracy"] <= 1
        assert run["latency_ms"] > 0
        if run is before:
            continue
        assert 0.3 * before["macs"] < run["macs"] <= TINY.macs * before["macs"]
        assert run["params"] < before["params"]
        assert len(run["rounds"]) == TINY.rounds
        assert all(1 <= n <= result["channels"][name] for name, n in run["kept"].items())
        assert sum(run["kept"].values()) < sum(result["channels"].values())


def test_picture(result, tmp_path):
    from matplotlib.image import imread

    path = demo_report.write_picture(result, tmp_path / "new")
    assert path.name == "singe-demo.png"
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    pixels = imread(path)
    assert pixels.shape[0] > 300
    assert pixels.shape[1] > 800
    assert pixels.std() > 0.01


def test_command_prints_table_or_json(result, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(demo, "run_demo", lambda *arguments: result)
    said = {}
    for name, words in {"table": [], "json": ["--json"]}.items():
        monkeypatch.setattr(sys, "argv", ["singe", "demo", "--out", str(tmp_path), *words])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert stop.value.code == 0
        said[name] = capsys.readouterr().out
    for criterion in demo.CRITERIA:
        assert criterion in said["table"]
    assert json.loads(said["json"])["runs"] == result["runs"]


def test_settings_are_checked():
    with pytest.raises(OptionError, match="seeds must be a whole number >= 1"):
        demo.Settings(seeds=0)
