"""Data by name: an image folder, a tar of one, ``.npz``, ``path/to/file.py:loader``."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from singe.cli.images import ImageFiles, Item, Transform, scan, unpacked
from singe.cli.users_files import call_from_file
from singe.data import as_batch, check_reiterable
from singe.errors import DataError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CPU = torch.device("cpu")
PARTS = ("train", "calibrate", "evaluate")


@dataclass(frozen=True)
class Reading:
    """How data is read.

    Attributes:
        image_size: images are resized to squares of this.
        batch_size: samples per batch.
        calibration: samples to score on.
        held_out: share kept for measuring accuracy where the data has no such part of its own.
        evaluation: measure accuracy on so many held-out samples at most; None: all.
        mean, std: per channel, for values in 0..1.
        augment: flip and shift training images at random.
        workers: processes that decode.
        seed: for the split and the choice of the calibration samples.
    """

    image_size: int = 224
    batch_size: int = 64
    calibration: int = 256
    held_out: float = 0.2
    evaluation: int | None = None
    mean: Sequence[float] = IMAGENET_MEAN
    std: Sequence[float] = IMAGENET_STD
    augment: bool = True
    workers: int = 0
    seed: int = 0


@dataclass(frozen=True)
class Data:
    """Re-iterable batches for the three uses; None where a loader gave none.

    Attributes:
        options: the fields of :class:`Reading` that had a say in them.
    """

    train: Iterable[Any] | None
    calibrate: Iterable[Any]
    evaluate: Iterable[Any] | None
    options: frozenset[str] = frozenset()

    def describe(self) -> dict[str, int]:
        """Samples per part, where the data knows."""
        calibrate = self.calibrate if isinstance(self.calibrate, list) else []
        sizes = {"calibrate": sum(as_batch(b, 0, CPU).size for b in calibrate)}
        for part in ("train", "evaluate"):
            dataset = getattr(getattr(self, part), "dataset", ())
            with suppress(TypeError):  # an IterableDataset has no length
                sizes[part] = len(dataset)
        return {part: size for part, size in sizes.items() if size}


class Source:
    """Data that was found but not read yet: its classes are known before the model is built."""

    def __init__(self, spec: str) -> None:
        self._folder: tuple[list[Item], list[Item] | None] | None = None
        self._arrays: dict[str, np.ndarray] | None = None
        self._user: Any = None
        self.classes: int | None = None
        path = Path(spec)
        if spec.rpartition(":")[0].endswith(".py"):
            self._user = call_from_file(spec)
            if self._user is None:
                raise DataError(
                    f"{spec} returned None; expected (train, evaluate), a dict of {', '.join(PARTS)}, "
                    "or training batches"
                )
        elif not path.exists():
            raise DataError(f"there is no data at {spec}")
        elif path.suffix == ".npz":
            self._arrays = _read_npz(path)
            self.classes = int(self._arrays["y_train"].max()) + 1
        else:
            names, train, held_out = scan(path if path.is_dir() else unpacked(path))
            self._folder, self.classes = (train, held_out), len(names)

    def read(self, model: nn.Module, how: Reading) -> Data:
        """Batches for this model: of one channel where its first convolution takes one.

        Raises:
            DataError: nothing in it, or in a form that is not offered.
        """
        if self._user is not None:
            return _from_user(self._user, how.calibration)
        channels = _channels(model)
        plain = Transform(how.mean, how.std, augment=False)
        training = Transform(how.mean, how.std, augment=how.augment)
        parts: list[Dataset[Any]]
        if self._arrays is not None:
            a = self._arrays
            train: Dataset[Any] = Arrays(a["x_train"], a["y_train"], training)
            same: Dataset[Any] = Arrays(a["x_train"], a["y_train"], plain)
            apart: Any = Arrays(a["x_test"], a["y_test"], plain) if "x_test" in a else None
            labels = a["y_train"]
        else:
            assert self._folder is not None
            items, others = self._folder
            train = ImageFiles(items, how.image_size, channels, training)
            same = ImageFiles(items, how.image_size, channels, plain)
            apart = None if others is None else ImageFiles(others, how.image_size, channels, plain)
            labels = np.array([label for _, label in items])
        order = np.random.default_rng(how.seed).permutation(len(labels)).tolist()
        if apart is None:
            order, last = _split(order, labels, how.held_out)
            if not order:
                raise DataError(
                    f"--held-out {how.held_out:g} of {len(labels)} samples leaves none to train on"
                )
            apart = Subset(same, last)
        parts = [Subset(train, order), Subset(same, order[: how.calibration])]
        count = len(apart) if how.evaluation is None else min(how.evaluation, len(apart))
        chosen = np.random.default_rng(how.seed).permutation(len(apart))[:count]
        parts.append(Subset(apart, np.sort(chosen).tolist()))
        train_loader, calibrate, evaluate = (
            _loader(part, how, shuffle=index == 0) for index, part in enumerate(parts)
        )
        # Kept decoded: every round reads the calibration samples again.
        return Data(train_loader, list(calibrate), evaluate if count else None, self._options())

    def _options(self) -> frozenset[str]:
        """The options that have a say in what is read of a folder or of arrays."""
        found = {"batch_size", "calibration", "evaluation", "workers"}
        if self._arrays is not None:
            images, own_part = _are_images(self._arrays["x_train"]), "x_test" in self._arrays
        else:
            assert self._folder is not None
            images, own_part = True, self._folder[1] is not None
            found |= {"image_size"}
        if images:
            found |= {"mean", "std", "augment"}
        return frozenset(found if own_part else found | {"held_out"})


class Arrays(Dataset[tuple[Tensor, int]]):
    """uint8 images are normalised; anything else is taken as it is, as float32."""

    def __init__(self, x: np.ndarray, y: np.ndarray, transform: Transform) -> None:
        self.y = y
        self.transform = transform if _are_images(x) else None
        if self.transform is not None and x.ndim == 3:
            x = x[:, None]
        elif self.transform is not None and x.shape[-1] in (1, 3) and x.shape[1] not in (1, 3):
            x = x.transpose(0, 3, 1, 2)
        self.x = x

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        x = torch.from_numpy(np.ascontiguousarray(self.x[index]))
        return (x.float() if self.transform is None else self.transform(x)), int(self.y[index])


def _are_images(x: np.ndarray) -> bool:
    return x.dtype == np.uint8 and x.ndim >= 3


def _loader(part: Dataset[Any], how: Reading, shuffle: bool) -> DataLoader[Any]:
    count = len(part)  # type: ignore[arg-type]
    # A last batch of one sample breaks BatchNorm in training.
    drop = shuffle and count > how.batch_size
    return DataLoader(
        part, how.batch_size, shuffle=shuffle, drop_last=drop, num_workers=how.workers,
        # Workers that live on draw on from the epoch before: a run that is continued could not follow.
        persistent_workers=how.workers > 0 and not shuffle,
    )  # fmt: skip


def _split(order: list[int], labels: np.ndarray, share: float) -> tuple[list[int], list[int]]:
    """Of every class the first ``share`` of the shuffled samples is held out."""
    if not 0.0 <= share < 1.0:
        raise DataError(f"the held-out share must lie in [0, 1), got {share!r}")
    seen: dict[int, int] = {}
    wanted = {
        int(c): round(share * n)
        for c, n in zip(*np.unique(labels, return_counts=True), strict=True)
    }
    kept: list[int] = []
    held_out: list[int] = []
    for index in order:
        label = int(labels[index])
        seen[label] = seen.get(label, 0) + 1
        (held_out if seen[label] <= wanted[label] else kept).append(index)
    return kept, held_out


def _channels(model: nn.Module) -> int:
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    return 1 if first is not None and first.in_channels == 1 else 3


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"cannot read {path}: {error}") from error
    if {"x", "y"} <= arrays.keys():
        arrays |= {"x_train": arrays["x"], "y_train": arrays["y"]}
    if not {"x_train", "y_train"} <= arrays.keys():
        raise DataError(
            f"{path} holds {', '.join(arrays) or 'nothing'}; expected x and y, or x_train, y_train, "
            "x_test and y_test"
        )
    found = {k: arrays[k] for k in ("x_train", "y_train")}
    parts = {"x_test", "y_test"}
    if len(parts & arrays.keys()) == 1:
        raise DataError(
            f"{path} has {', '.join(parts & arrays.keys())} but no {', '.join(parts - arrays.keys())}"
        )
    if parts <= arrays.keys():
        found |= {k: arrays[k] for k in ("x_test", "y_test")}
    for part in ("train", "test"):
        if f"x_{part}" not in found:
            continue
        x, y = found[f"x_{part}"], found[f"y_{part}"]
        if not len(x) or len(x) != len(y) or y.size != len(y) or y.dtype.kind not in "iu":
            raise DataError(
                f"{path}: the {part} part has {len(x)} samples and labels of shape {y.shape} and "
                f"type {y.dtype}; expected one integer label per sample"
            )
        if x.dtype.kind not in "buif" or int(y.max()) >= 2**31:
            raise DataError(
                f"{path}: the {part} part has samples of type {x.dtype} and labels up to {y.max()}; "
                "expected real numbers, and classes from 0"
            )
        found[f"y_{part}"] = y.reshape(-1)
    return found


def _from_user(value: Any, calibration: int) -> Data:
    """A mapping with ``train``, ``calibrate``, ``evaluate``; ``(train, evaluate)``; or batches."""
    if isinstance(value, Mapping) and not set(value) <= set(PARTS):
        raise DataError(f"the loader gave {', '.join(map(str, value))}; known: {', '.join(PARTS)}")
    if isinstance(value, Mapping):
        parts: dict[str, Any] = {name: value.get(name) for name in PARTS}
    elif isinstance(value, tuple) and len(value) == 2 and not isinstance(value[0], Tensor):
        parts = {"train": value[0], "calibrate": None, "evaluate": value[1]}
    else:
        parts = {"train": value, "calibrate": None, "evaluate": None}
    if parts["train"] is None and parts["calibrate"] is None:
        raise DataError("the loader gave neither train nor calibrate batches")
    for name, batches in parts.items():
        if batches is not None:
            check_reiterable(batches, f"the loader's {name} part")
    options = frozenset[str]()
    if parts["calibrate"] is None:
        parts["calibrate"] = first_batches(parts["train"], calibration)
        options = frozenset({"calibration"})
    return Data(parts["train"], parts["calibrate"], parts["evaluate"], options)


def first_batches(batches: Iterable[Any], count: int) -> list[Any]:
    """Whole batches until they hold ``count`` samples."""
    kept: list[Any] = []
    seen = 0
    for index, raw in enumerate(batches):
        kept.append(raw)
        seen += as_batch(raw, index, CPU).size
        if seen >= count:
            break
    return kept
