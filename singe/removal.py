"""Physical removal of channels, by Torch-Pruning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from singe.data import Batch
from singe.graph import Group, build_dependency_graph, unwrapped


def remove_units(
    model: nn.Module, batch: Batch, removals: Sequence[tuple[Group, Sequence[int]]]
) -> None:
    """Remove units from ``model`` in place.

    Args:
        model: its parameters are replaced by smaller ones; ``requires_grad`` flags and the training
            mode are kept.
        batch: a small batch to trace with.
        removals: (group, unit indices) pairs; every group at most once, never all of its units.
    """
    model = unwrapped(model)
    training = {name: module.training for name, module in model.named_modules()}
    trainable = {name: p.requires_grad for name, p in model.named_parameters()}
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(True)  # the trace follows grad_fns
    try:
        graph = build_dependency_graph(model, batch)
        modules = dict(model.named_modules())
        for group, units in removals:
            channels = group.root_channels[list(units)].flatten().tolist()
            root = modules[group.name]
            prune = graph.get_pruner_of_module(root).prune_out_channels
            graph.get_pruning_group(root, prune, sorted(channels)).prune()
    finally:
        _restore_flags(model, training, trainable)


def _restore_flags(
    model: nn.Module, training: Mapping[str, bool], trainable: Mapping[str, bool]
) -> None:
    for name, module in model.named_modules():
        module.training = training.get(name, module.training)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trainable.get(name, parameter.requires_grad))
