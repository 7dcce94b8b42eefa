"""Networks that are trained, or that torchvision brings."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from singe.cli.models import import_torchvision


class CifarBlock(nn.Module):
    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.stride, self.missing = stride, width - channels

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.missing:  # option A: every second pixel, the new channels zero on both sides
            half = self.missing // 2
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, half, half))
        return F.relu(out + x)


class CifarResNet(nn.Module):
    """The CIFAR ResNets with option A shortcuts (He et al. 2016); ``blocks=3`` is ResNet-20."""

    def __init__(self, blocks: int = 3, widths: Sequence[int] = (16, 32, 64)) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, widths[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        channels = widths[0]
        for index, width in enumerate(widths):
            stage = []
            for block in range(blocks):
                stage.append(CifarBlock(channels, width, 2 if index and block == 0 else 1))
                channels = width
            setattr(self, f"layer{index + 1}", nn.Sequential(*stage))
        self.linear = nn.Linear(channels, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


def trained_resnet20() -> nn.Module:
    """The trained ResNet-20 in float64, or a skip that says where it was looked for."""
    root = Path(__file__).resolve().parents[1]
    shared = Path(os.environ.get("SINGE_DATA", root.parent / "shared"))
    path = shared / "models" / "resnet20_cifar10.pt"
    if not path.is_file():
        pytest.skip("resnet20_cifar10.pt is neither in ../shared/models nor under $SINGE_DATA")
    model = CifarResNet()
    model.load_state_dict(torch.load(path, weights_only=True))
    return model.double().eval()


def torchvision_models() -> Any:
    """``torchvision.models``, also where torchvision's compiled operators do not load."""
    if importlib.util.find_spec("torchvision") is None:
        pytest.skip("torchvision is not installed")
    return import_torchvision().models
