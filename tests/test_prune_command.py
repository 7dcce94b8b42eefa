"""``singe prune``: one shot, what it says and what it leaves."""

from __future__ import annotations

import copy
import json
import re

import pytest
import torch
from helpers import (
    one_thread,  # noqa: F401 - autouse
)
from helpers_cli import DATA, MODEL, run, run_main
from helpers_loop import same_weights
from safetensors.torch import save_model

import singe
from singe.cli.data import Reading, Source
from singe.cli.folders import holds_run
from singe.cli.models import load_model
from singe.data import read_batches
from singe.errors import OptionError
from singe.evaluation import accuracy
from singe.export import load_pruned
from singe.recalibration import recalibrate

pytestmark = pytest.mark.usefixtures("inside")


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
    # A dry run looks at the model as well.
    words = ("--plan", out / "plan.json", "--dry-run", "--json")
    assert json.loads(run("prune", *MODEL, *DATA, *words))["plan"] == dict(plan)
    with pytest.raises(singe.SingeError):
        run("prune", "torchvision:resnet18", "--input-shape", "3,32,32", *words)


def test_scores_that_are_made_take_no_scoring_options_but_ignore(tmp_path):
    run("score", *MODEL, *DATA, "--out", tmp_path / "s.st")
    words = ("prune", *MODEL, *DATA, "--scores", tmp_path / "s.st", "--macs", 0.6, "--dry-run")
    with pytest.raises(singe.OptionError, match="made already: leave out criterion, layers"):
        run(*words, "--criterion", "magnitude", "--layer", "0")
    first = next(iter(json.loads(run(*words, "--json"))["plan"]))
    assert first not in json.loads(run(*words, "--ignore", first, "--json"))["plan"]
    with pytest.raises(singe.SingeError, match="nosuchlayer"):
        run(*words, "--ignore", "nosuchlayer")


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
    compared = run("compare", "--model", *words[1:12], "--criteria", "magnitude,random", "--json")
    assert json.loads(compared)["accuracy"]["magnitude"] == told["after"]["metric"]


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


def test_nothing_of_an_earlier_result_stays_beside_new_weights(tmp_path):
    words = ("prune", *MODEL, "--input-shape", "3,8,8", "--criterion", "magnitude", "--macs", 0.5)
    run(*words, "--out", tmp_path)
    assert (tmp_path / "model.pt2").exists()
    (tmp_path / "model.onnx").write_bytes(b"an earlier export")
    (tmp_path / "mine.txt").write_text("not of this command")
    run(*words, "--out", tmp_path, "--export", "none", "--no-report")
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"model.safetensors", "plan.json", "mine.txt"}


def test_what_a_result_starts_from_is_not_written_over(tmp_path):
    out = tmp_path / "out"
    words = ("prune", *MODEL, *DATA, "--macs", 0.8, "--export", "none", "--no-report", "--out")
    run(*words, out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    for weights in (out, out / "model.safetensors"):
        with pytest.raises(OptionError, match="is where --weights come from"):
            run(*words, out, "--weights", weights)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    run(*words, tmp_path / "again", "--weights", out)
    beside = (out / "model.safetensors").rename(tmp_path / "beside.safetensors")
    run(*words, tmp_path, "--weights", beside)  # other files there are not in the way


def test_the_report_says_what_decided(tmp_path):
    words = ("prune", *MODEL, *DATA, "--macs", 0.8, "--export", "none", "--out")
    run(*words, tmp_path / "a")
    settings = json.loads((tmp_path / "a" / "report.json").read_text())["settings"]
    expected = {
        "criterion": "singe", "path": "layer", "p": "fisher", "norm": "inside", "ranking": "cost",
        "max_pruning_ratio": 0.75, "macs": 0.8,
    }  # fmt: skip
    assert settings.items() >= expected.items()
    run(*words, tmp_path / "c", "--criterion", "random")
    settings = json.loads((tmp_path / "c" / "report.json").read_text())["settings"]
    assert settings["criterion"] == "random"
    assert not {"path", "p", "norm", "objective"} & settings.keys(), "they had no say"
    plan = tmp_path / "a" / "plan.json"
    run("prune", *MODEL, *DATA, "--plan", plan, "--export", "none", "--out", tmp_path / "b")
    settings = json.loads((tmp_path / "b" / "report.json").read_text())["settings"]
    assert settings.items() >= {"criterion": "singe", "ranking": "cost"}.items()
    assert "max_pruning_ratio" not in settings
    pictures = {path.stem for path in (tmp_path / "b" / "pictures").iterdir()}
    assert pictures == {"layers", "layers-dark", "latency", "latency-dark"}


def test_files_that_are_not_of_a_result_are_left_alone(tmp_path):
    (tmp_path / "report.html").write_text("the user's own")
    words = ("prune", *MODEL, "--input-shape", "3,8,8", "--criterion", "magnitude", "--macs", 0.5)
    run(*words, "--out", tmp_path, "--export", "none", "--no-report")
    assert (tmp_path / "report.html").read_text() == "the user's own"


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


def test_without_a_report_nothing_is_made_for_one(tmp_path, monkeypatch):
    monkeypatch.setattr("singe.cli.finish.explain", None)
    words = ("--macs", 0.6, "--export", "none", "--no-report", "--json")
    told = json.loads(run("prune", *MODEL, *DATA, *words, "--out", tmp_path / "out"))
    assert set(told["files"]) == {"weights", "plan"}


@pytest.mark.parametrize("folder", [".", "checkpoint", "warmup"])
def test_a_run_of_compress_is_known_by_its_checkpoints_wherever_it_is(tmp_path, folder):
    (tmp_path / folder).mkdir(exist_ok=True)
    (tmp_path / folder / "scores-1.safetensors").touch()
    assert not holds_run(tmp_path)
    (tmp_path / folder / "checkpoint-1.safetensors").touch()
    assert holds_run(tmp_path)
