"""Early decision: does it find the same lowest units as the full run, and with how much less work?

Nothing is timed here, so the draws run beside each other, one thread each.
"""

from __future__ import annotations

import multiprocessing
import statistics
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch

from benchmarks.models import Work, cifar10, work
from benchmarks.scoring import flat, refusal, sweep

SHARE = 0.30
IMAGES, BATCH_SIZE = 64, 64  # the engine cuts the samples anew
OPTIONS: dict[str, Any] = {"tolerance": 0.6, "pruning_ratio": SHARE}
WORK = "evaluations"  # of scores.meta: samples times units times nodes


def refused(options: dict[str, Any]) -> str | None:
    """Why the engine does not take these options, or None."""
    return refusal(path="neuron", **options)


def lowest(scores: Mapping[str, torch.Tensor], share: float) -> set[int]:
    """Positions of the lowest share among all units."""
    values = flat(scores)
    return set(values.argsort()[: round(share * len(values))].tolist())


def overlap(chosen: set[int], wanted: set[int]) -> float:
    """Share of ``wanted`` that is in ``chosen``."""
    return len(chosen & wanted) / len(wanted)


def one_draw(draw: int, options: dict[str, Any], device: str) -> dict[str, float]:
    """The full run and the early one on the images of one draw."""
    if device == "cpu":
        torch.set_num_threads(1)
    base = work("resnet20", 1, 1, device)
    x, y = cifar10.images("train")
    part = slice(draw * IMAGES, (draw + 1) * IMAGES)
    batches = cifar10.batches(x[part], y[part], BATCH_SIZE)
    batches = [(a.to(device), b.to(device)) for a, b in batches]
    todo = Work(base.name, base.model, batches, base.layers)
    full, early = sweep(todo, "neuron", 4), sweep(todo, "neuron", 4, **options)
    return {
        "work": early.meta[WORK] / full.meta[WORK],
        "same": overlap(lowest(early, SHARE), lowest(full, SHARE)),
        "seconds_full": full.meta["seconds"]["sweep"],
        "seconds_early": early.meta["seconds"]["sweep"],
    }


def draws(count: int, options: dict[str, Any], device: str) -> dict[str, Any]:
    """Several draws of other images, with their means."""
    if device == "cuda":
        found = [one_draw(draw, options, device) for draw in range(count)]
    else:
        workers = max(1, torch.get_num_threads())
        context = multiprocessing.get_context("spawn")  # threads do not survive a fork
        with ProcessPoolExecutor(workers, mp_context=context) as pool:
            tasks = [pool.submit(one_draw, draw, options, device) for draw in range(count)]
            found = [task.result() for task in tasks]
    return {
        "images": IMAGES,
        "batch_size": BATCH_SIZE,
        "options": options,
        "draws": found,
        "mean_work": statistics.mean(d["work"] for d in found),
        "mean_same": statistics.mean(d["same"] for d in found),
    }
