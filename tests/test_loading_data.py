"""Data by name: folders, tars, .npz files, loaders, and what is said about what is none."""

from __future__ import annotations

import io
import shutil
import tarfile

import numpy as np
import pytest
import torch
from helpers import (
    one_thread,  # noqa: F401 - autouse
)
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from singe.cli.data import Data, Reading, Source
from singe.cli.images import Transform, decode, scan, unpacked
from singe.cli.users_files import call_from_file
from singe.errors import DataError


def write_images(folder, classes=("cat", "dog", "eel"), count=5, size=(20, 12)):
    for label, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for index in range(count):
            Image.new("RGB", size, (80 * label, index, 10)).save(folder / name / f"{index}.png")


MODEL = nn.Conv2d(3, 2, 1)
SMALL = Reading(image_size=8, batch_size=4, calibration=6, augment=False)


def labels(batches):
    return torch.cat([y for _, y in batches]).tolist()


def test_an_image_folder_is_split_by_class(tmp_path):
    write_images(tmp_path)
    (tmp_path / "notes.txt").write_text("not an image")
    source = Source(str(tmp_path))
    assert source.classes == 3
    data = source.read(MODEL, SMALL)
    assert data.describe() == {"calibrate": 6, "train": 12, "evaluate": 3}
    assert sorted(labels(data.evaluate)) == [0, 1, 2]
    x, y = next(iter(data.evaluate))
    assert x.shape == (3, 3, 8, 8)
    # The picture's red tells its class, its green which one: nothing is in two parts.
    red = (x[:, 0].mean((1, 2)) * 0.229 + 0.485) * 255
    assert torch.allclose(red, 80.0 * y, atol=0.1)
    green = {part: greens(getattr(data, part)) for part in ("train", "evaluate", "calibrate")}
    assert not green["train"] & green["evaluate"]
    assert not green["calibrate"] & green["evaluate"]
    again = Source(str(tmp_path)).read(MODEL, SMALL)
    assert torch.equal(again.calibrate[0][0], data.calibrate[0][0])


def greens(batches):
    return {
        (int(label), round(float((g * 0.224 + 0.456) * 255)))
        for x, y in batches
        for g, label in zip(x[:, 1].mean((1, 2)), y, strict=True)
    }


@pytest.mark.parametrize("held_out", ["test", "val"])
def test_parts_of_their_own_and_a_wrapping_folder(tmp_path, held_out):
    root = tmp_path / "archive" / "pictures"
    write_images(root / "train", count=4)
    write_images(root / held_out, classes=("dog", "eel"), count=2)
    classes, train, others = scan(tmp_path)
    assert classes == ["cat", "dog", "eel"]
    assert len(train) == 12
    assert sorted({label for _, label in others}) == [1, 2]
    data = Source(str(tmp_path)).read(MODEL, Reading(image_size=8, evaluation=3))
    assert data.describe()["evaluate"] == 3


def test_parts_are_known_by_the_classes_in_them(tmp_path):
    """ImageNet's `test` has images without labels; a class may be called `train`."""
    write_images(tmp_path / "a" / "train")
    write_images(tmp_path / "a" / "val", count=2)
    (tmp_path / "a" / "test").mkdir()
    shutil.copy(next((tmp_path / "a" / "val" / "cat").iterdir()), tmp_path / "a" / "test")
    classes, train, held_out = scan(tmp_path / "a")
    assert (classes, len(train), len(held_out)) == (["cat", "dog", "eel"], 15, 6)
    write_images(tmp_path / "b", classes=("bus", "car", "train"))
    assert scan(tmp_path / "b")[0] == ["bus", "car", "train"]
    write_images(tmp_path / "c", classes=("train", "val"))  # without classes in them
    with pytest.raises(DataError, match="holds no image folder"):
        scan(tmp_path / "c")


