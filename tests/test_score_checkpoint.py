"""A run that is killed and resumed gives the bits of one that was not."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import (
    assert_unchanged,
    one_thread,  # noqa: F401 - autouse
    snapshot,
)
from helpers_networks import CASES

import singe
from singe import score_checkpoint
from singe.score_checkpoint import ScoreCheckpoint, digest_of
from singe.sweep import Sweep

SIZES = (3, 2, 4, 1, 3)
OPTIONS = [
    {"path": "layer"},
    {"path": "network", "norm": "outside"},
    {"path": "neuron", "p": "sum"},
    {"path": "layer", "p": "fisher"},
    {"criterion": "signed", "path": "neuron"},
    {"criterion": "ablation"},
    {"path": "neuron", "tolerance": 0.2, "pruning_ratio": 0.4},
]


class Killed(Exception):
    pass


class Breaks(list):
    """Batches of which one raises."""

    def __init__(self, batches, at) -> None:
        super().__init__(batches)
        self.at = at

    def __iter__(self):
        for index, batch in enumerate(super().__iter__()):
            if index == self.at:
                raise Killed
            yield batch


def score(file, batches, **options):
    model = CASES["residual"].model(dtype=torch.float32)
    return singe.score(model, batches, checkpoint=file, progress=False, **options)


@pytest.fixture(autouse=True)
def save_always(monkeypatch):
    """Without waiting until saving is cheap in comparison."""
    monkeypatch.setattr("singe.score_checkpoint.SHARE_OF_TIME", float("inf"))


def data(seed=0):
    return CASES["residual"].batches(SIZES, seed, dtype=torch.float32)


@pytest.mark.parametrize(
    ("options", "after"), [*((options, 3) for options in OPTIONS), (OPTIONS[-1], 8)], ids=str
)
def test_resumed_is_uninterrupted(tmp_path, options, after, monkeypatch):
    path = tmp_path / "run.safetensors"
    expected = score(None, data(), **options)
    done = []
    monkeypatch.setattr("singe.engine.FusedEngine.state", _stopping(after, done))
    with pytest.raises(Killed):
        score(path, data(), **options)
    monkeypatch.undo()
    assert path.exists()
    assert (done[after - 1] > 0) == (after > 3), "units that are settled by then"
    resumed = score(path, data(), **options)
    assert not path.exists(), "the run is complete"
    for name in expected:
        assert torch.equal(resumed[name], expected[name]), name
        if expected.stderr is not None:
            assert torch.equal(resumed.stderr[name], expected.stderr[name]), name
    assert resumed.meta["evaluations"] == expected.meta["evaluations"]
    assert resumed.meta["samples"] == expected.meta["samples"]


def _stopping(after, done):
    from singe.engine import FusedEngine

    state = FusedEngine.state

    def stops(self):
        done.append(int((~self.passes.active).sum()))
        if len(done) > after:
            raise Killed
        return state(self)

    return stops


def test_a_resumed_run_goes_on_in_passes_that_fit(tmp_path, monkeypatch):
    add, sizes, most = Sweep.add, [], 1

    def limited(self, variants, *rest):
        if len(variants) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        sizes.append(len(variants))
        add(self, variants, *rest)

    monkeypatch.setattr(Sweep, "add", limited)
    interrupted(tmp_path / "run")
    most = 100
    score(tmp_path / "run", data())
    assert set(sizes) == {1}


def _run(path, ready) -> None:
    torch.set_num_threads(1)
    ready.set()
    score(path, CASES["residual"].batches((4,) * 200, dtype=torch.float32), path="neuron")


def test_kill_9(tmp_path):
    path = tmp_path / "run.safetensors"
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    process = context.Process(target=_run, args=(path, ready))
    process.start()
    ready.wait(60)
    deadline = time.monotonic() + 60
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert path.exists(), "no checkpoint was written"
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL, "it was through before it was killed"
    batches = CASES["residual"].batches((4,) * 200, dtype=torch.float32)
    resumed = score(path, batches, path="neuron")
    expected = score(None, batches, path="neuron")
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)


def interrupted(path):
    with pytest.raises(Killed):
        score(path, Breaks(data(), 2))


def test_a_run_that_was_killed_when_all_was_done(tmp_path, monkeypatch):
    def killed(self):
        raise Killed

    path = tmp_path / "run.safetensors"
    with monkeypatch.context() as patch:
        patch.setattr(ScoreCheckpoint, "finished", killed)
        with pytest.raises(Killed):
            score(path, data())
    assert path.is_file()
    found, expected = score(path, data()), score(None, data())
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert not path.exists()


def test_other_data_is_refused(tmp_path):
    path = tmp_path / "run.safetensors"
    interrupted(path)
    with pytest.raises(singe.CheckpointError, match="batch 0 is not the one"):
        score(path, data(seed=1))
    score(path, data())  # it was not lost


@pytest.mark.parametrize("options", [{"quadrature": 3}, {"p": 2}, {"path": "network"}])
def test_other_options_are_refused(tmp_path, options):
    path = tmp_path / "run.safetensors"
    interrupted(path)
    with pytest.raises(singe.CheckpointError, match="belongs to another run"):
        score(path, data(), **options)


@pytest.mark.parametrize("count", [1, 4])
def test_another_number_of_batches_is_refused(tmp_path, count):
    path = tmp_path / "run.safetensors"
    interrupted(path)
    with pytest.raises(singe.CheckpointError, match="batches was 5, is"):
        score(path, data()[:count])


def test_a_loader_without_length_that_ends_early_is_refused(tmp_path):
    class Unknown:
        def __init__(self, batches) -> None:
            self.batches = batches

        def __iter__(self):
            return iter(self.batches)

    path = tmp_path / "run.safetensors"
    with pytest.raises(Killed):
        score(path, Unknown(Breaks(data(), 3)))
    with pytest.raises(singe.CheckpointError, match="the data has 2 batches"):
        score(path, Unknown(data()[:2]))


def test_another_cut_is_refused(tmp_path):
    path = tmp_path / "run.safetensors"
    options = {"path": "neuron", "tolerance": 0.1}
    run = ScoreCheckpoint(path, {"pruning_ratio": 0.9})
    run.digests = ["x"]
    run.save(Nothing())
    with pytest.raises(singe.CheckpointError, match=r"pruning_ratio was 0.9, is 0.2"):
        score(path, data(), pruning_ratio=0.2, **options)


class Nothing:
    def state(self):
        return {"active": torch.zeros(1)}, {}


def test_another_network_with_the_same_weights_is_refused(tmp_path):
    def model(activation):
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(6, 5), activation(), torch.nn.Linear(5, 4))

    batches = CASES["mlp"].batches(SIZES, dtype=torch.float32)
    path = tmp_path / "run.safetensors"
    with pytest.raises(Killed):
        singe.score(model(torch.nn.ReLU), Breaks(batches, 2), checkpoint=path, progress=False)
    with pytest.raises(singe.CheckpointError, match="model was"):
        singe.score(model(torch.nn.SiLU), batches, checkpoint=path, progress=False)


def test_numbers_in_a_batch_are_part_of_it():
    x = torch.ones(2)
    assert digest_of({"x": x, "w": 1.0}) != digest_of({"x": x, "w": 9.0})
    assert digest_of({"x": x, "w": 1.0}) == digest_of({"x": x.clone(), "w": 1.0})


def test_other_weights_are_refused(tmp_path):
    path = tmp_path / "run.safetensors"
    interrupted(path)
    model = CASES["residual"].model(seed=1, dtype=torch.float32)
    before = snapshot(model)
    with pytest.raises(singe.CheckpointError, match="model was"):
        singe.score(model, data(), checkpoint=path, progress=False)
    assert_unchanged(model, before)


@pytest.mark.parametrize("content", [b"", b"garbage", b"\x00" * 100])
def test_a_damaged_file_is_refused(tmp_path, content):
    path = tmp_path / "run.safetensors"
    path.write_bytes(content)
    with pytest.raises(singe.CheckpointError, match="remove it to start again"):
        score(path, data())
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c[:-3] + bytes([c[-3] ^ 1]) + c[-2:], "does not match its digest; remove it"),
        (lambda c: c.replace(b"cross_entropy", b"cross_entropi", 1), "does not match its digest"),
        (
            lambda c: c.replace(b"singe-run-3", b"singe-run-2"),
            r"another version of singe .singe-run-2,.*continue with",
        ),
    ],
    ids=["a bit of a tensor", "a number of the header", "version"],
)
def test_a_file_that_was_changed_is_refused(tmp_path, change, message):
    path = tmp_path / "run.safetensors"
    interrupted(path)
    content = change(path.read_bytes())
    assert content != path.read_bytes()
    path.write_bytes(content)
    with pytest.raises(singe.CheckpointError, match=message):
        score(path, data())


def test_another_kind_of_file_is_refused(tmp_path):
    path = tmp_path / "scores.safetensors"
    score(None, data()).save(path)
    with pytest.raises(singe.CheckpointError, match="no checkpoint of a scoring run"):
        score(path, data())


def test_a_full_disk_stops_nothing(tmp_path, monkeypatch):
    def full(path):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(score_checkpoint, "replacing", full)
    with pytest.warns(UserWarning, match=r"cannot write the checkpoint.*No space left"):
        found = score(tmp_path / "run.safetensors", data())
    expected = score(None, data())
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_disk_that_has_become_read_only_loses_no_scores(tmp_path, monkeypatch):
    path, unlink = tmp_path / "run.safetensors", Path.unlink

    def refuse(self, missing_ok=False):
        if self == path:
            raise OSError(errno.EROFS, "Read-only file system")
        unlink(self, missing_ok)

    monkeypatch.setattr(Path, "unlink", refuse)
    found = score(path, data())
    monkeypatch.undo()
    expected = score(None, data())
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_definition_has_no_checkpoint(tmp_path):
    with pytest.raises(singe.OptionError, match="engine='fused'"):
        score(tmp_path / "run", data(), engine="naive")


def test_batches_of_the_same_bytes_are_not_the_same():
    zeros = torch.zeros(2, 3)
    others = (zeros.T, zeros.int(), zeros.flatten(), [zeros[0], zeros[1]])
    assert digest_of(zeros) not in {digest_of(other) for other in others}
    assert digest_of(zeros) == digest_of(zeros.T.contiguous().T)


def test_saving_takes_no_more_than_its_share_of_the_time(tmp_path, monkeypatch):
    clock = SimpleNamespace(now=100.0, monotonic=lambda: clock.now)
    monkeypatch.setattr(score_checkpoint, "SHARE_OF_TIME", 1 / 16)
    monkeypatch.setattr(score_checkpoint, "time", clock)
    path, saved = tmp_path / "run.safetensors", []

    def state():
        clock.now += 2.0  # what saving takes
        saved.append(path.exists())
        return {"x": torch.zeros(1)}, {}

    run = SimpleNamespace(state=state)
    follower = ScoreCheckpoint(path, {})
    follower.save(run)
    assert saved == [False], "the first batch is always saved"
    for seconds, times in ((31.0, 1), (1.0, 2), (31.0, 2), (1.0, 3)):
        clock.now += seconds
        follower.save(run)
        assert len(saved) == times
