"""Whether a plan for a latency target holds when the pruned network is timed anew.

    python -m benchmarks.latency [--device cpu] [--batch 8] [--size 128] [--runs 11]

ResNet-18 with random weights. ``promised`` is the share of the original's time that
the plan measured while it was made; ``found`` is measured afterwards on a network pruned with it, both
in turn with the original, as medians of the ratios.
"""

from __future__ import annotations

import argparse
import copy
import time
from typing import Any

import torch

import singe
from benchmarks.budgets import network
from benchmarks.record import write
from singe.data import example_batch
from singe.latency import Stopwatch


def measure(device: str, batch: int, size: int, runs: int) -> dict[str, Any]:
    model = network("resnet18")[0].to(device)
    x = torch.randn(2, 3, size, size, device=device)
    data = [(x, torch.zeros(len(x), dtype=torch.long, device=device))]
    scores = singe.score(model, data, criterion="taylor", progress=False)
    timing = singe.Timing(batch_size=batch, runs=runs)
    watch = Stopwatch(model, example_batch(x, x.device), timing)
    rows = []
    for ranking in ("global", "cost"):
        for target in (0.7, 0.5):
            began = time.perf_counter()
            plan = singe.plan(model, scores, x, latency=target, ranking=ranking, timing=timing)
            seconds = time.perf_counter() - began
            pruned = copy.deepcopy(model)
            report = singe.prune(pruned, plan, x)
            limit = plan.meta["target"]["latency"]
            rows.append(
                {
                    "ranking": ranking, "target": target,
                    "promised": plan.meta["after"]["latency"] / (limit / target),
                    "found": watch.compare(pruned, 3 * runs).share,
                    "original_ms": watch.reference_ms,
                    "macs": report.macs_after / report.macs_before,
                    "score_kept": 1 - sum(float(scores[n][u].sum()) for n, u in plan.items())
                    / sum(float(t.sum()) for t in scores.values()),
                    "seconds_planning": seconds,
                }
            )  # fmt: skip
            print(rows[-1], flush=True)
    return {"batch": batch, "size": size, "runs": runs, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--runs", type=int, default=11)
    args = parser.parse_args()
    found = measure(args.device, args.batch, args.size, args.runs)
    write(f"latency-resnet18-{args.device}", found)


if __name__ == "__main__":
    main()
