"""The integrand along the path: the gradient variation of single units while the gates close."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import nn

from singe.criteria import CRITERIA
from singe.errors import OptionError
from singe.quadrature import Quadrature
from singe.request import Request
from singe.scores import Scores
from singe.scoring import carry_out

NODES = (0.02, 0.15, 0.3, 0.45, 0.6, 0.7, 0.8, 0.87, 0.94, 1.0)  # closer where paths bend most


def along_the_path(
    model: nn.Module,
    batches: Iterable[Any],
    units: Mapping[str, Sequence[int]],
    removed: Mapping[str, Sequence[int]],
    nodes: Sequence[float] = NODES,
    **options: Any,
) -> dict[str, Any]:
    """``|| D_u(mu) ||_p``, or what ``p`` says, of a few units at every node, from one scoring per node.

    Args:
        model: the network before pruning; not changed.
        batches: as for :func:`singe.score`; a few dozen samples do for a picture.
        units: group -> units to follow.
        removed: group -> units that a plan removes (:class:`singe.Plan` is one), to mark them.
        nodes: gate values mu in [0, 1], rising.
        options: further arguments of :func:`singe.score`, ``quadrature`` apart. Criteria without a path
            are shown along the layer path, ``"neuron"`` as well (its cost grows with the units of a
            group).

    Returns:
        JSON-ready: ``path``, ``criterion``, ``ylabel``, ``is_score`` (whether the area under a line is the
        score by these options) and ``units``, a list of ``{"group", "unit", "removed", "nodes",
        "values"}``.
    """
    if not units or not len(nodes):
        raise OptionError("along_the_path needs at least one unit and one node")
    options = {name: value for name, value in options.items() if name != "quadrature"}
    asked = {"criterion": "singe", "path": "layer", "norm": "inside"} | options
    known = CRITERIA.get(options.get("criterion", "singe"))
    on_path = known is not None and known.integrand in ("variation", "gradient")
    if not on_path or known is None or known.endpoint:
        options["criterion"] = "singe"
    if options.get("path") != "network":
        options["path"] = "layer"
        # Groups move one by one: the others need no sweep.
        options["layers"] = list(units)
    options |= {"norm": "inside", "progress": False}
    with warnings.catch_warnings():
        # Deep along the network path nothing is left of the signal: part of the picture.
        warnings.filterwarnings("ignore", message="every score is zero")
        graph, found = None, []
        for mu in nodes:
            request = Request(quadrature=_single(mu), **options)
            scores, graph = carry_out(request, model, batches, graph)
            found.append(scores)
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
    if kind["p"] == "fisher":
        what = "RMS derivative"
    return {
        "path": kind["path"],
        "criterion": kind["criterion"],
        "ylabel": f"{what} (p={kind['p']}, {kind['path']} path)",
        "is_score": all(asked[name] == kind[name] for name in ("criterion", "path", "norm")),
        "units": shown,
    }


def telling_units(
    scores: Scores, removed: Mapping[str, Sequence[int]], groups: int = 4
) -> dict[str, list[int]]:
    """A few units worth looking at, of groups spread over the depth.

    Per group the removed units with the lowest and the middle score, and the kept ones with the
    middle and the highest. Groups that lost nothing are passed over if others did.
    """
    cut = [name for name in scores if 0 < len(removed.get(name, ())) < len(scores[name])]
    names = cut or list(scores)
    positions = np.unique(np.linspace(0, len(names) - 1, min(groups, len(names))).round())
    chosen = {}
    for name in (names[int(p)] for p in positions):
        order = scores[name].argsort(stable=True).tolist()
        gone = set(removed.get(name, ()))
        low, high = [u for u in order if u in gone], [u for u in order if u not in gone]
        units = [*low[:1], *low[len(low) // 2 :][:1], *high[len(high) // 2 :][:1], *high[-1:]]
        chosen[name] = list(dict.fromkeys(units))
    return chosen


def _single(mu: float) -> Quadrature:
    return Quadrature(f"at {mu:g}", (float(mu),), (1.0,))
