"""How exactly plans meet their budgets, on networks people prune.

    python -m benchmarks.budgets [--models resnet18 resnet50 mobilenet_v2 resnet56]

Targets of 0.9, 0.7, 0.5 and 0.3 of the MACs and of the parameters, every ranking. The cost is counted by
Torch-Pruning on the network after it has been pruned, not taken from the plan. ``gap`` is how
far below the target it lies, ``step`` what the cheapest unit that went had cost, both as shares of
the unpruned model. The torchvision networks have random weights (the budget does not ask where scores
come from); ResNet-56 is the trained one beside the repository.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import sys
import time
from typing import Any

import torch
from torch import nn

import singe
from benchmarks.record import ROOT, write
from singe.budget import RANKINGS
from singe.cost import CostModel, CostState
from singe.data import example_batch
from singe.units import find_groups, small

sys.path.insert(0, str(ROOT / "examples" / "cifar10"))
import cifar10

TARGETS = (0.9, 0.7, 0.5, 0.3)


def network(name: str) -> tuple[nn.Module, torch.Tensor]:
    """The network in evaluation mode, and two images of its usual size."""
    torch.manual_seed(0)
    if name == "resnet56":
        return cifar10.trained(56), torch.randn(2, 3, 32, 32)
    library = torch.library.Library("torchvision", "DEF")
    for op in ("nms", "qnms"):  # torchvision's Python side registers fakes for these
        with contextlib.suppress(RuntimeError):  # its compiled operators do load
            library.define(f"{op}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    from torchvision import models

    return getattr(models, name)(weights=None).eval(), torch.randn(2, 3, 224, 224)


def smallest_step(cost: CostModel, plan: singe.Plan, kind: str) -> float:
    """What the cheapest unit of the plan would bring back."""
    state = CostState(cost)
    for name, units in plan.items():
        state.remove(name, len(units))
    return min(-state.saving(name, -1, kind) for name in plan)


def measure(name: str) -> list[dict[str, Any]]:
    model, x = network(name)
    scores = singe.score(
        model, [(x, torch.zeros(len(x), dtype=torch.long))], criterion="taylor", progress=False
    )
    batch = small(example_batch(x, x.device))
    cost = CostModel(model, find_groups(model, batch), batch)
    full = {"macs": cost.macs, "params": cost.params}
    rows = []
    for kind in ("macs", "params"):
        for ranking in RANKINGS:
            for target in TARGETS:
                began = time.perf_counter()
                plan = singe.plan(model, scores, x, ranking=ranking, **{kind: target})
                seconds = time.perf_counter() - began
                report = singe.prune(copy.deepcopy(model), plan, x)
                after = {"macs": report.macs_after, "params": report.params_after}[kind]
                gap, step = (
                    target - after / full[kind],
                    smallest_step(cost, plan, kind) / full[kind],
                )
                kept = sum(float(t.sum()) for t in scores.values())
                lost = sum(float(scores[n][u].sum()) for n, u in plan.items())
                rows.append(
                    {
                        "model": name, "kind": kind, "ranking": ranking, "target": target,
                        "achieved": after / full[kind], "gap": gap, "step": step,
                        "met": 0 <= gap <= max(0.01, step), "units_removed": plan.n_units,
                        "score_kept": 1 - lost / kept, "seconds": seconds,
                    }
                )  # fmt: skip
                print({k: v if isinstance(v, str) else round(v, 5) for k, v in rows[-1].items()})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    everything = ["resnet18", "resnet50", "mobilenet_v2", "resnet56"]
    parser.add_argument("--models", nargs="+", default=everything, choices=everything)
    args = parser.parse_args()
    rows = [row for name in args.models for row in measure(name)]
    write(
        "budgets",
        {
            "plans": len(rows),
            "met_from_below_within_1_percent_or_a_step": sum(row["met"] for row in rows),
            "widest_gap": max(row["gap"] for row in rows),
            "rows": rows,
        },
    )


if __name__ == "__main__":
    main()
