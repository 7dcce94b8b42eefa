"""``singe score | prune | compress | compare`` on a tiny model and data: files, JSON, exit status."""

from __future__ import annotations

import copy
import inspect
import json
import re
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import (
    one_thread,  # noqa: F401 - autouse
)
from helpers_loop import same_weights
from PIL import Image
from safetensors.torch import save_model
from typer.testing import CliRunner

import singe
from singe import cli
from singe.cli.compress import time_left
from singe.cli.data import Reading, Source
from singe.cli.models import load_model
from singe.cli.options import BudgetOptions, DataOptions, ScoreOptions, TuningOptions
from singe.compress import accuracy, compress
from singe.data import read_batches
from singe.errors import (
    BudgetError,
    CheckpointError,
    ExportError,
    ModelError,
    OptionError,
    SingeError,
)
from singe.export import load_pruned
from singe.finetune import recalibrate

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


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with ``net.py`` and ``data.npz``: four classes of brightness, easy to learn."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "net.py").write_text(FACTORY)
    draw = np.random.default_rng(0)
    y = draw.integers(0, 4, 120)
    x = draw.integers(0, 60, (120, 8, 8, 3)) + 50 * y[:, None, None, None]
    np.savez(folder / "data.npz", x=x.astype(np.uint8), y=y)
    return folder


@pytest.fixture(autouse=True)
def inside(place, monkeypatch):
    monkeypatch.chdir(place)


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


def test_prune_from_scores_leaves_a_model_that_loads(tmp_path):
    run("score", *MODEL, *DATA, "--out", tmp_path / "s.st")
    out = tmp_path / "out"
    told = json.loads(
        run("prune", *MODEL, *DATA, "--scores", tmp_path / "s.st", "--macs", 0.6, "--out", out,
            "--json")
    )  # fmt: skip
    assert told["after"]["macs"] <= 0.6 * told["before"]["macs"]
    assert set(told["files"]) == {"weights", "plan", "pt2", "report"}
    model = load_pruned(load_model("net.py:make"), out)
    x = torch.randn(3, 3, 8, 8)
    assert torch.allclose(torch.export.load(told["files"]["pt2"]).module()(x), model(x), atol=1e-5)
    assert "Why these channels went" in (out / "report.html").read_text()
    # The plan replays on a fresh model; the report says the same.
    plan = singe.Plan.load(out / "plan.json")
    assert singe.prune(load_model("net.py:make"), plan, x).macs_after == told["after"]["macs"]
    groups = json.loads((out / "report.json").read_text())["groups"]
    assert {g: v["removed"] for g, v in groups.items() if v["removed"]} == dict(plan)
    again = json.loads(
        run("prune", *MODEL, *DATA, "--plan", out / "plan.json", "--out", tmp_path / "again",
            "--export", "none", "--no-report", "--json")
    )  # fmt: skip
    assert again["after"] == told["after"]
    assert set(again["files"]) == {"weights", "plan"}


def test_latency_is_told_with_its_spread(tmp_path):
    words = ("prune", *MODEL, "--input-shape", "3,8,8", "--criterion", "magnitude", "--macs", 0.5,
             "--out", tmp_path, "--export", "none", "--no-report", "--timing-runs", 4,
             "--timing-threads", 1, "--timing-batch", 3)  # fmt: skip
    found = json.loads(run(*words, "--json"))["latency"]
    assert (found["runs"], found["batch_size"], found["device"]) == (4, 3, "cpu, 1 thread")
    for name in ("before", "after", "ratio"):
        low, high = found[f"{name}_quartiles"]
        assert 0 < low <= found[name] <= high
    number = r"[\d.]+ \([\d.]+-[\d.]+\)"
    told = (
        rf"latency +{number} -> {number} ms, ratio {number}: median \(quartiles\) of 4 runs in turn"
    )
    assert re.search(told + ", batch 3, cpu, 1 thread", run(*words))


