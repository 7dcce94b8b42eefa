"""CIFAR-10 and the CIFAR ResNets: data and trained weights, found beside the repository.

Looked for in ``$SINGE_DATA`` and in ``../shared`` next to the checkout: ``data/cifar10-jpeg.tar.xz``
(``train/<class>/*.jpg``, ``test/<class>/*.jpg``) and ``models/resnet{20,56}_cifar10.pt``.
"""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


def find(relative: str) -> Path:
    """Path of a data or model file.

    Raises:
        FileNotFoundError: with where it was looked for.
    """
    places = [Path(__file__).resolve().parents[2].parent / "shared"]
    if "SINGE_DATA" in os.environ:
        places.insert(0, Path(os.environ["SINGE_DATA"]))
    for place in places:
        if (place / relative).exists():
            return place / relative
    raise FileNotFoundError(
        f"{relative} not found in {', '.join(map(str, places))}; set SINGE_DATA"
    )


def images(split: str) -> tuple[Tensor, Tensor]:
    """``(uint8 [N, 3, 32, 32], int64 labels [N])`` of ``"train"`` or ``"test"``, in a fixed shuffle.

    Decoded once, then kept in the user's cache folder.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "singe"
    path = cache / "cifar10.npz"
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.npz")
        np.savez(partial, **_decode(find("data/cifar10-jpeg.tar.xz")))
        partial.rename(path)
    arrays = np.load(path)
    order = np.random.default_rng(0).permutation(len(arrays[f"{split}_y"]))
    x = torch.from_numpy(arrays[f"{split}_x"][order]).permute(0, 3, 1, 2).contiguous()
    return x, torch.from_numpy(arrays[f"{split}_y"][order])


def _decode(archive: Path) -> dict[str, np.ndarray]:
    found: dict[str, list[tuple[str, str, np.ndarray]]] = {"train": [], "test": []}
    with tarfile.open(archive) as tar:
        for entry in tar:
            parts = entry.name.split("/")
            if entry.isfile() and len(parts) == 3 and parts[0] in found:
                data = tar.extractfile(entry)
                assert data is not None
                pixels = np.asarray(Image.open(io.BytesIO(data.read())).convert("RGB"))
                found[parts[0]].append((parts[1], parts[2], pixels))
    arrays = {}
    names = sorted({name for name, _, _ in found["train"]})
    for split, items in found.items():
        items.sort(key=lambda item: item[:2])
        arrays[f"{split}_x"] = np.stack([pixels for _, _, pixels in items])
        arrays[f"{split}_y"] = np.array([names.index(name) for name, _, _ in items])
    return arrays


def normalise(x: Tensor) -> Tensor:
    """uint8 -> float32, as the trained networks expect it."""
    return (x.float() / 255 - MEAN.to(x.device)) / STD.to(x.device)


def batches(x: Tensor, y: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
    """Normalised ``(x, y)`` batches."""
    return [(normalise(a), b) for a, b in zip(x.split(size), y.split(size), strict=True)]


class Augmented:
    """Re-iterable training batches: random crop (padding 4) and flip, a new order every epoch.

    The images may lie on a GPU; what is drawn does not depend on that.
    """

    def __init__(self, x: Tensor, y: Tensor, size: int, seed: int) -> None:
        self.x, self.y, self.size = x, y, size
        self.generator = torch.Generator().manual_seed(seed)

    def __iter__(self):  # type: ignore[no-untyped-def]
        order = torch.randperm(len(self.x), generator=self.generator)
        for chosen in order.to(self.x.device).split(self.size):
            yield self._augment(normalise(self.x[chosen])), self.y[chosen]

    def _augment(self, x: Tensor) -> Tensor:
        padded = F.pad(x, (4, 4, 4, 4))
        shifts = torch.randint(0, 9, (2, len(x)), generator=self.generator)
        flip = torch.rand(len(x), generator=self.generator) < 0.5
        (dy, dx), flip = shifts.to(x.device), flip.to(x.device)
        pixels, sample = torch.arange(32, device=x.device), torch.arange(len(x), device=x.device)
        rows = (dy[:, None] + pixels)[:, None, :, None]
        columns = (dx[:, None] + pixels)[:, None, None, :]
        channels = pixels[:3, None, None]
        crop = padded[sample[:, None, None, None], channels, rows, columns]
        crop = torch.where(flip[:, None, None, None], crop.flip(3), crop)
        return crop


class BasicBlock(nn.Module):
    """Two 3x3 convolutions; the shortcut drops every other pixel and pads channels with zeros."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride, self.pad = stride, (outputs - inputs) // 2

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.stride != 1:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.pad, self.pad))
        return F.relu(out + x)


class CifarResNet(nn.Module):
    """ResNet-20 (n = 3) and ResNet-56 (n = 9) for 32x32 images, option A shortcuts."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(16, 16, n, 1)
        self.layer2 = self._stage(16, 32, n, 2)
        self.layer3 = self._stage(32, 64, n, 2)
        self.linear = nn.Linear(64, 10)

    @staticmethod
    def _stage(inputs: int, outputs: int, n: int, stride: int) -> nn.Sequential:
        first = BasicBlock(inputs, outputs, stride)
        return nn.Sequential(first, *(BasicBlock(outputs, outputs, 1) for _ in range(n - 1)))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


def trained(depth: int = 20) -> nn.Module:
    """The trained ResNet-20 or ResNet-56, in evaluation mode."""
    model = CifarResNet((depth - 2) // 6)
    state = torch.load(find(f"models/resnet{depth}_cifar10.pt"), weights_only=True)
    model.load_state_dict(state)
    return model.eval()
