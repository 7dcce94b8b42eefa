"""Small networks with non-trivial statistics, data for them, and one way to run either engine."""

from __future__ import annotations

import copy
import importlib.util
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from singe.cli.models import import_torchvision
from singe.criteria import as_criterion
from singe.data import Batch, as_batch, first_batch, read_batches
from singe.definition import Definition
from singe.engine import FusedEngine
from singe.graph import ModelGraph
from singe.naive import naive_scores
from singe.objectives import as_objective
from singe.quadrature import as_quadrature
from singe.request import ENDPOINT
from singe.result import Result
from singe.units import find_groups
from singe.weight_groups import find_weight_groups

CPU = torch.device("cpu")
NORM_LAYERS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.LayerNorm, nn.GroupNorm)
CLASSES = 4

# The examples are the same in every run: a property that fails, fails for everybody.
settings.register_profile(
    "singe", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("singe")


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """These networks are so small that threads waiting for each other cost a hundred times more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ---------------------------------------------------------------------- networks


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


@dataclass(frozen=True)
class Network:
    """A random small network: everything that decides it, so that a failure can be repeated."""

    dims: int
    blocks: tuple[str, ...]
    width: int
    activation: str
    seed: int

    def model(self, dtype: torch.dtype = torch.float64) -> nn.Module:
        torch.manual_seed(self.seed)
        conv: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[self.dims - 1]
        norm: Any = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[self.dims - 1]
        act, width = ACTIVATIONS[self.activation], self.width
        layers: list[nn.Module] = [conv(3, width, 3, padding=1), act()]
        channels = width
        for block in self.blocks:
            if block == "conv":
                layers += [conv(channels, width, 3, padding=1), act()]
            elif block == "conv_norm":
                layers += [conv(channels, width, 3, 2, 1, bias=False), norm(width), act()]
            elif block == "pre":
                layers += [norm(channels), act(), conv(channels, width, 1)]
            elif block == "group_norm":
                width = 2 * self.width
                layers += [conv(channels, width, 3, padding=1), nn.GroupNorm(2, width), act()]
            elif block == "grouped":
                width = 2 * self.width
                layers += [conv(channels, width, 1), act()]
                layers += [conv(width, width, 3, padding=1, groups=2), act()]
            elif block == "depthwise":
                layers += [conv(channels, width, 1), norm(width), act()]
                layers += [conv(width, width, 3, padding=1, groups=width), act()]
            elif block == "residual":
                width = channels
                inner = [conv(width, self.width + 1, 1, bias=False), norm(self.width + 1), act()]
                layers += [Residual(nn.Sequential(*inner, conv(self.width + 1, width, 1)))]
            elif block == "concat":
                layers += [Concat(nn.Sequential(conv(channels, self.width, 1), act()))]
                width = channels + self.width
            channels, width = width, self.width
        model = nn.Sequential(*layers, Head(channels))
        return randomise(model.to(dtype), self.seed)

    def batches(
        self, sizes: Sequence[int] = (3, 2), dtype: torch.dtype = torch.float64
    ) -> list[tuple[Tensor, Tensor]]:
        return make_batches((3, *(5,) * self.dims), sizes, self.seed, dtype)


BLOCKS = (
    "conv", "conv_norm", "pre", "group_norm", "grouped", "depthwise", "residual", "concat",
)  # fmt: skip


def networks(
    activations: Sequence[str] = tuple(ACTIVATIONS), blocks: Sequence[str] = BLOCKS
) -> st.SearchStrategy[Network]:
    """Random small convolutional networks."""
    return st.builds(
        Network,
        dims=st.integers(1, 3),
        blocks=st.lists(st.sampled_from(blocks), min_size=1, max_size=2).map(tuple),
        width=st.integers(2, 4),
        activation=st.sampled_from(activations),
        seed=st.integers(0, 2**16),
    )


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


@torch.no_grad()
def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Norms with random statistics and affine maps of both signs, in evaluation mode.

    With the defaults (mean 0, variance 1, weight 1, bias 0) a BatchNorm is the identity, and a test
    would not see one that is forgotten.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(like: Tensor, mean: float, std: float) -> Tensor:
        values = torch.randn(like.shape, generator=generator, dtype=torch.float64)
        return (mean + std * values).to(like.dtype)

    for module in model.modules():
        if not isinstance(module, NORM_LAYERS):
            continue
        if getattr(module, "running_mean", None) is not None:
            module.running_mean.copy_(normal(module.running_mean, 0.0, 0.4))
            module.running_var.copy_(normal(module.running_var, 0.0, 0.5).abs() + 0.5)
        if module.weight is not None:
            module.weight.copy_(normal(module.weight, 1.0, 0.3))
            module.weight[::3] *= -1
            module.bias.copy_(normal(module.bias, 0.0, 0.4))
    return model.eval()


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything of a model that must not move, by value and by identity."""
    return {
        "state": {k: v.clone() for k, v in model.state_dict().items()},
        "ids": {k: id(v) for k, v in [*model.named_parameters(), *model.named_buffers()]},
        "grad": {
            k: (id(p.grad), None if p.grad is None else p.grad.clone())
            for k, p in model.named_parameters()
        },
        "requires_grad": {k: p.requires_grad for k, p in model.named_parameters()},
        "training": {k: m.training for k, m in model.named_modules()},
        "attributes": {k: sorted(m.__dict__) for k, m in model.named_modules()},
        "hooks": {
            k: [list(v.items()) for n, v in sorted(m.__dict__.items()) if n.endswith("_hooks")]
            for k, m in model.named_modules()
        },
        "layout": {k: (v.stride(), v.dtype, v._version) for k, v in model.state_dict().items()},
    }


def assert_unchanged(model: nn.Module, before: dict[str, Any], versions: bool = True) -> None:
    """Bit for bit what :func:`snapshot` saw.

    Args:
        versions: also no in-place operation was ever run on a tensor of the model.
    """
    after = snapshot(model)
    assert after["state"].keys() == before["state"].keys()
    for name, value in before["state"].items():
        assert same_bits(after["state"][name], value), f"{name} has changed"
    for name, (identity, value) in before["grad"].items():
        now, grad = after["grad"][name]
        assert now == identity, f"{name}.grad is another tensor"
        assert (grad is None) == (value is None)
        assert value is None or same_bits(grad, value), f"{name}.grad has changed"
    for key in ("ids", "requires_grad", "training", "attributes", "hooks"):
        assert after[key] == before[key], key
    for name, layout in before["layout"].items():
        assert after["layout"][name][: 3 if versions else 2] == layout[: 3 if versions else 2], name


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Equal shape, dtype and bytes: NaN equals itself, 0 is not -0."""
    return (
        left.shape == right.shape
        and left.dtype == right.dtype
        and left.contiguous().numpy().tobytes() == right.contiguous().numpy().tobytes()
    )


# ---------------------------------------------------------------------- data


def make_batches(
    shape: Sequence[int],
    sizes: Sequence[int],
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    classes: int = CLASSES,
) -> list[tuple[Tensor, Tensor]]:
    """``(x, y)`` batches of the given sizes; the samples do not depend on how they are cut."""
    generator = torch.Generator().manual_seed(seed + 1000)
    total = sum(sizes)
    x = torch.randn(total, *shape, generator=generator, dtype=torch.float64).to(dtype)
    y = torch.randint(classes, (total,), generator=generator)
    return list(zip(x.split(list(sizes)), y.split(list(sizes)), strict=True))


def as_dict(batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """A batch for :class:`TwoInputs`."""
    x, y = batch
    return {"image": x, "meta": x.flatten(1)[:, :6].contiguous(), "labels": y}


# ---------------------------------------------------------------------- running


def run_engine(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    engine: str = "fused",
    criterion: str = "singe",
    path: str = "layer",
    quadrature: Any = 3,
    p: int | str = 1,
    norm: str = "inside",
    objective: Any = "cross_entropy",
    layers: Iterable[str] | None = None,
    ignore: Iterable[str] = (),
    max_memory: int | None = None,
    graph: ModelGraph | None = None,
    n_batches: int | None = 1,
    compile: bool = False,
    granularity: str = "unit",
) -> Result:
    """What :func:`singe.score` computes, before it is rounded to float32."""
    if graph is None:
        find = find_groups if granularity == "unit" else find_weight_groups
        graph = find(model, first_batch(batches, CPU), layers, ignore)
    chosen = as_criterion(criterion)
    rule = ENDPOINT if chosen.endpoint else as_quadrature(quadrature)
    path = "network" if chosen.endpoint else "neuron" if criterion == "ablation" else path
    definition = Definition(as_objective(objective), chosen, path, rule, p, norm, granularity)
    data = read_batches(batches, CPU)
    if engine == "naive":
        return naive_scores(model, graph, data, definition)
    fused = FusedEngine(model, graph, definition, max_memory, n_batches=n_batches, compile=compile)
    return fused.run(data)


def relative_error(left: Tensor, right: Tensor) -> float:
    """Relative L2 distance."""
    left, right = left.detach().double(), right.detach().double()
    scale, off = float(right.norm()), float((left - right).norm())
    return off / scale if scale else off


def assert_close(left: Any, right: Any, tolerance: float) -> None:
    """Two mappings of scores agree, group by group, in relative L2; NaN never agrees."""
    assert list(left) == list(right)
    for name in right:
        assert left[name].shape == right[name].shape, name
        error = relative_error(left[name], right[name])
        assert error <= tolerance, f"{name}: relative error {error:.2e} > {tolerance:.0e}"


@torch.no_grad()
def mean_loss(model: nn.Module, batches: Iterable[Any], objective: Any = "cross_entropy") -> float:
    """The mean loss over all samples, computed without anything of the engines."""
    goal = as_objective(objective)
    total, count = 0.0, 0
    for index, raw in enumerate(batches):
        batch = as_batch(raw, index, CPU)
        total += float(goal.total(batch.call(model), batch))
        count += batch.size
    return total / count


def batch_of(raw: Any) -> Batch:
    return as_batch(raw, 0, CPU)


def clone(model: nn.Module) -> nn.Module:
    """A deep copy that shares nothing."""
    return copy.deepcopy(model)