def test_prune_without_data_takes_the_shape_that_was_scored(tmp_path):
    run("score", *MODEL, *DATA, "--out", tmp_path / "s.st")
    words = ("prune", *MODEL, "--scores", tmp_path / "s.st", "--macs", 0.6, "--dry-run", "--json")
    planned = json.loads(run(*words))["meta"]["before"]["macs"]
    with_data = json.loads(run(*words, *DATA))["meta"]["before"]["macs"]
    assert planned == with_data
    assert json.loads(run(*words, "--input-shape", "3,6,6"))["meta"]["before"]["macs"] < planned


def test_prune_without_data_says_what_it_takes_for_inputs(monkeypatch, capsys):
    words = ("prune", *MODEL, "--criterion", "magnitude", "--macs", 0.5, "--dry-run")
    assert run_main(monkeypatch, *words) == 0
    said = "no data: inputs are taken to be 3 x 224 x 224; set --input-shape to change that\n"
    assert capsys.readouterr().err == said
    assert run_main(monkeypatch, *words, "--input-shape", "3,8,8") == 0
    assert capsys.readouterr().err == ""


@pytest.fixture(scope="module")
def trained(place):
    """Weights of the tiny model after a few steps, and what the commands read of its data."""
    model = load_model(f"{place / 'net.py'}:make")
    data = Source(str(place / "data.npz")).read(model, Reading(batch_size=16, augment=False))
    optimizer = torch.optim.SGD(model.train().parameters(), lr=0.05, momentum=0.9)
    for _ in range(10):
        for x, y in data.train:
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    save_model(model, str(place / "trained.safetensors"))
    return model.eval(), data


def test_prune_sets_the_statistics_of_batch_norm_again(trained, tmp_path):
    """On the calibration samples, the same in every run; accuracy is told before it and after."""
    words = ("prune", *MODEL, *DATA, "--weights", "trained.safetensors", "--macs", 0.5,
             "--criterion", "magnitude", "--export", "none")  # fmt: skip
    told = json.loads(run(*words, "--out", tmp_path / "a", "--json"))
    model, data = copy.deepcopy(trained[0]), trained[1]
    plan = singe.Plan.load(tmp_path / "a" / "plan.json")
    singe.prune(model, plan, data.calibrate[0][0])
    removed = accuracy(model, data.evaluate)
    recalibrate(model, read_batches(data.calibrate, torch.device("cpu")))
    assert accuracy(model, data.evaluate) > removed + 0.1, "or this tests nothing"
    left = load_pruned(load_model("net.py:make"), tmp_path / "a")
    assert same_weights(left, model)
    assert told["recalibrated"]
    assert told["metric_after_removal"] == removed
    assert told["after"]["metric"] == accuracy(model, data.evaluate)
    steps = f"{removed:.1%} -> {told['after']['metric']:.1%}"
    assert steps in json.loads((tmp_path / "a" / "report.json").read_text())["lead"]
    shown = run(*words, "--out", tmp_path / "b", "--no-report")
    assert f"-> {steps} (BatchNorm statistics set again)" in shown
    first, second = (tmp_path / name / "model.safetensors" for name in "ab")
    assert first.read_bytes() == second.read_bytes()


def test_prune_leaves_the_statistics_where_it_is_told_to(trained, tmp_path):
    words = ("prune", *MODEL, *DATA, "--weights", "trained.safetensors", "--export", "none",
             "--criterion", "magnitude")  # fmt: skip
    for out, options in (("a", ("--macs", 0.5, "--no-recalibrate")), ("b", ("--macs", 1.0))):
        told = json.loads(run(*words, *options, "--out", tmp_path / out, "--json"))
        assert not told["recalibrated"]
        assert told["metric_after_removal"] == told["after"]["metric"]
        report = json.loads((tmp_path / out / "report.json").read_text())
        assert "BatchNorm" not in report["lead"]
        model = copy.deepcopy(trained[0])
        singe.prune(model, singe.Plan.load(tmp_path / out / "plan.json"), torch.zeros(2, 3, 8, 8))
        assert same_weights(load_pruned(load_model("net.py:make"), tmp_path / out), model)


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


