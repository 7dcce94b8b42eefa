"""Options from a TOML file, and which of several choices counts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers import (
    one_thread,  # noqa: F401 - autouse
)
from helpers_cli import DATA, MODEL, run

import singe

pytestmark = pytest.mark.usefixtures("inside")


def test_a_file_holds_options_and_the_command_line_wins(tmp_path):
    config = tmp_path / "c.toml"
    config.write_text(
        'data = "data.npz"\nmodel = "net.py:make"\ndevice = "cpu"\nbatch_size = 16\nmacs = 0.9\n'
        'rounds = 7\nlayer = ["3"]\n[score]\ncriterion = "magnitude"\njson = true\n'
        f'out = "{tmp_path / "s.st"}"\n[prune]\nexport = "none"\nreport = false\n'
    )
    told = json.loads(run("score", "--config", config))
    assert told["meta"]["criterion"] == "magnitude"
    assert list(told["groups"]) == ["3"]
    told = json.loads(run("score", "--config", config, "--criterion", "random"))
    assert told["meta"]["criterion"] == "random"
    told = json.loads(
        run("prune", "--config", config, "--macs", 0.8, "--out", tmp_path / "out", "--json")
    )
    assert told["after"]["macs"] <= 0.8 * told["before"]["macs"]
    assert set(told["files"]) == {"weights", "plan"}
    told = json.loads(
        run("prune", "--config", config, "--params", 0.8, "--out", tmp_path / "b", "--json")
    )  # in place of the file's MACs
    assert 0.7 < told["after"]["params"] / told["before"]["params"] <= 0.8


def test_a_file_is_utf_8_whatever_the_locale_is(tmp_path, monkeypatch):
    config = tmp_path / "c.toml"
    config.write_bytes('data = "daten-für-alle.npz"\n'.encode())

    def read_text(path, encoding="ascii"):
        return path.read_bytes().decode(encoding)

    monkeypatch.setattr(Path, "read_text", read_text)  # as with LC_ALL=C and no UTF-8 mode
    with pytest.raises(singe.SingeError, match="daten-für-alle"):
        run("score", *MODEL, "--config", config, "--out", tmp_path / "s.st")


def test_a_file_may_use_the_forms_of_toml(tmp_path):
    config = tmp_path / "c.toml"
    config.write_text(
        'data = "data.npz"\nmodel = "net.py:make"\ndevice = "cpu"\nmean = [0.5, 0.5, 0.5]\nlayer = "3"\n'
        "[prune]\nchannels = 0.75\nmin-keep = {3 = 0.75}\ndry-run = true\njson = true\n"
    )
    told = json.loads(run("prune", "--config", config))
    (row,) = told["meta"]["groups"].values()
    assert row["kept"] == -(-3 * row["units"] // 4)
    assert row["why"] == "at its limit: min_keep"
    for name in ("taylor", "magnitude"):
        run("score", *MODEL, *DATA, "--criterion", name, "--out", tmp_path / f"{name}.st")
    files = [str(tmp_path / f"{name}.st") for name in ("taylor", "magnitude")]
    config.write_text(f"[compare]\nscores = {json.dumps(files)}\njson = true\n")
    assert json.loads(run("compare", "--config", config))["names"] == ["taylor", "magnitude"]
    config.write_text("[prune]\nmin-keep = {layer1.0.conv1 = 2}\n")  # tables in tables, to TOML
    with pytest.raises(singe.OptionError, match=r"min_keep of 'layer1\.0\.conv1' must lie in"):
        run("prune", *MODEL, *DATA, "--config", config, "--channels", 0.5, "--dry-run")


def test_of_what_excludes_each_other_the_nearer_counts(tmp_path):
    """Command line before the command's table before the top level."""
    scores, plan = tmp_path / "s.st", tmp_path / "plan.json"
    run("score", *MODEL, *DATA, "--criterion", "taylor", "--out", scores)
    plan.write_text('{"remove": {"3": [1]}}')
    shared = 'data = "data.npz"\nmodel = "net.py:make"\ndevice = "cpu"\n'

    def prune(top, table, *words):
        config = tmp_path / "c.toml"
        quiet = 'export = "none"\nreport = false\njson = true\ndry-run = true\n'
        config.write_text(f"{shared}{top}\n[prune]\n{quiet}{table}\n")
        told = json.loads(run("prune", "--config", config, *words, "--out", tmp_path / "out"))
        meta = told["meta"]
        return meta.get("criterion"), *meta.get("target", {}), *told["plan"].get("3", ())

    by_random = 'macs = 0.8\ncriterion = "random"\nround-to = 1'
    assert prune(by_random, "channels = 0.5")[:2] == ("random", "channels")
    assert prune(by_random, "channels = 0.5", "--params", 0.8)[:2] == ("random", "params")
    assert prune(by_random, "", "--scores", scores)[:2] == ("taylor", "macs")
    assert prune(by_random, f'scores = "{scores}"')[:2] == ("taylor", "macs")
    assert prune(f'macs = 0.8\nscores = "{scores}"', "")[:2] == ("taylor", "macs")
    assert prune("macs = 0.8", f'scores = "{scores}"', "--criterion", "random")[0] == "random"
    assert prune(by_random, f'scores = "{scores}"', "--plan", plan) == (None, 1)
    assert prune(by_random, f'plan = "{plan}"') == (None, 1)
    # What the plan of the table had set aside counts again where that plan gives way.
    assert prune("macs = 0.8", f'plan = "{plan}"', "--criterion", "random")[:2] == (
        "random",
        "macs",
    )
    # What only tunes a choice does not replace one.
    with pytest.raises(singe.OptionError, match="--scores are made already: leave out max_memory"):
        prune(by_random, f'scores = "{scores}"', "--max-memory", 64)
    for words in (("--round-to", 2), ("--ignore", "0"), ("--plan", plan, "--macs", 0.5)):
        with pytest.raises(singe.OptionError, match="--plan says what goes"):
            prune("macs = 0.8", f'plan = "{plan}"', *words)
    with pytest.raises(singe.OptionError, match=r"exactly one target of .* got macs, channels"):
        prune("macs = 0.8\nchannels = 0.5", "")


def test_an_order_on_the_command_line_sets_aside_what_belongs_to_the_other(tmp_path):
    config = tmp_path / "c.toml"
    shared = 'data = "data.npz"\nmodel = "net.py:make"\ndevice = "cpu"\nmacs = 0.8\n'

    def planned(text, *words):
        config.write_text(f"{shared}[compress]\n{text}\n")
        command = ("compress", "--config", config, *words, "--dry-run", "--json")
        return json.loads(run(*command, "--out", tmp_path / "out"))

    assert planned('schedule = "cubic"', "--order", "layerwise")["plan"]
    assert planned('order = "layerwise"\nvisit = "damage"', "--order", "global")["plan"]
    assert planned("distill = 0.5\ntemperature = 4.0", "--distill", 0)["plan"]
    assert planned('amp = true\namp_dtype = "float16"', "--no-amp")["plan"]
    with pytest.raises(singe.OptionError, match="the order of the groups under order='layerwise'"):
        planned('order = "global"\nvisit = "damage"')
    with pytest.raises(singe.OptionError, match="schedule shares the budget out"):
        planned('order = "layerwise"', "--schedule", "cubic")
