"""A run that is interrupted anywhere ends with the same bits as one that is not."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import (
    one_thread,  # noqa: F401 - autouse
    randomise,
)
from helpers_checkpoint import (
    BATCHES,
    OPTIMIZERS,
    SCHEDULERS,
    Evaluate,
    Power,
    compress,
    loader,
    network,
)
from helpers_loop import same_weights
from helpers_networks import residual
from safetensors.torch import load_file

import singe
from singe.checkpoint import Folder, pack, unpack
from singe.rounds import CompressReport

ROOT = Path(__file__).resolve().parents[1]


def steep(outputs: torch.Tensor, batch) -> torch.Tensor:
    """Overflows float16 until its scale has been halved a few times."""
    return 1e4 * torch.nn.functional.cross_entropy(outputs.float(), batch[1])


@pytest.mark.parametrize("after", [0, 7, 31, 45])
@pytest.mark.parametrize(("optimizer", "scheduler"), [("sgd", "warm_up"), ("adamw", "one_cycle")])
def test_cut_off_in_the_middle_of_a_batch(tmp_path, optimizer, scheduler, after):
    def run(model, folder, data):
        return compress(
            model, folder, optimizer=OPTIMIZERS[optimizer], scheduler=SCHEDULERS[scheduler],
            distill=0.3, train=data,
        )  # fmt: skip

    whole, cut = network(), network()
    expected = run(whole, None, loader())
    with pytest.raises(Power):
        run(cut, tmp_path, loader(after))
    assert same_weights(cut, network()), "the interrupted process leaves its model as it was"
    found = run(cut, tmp_path, loader())
    assert same_weights(cut, whole)
    assert [r.metric_finetuned for r in found.rounds] == [
        r.metric_finetuned for r in expected.rounds
    ]
    assert [r.finetune_loss for r in found.rounds] == [r.finetune_loss for r in expected.rounds]
    assert dict(found.plan) == dict(expected.plan)


@pytest.mark.parametrize("saves", [1, 2, 3, 5, 8])
def test_cut_off_around_a_checkpoint(tmp_path, monkeypatch, saves):
    """Just before the n-th checkpoint takes its place."""
    whole, cut = network(), network()
    compress(whole)
    write, left = Folder.save, [saves]

    def save(folder, state):
        left[0] -= 1
        if left[0] == 0:
            raise Power
        return write(folder, state)

    with monkeypatch.context() as patch:
        patch.setattr(Folder, "save", save)
        with pytest.raises(Power):
            compress(cut, tmp_path)
    compress(cut, tmp_path)
    assert same_weights(cut, whole)


@pytest.mark.parametrize(
    "options",
    [
        {"order": "layerwise", "rounds": None, "visit": "damage"},
        {"accuracy_floor": 0.0, "clip_grad_norm": 0.5, "label_smoothing": 0.1},
        {"criterion": "random", "ranking": "cost", "schedule": "cubic", "autocast": torch.bfloat16},
        {"criterion": "random", "autocast": torch.float16, "finetune_objective": steep},
    ],
)
def test_other_runs_resume_as_well(tmp_path, options):
    whole, cut = network(), network()
    compress(whole, **options)
    with pytest.raises(Power):
        compress(cut, tmp_path, evaluate=Evaluate(4), **options)
    compress(cut, tmp_path, evaluate=Evaluate(10**9), **options)
    assert same_weights(cut, whole)


def test_the_average_of_a_half_type_is_continued_in_float32(tmp_path):
    batches = [(x.bfloat16(), y) for x, y in BATCHES]
    options = {"train": batches, "calibrate": batches, "ema": 0.999}
    whole, cut = network().bfloat16(), network().bfloat16()
    compress(whole, evaluate=Evaluate(99), **options)
    with pytest.raises(Power):
        compress(cut, tmp_path, evaluate=Evaluate(4), **options)
    compress(cut, tmp_path, evaluate=Evaluate(99), **options)
    assert same_weights(cut, whole)
    newest = Folder(tmp_path, {}).files()[-1]
    assert any(t.dtype == torch.float32 for t in load_file(newest).values())


def test_layouts_and_frozen_layers_survive(tmp_path):
    """Channels-last weights come back channels-last: another layout sums in another order."""

    def build():
        torch.manual_seed(0)
        model = randomise(residual()).to(memory_format=torch.channels_last)
        model[0].weight.requires_grad_(False)
        return model

    batches = [(x[:, :, :6, :6].contiguous(), y) for x, y in BATCHES]
    options = {"train": batches, "calibrate": batches, "macs": 0.6}
    whole, cut = build(), build()
    compress(whole, **options, evaluate=Evaluate(99))
    with pytest.raises(Power):
        compress(cut, tmp_path, evaluate=Evaluate(3), **options)
    compress(cut, tmp_path, evaluate=Evaluate(99), **options)
    assert same_weights(cut, whole)
    assert not cut[0].weight.requires_grad
    strides = [t.stride() for t in whole.state_dict().values()]
    assert [t.stride() for t in cut.state_dict().values()] == strides


def test_a_roll_back_after_resuming(tmp_path):
    """The last good round is in the checkpoint, not only in the memory of the process that died."""

    def metric(values):
        values = iter(values)

        def evaluate(model):
            value = next(values)
            if value is None:
                raise Power
            return value

        return evaluate

    options = {"accuracy_floor": 0.7, "rounds": 3, "macs": 0.4}
    whole, cut = network(), network()
    expected = compress(whole, evaluate=metric([1.0, 0.9, 0.9, 0.5, 0.6]), **options)
    with pytest.raises(Power):
        compress(cut, tmp_path, evaluate=metric([1.0, 0.9, 0.9, 0.5, None]), **options)
    found = compress(cut, tmp_path, evaluate=metric([0.6]), **options)
    assert found.stopped == expected.stopped
    assert len(found.rounds) == 1
    assert same_weights(cut, whole)


def test_a_finetune_function_resumes_at_its_round(tmp_path):
    calls = []

    def finetune(model, stage):
        calls.append(stage.round)
        if calls == [1, 2]:
            raise Power
        with torch.no_grad():
            for p in model.parameters():
                p += 0.01 * torch.randn(p.shape)

    whole, cut = network(), network()
    with pytest.raises(Power):
        compress(cut, tmp_path, finetune=finetune, ema=None)
    compress(cut, tmp_path, finetune=finetune, ema=None)
    assert calls == [1, 2, 2]
    compress(whole, finetune=finetune, ema=None)
    assert same_weights(cut, whole)


def test_what_a_finetune_function_has_frozen_stays_frozen(tmp_path):
    """Head first, then all: a run that is continued trains what the other would."""
    calls = []

    def finetune(model, stage):
        calls.append(stage.round)
        if calls == [1, 2]:
            raise Power
        if stage.round == 1:
            model[1].requires_grad_(False)
        return float(not model[1].weight.requires_grad)

    cut, whole = network(), network()
    with pytest.raises(Power):
        compress(cut, tmp_path, finetune=finetune, ema=None)
    report = compress(cut, tmp_path, finetune=finetune, ema=None)
    assert calls == [1, 2, 2]
    assert [r.finetune_loss for r in report.rounds] == [1.0, 1.0]
    compress(whole, finetune=finetune, ema=None)
    assert [p.requires_grad for p in cut.parameters()] == [
        p.requires_grad for p in whole.parameters()
    ]
    assert not cut[1].weight.requires_grad


def test_a_finished_run_is_not_run_again(tmp_path):
    model, again, rounds = network(), network(), []
    report = compress(model, tmp_path)
    found = compress(
        again, tmp_path, on_round=lambda *r: rounds.append(r), train=[(torch.empty(0), None)]
    )
    assert rounds == []
    assert same_weights(model, again)
    assert found.to_dict() == report.to_dict()


def test_what_is_in_the_folder(tmp_path):
    report = compress(network(), tmp_path)
    names = sorted(p.name for p in tmp_path.iterdir())
    assert [n for n in names if not n.startswith("checkpoint")] == [
        "plan.json", "report.json",
        "round-01.plan.json", "round-01.scores.safetensors",
        "round-02.plan.json", "round-02.scores.safetensors",
    ]  # fmt: skip
    assert sum(n.startswith("checkpoint") for n in names) == 2
    assert dict(singe.Plan.load(tmp_path / "plan.json")) == dict(report.plan)
    first = singe.Plan.load(tmp_path / "round-01.plan.json")
    scores = singe.Scores.load(tmp_path / "round-01.scores.safetensors")
    assert set(first) <= set(scores)
    assert first.n_units == report.rounds[0].units_removed


def test_a_metric_or_a_loss_that_is_no_number_is_null_in_the_report(tmp_path):
    """The checkpoint keeps it as it is."""

    def refuse(constant):
        pytest.fail(f"{constant} is no JSON")

    numbers = {"evaluate": lambda m: math.nan, "finetune": lambda m, s: math.inf, "ema": None}
    report = compress(network(), tmp_path, **numbers)
    text = (tmp_path / "report.json").read_text()
    back = CompressReport.from_dict(json.loads(text, parse_constant=refuse))
    assert (back.metric_before, back.metric_after, back.rounds[0].finetune_loss) == (None,) * 3
    assert back.macs_after == report.macs_after
    assert dict(back.plan) == dict(report.plan)
    again = compress(network(), tmp_path, **numbers)
    for found in (report, again):
        assert math.isnan(found.metric_before)
        assert math.isnan(found.metric_after)
        assert found.rounds[0].finetune_loss == math.inf


def test_a_resumed_run_goes_on_counting(tmp_path):
    """Older checkpoints are gone by then: their number says nothing."""
    folder = Folder(tmp_path, {})
    for number in range(5):
        folder.save({"number": number})
    Folder(tmp_path, {}).save({"number": 5})
    assert Folder(tmp_path, {}).newest() == {"number": 5}


def test_containers_come_back_as_they_were():
    value = {
        "a": (1, 2.5, float("inf"), None, True, "x"),
        3: [torch.arange(6).view(2, 3).t(), torch.tensor(1.5, dtype=torch.bfloat16)],
        "empty": {}, "none": [torch.empty(0, 3)], "numpy": np.float32(0.5),
    }  # fmt: skip
    tensors: dict = {}
    back = unpack(json.loads(json.dumps(pack(value, tensors))), tensors)
    assert back["a"] == value["a"]
    assert list(back) == ["a", 3, "empty", "none", "numpy"]
    assert back["numpy"] == 0.5
    assert type(back["numpy"]) is float
    for left, right in zip(back[3] + back["none"], value[3] + value["none"], strict=True):
        assert torch.equal(left, right)
        assert left.dtype == right.dtype
        assert left.stride() == right.stride()


def test_kill_9(tmp_path):
    """A process that is killed outright, twice, and continued."""
    pytest.importorskip("sklearn", reason="the data is scikit-learn's digits")

    def start(folder, out):
        command = [sys.executable, "-m", "benchmarks.resume", "--work", folder, out, "15"]
        return subprocess.Popen(
            list(map(str, command)), cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )

    assert start(tmp_path / "alone", tmp_path / "alone.st").wait(300) == 0
    folder = tmp_path / "killed"
    for number in (1, 8):
        process = start(folder, tmp_path / "killed.st")
        while process.poll() is None and not number_reached(folder, number):
            time.sleep(0.01)
        assert process.poll() is None, "it finished before it could be killed"
        process.send_signal(signal.SIGKILL)
        process.wait(60)
    assert start(folder, tmp_path / "killed.st").wait(300) == 0
    alone, killed = load_file(tmp_path / "alone.st"), load_file(tmp_path / "killed.st")
    assert alone.keys() == killed.keys()
    assert all(torch.equal(alone[n], killed[n]) for n in alone)


def number_reached(folder: Path, number: int) -> bool:
    files = folder.glob("checkpoint-*.safetensors")
    return folder.exists() and max((int(f.stem[-6:]) for f in files), default=0) >= number
