"""Image folders: found, unpacked from a tar where needed, decoded, resized, normalised."""

from __future__ import annotations

import hashlib
import lzma
import os
import shutil
import tarfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from singe.errors import DataError

ENDINGS = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".ppm", ".pgm", ".tif", ".tiff"}
TRAINING = ("train", "training")
HELD_OUT = ("test", "val", "valid", "validation", "eval")
Item = tuple[Path, int]


class Transform:
    """uint8 [C, H, W] to normalised float32, with random flips and shifts where ``augment``.

    Args:
        mean, std: per channel, for values in 0..1; the first counts alone for a single channel.
        augment: flip left-right, and shift by up to an eighth of the size (zero-padded). Drawn from
            torch's global generator.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], augment: bool) -> None:
        self.mean = torch.tensor(mean).view(-1, 1, 1)
        self.std = torch.tensor(std).view(-1, 1, 1)
        self.augment = augment

    def __call__(self, image: Tensor) -> Tensor:
        channels = len(image)
        if any(1 < len(values) < channels or not len(values) for values in (self.mean, self.std)):
            raise DataError(
                f"an image has {channels} channels, --mean has {len(self.mean)} numbers and --std "
                f"{len(self.std)}; give one for each channel"
            )
        x = (image.float() / 255 - self.mean[:channels]) / self.std[:channels]
        if not self.augment:
            return x
        height, width = x.shape[1:]
        pad = max(1, max(height, width) // 8)
        top, left = torch.randint(0, 2 * pad + 1, (2,)).tolist()
        x = torch.nn.functional.pad(x, (pad, pad, pad, pad))[
            :, top : top + height, left : left + width
        ]
        return x.flip(2) if torch.rand(()) < 0.5 else x


class ImageFiles(Dataset[tuple[Tensor, int]]):
    """Decodes on access: the shorter side to ``size``, the square in the middle."""

    def __init__(
        self, items: Sequence[Item], size: int, channels: int, transform: Callable[[Tensor], Tensor]
    ) -> None:
        self.items, self.size, self.transform = list(items), size, transform
        self.mode = "L" if channels == 1 else "RGB"

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, label = self.items[index]
        return self.transform(decode(path, self.size, self.mode)), label


def decode(path: Path, size: int, mode: str) -> Tensor:
    """uint8 [C, size, size].

    Raises:
        DataError: no image, or a damaged one.
    """
    from PIL import Image  # the commands without images do without it

    try:
        with Image.open(path) as file:
            if file.mode[0] in "IF":  # PIL would clip them to 0..255: white or black
                raise DataError(
                    f"the image {path} has more than 8 bits per channel ({file.mode}); convert it to 8, "
                    "or give arrays, .npz"
                )
            image = file.convert(mode)
            scale = size / min(image.size)
            wide, high = (max(size, round(side * scale)) for side in image.size)
            left, top = (wide - size) // 2, (high - size) // 2
            if (wide, high) != image.size:
                image = image.resize((wide, high), Image.Resampling.BILINEAR)
            image = image.crop((left, top, left + size, top + size))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"cannot read the image {path}: {error}; remove it from the data"
        ) from error
    pixels = torch.from_numpy(np.array(image, dtype=np.uint8))
    return pixels.unsqueeze(0) if pixels.dim() == 2 else pixels.permute(2, 0, 1).contiguous()


def scan(folder: Path) -> tuple[list[str], list[Item], list[Item] | None]:
    """``(classes, training images, held-out images)`` of a folder.

    Either ``folder/<class>/...`` (nothing is held out: None) or ``folder/train/<class>/...`` beside
    ``folder/test`` or ``folder/val``. Classes are numbered in the order of their names. A single
    folder that wraps all of this is looked into.

    Raises:
        DataError: no class folders with images.
    """
    folder, train, held_out = _parts(folder)
    if train is None:
        inside = _folders(folder)
        if all(f.name.lower() in (*TRAINING, *HELD_OUT) for f in inside):
            inside = []  # parts without classes in them are no classes themselves
        classes = _classes(inside)
        return classes, _items(folder, classes), None
    classes = _classes(_folders(train))
    theirs = [] if held_out is None else [f.name for f in _folders(held_out) if _has_images(f)]
    if extra := set(theirs) - set(classes):
        raise DataError(
            f"{held_out} has classes that {train} lacks: {', '.join(sorted(extra)[:5])}"
        )
    return classes, _items(train, classes), None if held_out is None else _items(held_out, classes)


def class_parents(folder: Path) -> list[Path]:
    """The folders in which :func:`scan` takes every folder with images for a class."""
    folder, train, held_out = _parts(folder)
    return [folder] if train is None else [f for f in (train, held_out) if f is not None]


def _parts(folder: Path) -> tuple[Path, Path | None, Path | None]:
    """What a wrapping folder wraps, and in it the training and the held-out part, if it has them."""
    inside = _folders(folder)
    while len(inside) == 1 and _folders(inside[0]) and not _has_images(inside[0], deep=False):
        folder, inside = inside[0], _folders(inside[0])
    # A class may be called `train`, and a `test` beside `val` may hold images without labels.
    parts = [f for f in inside if any(map(_has_images, _folders(f)))]
    train = next((f for f in parts if f.name.lower() in TRAINING), None)
    held_out = next((f for f in parts if f.name.lower() in HELD_OUT), None)
    return folder, train, held_out


def _classes(folders: Sequence[Path]) -> list[str]:
    """Names of those with images; an empty one would shift the numbers of all that follow.

    One with other files alone (``labels``) is no class.
    """
    full = [f.name for f in folders if _has_images(f)]
    empty = [f.name for f in folders if not any(f.rglob("*"))]
    if full and empty:
        raise DataError(
            f"{folders[0].parent} has empty class folders: {', '.join(empty[:5])}; put images in, "
            "or take them away (names that begin with . or _ are passed over)"
        )
    return full


def _items(folder: Path, classes: Sequence[str]) -> list[Item]:
    items = [(p, label) for label, name in enumerate(classes) for p in _images(folder / name)]
    if not items or len(classes) < 2:
        raise DataError(
            f"{folder} holds no image folder: expected two class folders or more, each with images "
            f"({', '.join(sorted(ENDINGS)[:4])}, ...), as in {folder.name}/cat/1.jpg"
        )
    return items


def _folders(folder: Path) -> list[Path]:
    return sorted(f for f in folder.iterdir() if f.is_dir() and f.name[0] not in "._")


def _images(folder: Path) -> list[Path]:
    """None if the folder is missing: a held-out part need not have every class."""
    return sorted(f for f in folder.rglob("*") if _is_image(f))


def _has_images(folder: Path, deep: bool = True) -> bool:
    """Looks no further than the first one."""
    return any(map(_is_image, folder.rglob("*") if deep else folder.iterdir()))


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in ENDINGS and path.name[0] != "."


def unpacked(archive: Path) -> Path:
    """The folder that an archive was unpacked to: once, in the user's cache.

    Only images and empty folders are taken out. The folder's name depends on the archive's path, size and
    time of change.

    Raises:
        DataError: no readable tar, or unsafe names in it.
    """
    state = archive.stat()
    key = f"{archive.resolve()}|{state.st_size}|{state.st_mtime_ns}"
    name = f"{archive.name.split('.')[0]}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "singe"
    folder = cache / name
    if folder.is_dir():
        return folder
    partial = cache / f".{name}.{os.getpid()}.partial"
    try:
        partial.mkdir(parents=True)
        ended, images = False, 0
        folders: list[tarfile.TarInfo] = []
        filled: set[Path] = set()

        class Member(tarfile.TarInfo):
            """Sees the block of zeros that ends a tar; tarfile is content with the end of the file."""

            @classmethod
            def frombuf(cls, buf: Any, encoding: Any, errors: Any) -> Any:
                nonlocal ended
                ended = ended or (len(buf) == tarfile.BLOCKSIZE and not any(buf))
                return super().frombuf(buf, encoding, errors)

        with tarfile.open(archive, tarinfo=Member) as tar:
            for member in tar:  # in the archive's order: xz cannot go back
                path = Path(member.name)
                if member.isdir():
                    folders.append(member)
                else:
                    filled.update(path.parents)
                if member.isfile() and path.suffix.lower() in ENDINGS:
                    tar.extract(member, partial, filter="data")
                    images += 1
            for member in folders:  # an empty one would be a class without images
                if Path(member.name) not in filled:
                    tar.extract(member, partial, filter="data")
        if not ended:
            raise tarfile.ReadError("it ends in the middle; pack it again, or give a folder")
        if not images:
            raise DataError(f"{archive} holds no images, or is not whole")
        try:
            os.replace(partial, folder)
        except OSError:
            if not folder.is_dir():  # else another process has just unpacked the same
                raise
    except (tarfile.TarError, OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        kinds = "an image folder, a tar of one, .npz or file.py:loader"
        raise DataError(f"cannot unpack {archive}: {error}; data are {kinds}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder
