"""Physical removal of channels, by Torch-Pruning, and of heads.

Also what it does to tensors that mirror the model's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from singe.conv1d import Linears
from singe.data import Batch
from singe.dependencies import build_dependency_graph
from singe.graph import Group, named_tensors, private_copy, unwrapped
from singe.heads import remove_heads

Removals = Sequence[tuple[Group, Sequence[int]]]


def remove_units(
    model: nn.Module,
    batch: Batch,
    removals: Removals,
    once_traced: Callable[[nn.Module], None] | None = None,
) -> None:
    """Remove units from ``model`` in place.

    Args:
        model: its parameters are replaced by smaller ones; ``requires_grad`` flags and the training
            mode are kept.
        batch: a small batch to trace with.
        removals: (group, unit indices) pairs; every group at most once, never all of its units.
        once_traced: called with the model between the trace and the removal.
    """
    model = unwrapped(model)
    training = {name: module.training for name, module in model.named_modules()}
    trainable = {name: p.requires_grad for name, p in model.named_parameters()}
    channels_last = {name for name, p in model.named_parameters() if _is_channels_last(p)}
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(True)  # the trace follows grad_fns
    linears = Linears(model)
    try:
        linears.put()
        by_graph = any(group.heads is None for group, _ in removals)
        with _buffers_kept(model):  # the trace runs the user's own forward
            graph = build_dependency_graph(model, batch) if by_graph else None
        if once_traced is not None:
            linears.back()
            once_traced(model)
            linears.put()
        modules = dict(model.named_modules())
        for group, units in removals:
            if group.heads is None and graph is not None:
                channels = group.root_channels[list(units)].flatten().tolist()
                root = modules[group.name]
                prune = graph.get_pruner_of_module(root).prune_out_channels
                graph.get_pruning_group(root, prune, sorted(channels)).prune()
        for group, units in removals:  # last: the graph knows nothing of heads
            if group.heads is not None:
                remove_heads(model, group.heads, units)
    finally:
        linears.back()
        _restore_flags(model, training, trainable)
        for name, parameter in model.named_parameters():
            if name in channels_last and not _is_channels_last(parameter):
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)


def _is_channels_last(tensor: Tensor) -> bool:
    """Stored so, and not as usual at the same time (1 x 1 kernels are both)."""
    last = tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    return last and not tensor.is_contiguous()


@contextmanager
def _buffers_kept(model: nn.Module) -> Iterator[None]:
    """The very buffers of now, with their values, also where a forward pass counts or observes."""
    registered = [(module, dict(module._buffers)) for module in model.modules()]
    values = [(buffer, buffer._version, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        for module, buffers in registered:
            module._buffers.update(buffers)
        with torch.no_grad():
            for buffer, version, value in values:
                if buffer._version != version:
                    buffer.copy_(value)


def kept_elements(model: nn.Module, batch: Batch, removals: Removals) -> dict[str, Tensor]:
    """Which elements of every parameter and buffer :func:`remove_units` would keep.

    A copy whose tensors hold the numbers of their own elements is pruned: what is left of a tensor
    says where it came from, however channels were moved, flattened or concatenated on the way.

    Returns:
        name -> int64 flat indices into the tensor as it is now, in the shape that it will have.
    """
    twin = private_copy(model, trainable=True)

    def number(module: nn.Module) -> None:
        for tensor in (*module.parameters(), *module.buffers()):
            # float64 counts exactly to 9e15, and can be a parameter, unlike integers
            numbers = torch.arange(tensor.numel(), dtype=torch.float64, device=tensor.device)
            tensor.data = numbers.view(tensor.shape)

    remove_units(twin, batch, removals, once_traced=number)
    return {name: tensor.detach().long() for name, tensor in named_tensors(twin)}


def take(value: Tensor, kept: Tensor) -> Tensor:
    """The elements of ``value`` that :func:`kept_elements` names, in their new shape."""
    return value.reshape(-1)[kept.reshape(-1).to(value.device)].view(kept.shape)


def _restore_flags(
    model: nn.Module, training: Mapping[str, bool], trainable: Mapping[str, bool]
) -> None:
    for name, module in model.named_modules():
        module.training = training.get(name, module.training)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trainable.get(name, parameter.requires_grad))
