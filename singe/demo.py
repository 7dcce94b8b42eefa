"""``singe demo``: criteria compared at half the MACs, on a small network and bundled digits."""

from __future__ import annotations

import copy
import importlib.util
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

import singe
from singe.data import find_device
from singe.errors import SingeError
from singe.evaluation import accuracy
from singe.plain import plain_count
from singe.versions import versions

Batches = list[tuple[Tensor, Tensor]]

# Label -> options of singe.score. "random" is the control: what fine-tuning alone repairs.
CRITERIA: dict[str, dict[str, Any]] = {
    "random": {"criterion": "random"},
    "magnitude": {"criterion": "magnitude"},
    "taylor": {"criterion": "taylor"},
    "singe (layer)": {"criterion": "singe", "path": "layer", "p": "fisher"},
    "singe (network)": {"criterion": "singe", "path": "network"},
}
LATENCY_BATCH = 32
LATENCY_RUNS = 40


@dataclass(frozen=True)
class Settings:
    """What every criterion gets alike."""

    seeds: int = 3
    macs: float = 0.5
    ranking: str = "cost"  # with "global" single seeds lose 8 points: one layer goes nearly all
    rounds: int = 4
    train_steps: int = 150
    finetune_steps: int = 30
    lr: float = 0.03  # 0.01 is too little for 30 steps: a digit lost by pruning stays lost
    batch_size: int = 64
    calibration: int = 256

    def __post_init__(self) -> None:
        for name in ("seeds", "rounds", "train_steps", "finetune_steps"):
            object.__setattr__(self, name, plain_count(name, getattr(self, name), 1))


class ResidualBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        out = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(out)) + x)


