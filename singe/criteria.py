"""The criteria: what is integrated along the path, and how it becomes one number per unit.

``D_u(mu) = W_u * grad_u(mu)`` elementwise, ``grad_u`` the gradient of the dataset-mean loss with
respect to the scaled weights ``mu * W_u``. Channels with norms that cannot be folded into ``W_u``
contribute the derivative along their gate to ``D_u`` (its weight is the gate, 1).
"""

from __future__ import annotations

from dataclasses import dataclass

from singe.errors import OptionError


@dataclass(frozen=True)
class Criterion:
    """One row of the table of criteria.

    Attributes:
        integrand: ``"variation"`` (D_u), ``"gradient"`` (grad_u), ``"derivative"`` (the signed sum of
            D_u), ``"loss"`` (forwards only) or ``"none"`` (needs no data).
        endpoint: only mu = 1 is looked at, whatever the path and the quadrature.
    """

    name: str
    integrand: str
    endpoint: bool = False

    @property
    def needs_data(self) -> bool:
        return self.integrand != "none"


CRITERIA = {
    c.name: c
    for c in (
        Criterion("singe", "variation"),
        Criterion("ig", "gradient"),
        Criterion("signed", "derivative"),
        Criterion("taylor", "variation", endpoint=True),
        Criterion("gradient", "gradient", endpoint=True),
        Criterion("ablation", "loss"),
        Criterion("magnitude", "none"),
        Criterion("random", "none"),
    )
}
PATHS = ("layer", "neuron", "network")
NORMS = ("inside", "outside")
POWERS = (1, 2, "sum", "fisher")
GRANULARITIES = ("unit", "weight")
OF_WEIGHTS = ("singe", "ig", "taylor", "gradient", "magnitude", "random")  # offered for weights


def takes(criterion: Criterion, p: object) -> bool:
    """Whether ``p`` has a meaning for a criterion, or none that would matter (``signed`` has no norm)."""
    return p != "fisher" or not (criterion.integrand == "gradient" or criterion.name == "magnitude")


def choose(argument: str, value: object, offered: tuple) -> None:
    """Raise OptionError unless ``value`` is among ``offered``."""
    if isinstance(value, bool) or value not in offered:
        raise OptionError(f"{argument}={value!r} is not offered; choose from {list(offered)}")


def as_criterion(name: str) -> Criterion:
    """The criterion of that name.

    Raises:
        OptionError: unknown name; the message lists all.
    """
    choose("criterion", name, tuple(CRITERIA))
    return CRITERIA[name]
