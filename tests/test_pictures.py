"""Pictures on their way from a file to the network: which are taken, and what augmentation does."""

from __future__ import annotations

import os
import tarfile

import pytest
import torch
from helpers import (
    one_thread,  # noqa: F401 - autouse
)
from PIL import Image

from singe.cli.images import Transform, decode, scan, unpacked


def paint(folder, red=0, classes=("cat", "dog")):
    """One picture of each class; a .bmp has the same size whatever is on it."""
    for name in classes:
        (folder / name).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), (red, 0, 0)).save(folder / name / "0.bmp")


@pytest.mark.parametrize("size", [5, 16])
def test_augmentation_flips_left_and_right_and_shifts_by_an_eighth(size):
    """By one at least, in both directions, by zeros at the edges."""
    image = torch.zeros(3, size, size, dtype=torch.uint8)
    image[:, size // 2, 2] = 255
    transform = Transform((0.0,) * 3, (1.0,) * 3, augment=True)
    torch.manual_seed(0)
    seen = [transform(image)[0].nonzero().tolist() for _ in range(400)]
    assert all(len(pixels) == 1 for pixels in seen), "it stays in the picture"
    by = range(-max(1, size // 8), max(1, size // 8) + 1)
    rows, columns = ({pixels[0][dim] for pixels in seen} for dim in (0, 1))
    assert rows == {size // 2 + d for d in by}
    assert columns == {2 + d for d in by} | {size - 3 + d for d in by}


def test_what_systems_leave_beside_pictures_is_none(tmp_path):
    paint(tmp_path)
    (tmp_path / "cat" / "._0.bmp").write_bytes(b"macOS")
    (tmp_path / ".thumbnails").mkdir()
    paint(tmp_path, classes=("cat", "dog", ".thumbnails", "_old"))
    classes, items, _ = scan(tmp_path)
    assert classes == ["cat", "dog"]
    assert sorted(path.name for path, _ in items) == ["0.bmp", "0.bmp"]


def test_an_archive_that_has_changed_is_unpacked_again(tmp_path, monkeypatch):
    """Also where it is as long as it was."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    archive, sizes, reds = tmp_path / "a.tar", set(), []
    for time, red in enumerate((10, 200)):
        paint(tmp_path / "pictures", red)
        with tarfile.open(archive, "w") as tar:
            tar.add(tmp_path / "pictures", "pictures")
        os.utime(archive, (time, time))
        sizes.add(archive.stat().st_size)
        reds.append(int(decode(unpacked(archive) / "pictures/cat/0.bmp", 4, "RGB")[0].max()))
    assert len(sizes) == 1
    assert reds == [10, 200]
