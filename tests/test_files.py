"""Files are written whole or not at all, where they were meant to be, and errors name them; locks."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

import singe
from singe.files import InUseError, alone_in, replacing

SCORES = singe.Scores({"a": torch.arange(3.0)}, {"a": ["a"]}, {})
FULL = "No space left on device"


@pytest.mark.parametrize(
    "error", [OSError(28, FULL), SafetensorError(f"Error: {FULL} (os error 28)")]
)
def test_files_are_replaced_whole_or_not_at_all(tmp_path, monkeypatch, error):
    path = tmp_path / "scores.safetensors"
    SCORES.save(path)
    before = path.read_bytes()

    def full(tensors, partial, metadata):
        partial.write_bytes(b"half")
        raise error

    monkeypatch.setattr("singe.scores.save_file", full)
    with pytest.raises(OSError, match=FULL) as caught:
        SCORES.save(path)
    assert str(path) in str(caught.value)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_files_are_as_readable_as_any(tmp_path):
    plain, path = tmp_path / "plain", tmp_path / "scores.safetensors"
    plain.touch()
    SCORES.save(path)
    assert path.stat().st_mode == plain.stat().st_mode


def test_a_link_stays_one(tmp_path):
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_text("old")
    link.symlink_to(target)
    with replacing(link) as partial:
        partial.write_text("new")
    assert link.is_symlink()
    assert target.read_text() == "new"


@pytest.mark.parametrize("kind", ["folder", "pipe"])
def test_what_is_no_file_is_not_replaced(tmp_path, kind):
    path = tmp_path / "taken"
    os.mkfifo(path) if kind == "pipe" else path.mkdir()
    before = path.stat()
    with pytest.raises(OSError, match="a folder or a device has that name"), replacing(path):
        pytest.fail("nothing is written first")
    assert path.stat() == before


# ---------------------------------------------------------------------- one at a time in a folder


def try_to_work_in(folder: Path) -> bool:
    with alone_in(folder) as alone:
        return alone


def test_one_at_a_time_works_in_a_folder(tmp_path):
    """Another thread is somebody else, whatever path it comes by; nothing is written there."""
    folder, link = tmp_path / "run", tmp_path / "link"
    folder.mkdir()
    link.symlink_to(folder)
    folder.chmod(0o555)
    with ThreadPoolExecutor() as other, alone_in(folder) as alone:
        assert alone
        for path in (folder, link):
            with pytest.raises(InUseError, match=f"another process is working in {path}"):
                other.submit(try_to_work_in, path).result()
    with pytest.raises(KeyError), alone_in(folder):
        raise KeyError
    assert try_to_work_in(folder)
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("missing", ["locks", "module"])
def test_without_locks_everybody_works_everywhere(tmp_path, monkeypatch, missing):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    if missing == "locks":
        monkeypatch.setattr("fcntl.flock", flock)
    else:
        monkeypatch.setattr("singe.files.fcntl", None)
    with alone_in(tmp_path) as alone:
        assert not alone
        assert not try_to_work_in(tmp_path)


WITH_A_WORKER = """
import os, sys, time
from pathlib import Path
from singe.files import alone_in
with alone_in(Path(sys.argv[1])):
    if not os.fork():
        print(os.getpid(), flush=True)
    time.sleep(600)
"""


def test_a_worker_that_outlives_its_parent_does_not_keep_the_folder(tmp_path):
    """Nor does it give up the lock of a parent that lives: those of a loader come and go."""
    process = subprocess.Popen(
        [sys.executable, "-c", WITH_A_WORKER, tmp_path], stdout=subprocess.PIPE, text=True
    )
    worker = int(process.stdout.readline())
    try:
        with pytest.raises(InUseError):
            try_to_work_in(tmp_path)
        process.send_signal(signal.SIGKILL)
        process.wait(60)
        os.kill(worker, 0)  # it is alive
        assert try_to_work_in(tmp_path)
    finally:
        os.kill(worker, signal.SIGKILL)
        process.kill()
        process.stdout.close()
