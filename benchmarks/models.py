"""The networks, images and groups that the benchmarks run on."""

from __future__ import annotations

import copy
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.record import ROOT
from singe.cli.models import import_torchvision
from singe.data import first_batch
from singe.graph import ModelGraph
from singe.units import find_groups

sys.path.insert(0, str(ROOT / "examples" / "cifar10"))
import cifar10

MODELS = ("resnet20", "resnet56", "resnet50", "mobilenet_v2", "mixer")
Batches = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Work:
    """What is scored: a model in evaluation mode, batches on its device, and groups by layer name."""

    name: str
    model: nn.Module
    batches: Batches
    layers: tuple[str, ...]

    @property
    def images(self) -> int:
        return sum(len(y) for _, y in self.batches)

    def graph(self) -> ModelGraph:
        """The groups as the package finds them: what the naive loops must know, found untimed."""
        device = self.batches[0][0].device
        return find_groups(self.model, first_batch(self.batches, device), self.layers)

    def describe(self) -> dict[str, Any]:
        """For the JSON."""
        return {
            "model": self.name,
            "images": self.images,
            "batches": len(self.batches),
            "input": list(self.batches[0][0].shape[1:]),
            "groups": list(self.layers),
        }


class MixerBlock(nn.Module):
    """Token and channel mixing (Tolstikhin et al. 2021), each an MLP behind a LayerNorm."""

    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.tokens = nn.Sequential(
            nn.Linear(tokens, 2 * tokens), nn.GELU(), nn.Linear(2 * tokens, tokens)
        )
        self.channels = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.norm2(x))


class Mixer(nn.Module):
    """A small MLP-Mixer for 32x32 images in 4x4 patches: 64 tokens."""

    def __init__(self, width: int = 96, depth: int = 6, classes: int = 10) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.blocks = nn.Sequential(*(MixerBlock(64, width) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.patches(x).flatten(2).transpose(1, 2))
        return self.head(self.norm(x).mean(1))


def work(
    name: str, images: int, batch_size: int, device: str = "cpu", groups: int | None = None
) -> Work:
    """A workload by the name of its model.

    Args:
        name: one of ``MODELS``. The CIFAR ResNets are trained and see CIFAR-10; the others have
            random weights (speed does not depend on them) and normal noise, 224 pixels where that is
            what the model is made for.
        groups: take only so many of its groups, evenly spread over the depth.

    Raises:
        FileNotFoundError: the CIFAR data or weights are not there; says where they were looked for.
    """
    torch.manual_seed(0)
    if name in ("resnet20", "resnet56"):
        model: nn.Module = cifar10.trained(int(name.removeprefix("resnet")))
        x, y = cifar10.images("train")
        x, y = cifar10.normalise(x[:images]), y[:images]
    else:
        side, classes = (32, 10) if name == "mixer" else (224, 1000)
        model = Mixer() if name == "mixer" else import_torchvision().models.get_model(name)
        x, y = torch.randn(images, 3, side, side), torch.randint(classes, (images,))
        _settle(model, x[:2])
    layers = spread(inner_layers(name, model), groups)
    model, x, y = model.eval().to(device), x.to(device), y.to(device)
    batches = list(zip(x.split(batch_size), y.split(batch_size), strict=True))
    return Work(name, model, batches, tuple(layers))


def inner_layers(name: str, model: nn.Module) -> list[str]:
    """Root layers of the groups inside a block: those that are no residual stream."""
    convs = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    if name == "mixer":
        return [
            f"blocks.{i}.{part}.0"
            for i in range(len(model.blocks))
            for part in ("tokens", "channels")
        ]
    if name == "mobilenet_v2":  # the expansion, coupled with the depthwise convolution behind it
        return [n for n in convs if n.endswith("conv.0.0") and n != "features.1.conv.0.0"]
    inner = ("conv1", "conv2") if name == "resnet50" else ("conv1",)
    return [n for n in convs if "." in n and n.rsplit(".", 1)[1] in inner]


def spread(items: list[str], count: int | None) -> list[str]:
    """``count`` of the items, evenly spaced, first and last included."""
    if count is None or count >= len(items):
        return items
    if count == 1:
        return items[len(items) // 2 :][:1]
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


@torch.no_grad()
def _settle(model: nn.Module, x: Tensor) -> None:
    """BatchNorm statistics that fit the random weights: else activations grow with every block."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    model.train()(x)


def folded(work: Work) -> Work:
    """The same network with its BatchNorms folded, channels-last: the fastest plain way to run it."""
    model = copy.deepcopy(work.model)
    for row, norm in work.graph().folds.items():
        fused = nn.utils.fuse_conv_bn_eval(model.get_submodule(row), model.get_submodule(norm))
        model.set_submodule(row, fused)
        model.set_submodule(norm, nn.Identity())
    if work.batches[0][0].dim() != 4 or work.name == "mixer":
        return Work(work.name, model, work.batches, work.layers)
    model = model.to(memory_format=torch.channels_last)
    batches = [(x.contiguous(memory_format=torch.channels_last), y) for x, y in work.batches]
    return Work(work.name, model, batches, work.layers)
