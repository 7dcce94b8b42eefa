"""How exactly plans meet their budgets, on networks people prune.

    python -m benchmarks.budgets [--models resnet18 resnet50 mobilenet_v2 resnet56]

Targets of 0.9, 0.7, 0.5 and 0.3 of the MACs and of the parameters, every ranking. The cost is counted by
Torch-Pruning on the network after it has been pruned, not taken from the plan. ``gap`` is how
far below the target it lies, ``step`` what the cheapest unit that went had cost, both as shares of
the unpruned model. Then, on networks of some thirty units, the score that ``ranking="cost"`` and
``"global"`` keep within a parameter budget is set against the best of all possible plans.

The torchvision networks have random weights (the budget does not ask where scores come from);
ResNet-56 is the trained one beside the repository.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import statistics
import sys
import time
from typing import Any

import torch
from torch import nn

import singe
from benchmarks.record import ROOT, write
from singe.budget import RANKINGS
from singe.cli.models import import_torchvision
from singe.cost import CostModel, CostState
from singe.data import example_batch
from singe.demo import DigitsNet
from singe.limits import limits_of
from singe.scores import fingerprint
from singe.units import find_groups, small

sys.path.insert(0, str(ROOT / "examples" / "cifar10"))
import cifar10

TARGETS = (0.9, 0.7, 0.5, 0.3)


def network(name: str) -> tuple[nn.Module, torch.Tensor]:
    """The network in evaluation mode, and two images of its usual size."""
    torch.manual_seed(0)
    if name == "resnet56":
        return cifar10.trained(56), torch.randn(2, 3, 32, 32)
    return import_torchvision().models.get_model(name).eval(), torch.randn(2, 3, 224, 224)


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
                        "met": bool(0 <= gap <= max(0.01, step)), "units_removed": plan.n_units,
                        "score_kept": 1 - lost / kept, "seconds": seconds,
                    }
                )  # fmt: skip
                print({k: v if isinstance(v, str) else round(v, 5) for k, v in rows[-1].items()})
    return rows


def tiny(seed: int) -> tuple[nn.Module, torch.Tensor]:
    """A plain network or a residual one, small enough to try every plan."""
    torch.manual_seed(seed)
    if seed % 2:
        widths = (6, 8, 7)
        layers: list[nn.Module] = []
        for inputs, outputs in itertools.pairwise((3, *widths)):
            layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU()]
        layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(7, 9), nn.ReLU()]
        return nn.Sequential(*layers, nn.Linear(9, 4)).eval(), torch.randn(2, 3, 8, 8)
    return DigitsNet(8).eval(), torch.randn(2, 1, 8, 8)


def against_every_plan(seed: int, share: float) -> dict[str, Any]:
    """Score kept by two rankings, as shares of the most that any plan within the budget keeps."""
    model, x = tiny(seed)
    batch = small(example_batch(x, x.device))
    graph = find_groups(model, batch)
    cost, limits = CostModel(model, graph, batch), limits_of(model, graph)
    draw = torch.Generator().manual_seed(seed)
    values = {
        g.name: torch.rand(g.n_units, generator=draw) ** (1 + seed % 3)
        * (0.2 + torch.rand(1, generator=draw))
        for g in graph.groups
    }  # fmt: skip
    scores = singe.Scores(
        values, {g.name: g.layers for g in graph.groups}, {"fingerprint": fingerprint(model)}
    )
    total = sum(float(t.sum()) for t in values.values())
    lost = {n: [0.0, *t.sort()[0].double().cumsum(0).tolist()] for n, t in values.items()}
    room = [range(g.n_units - limits.least[g.name] + 1) for g in graph.groups]
    best = max(
        total - sum(lost[n][k] for n, k in zip(values, counts, strict=True))
        for counts in itertools.product(*room)
        if cost(dict(zip(values, counts, strict=True)))["params"] <= share * cost.params
    )
    row: dict[str, Any] = {"seed": seed, "target": share}
    for ranking in ("cost", "global"):
        plan = singe.plan(model, scores, x, ranking=ranking, params=share)
        kept = total - sum(lost[name][len(units)] for name, units in plan.items())
        row[ranking] = kept / best
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    everything = ["resnet18", "resnet50", "mobilenet_v2", "resnet56"]
    parser.add_argument("--models", nargs="+", default=everything, choices=everything)
    args = parser.parse_args()
    tried = [against_every_plan(s, t) for s in range(12) for t in (0.7, 0.5, 0.35)]
    knapsack = {
        ranking: {
            "mean": statistics.fmean(row[ranking] for row in tried),
            "lowest": min(row[ranking] for row in tried),
            "optimal": sum(row[ranking] > 1 - 1e-6 for row in tried),
        }
        for ranking in ("cost", "global")
    }
    print(knapsack)
    rows = [row for name in args.models for row in measure(name)]
    write(
        "budgets",
        {
            "plans": len(rows),
            "met_from_below_within_1_percent_or_a_step": sum(row["met"] for row in rows),
            "widest_gap": max(row["gap"] for row in rows),
            "rows": rows,
            "score_kept_as_a_share_of_the_best_plan": {"plans": len(tried), **knapsack},
            "every_plan": tried,
        },
    )


if __name__ == "__main__":
    main()
