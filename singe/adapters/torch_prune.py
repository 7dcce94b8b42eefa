"""``torch.nn.utils.prune``: masks from scores, for one layer or the whole network.

    from torch.nn.utils import prune

    # one layer, the library's own call:
    importance = torch_prune.importance_scores(scores, model, "layer1.0.conv1")
    prune.ln_structured(layer, "weight", amount=0.5, n=float("inf"), dim=0, importance_scores=importance)

    # every group, coupled layers, biases and norms included:
    torch_prune.global_structured(model, scores, example_inputs, amount=0.5)

    # single weights, with scores of granularity="weight":
    importance = torch_prune.weight_importance(weight_scores, model)
    prune.global_unstructured(list(importance), prune.L1Unstructured, importance, amount=0.8)
    torch_prune.n_of_m(model, weight_scores, n=2, m=4)

A mask switches a channel off, it makes nothing smaller; ``singe.prune`` removes it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from singe.adapters.channel_scores import channel_scores, of_layer
from singe.adapters.ranking import ranking
from singe.adapters.weight_tables import (
    check_n_of_m,
    cut_into_blocks,
    n_of_m_mask,
    weight_tables,
)
from singe.conv1d import is_transposed
from singe.data import device_of, example_batch
from singe.errors import BudgetError, ModelError, ScoresError
from singe.gradients import gradients_on
from singe.graph import BATCH_NORMS, Group, ModelGraph, unwrapped
from singe.limits import floor_of, plain_ratio
from singe.plain import plain_number
from singe.scores import Scores, expect_scores, require_one_per_unit, scores_for
from singe.units import find_groups, small
from singe.weight_scores import WeightScores


def importance_scores(scores: Scores, model: nn.Module, layer: str | nn.Module) -> Tensor:
    """Scores in the shape of a layer's weight, for ``ln_structured(..., n=float("inf"), dim=0)``.

    (``dim=1`` for ``Conv1D`` of transformers.) The library takes a norm per channel, of absolute values.
    The numbers are therefore ranks (1 for the lowest), float32 and the same all over a channel, so that
    signed scores keep their order and ``n=inf`` gives them back as they are. Other layers may be masked
    already.

    Raises:
        ScoresError: scores of another model.
        ModelError: the layer has none.
    """
    values = of_layer(channel_scores(scores, model, check=False), model, layer)
    module = unwrapped(model).get_submodule(layer) if isinstance(layer, str) else layer
    weight = module.weight
    assert isinstance(weight, Tensor)
    dim = int(is_transposed(module))
    if weight.shape[dim] != len(values):
        raise ScoresError(
            f"{layer!r} has {weight.shape[dim]} channels, the scores are for {len(values)}"
        )
    # In half precision neighbouring ranks would be one number.
    ranks = values.argsort(stable=True).argsort().to(weight.device, torch.float32) + 1
    shape = [1] * weight.dim()
    shape[dim] = -1
    return ranks.view(shape).expand_as(weight)


def local_structured(
    model: nn.Module, scores: Scores, example_inputs: Any, amount: float
) -> dict[str, list[int]]:
    """Mask the lowest share ``amount`` of every group, but its best unit; see :func:`global_structured`."""
    amount = plain_amount(amount)
    expect_scores(scores)
    chosen = {}
    for name, values in scores.items():
        count = min(round(amount * len(values)), len(values) - 1)
        chosen[name] = sorted(values.argsort(stable=True)[:count].tolist())
    return _mask(model, scores, example_inputs, chosen)


def global_structured(
    model: nn.Module,
    scores: Scores,
    example_inputs: Any,
    amount: float,
    max_pruning_ratio: float = 1.0,
) -> dict[str, list[int]]:
    """Mask the lowest share ``amount`` of all units, wherever they are.

    Masked are, with ``prune.custom_from_mask``: the rows of every coupled layer, their biases, and
    weight and bias of a BatchNorm behind them, which would otherwise hand its shift on; and the columns
    that read the unit where an activation makes something of zero. The masked network computes what the
    pruned one does. ``prune.remove(module, name)`` makes a mask permanent.

    Args:
        model: masked in place; its parameters get the library's ``_orig`` and ``_mask``.
        scores: of this very model.
        example_inputs: a tensor, a tuple of arguments or a dict: one pass finds the coupled layers.
        amount: share of all scored units, in (0, 1).
        max_pruning_ratio: no group loses more than this share, and none its best unit.

    Returns:
        group -> the units that were masked.

    Raises:
        OptionError: ``amount`` or ``max_pruning_ratio`` out of range, or no scores.
        BudgetError: ``amount`` cannot be met under ``max_pruning_ratio``.
        ScoresError: scores of another model, or all equal.
        ModelError: a unit in a LayerNorm or GroupNorm, whose statistics no mask can leave.
    """
    amount = plain_amount(amount)
    max_pruning_ratio = plain_ratio(max_pruning_ratio)
    expect_scores(scores)
    floors = {name: floor_of(len(values), max_pruning_ratio) for name, values in scores.items()}
    table = ranking(scores, keep=floors)
    total = sum(map(len, table.values()))
    count, most = round(amount * total), total - sum(floors.values())
    if count > most:
        raise BudgetError(
            f"amount={amount} cannot be met: at most {most / total:.3f} of the units can be masked "
            f"under max_pruning_ratio={max_pruning_ratio}"
        )
    flat = torch.cat(list(table.values()))
    threshold = flat.sort().values[count] if count < total else float("inf")
    chosen = {
        name: (values < threshold).nonzero().view(-1).tolist() for name, values in table.items()
    }
    return _mask(model, scores, example_inputs, chosen)


def weight_importance(
    scores: WeightScores, model: nn.Module
) -> dict[tuple[nn.Module, str], Tensor]:
    """(layer, ``"weight"``) -> scores in the shape of its weight, on its device.

    The keys are the ``parameters`` and the mapping the ``importance_scores`` of
    ``prune.global_unstructured``; one entry is the ``importance_scores`` of ``prune.l1_unstructured``. Drop
    entries to spare layers. Layers may be masked already.

    Raises:
        ScoresError: scores of units, or of another model.
    """
    modules = unwrapped(model)
    tables = weight_tables(scores, model)
    return {(modules.get_submodule(name), "weight"): table for name, table in tables.items()}


def n_of_m(model: nn.Module, scores: WeightScores, n: int = 2, m: int = 4) -> list[str]:
    """Mask all but the n highest of every m neighbouring inputs (2:4 by default), in place.

    Blocks lie along the input dimension, for every output channel and kernel position, as NVIDIA's
    sparse tensor cores want them. Masked with ``prune.custom_from_mask``.

    Returns:
        The layers that were masked; those whose inputs cannot be cut into blocks of m, and transposed
        convolutions, are left whole.

    Raises:
        OptionError: not 0 < n < m.
        ModelError: no layer's inputs can be cut into blocks of m.
        ScoresError: scores of units, or of another model.
    """
    check_n_of_m(n, m)
    tables = cut_into_blocks(weight_tables(scores, model), model, width=m)
    if not tables:
        raise ModelError(f"no scored layer has inputs that can be cut into blocks of {m}")
    masks = {name: n_of_m_mask(table, n, m) for name, table in tables.items()}
    for name, mask in masks.items():
        prune.custom_from_mask(unwrapped(model).get_submodule(name), "weight", mask)
    return list(masks)


def plain_amount(amount: float) -> float:
    return plain_number("amount", amount, "(0, 1)", "a share of the units")


@gradients_on()
def _mask(
    model: nn.Module, scores: Scores, example_inputs: Any, chosen: dict[str, list[int]]
) -> dict[str, list[int]]:
    scores = scores_for(scores, model)
    chosen = {name: units for name, units in chosen.items() if units}
    model = unwrapped(model)
    batch = small(example_batch(example_inputs, device_of(model)))
    graph = find_groups(model, batch, layers=list(chosen))
    masks: dict[tuple[str, str], Tensor] = {}
    for group in graph.groups:
        require_one_per_unit(scores, group)
        _mask_group(model, graph, group, chosen[group.name], masks)
    for (name, parameter), mask in masks.items():
        prune.custom_from_mask(model.get_submodule(name), parameter, mask)
    return chosen


def _mask_group(
    model: nn.Module,
    graph: ModelGraph,
    group: Group,
    units: list[int],
    masks: dict[tuple[str, str], Tensor],
) -> None:
    """Add one group's zeros to the masks; nothing of the model is touched yet."""

    def close(name: str, parameter: str, channels: Tensor, dim: int = 0) -> None:
        tensor = getattr(model.get_submodule(name), parameter, None)
        if tensor is None:
            return
        mask = masks.setdefault((name, parameter), torch.ones_like(tensor))
        mask.index_fill_(dim, channels.to(mask.device), 0.0)

    for member in group.members:
        channels = member.channels[units].flatten()
        module = model.get_submodule(member.name)
        if member.kind == "custom" or (
            member.kind == "norm" and not isinstance(module, BATCH_NORMS)
        ):
            raise ModelError(
                f"group {group.name!r} runs through {member.name!r}, a {type(module).__name__}: its "
                "statistics cannot leave a masked channel out; remove the units with singe.prune, or "
                "score without this group"
            )
        if member.kind == "input":
            grouped = getattr(module, "groups", 1) > 1
            if grouped:
                raise ModelError(
                    f"{member.name!r} reads the units in groups; no mask can say which"
                )
            close(member.name, "weight", channels, 1)
            continue
        if isinstance(module, nn.MultiheadAttention):
            close(member.name, "in_proj_weight", channels)
            close(member.name, "in_proj_bias", channels)
            continue
        for name in (member.name, graph.folds.get(member.name)):
            if name is not None:
                _require_affine(model.get_submodule(name), name)
                close(name, "weight", channels, int(is_transposed(model.get_submodule(name))))
                close(name, "bias", channels)


def _require_affine(module: nn.Module, name: str) -> None:
    if isinstance(module, BATCH_NORMS) and module.weight is None:
        raise ModelError(
            f"{name!r} is a BatchNorm without parameters: there is nothing to mask, and a masked "
            "channel would leave its mean behind; use singe.prune"
        )
