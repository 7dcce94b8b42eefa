"""Data for small networks, one way to run either engine, and what results are held against."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from torch import Tensor, nn

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


# ---------------------------------------------------------------------- models


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
