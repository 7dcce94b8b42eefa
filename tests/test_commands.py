"""``singe score | compress | compare`` on a tiny model and data: files, JSON, reports."""

from __future__ import annotations

import inspect
import json
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from helpers import (
    one_thread,  # noqa: F401 - autouse
)
from helpers_cli import DATA, LOADER, MODEL, run, run_main
from PIL import Image
from safetensors import safe_open

import singe
from singe.cli.models import load_model
from singe.cli.options import BudgetOptions, DataOptions, ScoreOptions
from singe.compress import compress
from singe.errors import (
    CheckpointError,
    ExportError,
    OptionError,
    SingeError,
)
from singe.export import load_pruned
from singe.latency import Timing

pytestmark = pytest.mark.usefixtures("inside")

QUICK = ("--finetune-steps", 8, "--rounds", 2, "--lr", 0.05, "--no-augment")


@pytest.fixture(scope="module")
def compressed(place):
    """One run of ``singe compress``: its folder and what it printed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        out = place / "run"
        words = ("compress", *MODEL, *DATA, *QUICK, "--macs", 0.5, "--warmup-steps", 30,
                 "--checkpoint-every", 3, "--out", out, "--json")  # fmt: skip
        return out, json.loads(run(*words))


def test_score_writes_scores(tmp_path):
    told = json.loads(run("score", *MODEL, *DATA, "--out", tmp_path / "s.safetensors", "--json"))
    scores = singe.Scores.load(told["scores"], load_model("net.py:make"))
    assert {g: len(v) for g, v in scores.items()} == {"0": 8, "3": 12}
    assert told["groups"]["3"]["highest"] == pytest.approx(float(scores["3"].max()))
    assert told["meta"]["samples"] == 96  # a fifth is held out
    shown = run("score", *MODEL, *DATA, "--path", "network", "--p", 2, "--out", tmp_path / "t.st")
    assert "singe, network path, 96 samples" in shown
    assert singe.Scores.load(tmp_path / "t.st").meta["p"] == 2


def test_score_takes_the_options_for_long_runs(tmp_path):
    words = ("score", *MODEL, *DATA, "--path", "neuron", "--out", tmp_path / "s.st", "--json")
    file = tmp_path / "run.safetensors"
    told = json.loads(
        run(*words, "--autocast", "bfloat16", "--tolerance", 0.2, "--pruning-ratio", 0.3,
            "--checkpoint", file)
    )  # fmt: skip
    assert told["meta"]["autocast"] == "torch.bfloat16"
    assert told["meta"]["tolerance"] == 0.2
    assert not file.exists(), "the run is complete"
    with pytest.raises(OptionError, match="autocast='int8' is not offered"):
        run(*words, "--autocast", "int8")


def test_scores_of_single_weights(tmp_path):
    words = ("score", *MODEL, *DATA, "--granularity", "weight", "--path", "network")
    told = json.loads(run(*words, "--out", tmp_path / "w.st", "--json"))
    scores = singe.WeightScores.load(told["scores"], load_model("net.py:make"))
    sizes = {name: row["weights"] for name, row in told["groups"].items()}
    assert sizes == {"0.weight": 8 * 27, "3.weight": 12 * 72, "8.weight": 48}
    assert told["groups"]["0.weight"]["highest"] == pytest.approx(float(scores["0.weight"].max()))
    shown = run(*words, "--out", tmp_path / "w.st")
    assert "parameter" in shown
    assert "864" in shown
    with pytest.raises(SingeError, match="it holds singe-weight-scores-1"):
        run("prune", *MODEL, *DATA, "--macs", 0.5, "--scores", tmp_path / "w.st", "--dry-run")
    with pytest.raises(OptionError, match="granularity='row' is not offered"):
        run(*words[:-4], "--granularity", "row", "--out", tmp_path / "w.st")


def test_scores_without_data(tmp_path):
    words = ("score", *MODEL, "--input-shape", "3,6,6", "--out", tmp_path / "s.st")
    assert "magnitude" in run(*words, "--criterion", "magnitude")
    with pytest.raises(OptionError, match="--data"):
        run(*words)


@pytest.mark.parametrize("command", ["prune", "compress"])
def test_a_dry_run_writes_nothing(tmp_path, command):
    out = tmp_path / "out"
    words = (command, *MODEL, *DATA, "--macs", 0.5, "--dry-run", "--out", out)
    told = json.loads(run(*words, "--json"))
    assert told["meta"]["after"]["macs"] <= 0.5 * told["meta"]["before"]["macs"]
    assert not out.exists()
    if command == "compress":
        assert inspect.signature(singe.compress).parameters["finetune_steps"].default == 200
        assert told["cost"]["training_steps"] == 5 * 200
        assert told["cost"]["estimated_seconds"] > 0
    assert "units go" in run(*words)


def test_compress_from_data_to_report(compressed):
    out, told = compressed
    assert told["after"]["macs"] <= 0.5 * told["before"]["macs"]
    assert told["before"]["metric"] > 0.6  # the warm-up taught it
    assert len(told["rounds"]) == 2
    assert told["stopped"] is None
    for path in told["files"].values():
        assert (out / path).exists()
    model = load_pruned(load_model("net.py:make"), out)
    assert sum(p.numel() for p in model.parameters()) == told["after"]["params"]
    page = (out / "report.html").read_text()
    for title in ("Accuracy against MACs", "What is left", "Scores, and where", "Why these",
                  "Criteria compared", "Latency", "Settings", "Versions"):  # fmt: skip
        assert title in page
    content = json.loads((out / "report.json").read_text())
    assert content["criteria"]["names"] == ["singe, layer path", "taylor", "magnitude"]
    assert content["settings"]["warmup_steps"] == 30


def test_a_finished_run_is_not_overwritten_and_resumes_to_the_same(compressed):
    out, told = compressed
    words = ("compress", *MODEL, *DATA, *QUICK, "--macs", 0.5, "--warmup-steps", 30,
             "--checkpoint-every", 3, "--out", out, "--export", "none", "--no-report")  # fmt: skip
    with pytest.raises(OptionError, match="--resume continues it"):
        run(*words)
    with pytest.raises(CheckpointError):
        run(*words, "--resume", "--optimizer", "adamw")
    before = (out / "model.safetensors").read_bytes()
    again = json.loads(run(*words, "--resume", "--json"))
    assert again["after"] == told["after"]
    assert (out / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("folder", [".", "checkpoint"])  # the latter as singe.compress leaves it
def test_prune_does_not_overwrite_a_run_of_compress(compressed, folder):
    out = compressed[0] / folder
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    words = ("prune", *MODEL, "--input-shape", "3,8,8", "--criterion", "magnitude", "--macs", 0.5)
    with pytest.raises(OptionError, match=r"holds a run of compress.*; give another"):
        run(*words, "--out", out)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    run(*words, "--out", out, "--dry-run")


@pytest.mark.parametrize(
    "options",
    [
        ("--quadrature", 3, "--p", 2, "--norm", "outside", "--path", "network"),
        ("--order", "layerwise", "--rounds", 2, "--criterion", "taylor"),
        ("--objective", "kl", "--layer", "0"),
        ("--p", "fisher"),
    ],
)
def test_reports_of_every_way_to_score(tmp_path, options):
    """What explains the scores is scored as they were, on the groups that they have."""
    told = json.loads(
        run("compress", *MODEL, *DATA, "--channels", 0.8, "--finetune-steps", 2, *options,
            "--out", tmp_path / "run", "--export", "none", "--json")
    )  # fmt: skip
    assert "Why these channels went" in Path(told["files"]["report"]).read_text()
    groups = json.loads((tmp_path / "run" / "report.json").read_text())["groups"]
    assert list(groups) == (["0"] if "--layer" in options else ["0", "3"])


def test_the_report_of_scores_from_a_file_is_about_them(tmp_path):
    run("score", *MODEL, *DATA, "--criterion", "ig", "--p", 2, "--layer", "3",
        "--out", tmp_path / "s.st")  # fmt: skip
    run("prune", *MODEL, *DATA, "--scores", tmp_path / "s.st", "--channels", 0.8,
        "--out", tmp_path / "out", "--export", "none")  # fmt: skip
    integrand = json.loads((tmp_path / "out" / "report.json").read_text())["integrand"]
    assert integrand["criterion"] == "ig"
    assert "p=2" in integrand["ylabel"]


READ = {"data", "batch_size", "calibration", "workers", "held_out"}


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (("--data", "data.npz"), READ | {"mean", "std", "augment"}),
        (("--data", "features.npz"), READ),
        (("--data", "data.py:make"), {"data", "calibration"}),
        (("--data", "data.py:parts"), {"data"}),
        (("--data", "images"), READ | {"image_size", "mean", "std", "augment"}),
        (("--image-size", 8), {"image_size"}),
        (("--input-shape", "3,8,8"), {"input_shape"}),
    ],
)
def test_the_settings_of_a_report_are_those_that_had_a_say(place, tmp_path, data, told):
    (place / "data.py").write_text(LOADER)
    images = np.zeros((10, 3, 8, 8), np.float32)
    np.savez(place / "features.npz", x=images, y=np.arange(10) % 2)
    for name in ("a", "b"):
        (place / "images" / name).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(place / "images" / name / "0.png")
    run("prune", *MODEL, *data, "--criterion", "magnitude", "--macs", 0.5, "--export", "none",
        "--out", tmp_path, "--quiet")  # fmt: skip
    settings = json.loads((tmp_path / "report.json").read_text())["settings"]
    assert settings.keys() & {f.name for f in fields(DataOptions)} == told
    rest = settings.keys() - told
    assert rest >= {"model", "device", "criterion", "macs", "seed", "recalibrate"}
    assert not rest & {"as_json", "quiet", "config", "resume"}


def test_warm_up_trains_as_it_was_told(tmp_path, monkeypatch):
    calls = []

    def spy(model, **options):
        calls.append(options)
        return compress(model, **options)

    monkeypatch.setattr("singe.compress", spy)
    run("compress", *MODEL, *DATA, "--macs", 0.8, "--rounds", 1, "--finetune-steps", 1,
        "--warmup-steps", 1, "--no-recalibrate", "--clip-grad-norm", 0.5, "--label-smoothing", 0.1,
        "--checkpoint-every", 7, "--no-report", "--export", "none", "--out", tmp_path / "run")  # fmt: skip
    told = {
        "recalibrate": False,
        "clip_grad_norm": 0.5,
        "label_smoothing": 0.1,
        "checkpoint_every": 7,
    }
    assert len(calls) == 2
    assert all(told.items() <= options.items() for options in calls)


def test_compress_stops_at_the_floor(tmp_path, monkeypatch, capsys):
    words = ("compress", *MODEL, *DATA, "--macs", 0.2, "--accuracy-floor", 0.7, "--lr", 0.05,
             "--no-augment", "--warmup-steps", 60, "--rounds", 1, "--finetune-steps", 0,
             "--no-recalibrate", "--max-pruning-ratio", 0.9, "--criterion", "random",
             "--out", tmp_path / "out", "--export", "none", "--no-report", "--json")  # fmt: skip
    assert run_main(monkeypatch, *words) == 3
    captured = capsys.readouterr()
    told = json.loads(captured.out)
    assert "below accuracy_floor=0.7" in told["stopped"]
    assert told["failed"] == []
    assert told["after"]["macs"] == told["before"]["macs"]  # not one round was good
    assert told["abandoned"]["macs"] <= 0.2 * told["before"]["macs"]
    load_pruned(load_model("net.py:make"), tmp_path / "out")


def test_labels_are_smoothed_in_the_warm_up_where_the_rounds_have_none(tmp_path):
    out = tmp_path / "out"
    run("compress", *MODEL, *DATA, "--macs", 0.8, "--rounds", 1, "--finetune-steps", 1, "--warmup-steps", 1,
        "--distill", 1, "--label-smoothing", 0.1, "--out", out, "--export", "none",
        "--no-report")  # fmt: skip
    for folder, smoothing in (("warmup", 0.1), ("checkpoint", 0.0)):
        newest = max((out / folder).glob("checkpoint-*.safetensors"))
        with safe_open(str(newest), framework="pt") as file:
            settings = json.loads(file.metadata()["singe"])["settings"]
        assert settings["label_smoothing"] == smoothing


def test_compare_files_and_criteria(tmp_path):
    for name in ("taylor", "magnitude"):
        run("score", *MODEL, *DATA, "--criterion", name, "--out", tmp_path / f"{name}.st")
    files = (tmp_path / "taylor.st", tmp_path / "magnitude.st")
    told = json.loads(run("compare", *files, "--json"))
    assert told["names"] == ["taylor", "magnitude"]
    assert "accuracy" not in told
    more = ("compare", *files, "--model", *MODEL, *DATA, "--criteria", "singe:network, random")
    told = json.loads(
        run(*more, "--macs", 0.6, "--finetune-steps", 2, "--out", tmp_path / "out", "--json")
    )
    assert list(told["accuracy"]) == ["taylor", "magnitude", "singe:network", "random"]
    assert np.shape(told["spearman"]) == (4, 4)
    full = told["cost"]["taylor"]["macs"]
    assert all(0.5 * full < cost["macs"] < 2 * full for cost in told["cost"].values())
    assert "after 2 steps" in (tmp_path / "out" / "report.json").read_text()
    told = json.loads(run("compare", "--model", *MODEL, *DATA, "--p", "fisher", "--json"))
    assert "magnitude (p=1)" in told["names"]
    assert "singe:layer" in told["names"]
    shown = run(*more)
    assert "Rank correlation" in shown
    assert "Overlap of the lowest 30%" in shown


def test_a_model_that_cannot_be_exported_is_still_saved_and_reported(tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise ExportError("cannot capture\nin many lines")

    monkeypatch.setattr("singe.cli.finish.export_pt2", fail)
    words = ("prune", *MODEL, "--criterion", "magnitude", "--macs", 0.5, "--image-size", 8,
             "--out", tmp_path / "out", "--json")  # fmt: skip
    assert run_main(monkeypatch, *words) == 2
    told = capsys.readouterr()
    assert set(json.loads(told.out)["files"]) == {"weights", "plan", "report"}
    assert told.err.strip().endswith("model.pt2 was not written: cannot capture")
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert {"model.safetensors", "plan.json", "report.html"} <= names


def test_quiet_says_nothing_but_the_result(tmp_path, monkeypatch, capsys):
    words = ("score", *MODEL, *DATA, "--quiet", "--out", tmp_path / "s.st")
    assert run_main(monkeypatch, *words) == 0
    captured = capsys.readouterr()
    assert "Scores:" in captured.out
    assert captured.err == ""


def test_options_become_arguments():
    scoring = ScoreOptions(quadrature="8", p="sum", layers=["a"], max_memory=2)
    assert scoring.arguments() == {
        "quadrature": 8, "p": "sum", "layers": ["a"], "max_memory": 2 * 2**20,
    }  # fmt: skip
    assert ScoreOptions(quadrature="trapezoid", p="2").arguments() == {
        "quadrature": "trapezoid", "p": 2,
    }  # fmt: skip
    budget = BudgetOptions(macs=0.5, min_keep=["0.2"], max_keep=["layer1=0.5", "fc=1"], round_to=8)
    assert budget.arguments() == {
        "macs": 0.5, "min_keep": 0.2, "max_keep": {"layer1": 0.5, "fc": 1.0}, "round_to": 8,
    }  # fmt: skip
    budget = BudgetOptions(timing_batch=3, timing_runs=5, timing_threads=2)
    assert budget.timing() == Timing(batch_size=3, runs=5, threads=2)


@pytest.mark.parametrize("command", ["score", "prune", "compress", "compare", "info", "demo"])
def test_every_command_has_help_and_json(command):
    shown = run(command, "--help")
    assert "--json" in shown
