"""Small networks, one per kind of layer or coupling, with data for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from helpers import CLASSES, make_batches, randomise
from torch import Tensor, nn


def as_dict(batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """A batch for :class:`TwoInputs`."""
    x, y = batch
    return {"image": x, "meta": x.flatten(1)[:, :6].contiguous(), "labels": y}


class Residual(nn.Module):
    """``relu(body(x) + x)``, written with the in-place operations of everyday code."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        out = self.body(x)
        out += x
        return out.relu_()


class Concat(nn.Module):
    """``[x, body(x)]`` along the channels, as in a DenseNet."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.body(x)], 1)


class Head(nn.Module):
    """Mean over all positions, then a linear layer."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(channels, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.flatten(2).mean(2))


class Twice(nn.Module):
    """A convolution that is called two times: its weight gradient is a sum over the calls."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, channels, 3, padding=1)
        self.again = nn.Conv2d(channels, channels, 3, padding=1)
        self.head = Head(channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).tanh()
        return self.head(self.again(self.again(x).tanh()).tanh())


class Tokens(nn.Module):
    """The feed-forward half of a transformer over [B, N, C] tokens."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.embed = nn.Linear(5, width)
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + self.down(F.gelu(self.up(self.norm(x))))
        return self.head(x.mean(1))


class TwoInputs(nn.Module):
    """A model called with keyword arguments, whose output is a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Conv2d(3, 4, 3)
        self.meta = nn.Linear(6, 5)
        self.head = nn.Linear(9, CLASSES)

    def forward(self, image: Tensor, meta: Tensor) -> dict[str, Tensor]:
        seen = self.image(image).relu().mean((2, 3))
        return {"logits": self.head(torch.cat([seen, self.meta(meta).relu()], 1))}


class Branching(nn.Module):
    """Control flow that depends on the data behind a gate: nothing torch.vmap can run."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 5), nn.Linear(5, 5)
        self.head = nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).tanh()
        x = self.b(x) if x.sum() > 0 else self.b(-x)
        return self.head(x.tanh())


class SqueezeExcite(nn.Module):
    """``x * sigmoid(b(relu(a(mean x))))``: channels multiplied with channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(channels, 3, 1), nn.Conv2d(3, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.b(self.a(x.mean((2, 3), keepdim=True)).relu()).sigmoid()


def mlp(activation: Callable[[], nn.Module] = nn.ReLU) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(6, 8), activation(), nn.Linear(8, 7), activation(), nn.Linear(7, CLASSES)
    )


def vgg(widths: Sequence[int] = (6, 8, 7), linear: int = 9) -> nn.Sequential:
    """Plain convolutions with BatchNorm, pooling, flattening and a hidden linear layer."""
    layers: list[nn.Module] = []
    channels = 3
    for width in widths:
        layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)]
        layers += [nn.ReLU(inplace=True), nn.MaxPool2d(2)]
        channels = width
    layers += [nn.Flatten(), nn.Linear(channels, linear), nn.BatchNorm1d(linear), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(linear, CLASSES))


def conv_net(dims: int) -> nn.Sequential:
    """conv-BN-ReLU-conv-ReLU in 1, 2 or 3 dimensions, with strides and dilation."""
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims - 1]
    return nn.Sequential(
        conv(3, 5, 3, padding=1), norm(5), nn.ReLU(), conv(5, 4, 3, stride=2, dilation=2, padding=2),
        nn.ReLU(inplace=True), Head(4),
    )  # fmt: skip


def grouped() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(),
        nn.Conv2d(6, 8, 3, padding=1, groups=2), nn.ReLU(), Head(8),
    )  # fmt: skip


def depthwise() -> nn.Sequential:
    """A MobileNet block: expand, depthwise, project."""
    return nn.Sequential(
        nn.Conv2d(3, 6, 1, bias=False), nn.BatchNorm2d(6), nn.ReLU6(inplace=True),
        nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False), nn.BatchNorm2d(6), nn.ReLU6(),
        nn.Conv2d(6, 5, 1, bias=False), nn.BatchNorm2d(5), Head(5),
    )  # fmt: skip


def pre_activation() -> nn.Sequential:
    """BatchNorm before its convolution, over a concatenation: nothing folds."""
    return nn.Sequential(
        nn.Conv2d(3, 5, 3, padding=1),
        Concat(nn.Sequential(nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 4, 3, padding=1))),
        Concat(nn.Sequential(nn.BatchNorm2d(9), nn.ReLU(), nn.Conv2d(9, 3, 3, padding=1))),
        nn.BatchNorm2d(12), nn.ReLU(inplace=True), Head(12),
    )  # fmt: skip


def residual() -> nn.Sequential:
    body = nn.Sequential(
        nn.Conv2d(5, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(inplace=True),
        nn.Conv2d(6, 5, 3, padding=1, bias=False), nn.BatchNorm2d(5),
    )  # fmt: skip
    stem = [nn.Conv2d(3, 5, 3, padding=1, bias=False), nn.BatchNorm2d(5), nn.ReLU(inplace=True)]
    return nn.Sequential(*stem, Residual(body), Head(5))


def two_blocks() -> nn.Sequential:
    """The first block's in-place operations lie before the gates of the second."""
    return nn.Sequential(*residual()[:4], Residual(nn.Conv2d(5, 5, 1)), *conv_tail(5))


