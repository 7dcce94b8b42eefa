"""What an engine returns, and the sets of units that move together along a path."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from singe.graph import Group

UnitSet = list[tuple[Group, list[int]]]


def unit_sets(groups: Sequence[Group], path: str) -> Iterator[UnitSet]:
    """The sets whose gates move together: one group, one unit, or everything at once."""
    if path == "network":
        yield [(group, list(range(group.n_units))) for group in groups]
    for group in groups:
        if path == "layer":
            yield [(group, list(range(group.n_units)))]
        elif path == "neuron":
            for unit in range(group.n_units):
                yield [(group, [unit])]


@dataclass
class Result:
    """Raw scores of one run, float64 on the CPU.

    Attributes:
        scores: [U] per group; for weights a tensor per parameter, in its shape.
        n_samples: samples seen.
        completeness: for ``signed`` only: integral minus true loss change of every set of units: [U]
            per group (neuron path), [1] per group (layer path), [1] under ``"network"``.
        stderr: in the shapes of ``scores``, or None where the data was not seen in at least two folds.
        meta: what the engine did: passes, chunk sizes, peak memory.
    """

    scores: dict[str, Tensor]
    n_samples: int
    completeness: dict[str, Tensor] | None = None
    stderr: dict[str, Tensor] | None = None
    meta: dict[str, object] = field(default_factory=dict)

    @classmethod
    def empty(cls, groups: Sequence[Group], n_samples: int) -> Result:
        zeros = {g.name: torch.zeros(g.n_units, dtype=torch.float64, device="cpu") for g in groups}
        return cls(zeros, n_samples)

    def note_completeness(self, units: UnitSet, path: str, gap: float) -> None:
        """Record the gap of one set of units."""
        self.completeness = self.completeness if self.completeness is not None else {}
        if path == "network":
            self.completeness["network"] = torch.tensor([gap], device="cpu")
            return
        group, chosen = units[0]
        if path == "layer":
            self.completeness[group.name] = torch.tensor([gap], device="cpu")
        else:
            nothing = torch.zeros(group.n_units, device="cpu")
            gaps = self.completeness.setdefault(group.name, nothing)
            gaps[chosen] = gap
