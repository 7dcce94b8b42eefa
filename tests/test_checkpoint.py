"""A run that is interrupted anywhere ends with the same bits as one that is not."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import (
    assert_unchanged,
    clone,
    make_batches,
    one_thread,  # noqa: F401 - autouse
    randomise,
    snapshot,
)
from helpers_loop import same_weights
from helpers_networks import residual, vgg
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import singe
from singe.checkpoint import Folder, pack, unpack
from singe.settings import as_json

ROOT = Path(__file__).resolve().parents[1]
BATCHES = make_batches((3, 8, 8), (4, 4, 4), dtype=torch.float32)


class Power(BaseException):
    """The power is cut: nothing catches this."""


def network() -> nn.Module:
    torch.manual_seed(0)
    model = randomise(vgg((8, 10, 9), 12))
    model[12] = nn.Sequential(nn.Flatten(), nn.Dropout(0.1))
    return model


def loader(after: int = 10**9) -> DataLoader:
    return DataLoader(Cut(after), batch_size=5, shuffle=True)


def compress(model: nn.Module, folder=None, **options) -> singe.CompressReport:
    options = {
        "macs": 0.5, "rounds": 2, "finetune_steps": 6, "checkpoint_every": 2, "train": loader(),
        "calibrate": BATCHES, "evaluate": BATCHES, "ema": 0.9, "resume": folder is not None,
        "progress": False,
    } | options  # fmt: skip
    return singe.compress(model, checkpoint=folder, **options)


def steep(outputs: torch.Tensor, batch) -> torch.Tensor:
    """Overflows float16 until its scale has been halved a few times."""
    return 1e4 * torch.nn.functional.cross_entropy(outputs.float(), batch[1])


class Cut(TensorDataset):
    """Cuts the power when the n-th sample is read."""

    def __init__(self, after: int) -> None:
        super().__init__(torch.cat([b[0] for b in BATCHES]), torch.cat([b[1] for b in BATCHES]))
        self.left = after

    def __getitem__(self, index):
        self.left -= 1
        if self.left < 0:
            raise Power
        return super().__getitem__(index)


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, nesterov=True),
    "adamw": lambda p: torch.optim.AdamW(p, 1e-2, amsgrad=True),
}
SCHEDULERS = {
    "one_cycle": lambda o, steps: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=steps + 1),
    "warm_up": lambda o, steps: torch.optim.lr_scheduler.SequentialLR(
        o, [torch.optim.lr_scheduler.LinearLR(o, total_iters=2),
            torch.optim.lr_scheduler.CosineAnnealingLR(o, steps)], [2],
    ),
}  # fmt: skip


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


class Evaluate:
    """Cuts the power at the n-th evaluation."""

    def __init__(self, left: int) -> None:
        self.left = left

    def __call__(self, model: nn.Module) -> float:
        self.left -= 1
        if self.left < 0:
            raise Power
        return 1.0


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


# ---------------------------------------------------------------------- what goes wrong


def interrupted(folder: Path) -> None:
    with pytest.raises(Power):
        compress(network(), folder, evaluate=Evaluate(4))


class Trainer:
    """A callable object: what it prints as has an address in it."""

    def __call__(self, model, stage):
        return None


@pytest.mark.parametrize(
    "make",
    [
        lambda: {"finetune": Trainer(), "ema": None},
        lambda: {"scheduler": partial(SCHEDULERS["one_cycle"])},
        lambda: {"ignore": {"0", "1", "2"}, "macs": 0.7},
        lambda: {"optimizer": partial(OPTIMIZERS["sgd"])},
    ],
)
def test_the_same_options_made_again_are_the_same_run(tmp_path, make):
    compress(network(), tmp_path, **make())
    compress(network(), tmp_path, **make())


def test_another_rate_in_a_partial_is_another_run(tmp_path):
    compress(network(), tmp_path, optimizer=partial(torch.optim.SGD, lr=0.1))
    with pytest.raises(singe.CheckpointError, match=r"SGD\(lr=0.1, ...\).*SGD\(lr=0.2"):
        compress(network(), tmp_path, optimizer=partial(torch.optim.SGD, lr=0.2))


def test_files_of_others_in_the_folder_are_left_alone(tmp_path):
    theirs = tmp_path / "checkpoint-best.safetensors"
    theirs.write_bytes(b"theirs")
    compress(network(), tmp_path)
    assert theirs.read_bytes() == b"theirs"


@pytest.mark.parametrize("damage", ["truncate", "flip", "empty", "other"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path, damage):
    interrupted(tmp_path)
    older, newest = sorted(tmp_path.glob("checkpoint-*"))
    content = newest.read_bytes()
    middle = len(content) * 3 // 4
    newest.write_bytes({
        "truncate": content[:middle],
        "flip": content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :],
        "empty": b"",
        "other": (tmp_path / "round-01.scores.safetensors").read_bytes(),
    }[damage])  # fmt: skip
    whole, cut = network(), network()
    compress(whole, evaluate=Evaluate(99))
    with pytest.warns(UserWarning, match=rf"{newest.name} is damaged.*from {older.name}"):
        compress(cut, tmp_path, evaluate=Evaluate(99))
    assert same_weights(cut, whole)


def test_no_checkpoint_that_can_be_read(tmp_path):
    interrupted(tmp_path)
    for path in tmp_path.glob("checkpoint-*"):
        path.write_bytes(b"nothing")
    model = network()
    before = snapshot(model)
    with pytest.raises(
        singe.CheckpointError, match=r"no checkpoint in .* can be read.*start again"
    ):
        compress(model, tmp_path, evaluate=Evaluate(99))
    assert_unchanged(model, before, versions=False)


def test_a_checkpoint_of_another_run(tmp_path):
    interrupted(tmp_path)
    files = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    model = network()
    with pytest.raises(
        singe.CheckpointError, match=r"another run: finetune_steps was 6 and is now 7"
    ):
        compress(model, tmp_path, finetune_steps=7, evaluate=Evaluate(99))
    with torch.no_grad():
        model[0].weight[0] += 1e-3
    with pytest.raises(singe.CheckpointError, match=r"another run: model was"):
        compress(model, tmp_path, evaluate=Evaluate(99))
    with pytest.raises(singe.CheckpointError, match=r"holds a run already.*resume=True"):
        compress(network(), tmp_path, evaluate=Evaluate(99), resume=False)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == files


def test_a_full_disk(tmp_path):
    """The system refuses to write so much: the older checkpoint stays, and can be continued."""
    whole, cut = network(), network()
    compress(whole, evaluate=Evaluate(99))
    interrupted(tmp_path)
    files = {p.name: p.read_bytes() for p in tmp_path.glob("checkpoint-*")}
    before, limits = snapshot(cut), resource.getrlimit(resource.RLIMIT_FSIZE)
    # Larger than the readable files, smaller than a checkpoint.
    resource.setrlimit(resource.RLIMIT_FSIZE, (min(map(len, files.values())) // 2, limits[1]))
    try:
        with pytest.raises(singe.CheckpointError, match=r"cannot write.*(intact|\.json)"):
            compress(cut, tmp_path, evaluate=Evaluate(99))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert_unchanged(cut, before, versions=False)
    assert {p.name: p.read_bytes() for p in tmp_path.glob("checkpoint-*")} == files
    assert not list(tmp_path.glob(".*partial"))
    compress(cut, tmp_path, evaluate=Evaluate(99))
    assert same_weights(cut, whole)


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(singe.CheckpointError, match="cannot make the folder"):
        compress(network(), tmp_path / "file" / "run")


def test_an_optimizer_that_cannot_be_written(tmp_path):
    def factory(parameters):
        optimizer = torch.optim.SGD(parameters, 0.1, momentum=0.9)
        optimizer.param_groups[0]["secret"] = object()
        return optimizer

    model = network()
    before = snapshot(model)
    with pytest.raises(singe.CheckpointError, match="cannot hold a object"):
        compress(model, tmp_path, optimizer=factory)
    assert_unchanged(model, before, versions=False)


def test_training_data_that_has_shrunk(tmp_path):
    with pytest.raises(Power):
        compress(network(), tmp_path, train=BATCHES, evaluate=Evaluate(3))
    with pytest.raises(singe.DataError, match="fewer batches than when the checkpoint was written"):
        compress(network(), tmp_path, train=BATCHES[:1], evaluate=Evaluate(99))


def test_containers_come_back_as_they_were():
    value = {
        "a": (1, 2.5, float("inf"), None, True, "x"),
        3: [torch.arange(6).view(2, 3).t(), torch.tensor(1.5, dtype=torch.bfloat16)],
        "empty": {}, "none": [torch.empty(0, 3)],
    }  # fmt: skip
    tensors: dict = {}
    back = unpack(json.loads(json.dumps(pack(value, tensors))), tensors)
    assert back["a"] == value["a"]
    assert list(back) == ["a", 3, "empty", "none"]
    for left, right in zip(back[3] + back["none"], value[3] + value["none"], strict=True):
        assert torch.equal(left, right)
        assert left.dtype == right.dtype
        assert left.stride() == right.stride()


# ---------------------------------------------------------------------- kill -9


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


def test_a_model_given_twice_is_not_confused_with_its_copy(tmp_path):
    """Resuming works on any object that holds the original's values."""
    model = network()
    twin = clone(model)
    report = compress(model, tmp_path)
    assert compress(twin, tmp_path).macs_after == report.macs_after
    assert same_weights(model, twin)


def test_settings_know_functions_by_name_and_other_objects_by_type():
    """An address in memory would make every process another run."""

    def train(model, stage, loader, lr):
        pass

    told = {as_json(partial(train, loader=DataLoader([1]), lr=0.1), network()) for _ in range(2)}
    assert len(told) == 1
    assert told.pop().endswith("train(loader=DataLoader, lr=0.1, ...)")