def conv_tail(channels: int) -> list[nn.Module]:
    return [nn.Conv2d(channels, 4, 3, padding=1), nn.ReLU(inplace=True), Head(4)]


def group_norm() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.GroupNorm(2, 6), nn.ReLU(),
        nn.Conv2d(6, 5, 3, padding=1), nn.GroupNorm(1, 5), nn.SiLU(), Head(5),
    )  # fmt: skip


def plain_norm() -> nn.Sequential:
    """BatchNorms without an affine map."""
    return nn.Sequential(
        nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5, affine=False), nn.ReLU(),
        nn.Conv2d(5, 4, 3), nn.BatchNorm2d(4, affine=False), nn.Hardswish(), Head(4),
    )  # fmt: skip


def layer_norm() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(6, 7), nn.LayerNorm(7), nn.GELU(), nn.Linear(7, 5), nn.Tanh(), nn.LayerNorm(5),
        nn.Linear(5, CLASSES),
    )  # fmt: skip


def input_gates(activation: Callable[[], nn.Module]) -> nn.Sequential:
    """An activation that maps 0 to something else stands between producer and consumer."""
    return nn.Sequential(
        nn.Conv2d(3, 5, 3, padding=1), nn.BatchNorm2d(5), activation(),
        nn.Conv2d(5, 4, 3, padding=1), activation(), Head(4),
    )  # fmt: skip


def padded(mode: str, padding: int | str = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 5, 3, padding=padding, padding_mode=mode), nn.Softsign(),
        nn.Conv2d(5, 4, 3, padding=padding, padding_mode=mode, groups=1), nn.ReLU(), Head(4),
    )  # fmt: skip


def channels_last() -> nn.Module:
    return residual().to(memory_format=torch.channels_last)


@dataclass(frozen=True)
class Case:
    """A network by name, and the shape of one sample of its input."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]

    def model(self, seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Module:
        torch.manual_seed(seed)
        return randomise(self.build().to(dtype), seed)

    def batches(
        self, sizes: Sequence[int] = (3, 2), seed: int = 0, dtype: torch.dtype = torch.float64
    ) -> list[Any]:
        if self.build is TwoInputs:
            return [as_dict(b) for b in make_batches(self.shape, sizes, seed, dtype)]
        return make_batches(self.shape, sizes, seed, dtype)


IMAGE = (3, 6, 6)

CASES = {
    "mlp": Case(mlp, (6,)),
    "conv1d": Case(lambda: conv_net(1), (3, 9)),
    "conv2d": Case(lambda: conv_net(2), IMAGE),
    "conv3d": Case(lambda: conv_net(3), (3, 4, 4, 4)),
    "vgg": Case(lambda: vgg((4, 5), 6), (3, 4, 4)),
    "grouped": Case(grouped, IMAGE),
    "depthwise": Case(depthwise, IMAGE),
    "pre_activation": Case(pre_activation, IMAGE),
    "residual": Case(residual, IMAGE),
    "two_blocks": Case(two_blocks, IMAGE),
    "channels_last": Case(channels_last, IMAGE),
    "group_norm": Case(group_norm, IMAGE),
    "layer_norm": Case(layer_norm, (6,)),
    "tokens": Case(lambda: Tokens(4, 6), (3, 5)),
    "sigmoid": Case(lambda: input_gates(nn.Sigmoid), IMAGE),
    "softplus": Case(lambda: input_gates(nn.Softplus), IMAGE),
    "pad_same": Case(lambda: padded("zeros", "same"), IMAGE),
    "pad_reflect": Case(lambda: padded("reflect"), IMAGE),
    "pad_replicate": Case(lambda: padded("replicate"), IMAGE),
    "pad_circular": Case(lambda: padded("circular"), IMAGE),
    "twice": Case(lambda: Twice(4), IMAGE),
    "squeeze_excite": Case(
        lambda: nn.Sequential(
            nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.PReLU(5), SqueezeExcite(5), Head(5)
        ),
        IMAGE,
    ),
    "plain_norm": Case(plain_norm, IMAGE),
    "dict": Case(TwoInputs, IMAGE),
}

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "relu_": lambda: nn.ReLU(inplace=True),
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "softplus": nn.Softplus,
    "hardswish": nn.Hardswish,
}

SMOOTH = ("silu", "gelu", "tanh", "sigmoid", "softplus")
