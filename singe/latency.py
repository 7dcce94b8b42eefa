"""Measured time of a network: warm, median, in turn with the network it is compared to."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_map

from singe.data import Batch, device_of, has_samples
from singe.errors import OptionError, expect
from singe.graph import ROWS, private_copy
from singe.modes import eager
from singe.plain import plain_count


@dataclass(frozen=True)
class Timing:
    """How latency is measured.

    Attributes:
        batch_size: samples per forward pass; the example inputs are repeated or cut to it.
        runs: timed passes; the median counts.
        warmup: passes before the clock starts.
        threads: torch's CPU threads while timing; default as they are.
    """

    batch_size: int = 1
    runs: int = 15
    warmup: int = 3
    threads: int | None = None

    def __post_init__(self) -> None:
        for name, least in (("batch_size", 1), ("runs", 1), ("warmup", 0), ("threads", 1)):
            value = getattr(self, name)
            if value is not None or name != "threads":
                object.__setattr__(self, name, plain_count(f"Timing: {name}", value, least))


def timing_of(timing: Timing | None, kind: str) -> Timing:
    """How a target of this kind is timed, if it is.

    Raises:
        OptionError: no :class:`Timing`, or one that would not have a say.
    """
    if timing is None:
        return Timing()
    expect("timing", timing, Timing, "a singe.Timing(batch_size=..., runs=..., threads=...)")
    if kind != "latency":
        raise OptionError(f"timing is how a latency is measured, and the target is {kind}")
    return timing


@dataclass(frozen=True)
class Latency:
    """One comparison: median milliseconds of both networks, and the median of their ratios.

    The ratio is taken run by run, so that what slows the whole machine down cancels. The quartiles say
    how far each median is to be trusted.
    """

    ms: float
    reference_ms: float
    share: float
    ms_quartiles: tuple[float, float]
    reference_quartiles: tuple[float, float]
    share_quartiles: tuple[float, float]


class Stopwatch:
    """Times networks against one reference, on the reference's device.

    Args:
        reference: usually the unpruned model; a private copy in evaluation mode is kept.
        batch: example inputs.
        timing: batch size and number of runs.
    """

    def __init__(self, reference: nn.Module, batch: Batch, timing: Timing) -> None:
        self.timing = timing
        self._device = device_of(reference)
        self._batch = resized(batch, timing.batch_size)
        self._reference = private_copy(reference, fast_path=True)
        self.reference_ms = self.compare(self._reference).reference_ms

    @torch.no_grad()
    def compare(self, model: nn.Module, runs: int | None = None) -> Latency:
        """Time ``model`` and the reference in turn."""
        candidate = private_copy(model, fast_path=True)
        pairs: list[tuple[float, float]] = []
        with _threads(self.timing.threads):
            for run in range(-self.timing.warmup, runs or self.timing.runs):
                pair = self._seconds(candidate), self._seconds(self._reference)
                if run >= 0:
                    pairs.append(pair)
        ours = [1e3 * seconds for seconds, _ in pairs]
        theirs = [1e3 * seconds for _, seconds in pairs]
        ratios = [a / b for a, b in pairs]
        return Latency(
            statistics.median(ours), statistics.median(theirs), statistics.median(ratios),
            quartiles(ours), quartiles(theirs), quartiles(ratios),
        )  # fmt: skip

    @torch.no_grad()
    def layer_seconds(self, model: nn.Module) -> dict[str, float]:
        """Median time of every convolution and linear layer of ``model``, compiled parts as they are."""
        twin = private_copy(model)
        times: dict[str, list[float]] = {}
        began: dict[str, float] = {}

        def start(name: str) -> Callable[..., None]:
            def hook(*_: Any) -> None:
                self._wait()
                began[name] = time.perf_counter()

            return hook

        def stop(name: str) -> Callable[..., None]:
            def hook(*_: Any) -> None:
                self._wait()
                times.setdefault(name, []).append(time.perf_counter() - began[name])

            return hook

        for name, module in twin.named_modules():
            if isinstance(module, ROWS):
                module.register_forward_pre_hook(start(name))
                module.register_forward_hook(stop(name))
        with _threads(self.timing.threads), eager():
            for run in range(self.timing.warmup + self.timing.runs):
                if run == self.timing.warmup:
                    times.clear()
                self._batch.call(twin)
        # A layer that is called several times counts with all its calls.
        return {n: statistics.median(t) * len(t) / self.timing.runs for n, t in times.items()}

    def _seconds(self, model: nn.Module) -> float:
        args, kwargs = self._batch.inputs()  # copying them is none of the model's time
        self._wait()
        start = time.perf_counter()
        model(*args, **kwargs)
        self._wait()
        return time.perf_counter() - start

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """The first and the third."""
    low, high = np.quantile(values, (0.25, 0.75))
    return float(low), float(high)


def resized(batch: Batch, size: int) -> Batch:
    """The batch with ``size`` samples, repeating or dropping some."""

    def take(value: Any) -> Any:
        if not has_samples(value, batch.size):
            return value
        return value[torch.arange(size, device=value.device) % batch.size]

    args, kwargs = tree_map(take, batch.args), tree_map(take, batch.kwargs)
    return replace(batch, args=args, kwargs=kwargs, size=size)


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
