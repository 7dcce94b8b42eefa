"""The criteria that need no data: magnitude and random."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from singe.criteria import Criterion
from singe.graph import Group, Member, ModelGraph, unwrapped
from singe.network import Network, site_key
from singe.result import Result
from singe.rows import rows_of
from singe.weight_scores import by_parameter


def of_units(
    model: nn.Module, graph: ModelGraph, criterion: Criterion, p: int | str, seed: int
) -> Result:
    """Magnitude (folded) or random numbers for every unit."""
    result = Result.empty(graph.groups, 0)
    if criterion.name == "random":
        generator = torch.Generator().manual_seed(seed)
        for name, values in result.scores.items():
            result.scores[name] = torch.rand(
                len(values), generator=generator, dtype=torch.float64, device="cpu"
            )
        return result
    network = Network(model, graph.groups, graph.folds)
    for group in graph.groups:
        weight = torch.cat(
            [network.sites[site_key(m)].weight.cpu()[m.channels].flatten(1) for m in group.rows], 1
        ).double()
        result.scores[group.name] = magnitude(weight, p)
    return result


def of_weights(model: nn.Module, graph: ModelGraph, criterion: Criterion, seed: int) -> Result:
    """Magnitude of every weight as it is (nothing folded), or random numbers."""
    plain, generator = unwrapped(model), torch.Generator().manual_seed(seed)

    def of_rows(group: Group, member: Member) -> Tensor:
        module = plain.get_submodule(member.name)
        weight = module.weight
        assert isinstance(weight, Tensor)
        rows = rows_of(module, weight.detach().cpu())[member.channels].double()
        if criterion.name == "magnitude":
            return rows.abs()
        return torch.rand(rows.shape, generator=generator, dtype=torch.float64, device="cpu")

    result = Result.empty((), 0)
    result.scores = by_parameter(plain, graph.groups, of_rows)
    return result


def magnitude(weight: Tensor, p: int | str) -> Tensor:
    """``||W_u||_p`` [U] of [U, K] weights; ``"sum"`` is the absolute value of their plain sum."""
    if p == "sum":
        return weight.sum(1).abs()
    return torch.linalg.vector_norm(weight, ord=float(p), dim=1)
