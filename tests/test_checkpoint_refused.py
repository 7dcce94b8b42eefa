"""What cannot be continued: another run's checkpoints, damaged ones, full disks; older ones are kept."""

from __future__ import annotations

import re
import resource
from functools import partial

import pytest
import torch
from helpers import (
    assert_unchanged,
    clone,
    one_thread,  # noqa: F401 - autouse
    snapshot,
)
from helpers_checkpoint import (
    BATCHES,
    OPTIMIZERS,
    SCHEDULERS,
    Evaluate,
    Power,
    compress,
    interrupted,
    network,
)
from helpers_loop import same_weights
from safetensors import SafetensorError
from torch.utils.data import DataLoader

import singe
from singe.checkpoint import Folder
from singe.settings import as_json


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


def test_a_default_spelled_out_is_the_same_run(tmp_path):
    options = {"criterion": "singe", "path": "layer", "norm": "inside", "ignore": ()}
    first = compress(network(), tmp_path, rounds=None)
    again = compress(network(), tmp_path, rounds=5, **options)
    assert again.to_dict() == first.to_dict()


def test_other_frozen_parameters_are_another_run(tmp_path):
    """Their optimizer has no state, or one that nothing asks for: not the same bits."""
    interrupted(tmp_path)
    frozen = network()
    frozen[0].requires_grad_(False)
    with pytest.raises(singe.CheckpointError, match=r"frozen was \[\] and is now \['0.weight'"):
        compress(frozen, tmp_path)


def test_other_calibration_data_are_told(tmp_path):
    interrupted(tmp_path)
    other = [(x + 1, y) for x, y in BATCHES]
    with pytest.warns(UserWarning, match="first calibration batch is not the one"):
        compress(network(), tmp_path, calibrate=other)


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


@pytest.mark.parametrize(
    ("written", "damaged"),
    [
        (rb'"step", \d', rb'"step", 9'),
        (rb'"finished", false', rb'"finished", true '),
        (rb'{"tensor": "t0"', rb'{"tensor": "t1"'),
        (rb'{"tensor": "t0"', rb'{"tensor": "u0"'),
        (rb'"finetune_steps": 6', rb'"finetune_steps": 7'),
        (rb"singe-checkpoint-", rb"singe-checkpoint,"),
    ],
)
def test_a_header_is_damaged_as_well_as_a_tensor(tmp_path, written, damaged):
    interrupted(tmp_path)
    older, newest = sorted(tmp_path.glob("checkpoint-*"))
    content = newest.read_bytes()
    # The header of the file holds JSON as a string in JSON: its quotes are escaped.
    written = written.replace(b'"', rb"\\\"")
    damaged = damaged.replace(b'"', rb"\"")
    other = re.sub(written, lambda _: damaged, content, count=1)
    assert other != content
    assert len(other) == len(content)
    newest.write_bytes(other)
    whole, cut = network(), network()
    compress(whole, evaluate=Evaluate(99))
    with pytest.warns(UserWarning, match=rf"{newest.name} is damaged.*from {older.name}"):
        compress(cut, tmp_path, evaluate=Evaluate(99))
    assert same_weights(cut, whole)


def test_checkpoints_of_another_version(tmp_path):
    interrupted(tmp_path)
    for path in tmp_path.glob("checkpoint-*"):
        path.write_bytes(path.read_bytes().replace(b"singe-checkpoint-9", b"singe-checkpoint-6"))
    with pytest.raises(
        singe.CheckpointError,
        match=r"another version of singe \(singe-checkpoint-6.*continue with that version",
    ):
        compress(network(), tmp_path, evaluate=Evaluate(99))


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


def test_an_option_that_the_former_run_did_not_know_is_another_run(tmp_path):
    Folder(tmp_path, {"a": 1}).save({})
    with pytest.raises(singe.CheckpointError, match="another run: b was None and is now 2"):
        Folder(tmp_path, {"a": 1, "b": 2}).newest()


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


def test_scores_that_find_no_room_are_said_to_as_a_checkpoint_is(tmp_path, monkeypatch):
    def full(*_, **__):
        raise SafetensorError("No space left on device (os error 28)")

    monkeypatch.setattr("singe.scores.save_file", full)
    with pytest.raises(
        singe.CheckpointError, match=r"cannot write .*round-01\.scores\.safetensors: .*No space"
    ):
        compress(network(), tmp_path)


def test_a_folder_that_another_run_is_working_in(tmp_path):
    """It is told so, and disturbs neither that run nor what it is writing."""
    alone, model = network(), network()
    half = tmp_path / ".checkpoint-000009.safetensors.1.partial"
    compress(alone)
    refused = []

    def start_another(*_):
        half.touch()
        with pytest.raises(
            singe.CheckpointError,
            match=rf"another process is working in {tmp_path}.*another folder",
        ) as caught:
            compress(network(), tmp_path)
        refused.append(caught)
        assert half.exists()

    compress(model, tmp_path, on_round=start_another)
    assert len(refused) == 2
    assert same_weights(model, alone)
    compress(network(), tmp_path)  # it is free again


@pytest.mark.parametrize("locks", [True, False])
def test_what_a_killed_process_was_writing_is_removed_where_nobody_can_be_at_it(
    tmp_path, monkeypatch, locks
):
    interrupted(tmp_path)
    names = ("checkpoint-000009.safetensors", "round-01.plan.json", "report.json", "theirs.json")
    halves = [tmp_path / f".{name}.1.partial" for name in names]
    for half in halves:
        half.touch()
    if not locks:
        monkeypatch.setattr("singe.files.fcntl", None)
    compress(network(), tmp_path, evaluate=Evaluate(99))
    assert [p for p in halves if p.exists()] == halves[3 if locks else 0 :]


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
