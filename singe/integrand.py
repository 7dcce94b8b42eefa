"""The integrand along the path: the gradient variation of single units while the gates close."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import nn

from singe.criteria import CRITERIA
from singe.errors import OptionError
from singe.quadrature import Quadrature
from singe.scores import Scores
from singe.scoring import score

NODES = (0.02, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 1.0)


def along_the_path(
    model: nn.Module,
    batches: Iterable[Any],
    units: Mapping[str, Sequence[int]],
    removed: Mapping[str, Sequence[int]],
    nodes: Sequence[float] = NODES,
    **options: Any,
) -> dict[str, Any]:
    """``|| D_u(mu) ||_p`` of a few units at every node, from one scoring per node.

    Args:
        model: the network before pruning; not changed.
        batches: as for :func:`singe.score`; a few dozen samples do for a picture.
        units: group -> units to follow.
        removed: group -> units that a plan removes (:class:`singe.Plan` is one), to mark them.
        nodes: gate values mu in [0, 1], rising.
        options: further arguments of :func:`singe.score`. Criteria without a path are shown along
            the layer path, ``"neuron"`` as well (its cost grows with the units of a group).

    Returns:
        JSON-ready: ``path``, ``criterion``, ``ylabel`` and ``units``, a list of ``{"group", "unit",
        "removed", "nodes", "values"}``.
    """
    if not units or not len(nodes):
        raise OptionError("along_the_path needs at least one unit and one node")
    options = dict(options)
    known = CRITERIA.get(options.get("criterion", "singe"))
    on_path = known is not None and known.integrand in ("variation", "gradient")
    if not on_path or known is None or known.endpoint:
        options["criterion"] = "singe"
    if options.get("path") != "network":
        options["path"] = "layer"
        # Groups move one by one: the others need no sweep.
        options["layers"] = list(units)
    options |= {"norm": "inside", "progress": False}
    found = [score(model, batches, quadrature=_single(mu), **options) for mu in nodes]
    kind = found[0].meta
    shown = [
        {
            "group": group,
            "unit": unit,
            "removed": unit in set(removed.get(group, ())),
            "nodes": list(nodes),
            "values": [float(at[group][unit]) for at in found],
        }
        for group, chosen in units.items()
        for unit in chosen
    ]
    what = "gradient" if kind["criterion"] == "ig" else "gradient variation"
    return {
        "path": kind["path"],
        "criterion": kind["criterion"],
        "ylabel": f"{what} (p={kind['p']}, {kind['path']} path)",
        "units": shown,
    }


def telling_units(
    scores: Scores, removed: Mapping[str, Sequence[int]], groups: int = 4, each: int = 2
) -> dict[str, list[int]]:
    """A few units worth looking at: of groups spread over the depth, those on both sides of the cut.

    Per group ``each`` removed units (the lowest and the last to go) and ``each`` kept ones (the first
    to stay and the highest). Groups that lost nothing, or everything they could, come last.
    """
    cut = [name for name in scores if 0 < len(removed.get(name, ())) < len(scores[name])]
    names = cut or list(scores)
    positions = np.unique(np.linspace(0, len(names) - 1, min(groups, len(names))).round())
    chosen = {}
    for name in (names[int(p)] for p in positions):
        order = scores[name].argsort(stable=True).tolist()
        gone = set(removed.get(name, ()))
        low, high = [u for u in order if u in gone], [u for u in order if u not in gone]
        chosen[name] = [*_ends(low, each), *_ends(high, each)]
    return chosen


def _ends(units: list[int], count: int) -> list[int]:
    """First and last, and evenly between."""
    if not units:
        return []
    at = np.unique(np.linspace(0, len(units) - 1, min(count, len(units))).round())
    return [units[int(i)] for i in at]


def _single(mu: float) -> Quadrature:
    return Quadrature(f"at {mu:g}", (float(mu),), (1.0,))
