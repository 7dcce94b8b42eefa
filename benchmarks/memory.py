"""Peak extra memory of a scoring run against ``max_memory``, each run in a fresh process.

    python -m benchmarks.memory --budget 200000000    # one run; prints one line of JSON

Extra is what the process holds at its peak beyond what it held before ``singe.score`` was called, model,
images and libraries loaded and warm. On the CPU that is the resident set, its peak counter reset
before the call (Linux); on a GPU what the allocator handed out.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import resource
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.models import MODELS, Work, work
from benchmarks.record import ROOT
from benchmarks.scoring import KEPT_META, flat, sweep
from singe.scores import Scores


def resident(key: str) -> int:
    """``VmRSS`` or ``VmHWM`` of this process, in bytes."""
    for entry in Path("/proc/self/status").read_text().splitlines():
        if entry.startswith(key + ":"):
            return 1024 * int(entry.split()[1])
    raise OSError(f"/proc/self/status has no {key}")


class Peak:
    """Peak memory beyond what is held at the start: ``with Peak(device) as peak: ...; peak.extra``."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"
        self.extra = 0
        self.resettable = True

    def __enter__(self) -> Peak:
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
            return self
        ctypes.CDLL(None).malloc_trim(0)  # what was freed goes back, and counts when taken again
        try:
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts over
        except OSError:
            self.resettable = False
        self.before = resident("VmRSS")
        return self

    def __exit__(self, *error: object) -> None:
        if self.cuda:
            self.extra = torch.cuda.max_memory_allocated() - self.before
        elif self.resettable:
            self.extra = resident("VmHWM") - self.before
        else:
            self.extra = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - self.before


def variants_at_once(meta: dict[str, Any], nodes: int) -> int:
    """How many variants the largest pass held."""
    return min(nodes, int(meta["variants_per_pass"]))


def one_run(
    todo: Work, nodes: int, budget: int | None, device: str
) -> tuple[dict[str, Any], Scores]:
    """Score once under a budget and watch the memory."""
    small = Work(todo.name, todo.model, [(x[:2], y[:2]) for x, y in todo.batches[:1]], todo.layers)
    sweep(small, "layer", 2)  # libraries and kernels loaded
    with Peak(device) as peak:
        scores = sweep(todo, "layer", nodes, max_memory=budget)
    at_once = variants_at_once(scores.meta, nodes)
    found = {
        "budget": budget,
        "peak_extra": peak.extra,
        "chunks": -(-nodes // at_once),
        "meta": {k: v for k, v in scores.meta.items() if k in KEPT_META},
    }
    return found, scores


def in_fresh_process(arguments: Sequence[str]) -> dict[str, Any]:
    """What ``python -m benchmarks.memory *arguments`` prints.

    Raises:
        RuntimeError: the process failed; with the end of what it said.
    """
    command = [sys.executable, "-m", "benchmarks.memory", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[1:])} failed: {done.stderr[-800:]}")
    return json.loads(done.stdout.splitlines()[-1])


def against_budgets(
    model: str, images: int, nodes: int, device: str, shares: Sequence[float] = (0.5, 0.25, 0.125)
) -> dict[str, Any]:
    """One run with all the memory there is, then one for each share of its peak as budget."""
    common = ["--model", model, "--images", str(images), "--nodes", str(nodes), "--device", device]
    with tempfile.TemporaryDirectory() as folder:
        reference = f"{folder}/free.safetensors"
        free = in_fresh_process([*common, "--save", reference])
        runs = [
            in_fresh_process(
                [*common, "--budget", str(int(s * free["peak_extra"])), "--like", reference]
            )
            for s in shares
        ]
    return {"model": model, "images": images, "nodes": nodes, "free": free, "budgeted": runs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="resnet20", choices=MODELS)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--nodes", type=int, default=16)
    parser.add_argument("--budget", type=int, help="max_memory in bytes")
    parser.add_argument("--save", help="write the scores here")
    parser.add_argument("--like", help="compare with the scores in this file")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    todo = work(args.model, args.images, args.images, args.device)
    found, scores = one_run(todo, args.nodes, args.budget, args.device)
    if args.save:
        scores.save(args.save)
    if args.like:
        other = flat(Scores.load(args.like))
        found["relative_difference"] = float((flat(scores) - other).norm() / other.norm())
        found["identical"] = bool(torch.equal(flat(scores), other))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