@pytest.mark.parametrize("name", ["x.npz", "x.tar.xz", "x.tar.gz", "x.tar"])
def test_damaged_files_are_named(tmp_path, monkeypatch, name):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / name
    if name == "x.npz":
        draw = np.random.default_rng(0)
        np.savez(path, x=draw.integers(0, 256, (20, 8, 8, 3), np.uint8), y=np.arange(20) % 2)
    else:
        write_images(tmp_path / "images", size=(64, 64))
        with tarfile.open(path, "w:" + name.partition("tar")[2].lstrip(".")) as tar:
            tar.add(tmp_path / "images", "images")
    whole = path.read_bytes()
    middle = len(whole) // 2
    overwritten = whole[:middle] + bytes(99) + whole[middle + 99 :]
    for damaged in (whole[: len(whole) // 3], overwritten)[: 1 if name == "x.tar" else 2]:
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=name):
            Source(str(path))


def test_channels_and_mean_must_fit(tmp_path):
    np.savez(tmp_path / "x.npz", x=np.zeros((8, 4, 6, 6), np.uint8), y=np.arange(8) % 2)
    with pytest.raises(DataError, match="has 4 channels, --mean has 3"):
        Source(str(tmp_path / "x.npz")).read(nn.Conv2d(4, 2, 3), Reading())


def test_data_without_a_length_is_described(tmp_path):
    class Endless(IterableDataset):
        def __iter__(self):
            return iter([(torch.zeros(3), 0)])

    assert Data(DataLoader(Endless()), [(torch.zeros(2, 3), torch.zeros(2))], None).describe() == {
        "calibrate": 2
    }


def test_a_tar_is_unpacked_once(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_images(tmp_path / "pictures")
    archive = tmp_path / "pictures.tar.xz"
    with tarfile.open(archive, "w:xz") as tar:
        tar.add(tmp_path / "pictures", "pictures")
    for _ in range(2):
        assert Source(str(archive)).read(MODEL, SMALL).describe()["train"] == 12
    (folder,) = (tmp_path / "cache" / "singe").iterdir()
    marker = folder / "pictures" / "cat" / "0.png"
    marker.unlink()
    assert Source(str(archive)).read(MODEL, SMALL).describe()["train"] == 11


def test_a_tar_cannot_leave_its_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    archive = tmp_path / "evil.tar"
    with tarfile.open(archive, "w") as tar:
        member = tarfile.TarInfo("../../outside.png")
        member.size = 3
        tar.addfile(member, io.BytesIO(b"abc"))
    with pytest.raises(DataError, match="cannot unpack"):
        Source(str(archive))
    assert not list(tmp_path.rglob("outside.png"))
    archive.write_bytes(b"no tar at all")
    with pytest.raises(DataError, match="cannot unpack"):
        Source(str(archive))
    assert not list((tmp_path / "cache" / "singe").iterdir())


def test_a_grey_model_gets_grey_images(tmp_path):
    write_images(tmp_path)
    data = Source(str(tmp_path)).read(nn.Conv2d(1, 2, 3), SMALL)
    assert data.calibrate[0][0].shape == (4, 1, 8, 8)


def test_decoding_keeps_the_middle(tmp_path):
    wide = np.zeros((10, 30, 3), dtype=np.uint8)
    wide[:, 10:20] = 255
    Image.fromarray(wide).save(tmp_path / "wide.png")
    assert decode(tmp_path / "wide.png", 10, "RGB").float().mean() == 255
    assert decode(tmp_path / "wide.png", 4, "L").shape == (1, 4, 4)
    (tmp_path / "cut.png").write_bytes((tmp_path / "wide.png").read_bytes()[:60])
    with pytest.raises(DataError, match=r"cut\.png"):
        decode(tmp_path / "cut.png", 10, "RGB")


def test_augmentation_is_seeded_and_keeps_shapes():
    image = torch.randint(0, 256, (3, 9, 9), dtype=torch.uint8)
    transform = Transform((0.0,) * 3, (1.0,) * 3, augment=True)

    def draw(seed):
        torch.manual_seed(seed)
        return torch.stack([transform(image) for _ in range(4)])

    assert torch.equal(draw(0), draw(0))
    assert not torch.equal(draw(0), draw(1))
    assert draw(0).shape == (4, 3, 9, 9)
    plain = Transform((0.5,) * 3, (0.25,) * 3, augment=False)
    assert torch.allclose(plain(image), (image / 255 - 0.5) / 0.25)


@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
def test_npz_images(tmp_path, layout):
    x = np.arange(5 * 4 * 4 * 3, dtype=np.uint8).reshape(5, 4, 4, 3)
    expected = torch.from_numpy(x).permute(0, 3, 1, 2).float() / 255
    stored = x if layout == "NHWC" else x.transpose(0, 3, 1, 2)
    y = np.array([[0], [2], [1], [0], [1]])
    np.savez(tmp_path / "d.npz", x_train=stored, y_train=y, x_test=stored[:2], y_test=y[:2])
    source = Source(str(tmp_path / "d.npz"))
    assert source.classes == 3
    how = Reading(mean=(0.0,) * 3, std=(1.0,) * 3, augment=False)
    data = source.read(MODEL, how)
    ((x_test, y_test),) = data.evaluate
    assert torch.equal(x_test, expected[:2])
    assert y_test.tolist() == [0, 2]
    assert len(data.train.dataset) == 5


def test_npz_features_stay_as_they_are(tmp_path):
    x = np.linspace(-3, 3, 40).reshape(10, 4)
    np.savez(tmp_path / "d.npz", x=x, y=np.arange(10) % 2)
    data = Source(str(tmp_path / "d.npz")).read(nn.Linear(4, 2), Reading())
    seen = torch.cat([b for b, _ in (*data.train, *data.evaluate)])
    assert torch.allclose(seen.sort(0).values, torch.from_numpy(x).float())


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": np.zeros(3)}, "expected x and y"),
        ({"x": np.zeros((3, 2)), "y": np.zeros(2, int)}, "one integer label per sample"),
        ({"x": np.zeros((3, 2)), "y": np.zeros(3)}, "one integer label per sample"),
        ({"x": np.zeros((2, 2)), "y": np.array([object(), 1])}, "cannot read"),
        ({"x": np.array(["a", "b"]), "y": np.zeros(2, int)}, "samples of type <U1"),
        ({"x": np.zeros((2, 2), complex), "y": np.zeros(2, int)}, "samples of type complex128"),
        ({"x": np.zeros((2, 2)), "y": np.array([0, 2**63], np.uint64)}, f"labels up to {2**63}"),
    ],
)
def test_npz_in_another_form(tmp_path, arrays, message):
    np.savez(tmp_path / "d.npz", **arrays)
    with pytest.raises(DataError, match=message):
        Source(str(tmp_path / "d.npz"))


