"""Networks, hand-made scores and pruners for the tests of the Torch-Pruning adapter."""

from __future__ import annotations

import torch
import torch_pruning as tp
from helpers_attention import FAMILIES
from helpers_heads import scored
from helpers_networks import CASES
from torch import nn

from singe.scores import Scores, fingerprint


def lowest(scores: Scores, count: int) -> dict[str, list[int]]:
    """The lowest units of all; the best one of each group stays."""
    order = sorted(
        (float(value), name, unit)
        for name, values in scores.items()
        for unit, value in enumerate(values)
        if unit != int(values.argmax())
    )
    chosen: dict[str, list[int]] = {}
    for _, name, unit in order[:count]:
        chosen.setdefault(name, []).append(unit)
    return {name: sorted(units) for name, units in chosen.items()}


def units_of(removed: dict[str, list[int]], scores: Scores) -> dict[str, list[int]]:
    return {name: sorted({c % len(scores[name]) for c in idxs}) for name, idxs in removed.items()}


def scores_of(model: nn.Module, values: dict[str, torch.Tensor], **meta) -> Scores:
    """Hand-made scores of a model."""
    meta = {"fingerprint": fingerprint(model), "model": type(model).__name__, **meta}
    return Scores(values, {name: (name,) for name in values}, meta)


def pruner_for(model, inputs, importance, **options):
    options = {"global_pruning": True, "pruning_ratio": 0.5, **options}
    if "ignored_layers" not in options:
        options["ignored_layers"] = [
            m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features in (4, 10)
        ]
    # The dictionaries are default arguments that Torch-Pruning fills in: give it fresh ones.
    options = {"num_heads": {}, "in_channel_groups": {}, "out_channel_groups": {}, **options}
    return tp.pruner.BasePruner(model, inputs, importance=importance, **options)


def heads_of(name: str):
    """A family of :mod:`helpers_attention`, its scores, and how BasePruner is told of its heads."""
    model, inputs, scores = scored(FAMILIES[name])
    modules = dict(model.named_modules())
    heads = {
        modules[layer]: int(units.max()) + 1
        for group in scores.meta["heads"]
        for layer, units in scores.units[group].items()
    }
    options = {
        "num_heads": heads, "prune_num_heads": True, "prune_head_dims": False,
        "pruning_ratio": 1e-9, "head_pruning_ratio": 0.5, "ignored_layers": [model.head],
    }  # fmt: skip
    return model, inputs, scores, options


def case(name: str):
    model, batches = CASES[name].model(), CASES[name].batches()
    return model, batches[0][0], batches
