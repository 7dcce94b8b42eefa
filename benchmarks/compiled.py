"""What `compile=True` saves of a scoring run, and what compiling costs.

    python -m benchmarks.compiled [--batches 10] [--device cpu]

Seconds per batch, once everything is compiled, without and with `compile=True`, in turn; and the time
that the first batches take beyond that, which is compiling (Inductor's caches are off). It pays once a
run has more batches than `pays_after`.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch
import torch._inductor.config

import singe
from benchmarks.models import work
from benchmarks.record import synchronize, write

WARM_UP = 3  # batches until nothing new is compiled or checked
CASES: dict[str, dict[str, Any]] = {
    "resnet20, network path": {"model": "resnet20", "path": "network"},
    "resnet20, network path, bf16": {
        "model": "resnet20", "path": "network", "autocast": torch.bfloat16,
    },
    "resnet20, layer path, 2 groups": {"model": "resnet20", "path": "layer", "groups": 2},
    "mixer, network path": {"model": "mixer", "path": "network"},
}  # fmt: skip


class Clocked:
    """The same batch again and again, and when each was asked for."""

    def __init__(self, batch: Any, count: int) -> None:
        self.batch, self.count = batch, count
        self.times: list[float] = []

    def __iter__(self) -> Iterator[Any]:
        self.times = []
        for _ in range(self.count):
            synchronize()
            self.times.append(time.perf_counter())
            yield self.batch
        synchronize()
        self.times.append(time.perf_counter())

    def seconds(self) -> list[float]:
        return [b - a for a, b in zip(self.times, self.times[1:], strict=False)]


def measured(case: dict[str, Any], images: int, count: int, device: str) -> dict[str, Any]:
    """Seconds per batch: plain, compiled, and plain once more."""
    todo = work(case["model"], images, images, device, case.get("groups"))
    options = {key: value for key, value in case.items() if key not in ("model", "groups")}
    steady: dict[bool, list[float]] = {False: [], True: []}
    for compile in (False, True, False):
        data = Clocked(todo.batches[0], WARM_UP + count)
        singe.score(
            todo.model, data, layers=todo.layers, compile=compile, progress=False, **options
        )
        seconds = data.seconds()
        steady[compile] += seconds[WARM_UP:]
        if compile:
            first = sum(seconds[:WARM_UP])
    plain, compiled = (statistics.median(steady[kind]) for kind in (False, True))
    compiling = first - WARM_UP * compiled
    return {
        "seconds_per_batch": {"plain": plain, "compiled": compiled},
        "all_seconds": {"plain": steady[False], "compiled": steady[True]},
        "plain_over_compiled": plain / compiled,
        "compiling_seconds": compiling,
        "pays_after": compiling / (plain - compiled) if plain > compiled else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--batches", type=int, default=10)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch._inductor.config.force_disable_caches = True  # what a first run pays
    results: dict[str, Any] = {"settings": vars(args)}
    for name, case in CASES.items():
        results[name] = measured(case, args.images, args.batches, args.device)
        row = results[name]
        print(f"{name:32s} {row['plain_over_compiled']:.2f} x, compiling "
              f"{row['compiling_seconds']:.0f} s, pays after {row['pays_after']} batches")  # fmt: skip
        write(f"compiled-{args.device}", results)


if __name__ == "__main__":
    main()