def test_half_a_test_part(tmp_path):
    path = tmp_path / "data.npz"
    np.savez(path, x=np.zeros((4, 3), np.float32), y=np.arange(4), x_test=np.zeros((4, 3)))
    with pytest.raises(DataError, match="has x_test but no y_test"):
        Source(str(path))


@pytest.mark.parametrize("packed", [False, True])
def test_a_class_without_images_would_shift_the_others(tmp_path, monkeypatch, packed):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    pictures, archive = tmp_path / "pictures", tmp_path / "pictures.tar.xz"

    def scanned():
        if not packed:
            return scan(pictures)
        with tarfile.open(archive, "w:xz") as tar:
            tar.add(pictures, ".")
        return scan(unpacked(archive))

    write_images(pictures)
    (pictures / "doe").mkdir()
    (pictures / "labels").mkdir()
    (pictures / "labels" / "doe.txt").touch()
    (pictures / "_about").mkdir()
    with pytest.raises(DataError, match="empty class folders: doe; put images in"):
        scanned()
    shutil.rmtree(pictures / "doe")
    assert scanned()[0] == ["cat", "dog", "eel"]


def test_a_held_out_part_need_not_have_every_class(tmp_path):
    for part in ("train", "test"):
        write_images(tmp_path / "parts" / part)
    (tmp_path / "parts" / "test" / "doe").mkdir()  # of no class there is an image
    assert scan(tmp_path / "parts")[0] == ["cat", "dog", "eel"]


