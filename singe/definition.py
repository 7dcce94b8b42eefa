"""What is computed: everything that decides the value of a score, and nothing that does not."""

from __future__ import annotations

from dataclasses import dataclass

from singe.criteria import Criterion
from singe.objectives import Objective
from singe.quadrature import Quadrature


@dataclass(frozen=True)
class Definition:
    """The arguments of :func:`singe.score` that both engines obey.

    Attributes:
        objective: what is differentiated.
        criterion: what is integrated.
        path: ``"layer"``, ``"neuron"`` or ``"network"``.
        quadrature: nodes on the path.
        p: 1, 2, ``"sum"`` or ``"fisher"``.
        norm: ``"inside"`` or ``"outside"``.
        granularity: ``"unit"``, or ``"weight"``: a score for every weight of the units' rows.
    """

    objective: Objective
    criterion: Criterion
    path: str
    quadrature: Quadrature
    p: int | str = 1
    norm: str = "inside"
    granularity: str = "unit"

    @property
    def gates_only(self) -> bool:
        """Whether derivatives along the gates will do: a sum over a unit's entries is one."""
        integrand = self.criterion.integrand
        return integrand == "derivative" or (
            integrand == "variation" and self.p in ("sum", "fisher")
        )

    @property
    def each_sample(self) -> bool:
        """Whether the derivative of every single sample counts, not that of their mean."""
        return self.criterion.integrand == "variation" and self.p == "fisher"

    @property
    def nodes_in_one(self) -> bool:
        """Whether the nodes are summed before the norm, so that one slot holds them all."""
        return self.norm == "outside" and self.criterion.integrand != "derivative"
