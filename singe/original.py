"""The model a run began with: its groups and cost, and how any later state is built from it again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from singe.cost import CostModel
from singe.data import Batch
from singe.explain import explain_rounds
from singe.graph import Group, ModelGraph, named_tensors, private_copy
from singe.latency import Stopwatch, Timing
from singe.limits import Limits
from singe.modes import eager
from singe.plan import Plan, full_cost
from singe.removal import remove_units
from singe.scores import fingerprint
from singe.seeding import random_state_kept
from singe.snapshot import Snapshot
from singe.units import small

Kept = dict[str, list[int]]


class Original:
    """What is the same in every process that works on a run.

    Args:
        model: as it was given; the run changes it in place.
        snapshot: of it.
        graph: its groups.
        example: a batch of its inputs.
        timing: how latency is measured, where it is the target.

    Attributes:
        batch: two samples, to trace with.
        full: what the model costs; see :func:`singe.plan.full_cost`.
        watch: compares latencies with the original's; None where they are not the target.
    """

    def __init__(
        self,
        model: nn.Module,
        snapshot: Snapshot,
        graph: ModelGraph,
        example: Batch,
        timing: Timing | None,
    ) -> None:
        self.model, self.graph = model, graph
        self.batch = small(example)
        self.watch = None if timing is None else Stopwatch(model, example, timing)
        self.full = full_cost(model, graph, self.batch, self.watch)
        self._cost = CostModel(model, graph, self.batch)
        self._snapshot = snapshot
        self._fingerprint = fingerprint(model)

    def everything(self) -> Kept:
        """Group -> all its units."""
        return {g.name: list(range(g.n_units)) for g in self.graph.groups}

    def missing(self, kept: Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
        """Group -> units of the original that are gone, where any are."""
        gone = {
            name: sorted(set(units) - set(kept[name])) for name, units in self.everything().items()
        }
        return {name: units for name, units in gone.items() if units}

    def plan(
        self,
        kept: Mapping[str, Sequence[int]],
        meta: Mapping[str, Any],
        rounds: Sequence[Mapping[str, int]],
        limits: Limits,
    ) -> Plan:
        """What is gone as a plan for a fresh copy of the original.

        Args:
            kept: group -> its units that are left.
            meta: what else is to be known of it.
            rounds: group -> number of units left, after every round.
            limits: what every group may come to.
        """
        gone = self.missing(kept)
        groups = explain_rounds(self.graph.groups, gone, rounds, limits, self._cost)
        return Plan(gone, {**meta, "fingerprint": self._fingerprint, "groups": groups})

    def latency(self) -> float:
        """Of the network as it is, in milliseconds on the scale of :attr:`full`."""
        assert self.watch is not None
        return self.watch.compare(self.model).share * self.full["latency"]

    def in_order_of_calls(self, groups: Iterable[str]) -> list[str]:
        """Names of groups from front to back: by the first call of one of their layers."""
        twin, first = private_copy(self.model), dict[str, int]()

        def note(name: str) -> None:
            first.setdefault(name, len(first))

        for name, module in twin.named_modules():
            module.register_forward_pre_hook(lambda *_, name=name: note(name))
        with torch.no_grad(), random_state_kept(), eager():
            self.batch.call(twin)

        def place(group: Group) -> int:
            layers = [*group.layers, *([group.heads.module] if group.heads else [])]
            return min(first.get(name, len(first)) for name in layers)

        wanted = set(groups)
        return [g.name for g in sorted(self.graph.groups, key=place) if g.name in wanted]

    def values(self) -> dict[str, Tensor]:
        """Copies of all parameters and buffers as they are now, in their layouts."""
        return {name: t.detach().clone() for name, t in named_tensors(self.model)}

    def rebuild(self, kept: Mapping[str, Sequence[int]], values: Mapping[str, Tensor]) -> None:
        """Make the model what it was when ``kept`` were its units and ``values`` its tensors."""
        self.restore()
        gone = self.missing(kept)
        removals = [(g, gone[g.name]) for g in self.graph.groups if g.name in gone]
        if removals:
            remove_units(self.model, self.batch, removals)
        for name, tensor in named_tensors(self.model):
            _fill(tensor, values[name])

    def restore(self) -> None:
        """Make the model what it was at first."""
        self._snapshot.restore()


def _fill(tensor: Tensor, value: Tensor) -> None:
    """Values and memory layout: kernels sum in another order where the layout is another."""
    if tensor.stride() == value.stride():
        with torch.no_grad():
            tensor.copy_(value)
    else:
        tensor.data = value.to(tensor.device).clone()
