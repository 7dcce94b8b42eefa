"""The sets that move together when single weights are scored.

They are the groups of :func:`singe.units.find_groups`, and for every other convolution and linear layer its
own rows: a weight that is masked need not be removable, so the output layer and channels tied to a
padded shortcut have weight scores, too.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from singe.coupling import beyond_its_base, is_plain, tied_layers
from singe.data import Batch
from singe.errors import ModelError
from singe.graph import ROWS, Group, Member, ModelGraph, unwrapped
from singe.network import Network, set_gates
from singe.rows import TRANSPOSED, rows_of, weight_of
from singe.tf32 import full_float32
from singe.units import checked_groups, full_precision, inside, names_of, small
from singe.verification import distance, float_outputs, tolerance_of, with_problems

SCORED = (*ROWS, *TRANSPOSED)


def find_weight_groups(
    model: nn.Module,
    batch: Batch,
    layers: Iterable[str | nn.Module] | None = None,
    ignore: Iterable[str | nn.Module] = (),
) -> ModelGraph:
    """Groups of units, and a group of its own for the rows of every layer that is in none.

    Args:
        layers: only these layers (names or modules, containers included) and what is coupled with
            them; default every convolution and linear layer.
        ignore: layers (names or modules, containers included) that get no scores.

    Returns:
        The groups in module order. Those that were added have one unit per output channel and no
        consumers; ``rejected`` says why other layers with a weight matrix are not there.

    Raises:
        ModelError: no layer to score, an unknown layer, a chosen layer that cannot be scored.
    """
    model = unwrapped(model)
    names = dict(model.named_modules())
    ignored = frozenset(inside(names, names_of(names, ignore, "ignore")))
    roots = None if layers is None else names_of(names, layers, "layers")
    wanted = set(names) if roots is None else inside(names, roots)
    graph = checked_groups(model, batch, ignored)
    groups = [
        g
        for g in graph.groups
        if wanted.intersection((g.name, *g.layers))
        and all(isinstance(names[m.name], SCORED) for m in g.rows)
    ]
    rejected: dict[str, str] = {}
    tied = tied_layers(model)
    alone = []
    for name in names:
        why = _why_not(name, names[name], tied, ignored)
        if why is not None:
            rejected[name] = why
        elif isinstance(names[name], SCORED) and name in wanted:
            alone += uncovered(name, names[name], groups)
    for name, parameter in model.named_parameters():
        owner = name.rpartition(".")[0]
        matrix_of_a_layer = name.endswith("weight") and isinstance(names[owner], SCORED)
        if parameter.dim() >= 2 and not matrix_of_a_layer:
            rejected.setdefault(owner or name, f"{name} belongs to {_foreign(names[owner])}")
    wrong = _not_gated(model, batch, replace(graph, groups=(*groups, *alone)), alone)
    rejected |= {group.layers[0]: wrong[group.name] for group in alone if group.name in wrong}
    groups += [group for group in alone if group.name not in wrong]
    order = {name: i for i, name in enumerate(names)}
    groups.sort(key=lambda group: order[group.rows[0].name])
    found = replace(graph, groups=tuple(groups), rejected=rejected, rejected_layers={})
    _require(type(model).__name__, names, roots, found)
    return found


def _foreign(module: nn.Module) -> str:
    return f"a {type(module).__name__}; scored are convolutions and Linear"


def _why_not(name: str, module: nn.Module, tied: set[str], ignored: frozenset[str]) -> str | None:
    """Why a layer with a weight matrix has no weight scores; None for all others."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() < 2:
        return None
    if name in ignored:
        return "it is in `ignore`"
    if not isinstance(module, SCORED):
        return f"it is {_foreign(module)}"
    if not is_plain(module, SCORED):
        return f"it is {beyond_its_base(module)}"
    if "weight" not in module._parameters:
        return "its weight is computed; remove its weight_norm, mask or parametrization first"
    if name in tied:
        return "it shares a parameter with another layer"
    return None


def uncovered(name: str, module: nn.Module, groups: Sequence[Group]) -> list[Group]:
    """A group of the rows that are in none of ``groups``, if there are any."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    free = torch.ones(len(rows_of(module, weight)), dtype=torch.bool, device="cpu")
    for group in groups:
        for member in group.rows:
            if member.name == name:
                free[member.channels.flatten()] = False
    channels = torch.nonzero(free)  # [U, 1]
    if not len(channels):
        return []
    title = name if bool(free.all()) else f"{name}:rest"  # another group may have the layer's name
    return [Group(title, len(channels), channels, (Member(name, "rows", channels),))]


@torch.no_grad()
@full_float32()
def _not_gated(
    model: nn.Module, batch: Batch, graph: ModelGraph, alone: Sequence[Group]
) -> dict[str, str]:
    """Groups of ``alone`` whose gates at 1/2 give something else than half their weights and biases."""
    model, batch = full_precision(model, small(batch))
    gated = Network(model, graph.groups, graph.folds)

    def problem(groups: Sequence[Group]) -> str | None:
        set_gates(gated, [(g, range(g.n_units)) for g in groups], 0.5)
        halved = Network(model, (), graph.folds)
        for group in groups:
            module: Any = halved.module.get_submodule(group.layers[0])
            channels = group.root_channels.flatten()
            rows = rows_of(module, module.weight.detach()).clone()
            rows[channels] *= 0.5
            module.weight = nn.Parameter(weight_of(module, rows), requires_grad=False)
            if module.bias is not None:
                bias = module.bias.detach().clone()
                bias[channels] *= 0.5
                module.bias = nn.Parameter(bias, requires_grad=False)
        expected = float_outputs(halved(batch))
        off = distance(float_outputs(gated(batch)), expected)
        if not off <= tolerance_of(expected, model):
            return "something reads its weight without calling it: no gate can stand for its rows"
        return None

    return with_problems(alone, problem)


def _require(
    model: str, names: dict[str, nn.Module], roots: Sequence[str] | None, graph: ModelGraph
) -> None:
    scored = {member.name for group in graph.groups for member in group.rows}
    for root in roots or ():
        within = inside(names, [root])
        if not within & scored:
            reasons = [graph.rejected[name] for name in within if name in graph.rejected]
            why = "; ".join(dict.fromkeys(reasons)) or "it holds no convolution or linear layer"
            raise ModelError(f"layer {root!r} has no weights to score: {why}")
    if not scored:
        reasons = [f"{name}: {why}" for name, why in list(graph.rejected.items())[:5]]
        raise ModelError(
            f"{model} has no weights to score ({'; '.join(reasons) or 'no conv or linear layer'})"
        )
