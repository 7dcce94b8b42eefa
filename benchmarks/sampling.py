"""Long naive runs are not run to the end: some of their steps, from every group, stand for all."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Step:
    """One batch at one node with one set of units scaled: what the naive loop does over and over.

    Attributes:
        group: index of the group; None if all move together.
        unit: the unit that moves; None if all of the group do.
        node: index into the quadrature.
        batch: index of the batch.
    """

    group: int | None
    unit: int | None
    node: int
    batch: int


@dataclass(frozen=True)
class Plan:
    """Which steps to run, and what they stand for.

    Attributes:
        steps: the steps to run, in random order.
        total: per group (key as in ``Step.group``), how many steps the whole run has there.
    """

    steps: tuple[Step, ...]
    total: dict[int | None, int]

    @property
    def complete(self) -> bool:
        return len(self.steps) == sum(self.total.values())

    def describe(self) -> dict[str, object]:
        """For the JSON: what was measured and what was not."""
        return {
            "extrapolated": not self.complete,
            "steps_run": len(self.steps),
            "steps_of_the_whole": sum(self.total.values()),
            "strata": len(self.total),
            "units_run": len({(s.group, s.unit) for s in self.steps}),
        }


def plan(
    path: str, units: Sequence[int], nodes: int, batches: int, per_group: int | None, seed: int = 0
) -> Plan:
    """The steps to run of a naive sweep, stratified: the same number in every group.

    Args:
        units: number of units of every group.
        per_group: steps per group; None: all. On the network path all steps are one stratum.
    """
    generator = random.Random(seed)
    chosen: list[Step] = []
    total: dict[int | None, int] = {}
    strata = [None] if path == "network" else list(range(len(units)))
    for group in strata:
        members = range(units[group]) if path == "neuron" and group is not None else [None]
        steps = [
            Step(group, unit, node, batch)
            for unit in members
            for node in range(nodes)
            for batch in range(batches)
        ]
        total[group] = len(steps)
        few = per_group is not None and per_group < len(steps)
        chosen += generator.sample(steps, per_group) if few else steps
    generator.shuffle(chosen)  # what drifts during the run hits all groups alike
    return Plan(tuple(chosen), total)


def extrapolate(times: Sequence[tuple[int | None, float]], total: dict[int | None, int]) -> float:
    """Seconds of the whole run: per stratum, its mean step times its number of steps; summed.

    Args:
        times: ``(stratum, seconds)`` of every step that was run.
        total: steps of every stratum in the whole run.

    Raises:
        ValueError: a stratum without a measured step.
    """
    by_stratum: dict[int | None, list[float]] = {key: [] for key in total}
    for key, spent in times:
        by_stratum[key].append(spent)
    empty = [key for key, spent in by_stratum.items() if not spent]
    if empty:
        raise ValueError(f"no step of the strata {empty} was measured")
    return sum(total[key] * sum(spent) / len(spent) for key, spent in by_stratum.items())