def test_a_held_out_part_that_leaves_nothing(tmp_path):
    np.savez(tmp_path / "d.npz", x=np.zeros((6, 2)), y=np.arange(6) % 2)
    with pytest.raises(DataError, match=r"--held-out 0\.999 of 6 samples leaves none"):
        Source(str(tmp_path / "d.npz")).read(nn.Linear(2, 2), Reading(held_out=0.999))


def test_pictures_that_would_be_read_wrongly(tmp_path):
    """PIL clips what has more than 8 bits: white, or black."""
    for name, values in (
        ("a.png", np.arange(64, dtype=np.uint16) * 1000),
        ("b.tif", np.float32(0.5)),
    ):
        Image.fromarray(np.broadcast_to(values, (64, 64)).copy()).save(tmp_path / name)
        with pytest.raises(DataError, match=rf"{name} has more than 8 bits per channel"):
            decode(tmp_path / name, 8, "L")
    (tmp_path / "c.ppm").write_bytes(b"P6\nx 3\n255\n" + bytes(27))
    with pytest.raises(DataError, match=r"cannot read the image .*c\.ppm"):
        decode(tmp_path / "c.ppm", 8, "RGB")


def test_folders_in_another_form(tmp_path):
    with pytest.raises(DataError, match="no data at"):
        Source(str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match="holds no image folder"):
        Source(str(tmp_path))
    write_images(tmp_path / "train", classes=("cat", "dog"))
    write_images(tmp_path / "test", classes=("cat", "owl"))
    with pytest.raises(DataError, match=r"classes that .* lacks: owl"):
        Source(str(tmp_path))


LOADER = """
import torch
X, Y = torch.zeros(4, 2), torch.tensor([0, 1, 0, 1])
def pair(): return [(X, Y)] * 3, [(X, Y)]
def parts(): return {"calibrate": [(X, Y)]}
def batches(): return [(X, Y)] * 5
def once(): return iter([(X, Y)])
def odd(): return {"training": [(X, Y)]}
def nothing(): return {"evaluate": [(X, Y)]}
def none(): [(X, Y)]
"""


@pytest.mark.parametrize(
    ("name", "train", "calibrate", "evaluate"),
    [("pair", 3, 2, 1), ("parts", None, 1, None), ("batches", 5, 2, None)],
)
def test_a_loader_of_the_user(tmp_path, name, train, calibrate, evaluate):
    (tmp_path / "my_data.py").write_text(LOADER)
    data = Source(f"{tmp_path / 'my_data.py'}:{name}").read(MODEL, Reading(calibration=6))
    sizes = [None if p is None else len(p) for p in (data.train, data.calibrate, data.evaluate)]
    assert sizes == [train, calibrate, evaluate]
    assert isinstance(data, Data)


@pytest.mark.parametrize(
    ("name", "message"),
    [("once", "one-shot"), ("odd", "the loader gave training"), ("nothing", "neither")],
)
def test_a_loader_in_another_form(tmp_path, name, message):
    (tmp_path / "my_data.py").write_text(LOADER)
    source = Source(f"{tmp_path / 'my_data.py'}:{name}")
    with pytest.raises(DataError, match=message):
        source.read(MODEL, Reading())


def test_a_loader_that_forgot_to_return(tmp_path):
    (tmp_path / "my_data.py").write_text(LOADER)
    with pytest.raises(DataError, match=r"my_data\.py:none returned None; expected \(train, eval"):
        Source(f"{tmp_path / 'my_data.py'}:none")


def test_a_file_may_look_itself_up(tmp_path):
    (tmp_path / "late.py").write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "@dataclass\nclass Box:\n    value: int = 3\ndef make(): return Box().value\n"
    )
    assert call_from_file(f"{tmp_path / 'late.py'}:make") == 3
