"""Commands with mistakes in them: said before the work, in a line, with exit status 2."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from helpers import (
    one_thread,  # noqa: F401 - autouse
)
from helpers_cli import DATA, FACTORY, LOADER, MODEL, run, run_main
from PIL import Image
from safetensors.torch import save_file

import singe
from singe.cli.folders import holds_scores, require_folder
from singe.cli.images import class_parents
from singe.errors import (
    BudgetError,
    ExportError,
    ModelError,
    OptionError,
    SingeError,
)

pytestmark = pytest.mark.usefixtures("inside")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--input-shape", "1,8,8"), r"inputs of 1 x 8 x 8: .*3 channels.* \(--input-shape sets"),
        (("--data", "grey.py:grey"), r"inputs of 1 x 8 x 8: .*3 channels.* \(as --data has them\)"),
        (("--data", "pictures", "--image-size", 6), r"inputs of 3 x 6 x 6: .* \(--image-size sets"),
    ],
)
def test_inputs_that_do_not_fit_the_model_are_told_with_their_option(place, options, message):
    (place / "grey.py").write_text(LOADER)
    (place / "large.py").write_text(FACTORY.replace("8, 12, 3", "8, 12, 9, dilation=2"))
    for name in ("a", "b"):
        (place / "pictures" / name).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(place / "pictures" / name / "0.png")
    with pytest.raises(ModelError, match=message):
        run("score", "large.py:make", "--device", "cpu", *options, "--criterion", "magnitude")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("compare",), "at least two"),
        (("compare", "--macs", 0.5), "need --model"),
        (("prune", *MODEL, *DATA), "exactly one"),
        (("prune", *MODEL, *DATA, "--macs", 0.5, "--params", 0.5), "exactly one"),
        (("prune", *MODEL, *DATA, "--macs", 0.5, "--plan", "p.json"), "--plan says"),
        (
            ("prune", *MODEL, *DATA, "--macs", 0.5, "--export", "tflite"),
            "'tflite' is not offered; choose pt2, onnx, pt2,onnx or none",
        ),
        (("score", *MODEL, *DATA, "--criterion", "tailor"), "tailor"),
        (("score", *MODEL, *DATA, "--mean", "a,b"), "--mean"),
        (("score", *MODEL, *DATA, "--std", "0.5,0,0.5"), "--std 0.5,0,0.5: .* must be positive"),
        (("score", *MODEL, "--device", "abacus"), "abacus"),
        (("compress", *MODEL, "--macs", 0.5), "compress needs data"),
        (("compress", *MODEL, *DATA, "--macs", 0.5, "--optimizer", "lion"), "lion"),
        (("prune", *MODEL, *DATA, "--macs", 0.5, "--min-keep", "a=b"), "--min-keep"),
        (
            ("prune", *MODEL, *DATA, "--macs", 0.5, "--min-keep", "=0.5"),
            "--min-keep: give one share",
        ),
        (
            ("prune", *MODEL, *DATA, "--macs", 0.5, "--min-keep", 0.5, "--min-keep", "0=0.9"),
            "--min-keep: give one share for all groups",
        ),
        (
            ("prune", *MODEL, *DATA, "--macs", 0.5, "--min-keep", "0=0.5", "--min-keep", "0=0.9"),
            "--min-keep names 0 twice",
        ),
        (("score", *MODEL, *DATA, "--quadrature", "²"), "quadrature"),
        (("score", "net.py:make", *DATA, "--device", "meta"), "'meta' cannot be used"),
        (
            ("score", *MODEL, "--criterion", "magnitude", "--input-shape", "3,8.5,8"),
            "whole numbers",
        ),
        (
            ("score", *MODEL, "--criterion", "magnitude", "--input-shape", "3,nan,8"),
            "whole numbers",
        ),
        (
            ("compress", *MODEL, *DATA, "--macs", 0.5, "--distill", 1, "--label-smoothing", 0.1),
            "label_smoothing has no say",
        ),
        (
            ("compress", *MODEL, *DATA, "--macs", 0.5, "--amp-dtype", "float16"),
            "give --amp as well",
        ),
    ],
)
def test_wrong_use(words, message, tmp_path):
    with pytest.raises(SingeError, match=message):
        run(*words, *(() if words[0] == "compare" else ("--out", tmp_path / "out")))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "give exactly one target"),
        (("--macs", 0.5, "--temperature", 3), "temperature is of the distillation"),
        (("--macs", 0.5, "--visit", "damage"), "visit is the order of the groups"),
        (("--macs", 0.5, "--min-keep", 3), r"min_keep must lie in \[0, 1\]"),
        (("--macs", 0.5, "--criterion", "abacus"), "abacus"),
        (("--macs", 0.5, "--lr", -1), "--lr must be positive"),
        (("--macs", 0.5, "--amp-dtype", "float16"), "give --amp as well"),
        (
            ("--macs", 0.5, "--accuracy-floor", 0.5, "--held-out", 0),
            "--accuracy-floor needs held-out data",
        ),
        (("--macs", 0.5, "--weight-decay", -1), "--weight-decay must be finite and not negative"),
    ],
)
@pytest.mark.parametrize("how", [("--warmup-steps", 5), ("--dry-run",)])
def test_wrong_options_are_found_before_a_warm_up_or_a_plan(words, message, how, tmp_path):
    with pytest.raises(SingeError, match=message):
        run("compress", *MODEL, "--data", "data.npz", *words, *how, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("prune",), "exactly one target"),
        (("prune", "--macs", 0.5, "--ranking", "best"), "ranking='best' is not offered"),
        (("compare", "--share", 3), r"--share must lie in \(0, 1\), got 3"),
        (("compare", "--macs", 0.5, "--params", 0.5), "exactly one target"),
        (("compare", "--macs", 0.5, "--finetune-steps", 3, "--lr", -1), "--lr must be positive"),
        (("compare", "--finetune-steps", 3), "--finetune-steps needs a budget"),
        (("compare", "--criteria", "taylor,best"), "criterion='best' is not offered"),
        (("compare", "--criteria", "singe:straight,taylor"), "path='straight' is not offered"),
        (("compare", "--criteria", "taylor"), "at least two scorings, got 1"),
    ],
)
def test_wrong_options_are_found_before_anything_is_scored(words, message, monkeypatch, tmp_path):
    monkeypatch.setattr(singe, "score", None)
    command, *options = words
    model = ("--model", *MODEL) if command == "compare" else MODEL
    with pytest.raises(OptionError, match=message):
        run(command, *model, *DATA, *options, "--out", tmp_path / "out")


@pytest.mark.parametrize("command", ["prune", "compress", "compare", "demo"])
@pytest.mark.parametrize(
    ("out", "message"),
    [("net.py", r"--out net\.py is a file; give a folder"),
     ("net.py/out", r"--out net\.py/out: .* \(Not a directory\); give another"),
     ("/proc/new/out", r"--out /proc/new/out: .* \(.+\); give another")],
)  # fmt: skip
def test_an_impossible_folder_is_found_before_the_work(command, out, message, monkeypatch):
    monkeypatch.setattr("singe.cli.inputs.load_model", None)
    monkeypatch.setattr("singe.demo.run_demo", None)
    model = {"prune": MODEL, "compress": MODEL, "compare": ("--model", *MODEL), "demo": ()}
    with pytest.raises(OptionError, match=message):
        run(command, *model[command], "--out", out)


@pytest.mark.parametrize("command", ["prune", "compress", "compare"])
@pytest.mark.parametrize("out", ["pictures/out", "pictures"])
def test_a_report_among_the_data_would_be_a_class(place, command, out, monkeypatch):
    monkeypatch.setattr("singe.cli.inputs.load_model", None)
    for name in ("a", "b"):
        (place / "pictures" / name).mkdir(parents=True, exist_ok=True)
        (place / "parts" / "train" / name).mkdir(parents=True, exist_ok=True)
        (place / "parts" / "train" / name / "0.png").touch()
    model = ("--model", *MODEL) if command == "compare" else MODEL
    with pytest.raises(OptionError, match=rf"--out {out} lies in pictures, where"):
        run(command, *model, "--data", "pictures", "--macs", 0.5, "--out", out)
    assert class_parents(Path("parts")) == [Path("parts/train")]
    require_folder(Path("parts/out"), "parts")  # classes are read further in


def test_a_message_that_names_another_error_is_whole(monkeypatch, capsys):
    def fails(**_):
        raise ModelError("nothing to prune (a: ModelError: no bias)")

    monkeypatch.setattr("singe.cli.app", fails)
    assert run_main(monkeypatch, "score") == 2
    assert capsys.readouterr().err == "error: nothing to prune (a: ModelError: no bias)\n"


@pytest.mark.parametrize("words", [("info",), ("info", "--json"), ("--help",), ("score", "--help")])
def test_a_reader_that_has_gone_is_no_bug(words, monkeypatch):
    """``singe info | head -c 0``."""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as out:
        monkeypatch.setattr("sys.stdout", out)
        assert run_main(monkeypatch, *words) == 141
        monkeypatch.undo()
        os.dup2(os.open(os.devnull, os.O_WRONLY), writer)  # for what is left to be flushed


def test_a_seed_that_is_none(monkeypatch):
    for seed in (-1, 2**63):
        assert run_main(monkeypatch, "score", *MODEL, *DATA, "--seed", seed) == 2


def test_an_image_that_a_worker_cannot_read_is_one_line(place, monkeypatch, capsys):
    for name in ("a", "b"):
        folder = place / "pictures" / name
        folder.mkdir(parents=True, exist_ok=True)
        for index in range(4):
            (folder / f"{index}.png").write_bytes(b"no image")
    words = ("score", *MODEL, "--data", "pictures", "--image-size", 8, "--workers", 1)
    assert run_main(monkeypatch, *words) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("error: cannot read the image ")
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("out", "message"),
    [("nowhere/s.st", r"--out nowhere/s\.st: there is no folder nowhere; make it"),
     (".", r"--out \. is a folder; give a file, e\.g\. scores\.safetensors"),
     ("/proc/s.st", r"--out /proc/s\.st: /proc cannot be written to \(.+\)")],
)  # fmt: skip
def test_score_makes_no_folder(out, message, monkeypatch):
    monkeypatch.setattr("singe.cli.inputs.load_model", None)
    with pytest.raises(OptionError, match=message):
        run("score", *MODEL, *DATA, "--out", out)
    assert not Path("nowhere").exists()


def test_an_unreachable_budget_is_status_2_and_one_line(tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    words = ("prune", *MODEL, *DATA, "--macs", 0.001, "--out", out)
    assert run_main(monkeypatch, *words) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert "smallest reachable" in captured.err
    assert captured.err.count("\n") == 1
    assert not out.exists()
    with pytest.raises(BudgetError):
        run(*words)


def test_a_missing_exporter_is_found_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr("singe.export.ONNX_MODULES", ("no_such_exporter",))
    with pytest.raises(ExportError, match=r"pip install no_such_exporter"):
        run("prune", *MODEL, *DATA, "--macs", 0.5, "--export", "onnx", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("critereon = 'random'", "no option 'critereon'; did you mean criterion"),
        ("[score]\nrounds = 3", r"\[score\] there is no option 'rounds'"),
        ("score = 3", "must be a table"),
        ("[compress]\nround = 2", r"\[compress\] there is no option 'round'; did you mean rounds"),
        ("compress = 3", r"must be a table, \[compress\]"),
        (
            "[train]\nlr = 1",
            r"no table \[train\]; .* \[score\], \[prune\], \[compress\], \[compare\]",
        ),
        ("[data]\npath = 'x'", r"no table \[data\]"),
        ("[info]\njson = true", r"no table \[info\]"),  # it does not read any file
        ("[score]\nseed = {a = 1}", r"\[score\] seed is one value, not a table"),
        ("macs = true", "c.toml: macs takes a value, not true"),
        ("[prune]\nmin-keep = false", r"\[prune\] min-keep takes a value, not false"),
        ("= 3", "cannot read the configuration"),
        ("config = 'other.toml'", "cannot name another"),
        ("[score]\nconfig = 'other.toml'", "cannot name another"),
    ],
)
def test_a_wrong_file(tmp_path, text, message):
    (tmp_path / "c.toml").write_text(text)
    with pytest.raises(OptionError, match=message):
        run("score", *MODEL, "--config", tmp_path / "c.toml")


@pytest.mark.parametrize(
    "name", ["weights.safetensors", "model.py", "data.npz", "run/model.safetensors"]
)
def test_scores_replace_nothing_but_scores(place, name, monkeypatch):
    """Neither the weights nor the model nor the data that they are of."""
    monkeypatch.setattr("singe.cli.inputs.load_model", None)
    (place / "run").mkdir(exist_ok=True)
    save_file({"0.weight": torch.zeros(2)}, place / "weights.safetensors")
    save_file({}, place / "run" / "model.safetensors", {"singe": '{"format": "singe-pruned-1"}'})
    for other in ("model.py", "data.npz"):
        (place / other).write_text("anything")
    with pytest.raises(OptionError, match=rf"--out {name} is there already and holds no scores"):
        run("score", *MODEL, "--out", name)


def test_scores_replace_scores(place):
    for granularity in ("unit", "weight"):
        run("score", *MODEL, "--criterion", "magnitude", "--granularity", granularity, "--out", "s")
        assert holds_scores(place / "s")