def test_nothing_of_an_earlier_result_stays_beside_new_weights(tmp_path):
    words = ("prune", *MODEL, "--input-shape", "3,8,8", "--criterion", "magnitude", "--macs", 0.5)
    run(*words, "--out", tmp_path)
    assert (tmp_path / "model.pt2").exists()
    (tmp_path / "model.onnx").write_bytes(b"an earlier export")
    (tmp_path / "mine.txt").write_text("not of this command")
    run(*words, "--out", tmp_path, "--export", "none", "--no-report")
    names = {path.name for path in tmp_path.iterdir() if path.is_file()}
    assert names == {"model.safetensors", "plan.json", "mine.txt"}


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


LOADER = """
import torch
def make(): return [(torch.randn(4, 3, 8, 8), torch.arange(4))] * 3
def parts(): return {"calibrate": make()}
def grey(): return [(torch.randn(4, 1, 8, 8), torch.arange(4))]
"""
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
    assert "stopped early" in captured.err
    assert told["after"]["macs"] == told["before"]["macs"]  # not one round was good
    load_pruned(load_model("net.py:make"), tmp_path / "out")


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


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("compare",), "at least two"),
        (("compare", "--macs", 0.5), "need --model"),
        (("prune", *MODEL, *DATA), "exactly one"),
        (("prune", *MODEL, *DATA, "--macs", 0.5, "--params", 0.5), "exactly one"),
        (("prune", *MODEL, *DATA, "--macs", 0.5, "--plan", "p.json"), "--plan says"),
        (("prune", *MODEL, *DATA, "--macs", 0.5, "--export", "tflite"), "tflite is not offered"),
        (("score", *MODEL, *DATA, "--criterion", "tailor"), "tailor"),
        (("score", *MODEL, *DATA, "--mean", "a,b"), "--mean"),
        (("score", *MODEL, "--device", "abacus"), "abacus"),
        (("compress", *MODEL, "--macs", 0.5), "compress needs data"),
        (("compress", *MODEL, *DATA, "--macs", 0.5, "--optimizer", "lion"), "lion"),
        (("prune", *MODEL, *DATA, "--macs", 0.5, "--min-keep", "a=b"), "--min-keep"),
    ],
)
def test_wrong_use(words, message, tmp_path):
    with pytest.raises(SingeError, match=message):
        run(*words, *(() if words[0] == "compare" else ("--out", tmp_path / "out")))


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


def test_the_time_left_is_told_after_each_round_but_the_last(tmp_path):
    class Listener:
        said: tuple[str, ...] = ()

        def step(self, line):
            self.said += (line,)

    listener = Listener()

    def told(rounds):
        listener.said = ()
        tell = time_left(TuningOptions(rounds=3), tmp_path, listener)
        for _ in range(rounds):
            tell(None, None, None)
        return [line.split(" left, ")[1] for line in listener.said]

    assert told(3) == ["2 of 3 rounds", "1 of 3 rounds"]
    (tmp_path / "report.json").write_text('{"rounds": [{}]}')  # the first is over: a run goes on
    assert told(2) == ["1 of 3 rounds"]


def test_quiet_says_nothing_but_the_result(tmp_path, monkeypatch, capsys):
    words = ("score", *MODEL, *DATA, "--quiet", "--out", tmp_path / "s.st")
    assert run_main(monkeypatch, *words) == 0
    captured = capsys.readouterr()
    assert "Scores:" in captured.out
    assert captured.err == ""


# ---------------------------------------------------------------------- options from a file


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
        ("= 3", "cannot read the configuration"),
    ],
)
def test_a_wrong_file(tmp_path, text, message):
    (tmp_path / "c.toml").write_text(text)
    with pytest.raises(OptionError, match=message):
        run("score", *MODEL, "--config", tmp_path / "c.toml")


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


@pytest.mark.parametrize("command", ["score", "prune", "compress", "compare", "info", "demo"])
def test_every_command_has_help_and_json(command):
    shown = run(command, "--help")
    assert "--json" in shown
