"""``singe compare``: what the criteria are compared on, and what a report compares of its own accord."""

from __future__ import annotations

import importlib
import json

import pytest
from helpers import (
    one_thread,  # noqa: F401 - autouse
)
from helpers_cli import DATA, FACTORY, MODEL, run, run_main

from singe.errors import OptionError, ScoresError

pytestmark = pytest.mark.usefixtures("inside")
COMPARE = ("compare", "--model", *MODEL, *DATA, "--json")


def test_the_seed_reaches_the_scores():
    first, again, other = (
        json.loads(run(*COMPARE, "--criteria", "random,magnitude", "--seed", seed))["spearman"]
        for seed in (0, 0, 1)
    )
    assert first == again
    assert first != other


def test_every_copy_gets_statistics_of_its_own(monkeypatch):
    command = importlib.import_module("singe.cli.compare")  # singe.cli has the function
    pruned, own = [], command.set_statistics

    def noted(inputs, seed):
        pruned.append(inputs.model)
        own(inputs, seed)

    monkeypatch.setattr(command, "set_statistics", noted)
    run(*COMPARE, "--criteria", "random,magnitude", "--macs", 0.6)
    assert len({id(model) for model in pruned}) == 2


def test_an_earlier_result_keeps_its_report(tmp_path):
    out = tmp_path / "out"
    run("prune", *MODEL, *DATA, "--macs", 0.5, "--export", "none", "--out", out)
    before = (out / "report.html").read_text()
    words = ("compare", "--model", *MODEL, *DATA, "--criteria", "magnitude,random", "--out")
    with pytest.raises(OptionError, match="holds a pruned model or a run, whose report"):
        run(*words, out)
    assert (out / "report.html").read_text() == before
    run(*words, tmp_path / "other", "--share", 0.25)
    settings = json.loads((tmp_path / "other" / "report.json").read_text())["settings"]
    assert settings["share"] == 0.25
    assert settings["criteria"] == "magnitude, random"


def test_score_files_alone_are_told_what_has_no_say(tmp_path, monkeypatch, capsys):
    """A notice, not a refusal: one file of options may serve several commands."""
    files = [tmp_path / "a.st", tmp_path / "b.st"]
    for file, criterion in zip(files, ("magnitude", "random"), strict=True):
        run("score", *MODEL, "--criterion", criterion, "--input-shape", "3,8,8", "--out", file)
    words = (
        "compare",
        *files,
        "--weights",
        "w.pt",
        "--data",
        "nowhere",
        "--image-size",
        3,
        "--lr",
        5,
    )
    assert run_main(monkeypatch, *words) == 0
    assert capsys.readouterr().err.splitlines() == [
        "--weights, --data, --image-size: no say without --model",
        "--lr: no say without --finetune-steps",
    ]


def test_scores_of_another_model_are_refused(tmp_path):
    (tmp_path / "other.py").write_text(FACTORY.replace("8, 12, 3", "8, 12, 5"))
    run("score", f"{tmp_path / 'other.py'}:make", "--device", "cpu", *DATA,
        "--criterion", "magnitude", "--out", tmp_path / "s.st")  # fmt: skip
    with pytest.raises(ScoresError, match="belong to another model"):
        run(*COMPARE, tmp_path / "s.st", "--criteria", "random")


@pytest.mark.parametrize(
    ("objective", "others"), [("cross_entropy", ["taylor", "magnitude"]), ("kl", ["magnitude"])]
)
def test_a_report_leaves_out_what_its_objective_says_nothing_to(tmp_path, objective, others):
    """The divergence from a network is flat at that network, where Taylor looks."""
    run("prune", *MODEL, *DATA, "--channels", 0.8, "--objective", objective, "--path", "network",
        "--quadrature", 2, "--out", tmp_path / "out", "--export", "none")  # fmt: skip
    names = json.loads((tmp_path / "out" / "report.json").read_text())["criteria"]["names"]
    assert names == ["singe, network path", *others]
