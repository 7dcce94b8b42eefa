"""Files are written whole or not at all, where they were meant to be, and errors name them."""

from __future__ import annotations

import os

import pytest
import torch
from safetensors import SafetensorError

import singe
from singe.files import replacing

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
