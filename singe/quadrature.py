"""Quadrature rules on [0, 1]: where the path is looked at, and how much each look counts.

Every rule approximates ``integral_0^1 f(mu) dmu`` by ``sum_s weights[s] * f(nodes[s])``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from singe.errors import OptionError


@dataclass(frozen=True)
class Quadrature:
    """A quadrature rule on [0, 1].

    Attributes:
        name: what the rule is, e.g. ``"gauss_legendre(4)"``; kept in ``scores.meta``.
        nodes: positions mu_s in [0, 1].
        weights: omega_s, one per node.
    """

    name: str
    nodes: tuple[float, ...]
    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.nodes or len(self.nodes) != len(self.weights):
            raise OptionError(
                f"quadrature {self.name!r} needs as many weights as nodes and at least one, "
                f"got {len(self.nodes)} nodes and {len(self.weights)} weights"
            )
        if not all(0.0 <= node <= 1.0 for node in self.nodes):
            raise OptionError(f"quadrature {self.name!r} has nodes outside [0, 1]: {self.nodes}")
        if not all(map(math.isfinite, self.weights)):
            raise OptionError(f"quadrature {self.name!r} has weights that are no finite numbers")

    def __len__(self) -> int:
        return len(self.nodes)


def _positive(n: int, least: int = 1) -> int:
    if isinstance(n, bool) or not isinstance(n, int | np.integer) or n < least:
        raise OptionError(f"a quadrature needs an integer number of nodes >= {least}, got {n!r}")
    return int(n)


def _rule(name: str, nodes: np.ndarray, weights: np.ndarray) -> Quadrature:
    return Quadrature(name, tuple(map(float, nodes)), tuple(map(float, weights)))


def gauss_legendre(n: int = 4) -> Quadrature:
    """Gauss-Legendre with ``n`` nodes: exact for polynomials up to degree 2n - 1."""
    n = _positive(n)
    nodes, weights = np.polynomial.legendre.leggauss(n)
    return _rule(f"gauss_legendre({n})", (nodes + 1) / 2, weights / 2)


def geometric(rate: float = 0.9, n: int = 30) -> Quadrature:
    """The nodes ``rate**s``, s = 0..n-1, each weighted with its cell down to the next node.

    The last cell reaches 0, so the weights sum to 1. A schedule that shrinks by a factor, kept as a
    baseline: with 30 nodes it comes between ``gauss_legendre(3)`` and ``(4)`` (``docs/performance.md``).
    """
    n = _positive(n)
    if not 0.0 < rate < 1.0:
        raise OptionError(f"geometric needs a rate strictly between 0 and 1, got {rate!r}")
    nodes = float(rate) ** np.arange(n)
    return _rule(f"geometric({rate}, {n})", nodes, nodes - np.append(nodes[1:], 0.0))


def midpoint(n: int = 4) -> Quadrature:
    """The centres of ``n`` equal cells."""
    n = _positive(n)
    return _rule(f"midpoint({n})", (np.arange(n) + 0.5) / n, np.full(n, 1.0 / n))


def trapezoid(n: int = 5) -> Quadrature:
    """``n`` >= 2 equally spaced nodes, both ends included, the ends weighted half."""
    n = _positive(n, least=2)
    weights = np.full(n, 1.0 / (n - 1))
    weights[[0, -1]] /= 2
    return _rule(f"trapezoid({n})", np.linspace(0.0, 1.0, n), weights)


def _left(n: int = 4) -> Quadrature:
    n = _positive(n)
    return _rule(f"riemann_left({n})", np.arange(n) / n, np.full(n, 1.0 / n))


def _right(n: int = 4) -> Quadrature:
    n = _positive(n)
    return _rule(f"riemann_right({n})", np.arange(1, n + 1) / n, np.full(n, 1.0 / n))


_BY_NAME = {
    "gauss_legendre": gauss_legendre,
    "gausslegendre": gauss_legendre,
    "midpoint": midpoint,
    "riemann_middle": midpoint,
    "trapezoid": trapezoid,
    "riemann_trapezoid": trapezoid,
    "riemann_left": _left,
    "riemann_right": _right,
}


def by_name(method: str, n_steps: int | None = None) -> Quadrature:
    """A rule by its name here or by Captum's (``gausslegendre``, ``riemann_*``).

    Without ``n_steps`` with as many nodes as the rule has by default: 4, trapezoid 5, geometric 30.

    Raises:
        OptionError: unknown name; the message lists the known ones.
    """
    if method == "geometric":
        return geometric() if n_steps is None else geometric(n=n_steps)
    if method not in _BY_NAME:
        known = ", ".join(sorted([*_BY_NAME, "geometric"]))
        raise OptionError(f"unknown quadrature {method!r}; known: {known}")
    rule = _BY_NAME[method]
    return rule() if n_steps is None else rule(n_steps)


def as_quadrature(value: int | str | Quadrature) -> Quadrature:
    """``int`` -> Gauss-Legendre with so many nodes; ``str`` -> :func:`by_name`; a rule -> itself."""
    if isinstance(value, Quadrature):
        return value
    if isinstance(value, str):
        return by_name(value)
    return gauss_legendre(value)
