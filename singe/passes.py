"""What a run has to compute for every batch: variants of the network, in the order they run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from singe.definition import Definition
from singe.graph import Group
from singe.network import Network, site_key
from singe.result import UnitSet, unit_sets


@dataclass(frozen=True)
class Variant:
    """One setting of the gates: the units of ``units`` at ``mu``, all others at 1.

    Attributes:
        index: position of ``units`` among the unit sets of the run.
        node: index into the quadrature, or None for the end of the path, mu = 0.
    """

    units: UnitSet
    index: int
    node: int | None
    mu: float

    @property
    def unit(self) -> int:
        """The one unit that moves on the neuron path."""
        return self.units[0][1][0]


def all_variants(groups: Sequence[Group], definition: Definition) -> list[list[Variant]]:
    """Jobs: per stage (gradients at the nodes, losses at the end) and group, its variants."""
    stages: list[list[tuple[int | None, float]]] = []
    integrand = definition.criterion.integrand
    if integrand != "loss":
        stages.append(list(enumerate(definition.quadrature.nodes)))
    if integrand in ("loss", "derivative"):
        stages.append([(None, 0.0)])
    sets = list(enumerate(unit_sets(groups, definition.path)))
    return [
        [Variant(units, index, node, mu) for index, units in of_group for node, mu in stage]
        for stage in stages
        for _, of_group in groupby(sets, key=lambda pair: id(pair[1][0][0]))
    ]


def merged(jobs: Sequence[list[Variant]], limit: int) -> list[list[Variant]]:
    """Neighbouring jobs of one stage put together while they hold no more than ``limit`` variants."""
    result: list[list[Variant]] = []
    for job in jobs:
        if not job:
            continue
        same_stage = bool(result) and (result[-1][0].node is None) == (job[0].node is None)
        if same_stage and len(result[-1]) + len(job) <= limit:
            result[-1] = result[-1] + job
        else:
            result.append(job)
    return result


def for_each_sample(gates: Mapping[str, Tensor], size: int) -> dict[str, Tensor]:
    """[V, C] -> [V, B, C]: gates that every sample of a batch has for itself."""
    return {key: gate.unsqueeze(1).repeat(1, size, 1) for key, gate in gates.items()}


def runs_of_groups(variants: Sequence[Variant]) -> Iterator[tuple[UnitSet, slice]]:
    """Neighbouring variants that move units of the same groups, and where they stand."""
    start = 0
    for _, run in groupby(variants, key=lambda one: id(one.units[0][0])):
        same = list(run)
        yield same[0].units, slice(start, start + len(same))
        start += len(same)


def gates_of(network: Network, variants: Sequence[Variant]) -> dict[str, Tensor]:
    """[V, C] gates of every site that these variants touch."""
    gates: dict[str, Tensor] = {}  # filled on the CPU: a GPU gets each in one piece
    mus = torch.tensor([one.mu for one in variants], dtype=torch.float64, device="cpu")
    for units, where in runs_of_groups(variants):
        rows = torch.arange(len(variants), device="cpu")[where, None]
        for position, (group, _) in enumerate(units):
            moved = _moved(variants[where], position)
            for member in group.members:
                key = site_key(member)
                if key not in gates:
                    dtype, channels = network.open_gate(key).dtype, network.sites[key].channels
                    gates[key] = torch.ones(len(variants), channels, dtype=dtype, device="cpu")
                gate = gates[key]
                gate[rows, member.channels[moved].flatten(1)] = mus[where, None].to(gate.dtype)
    return {key: gate.to(network.open_gate(key).device) for key, gate in gates.items()}


def _moved(variants: Sequence[Variant], position: int) -> Tensor:
    """int64 [V, k]: the units that each variant moves of the group at ``position``."""
    chosen = [one.units[position][1] for one in variants]
    if all(one is chosen[0] for one in chosen):
        return torch.tensor(chosen[:1], device="cpu").expand(len(chosen), -1)
    return torch.tensor(chosen, device="cpu")
