"""Models with attention, and what must hold of their heads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from helpers import (
    assert_close,
    assert_unchanged,
    batch_of,
    clone,
    make_batches,
    run_engine,
    snapshot,
)
from torch import Tensor, nn

import singe
from singe.network import Network, set_gates
from singe.removal import remove_units
from singe.units import find_groups
from singe.verification import float_outputs

EXACT = 1e-9


@dataclass(frozen=True)
class Family:
    """A way of writing attention.

    Attributes:
        build: a model with random weights.
        data: the shape of a sample, or a function that gives the batches in float64.
        heads: {group of heads: their number}.
        tolerance: what the engines may differ by; more where a model computes in float32 by itself.
    """

    build: Callable[[], nn.Module]
    data: tuple[int, ...] | Callable[[], list[Any]]
    heads: dict[str, int]
    tolerance: float = EXACT

    def model(self) -> nn.Module:
        """In float64, all its parameters random, tables of relative positions included."""
        torch.manual_seed(0)
        model = self.build().double()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn_like(parameter) * 0.5 + 0.1)
        return model.eval()

    def batches(self) -> list[Any]:
        return self.data() if callable(self.data) else make_batches(self.data, (3, 2))

    def example(self) -> Any:
        """One batch as :func:`singe.prune` takes it."""
        batch = self.batches()[0]
        if isinstance(batch, dict):
            return {k: v for k, v in batch.items() if k != "labels"}
        return batch[0]


def outputs_of(model: nn.Module, batch: Any) -> list[Tensor]:
    return float_outputs(batch_of(batch).call(model))


@torch.no_grad()
def gated(network: Network, units: Any, batches: list[Any]) -> list[list[Tensor]]:
    set_gates(network, units, 0.0)
    return [float_outputs(network(batch_of(batch))) for batch in batches]


def assert_gates_are_removals(family: Family) -> None:
    """Every head alone, then one of every module with half of all channels."""
    model, batches = family.model(), family.batches()
    graph = find_groups(model, batch_of(batches[0]))
    heads = [group for group in graph.groups if group.heads is not None]
    assert {group.name: group.n_units for group in heads} == family.heads, graph.rejected
    assert len(graph.groups) > len(heads), "the feed-forward layers are gone"
    network = Network(model, graph.groups, graph.folds)
    full = gated(network, [], batches)
    single = [[(group, [unit])] for group in heads for unit in range(group.n_units)]
    half = [(g, [0] if g.heads else list(range(g.n_units // 2))) for g in graph.groups]
    for units in [*single, half]:
        small = clone(model)
        remove_units(small, batch_of(batches[0]), units)
        closed = gated(network, units, batches)
        for batch, found, before in zip(batches, closed, full, strict=True):
            expected = outputs_of(small, batch)
            for a, b in zip(found, expected, strict=True):
                assert torch.allclose(a, b, rtol=EXACT, atol=EXACT)
            assert not torch.allclose(expected[0], before[0], rtol=1e-6), "this head does nothing"


def assert_engines_agree(family: Family, **options: Any) -> None:
    model, batches = family.model(), family.batches()
    before = snapshot(model)
    options["graph"] = find_groups(model, batch_of(batches[0]))
    fused = run_engine(model, batches, **options)
    assert fused.meta["stacked"], "the variants did not run in one pass"
    naive = run_engine(model, batches, engine="naive", **options)
    assert_close(fused.scores, naive.scores, family.tolerance)
    assert_unchanged(model, before)


def scored(family: Family) -> tuple[nn.Module, Any, singe.Scores]:
    model, batches = family.model(), family.batches()
    return model, family.example(), singe.score(model, batches, path="network", progress=False)


def assert_a_plan_works(family: Family, folder: Any) -> nn.Module:
    """Scores and plan through their files, the budget met; the pruned model runs and trains on."""
    model, x, scores = scored(family)
    scores.save(folder / "scores")
    scores = singe.Scores.load(folder / "scores", model)
    assert set(family.heads) <= set(scores.meta["heads"])
    plan = singe.plan(model, scores, x, macs=0.75, ranking="cost", max_pruning_ratio=0.8)
    assert plan.meta["after"]["macs"] <= 0.75 * plan.meta["before"]["macs"]
    plan = singe.Plan({**plan, **{group: [units - 1] for group, units in family.heads.items()}})
    plan.save(folder / "plan")
    other = clone(model)
    report = singe.prune(model, singe.Plan.load(folder / "plan"), x)
    singe.prune(other, plan, x)
    assert all(report.kept[group] == units - 1 for group, units in family.heads.items())
    assert report.params_after == sum(p.numel() for p in model.parameters())
    batches = family.batches()
    found, again = outputs_of(model, batches[0]), outputs_of(other, batches[0])
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    assert all(p.requires_grad for p in model.parameters())
    outputs_of(model.train(), batches[0])[0].square().sum().backward()
    touched = [n for n in dict(model.named_parameters()) if n.startswith(tuple(family.heads))]
    assert touched
    assert all(model.get_parameter(name).grad is not None for name in touched)
    rescored = singe.score(model.eval(), batches, progress=False)
    assert all(
        len(rescored[group]) == units - 1 for group, units in family.heads.items() if units > 2
    )
    return model