class DigitsNet(nn.Module):
    """Stem, residual block, a stage at half the resolution, global pooling, linear."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1, bias=False)
        self.stem_bn = nn.BatchNorm2d(width)
        self.block = ResidualBlock(width)
        self.down = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1, bias=False)
        self.down_bn = nn.BatchNorm2d(2 * width)
        self.last = nn.Conv2d(2 * width, 2 * width, 3, padding=1, bias=False)
        self.last_bn = nn.BatchNorm2d(2 * width)
        self.head = nn.Linear(2 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(torch.relu(self.stem_bn(self.stem(x))))
        x = torch.relu(self.down_bn(self.down(x)))
        x = torch.relu(self.last_bn(self.last(x)))
        return self.head(x.mean((2, 3)))


def check_requirements() -> None:
    """Raise where scikit-learn or matplotlib is missing."""
    for module, name in (("sklearn", "scikit-learn"), ("matplotlib", "matplotlib")):
        if importlib.util.find_spec(module) is None:
            raise SingeError(f"the demo needs {name}: pip install {name}")


def load_data(settings: Settings, device: torch.device) -> tuple[Batches, Batches, Batches]:
    """Training, calibration (the first training images) and held-out batches of the digits."""
    check_requirements()
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target, dtype=torch.int64)
    train, held_out = train_test_split(
        torch.arange(len(labels)).numpy(), test_size=0.4, random_state=0, stratify=digits.target
    )

    def batches(index: Any, size: int) -> Batches:
        x, y = images[index].to(device), labels[index].to(device)
        return list(zip(x.split(size), y.split(size), strict=True))

    return (
        batches(train, settings.batch_size),
        batches(train[: settings.calibration], settings.calibration),
        batches(held_out, 512),
    )


def train_network(seed: int, batches: Batches, steps: int) -> nn.Module:
    """A trained :class:`DigitsNet` on the device of the data."""
    torch.manual_seed(seed)
    model = DigitsNet().to(batches[0][0].device).train()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        x, y = batches[step % len(batches)]
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def latencies(models: dict[str, nn.Module]) -> dict[str, float]:
    """Median milliseconds of a warm CPU forward; the models take turns, so all share the noise."""
    x = torch.zeros(LATENCY_BATCH, 1, 8, 8)
    ready = {name: copy.deepcopy(model).cpu().eval() for name, model in models.items()}
    taken: dict[str, list[float]] = {name: [] for name in ready}
    for run in range(-5, LATENCY_RUNS):
        for name, model in ready.items():
            start = time.perf_counter()
            model(x)
            if run >= 0:
                taken[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in taken.items()}


def compress_one(
    model: nn.Module, data: tuple[Batches, Batches, Batches], settings: Settings, seed: int,
    options: dict[str, Any],
) -> tuple[nn.Module, dict[str, Any]]:  # fmt: skip
    """One criterion: a copy of ``model`` through the entwined loop, and what was measured of it."""
    train, calibrate, held_out = data
    options = options | {"seed": seed, "progress": False}
    pruned = copy.deepcopy(model)
    start = time.perf_counter()
    scores = singe.score(pruned, calibrate, **options)
    seconds = time.perf_counter() - start
    report = singe.compress(
        pruned, train=train, calibrate=calibrate, evaluate=held_out,
        macs=settings.macs, rounds=settings.rounds, finetune_steps=settings.finetune_steps,
        ranking=settings.ranking, lr=settings.lr, **options,
    )  # fmt: skip
    kept = {name: len(pruned.get_parameter(f"{name}.weight")) for name in scores}
    return pruned, {
        "accuracy_pruned": statistics.fmean(float(r.metric_pruned or 0) for r in report.rounds),
        "accuracy": report.metric_after,
        "macs": report.macs_after,
        "params": report.params_after,
        "seconds_scoring": seconds,
        "kept": kept,
        "rounds": report.to_dict()["rounds"],
    }


def run_demo(
    settings: Settings | None = None,
    device: str | None = None,
    notify: Callable[[str], None] = lambda step: None,
) -> dict[str, Any]:
    """Train, prune with every criterion, measure.

    Args:
        settings: budgets, equal for all criteria.
        device: ``"cpu"``, ``"cuda"``, ...; default CUDA where torch finds it.
        notify: called with a few words before each step, ``count_steps(settings)`` times.

    Returns:
        JSON-ready: ``settings``, ``device``, ``versions``, ``held_out`` (images),
        ``channels`` (per layer, unpruned), ``runs`` (one dict per seed and criterion,
        ``"unpruned"`` among them) and ``seconds``.
    """
    # The network is tiny: on a busy machine more threads mostly wait for each other.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _run(settings or Settings(), find_device(device), notify)
    finally:
        torch.set_num_threads(threads)


def _run(settings: Settings, where: torch.device, notify: Callable[[str], None]) -> dict[str, Any]:
    start = time.perf_counter()
    data = load_data(settings, where)
    train, calibrate, held_out = data
    example = calibrate[0][0][:1]
    singe.score(DigitsNet().to(where), calibrate, progress=False)  # first calls load libraries
    runs: list[dict[str, Any]] = []
    channels: dict[str, int] = {}
    for seed in range(settings.seeds):
        title = f"seed {seed + 1}/{settings.seeds}: "
        notify(title + "training")
        model = train_network(seed, train, settings.train_steps)
        models = {"unpruned": model}
        scores = singe.score(model, calibrate, criterion="magnitude")
        channels = {name: len(values) for name, values in scores.items()}
        unpruned = singe.prune(copy.deepcopy(model), singe.Plan({}), example)
        found = {
            "unpruned": {
                "accuracy": accuracy(model, held_out),
                "macs": unpruned.macs_before,
                "params": unpruned.params_before,
            }
        }
        for name, options in CRITERIA.items():
            notify(title + name)
            models[name], found[name] = compress_one(model, data, settings, seed, options)
        speeds = latencies(models)
        runs += [
            {"seed": seed, "criterion": name, **run, "latency_ms": speeds[name]}
            for name, run in found.items()
        ]
    return {
        "settings": asdict(settings) | {"latency_batch": LATENCY_BATCH},
        "device": str(where),
        "versions": versions(),
        "held_out": sum(len(y) for _, y in held_out),
        "channels": channels,
        "runs": runs,
        "seconds": time.perf_counter() - start,
    }


def count_steps(settings: Settings) -> int:
    """How often :func:`run_demo` calls ``notify``."""
    return settings.seeds * (1 + len(CRITERIA))
