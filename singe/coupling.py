"""Reading the groups of a model off Torch-Pruning's graph, and what speaks against each."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn

from singe.conv1d import with_linears
from singe.data import Batch
from singe.dependencies import build_dependency_graph, coupled
from singe.gates import BATCH_NORMS, dialect, registered
from singe.graph import NORMS, ROWS, Group, Member, ModelGraph, private_copy, width_of
from singe.heads import Heads, find_heads


def read_graph(
    model: nn.Module, batch: Batch, ignore: frozenset[str] = frozenset(), fold: bool = True
) -> ModelGraph:
    """Groups of ``model`` as Torch-Pruning couples them, before any numerical check.

    Args:
        model: any module; not changed.
        batch: a small batch to trace with.
        ignore: layers that must keep all their channels.
        fold: treat a BatchNorm that directly follows a row as part of it.
    """
    twin = with_linears(private_copy(model, trainable=True))
    names = {module: name for name, module in twin.named_modules()}
    dg = build_dependency_graph(twin, batch)
    folds = _find_folds(dg, names) if fold else {}
    tied = tied_layers(twin)
    folded = set(folds.values())

    groups: list[Group] = []
    rejected: dict[str, str] = {}
    rejected_layers: dict[str, str] = {}

    def offer(root: str, group: Group | str, layers: Iterable[str]) -> None:
        if isinstance(group, Group) and (hit := ignore.intersection(group.layers)):
            group = f"{', '.join(sorted(hit))} is in `ignore`"
        if isinstance(group, Group):
            groups.append(group)
        else:
            rejected[root] = group
            rejected_layers.update(dict.fromkeys(layers, root))

    in_heads: set[str] = set()
    for name, heads in find_heads(twin):
        if isinstance(heads, str):
            rejected.setdefault(name, heads)
            continue
        layers = tuple(heads.rows)
        offer(heads.value, _group_of(heads, twin, tied), layers)
        in_heads |= set(layers)
    for root_module, tp_group in coupled(dg):
        root = names[root_module]
        if isinstance(tp_group, str):
            if root not in in_heads:
                offer(root, tp_group, (root,))
            continue
        coupled_layers = {
            names[item.dep.target.module]
            for item in tp_group
            if isinstance(item.dep.target.module, ROWS)
            and dg.is_out_channel_pruning_fn(item.dep.handler)
        }
        if not coupled_layers & in_heads:  # those leave head by head
            offer(root, _describe(dg, tp_group, names, folded, tied), coupled_layers)

    for module, name in names.items():
        if isinstance(module, nn.RNNBase):
            rejected[name] = (
                f"it is a {type(module).__name__}: its channels feed back into each other over time, "
                "and no gate here closes that; score and prune the layers around it"
            )
            rejected_layers[name] = name
        elif _is_foreign(module):
            rejected[name] = (
                f"it is a {type(module).__name__}, a layer neither torch.nn nor Torch-Pruning has; put "
                "a Linear or a convolution in its place"
            )
            rejected_layers[name] = name
    order = {name: i for i, name in enumerate(names.values())}
    groups.sort(key=lambda g: order[g.name])
    return ModelGraph(tuple(groups), folds, rejected, rejected_layers)


def readers_in_training(
    model: nn.Module, batch: Batch, groups: Iterable[Group], layers: set[str]
) -> dict[str, str]:
    """Group -> the one of ``layers`` that reads its channels in training mode, where one does."""
    twin = with_linears(private_copy(model, trainable=True))
    names = {module: name for name, module in twin.named_modules()}
    dg = build_dependency_graph(twin, batch, training=True)
    readers: dict[str, str] = {}
    for group in groups:
        root = twin.get_submodule(group.name)
        prune = dg.get_pruner_of_module(root).prune_out_channels
        items = dg.get_pruning_group(root, prune, group.root_channels.flatten().tolist())
        if found := {names.get(item.dep.target.module, "") for item in items} & layers:
            readers[group.name] = min(found)
    return readers


def _find_folds(dg: tp.DependencyGraph, names: dict[nn.Module, str]) -> dict[str, str]:
    """conv/linear -> BatchNorm pairs in which each is the other's only neighbour."""
    folds = {}
    for module, node in dg.module2node.items():
        if not isinstance(module, ROWS) or len(set(node.outputs)) != 1:
            continue
        if "weight" not in module._parameters:  # computed by a parametrization
            continue
        after = node.outputs[0]
        if (
            isinstance(after.module, BATCH_NORMS)
            and set(after.inputs) == {node}
            and after.module.running_mean is not None
            and dialect(after.module) is not None
        ):
            folds[names[module]] = names[after.module]
    return folds


def tied_layers(model: nn.Module) -> set[str]:
    """Layers whose weight or bias is also another layer's: removing from one would untie them."""
    users: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            users.setdefault(id(parameter), []).append(name)
    return {name for sharers in users.values() if len(sharers) > 1 for name in sharers}


def _blocks_of(module: nn.Module) -> int:
    """Into how many equal blocks a layer cuts its channels: each must lose as many as the others."""
    if isinstance(module, nn.GroupNorm):
        return module.num_groups
    groups = getattr(module, "groups", 1)
    if isinstance(module, ROWS) and groups > 1 and groups != module.out_channels:
        return int(groups)
    return 1


def _describe(
    dg: tp.DependencyGraph,
    tp_group: Any,
    names: dict[nn.Module, str],
    folded: set[str],
    tied: set[str],
) -> Group | str:
    """A Group, or the reason why this one cannot be offered."""
    root = tp_group[0].dep.target.module
    n_channels = len(tp_group[0].idxs)
    blocks = math.lcm(*(_blocks_of(item.dep.target.module) for item in tp_group))
    if n_channels % blocks:
        return f"{n_channels} channels cannot be shared out over {blocks} blocks"
    n_units = n_channels // blocks
    if n_units < 2:
        return "it has a single unit, and a layer cannot lose all its channels"

    members: list[Member] = []
    consumers: list[Member] = []
    units: dict[str, Tensor] = {}
    suspicious = False
    for item in tp_group:
        node, module = item.dep.target, item.dep.target.module
        if isinstance(module, nn.Parameter):
            if not _only_multiplies(node):
                return "its channels are tied to a bare nn.Parameter"
            continue  # a layer scale: times zero
        is_out = dg.is_out_channel_pruning_fn(item.dep.handler)
        if is_out and not node.outputs:
            return "its channels reach the model's output"
        if module not in names or isinstance(module, nn.PReLU):
            continue  # an element-wise, concat, split or reshape operation
        name = names[module]
        if registered(module) is not None:
            channels = _channels_by_unit(item.idxs, item.root_idxs, n_units)
            if channels is None:
                return f"{name} holds more channels of some units than of others, as behind a concatenation"
            members.append(Member(name, "custom", channels))
            continue
        if not isinstance(module, (*ROWS, *NORMS)):
            return f"{name} is a {type(module).__name__}, which has no gate yet"
        if isinstance(module, nn.LayerNorm) and len(module.normalized_shape) > 1:
            return f"{name} normalises over several dimensions"
        if isinstance(module, ROWS) and not is_plain(module):
            return f"{name} is {beyond_its_base(module)}"
        if isinstance(module, NORMS) and dialect(module) is None:
            return f"{name} is a {type(module).__name__}, which does more than its base class"
        if isinstance(module, ROWS) and "weight" not in module._parameters:
            return f"{name} computes its weight; remove its weight_norm or parametrization first"
        if name in tied:
            return f"{name} shares a parameter with another layer"
        if isinstance(module, BATCH_NORMS) and module.running_mean is None:
            return f"{name} keeps no running statistics"
        if min(item.idxs) < 0 or max(item.idxs) >= width_of(module, is_out):
            return f"something in front of {name} moves channels in a way that cannot be followed"
        channels = _channels_by_unit(item.idxs, item.root_idxs, n_units)
        if channels is None:
            return f"{name} holds more channels of some units than of others, as behind a concatenation"
        if blocks > 1 and item.idxs != item.root_idxs:
            return f"{name} is behind a concat or reshape and cuts its channels into blocks"
        if isinstance(module, ROWS) and not is_out:
            consumers.append(Member(name, "input", channels))
        elif isinstance(module, ROWS):
            members.append(Member(name, "rows", channels))
            units[name] = units_by_channel(channels, module.weight.shape[0])
            suspicious |= channels.numel() != module.weight.shape[0]
        elif name not in folded:
            members.append(Member(name, "norm", channels))
    if not consumers:
        return "no layer reads its channels, so they reach the model's output"
    root_channels = torch.arange(n_channels, device="cpu").view(blocks, n_units).T.contiguous()
    return Group(
        names[root], n_units, root_channels, tuple(members), tuple(consumers), suspicious, units
    )


def _group_of(heads: Heads, model: nn.Module, tied: set[str]) -> Group | str:
    """The group of an attention module's heads, or the reason why they cannot be offered."""
    if heads.n_units < 2:
        return "it has a single head, and attention cannot lose all its heads"
    units: dict[str, Tensor] = {}
    for name, rows in heads.rows.items():
        if name in tied:
            return f"{name} shares a parameter with another layer"
        module: Any = model.get_submodule(name)
        if isinstance(module, nn.MultiheadAttention):
            units[name] = units_by_channel(rows, len(module.in_proj_weight))
            continue
        if not is_plain(module):
            return f"{name} is {beyond_its_base(module)}"
        if "weight" not in module._parameters:
            return f"{name} computes its weight; remove its weight_norm or parametrization first"
        units[name] = units_by_channel(rows, len(module.weight))
    return Group(
        heads.value,
        heads.n_units,
        heads.value_rows,
        (Member(heads.value, "rows", heads.value_rows),),
        (Member(heads.proj, "input", heads.columns),),
        units=units,
        heads=heads,
    )


def _is_foreign(module: nn.Module) -> bool:
    """A matrix of somebody's own: its outputs are in nobody's group."""
    weight = module._parameters.get("weight")
    bases = [base for base in type(module).__mro__ if base is not nn.Module]
    is_torchs = any(base.__module__.startswith("torch.") for base in bases)
    return weight is not None and weight.dim() >= 2 and not is_torchs and registered(module) is None


def is_plain(row: nn.Module, bases: tuple[type[nn.Module], ...] = ROWS) -> bool:
    """Whether a conv or linear computes what torch's does: its weight gradient is taken for granted."""
    return not _is_patched(row) and any(
        type(row).forward is base.forward
        and getattr(base, "_conv_forward", None) is getattr(type(row), "_conv_forward", None)
        for base in bases
    )


def _is_patched(row: nn.Module) -> bool:
    return not {"forward", "_conv_forward"}.isdisjoint(vars(row))


def beyond_its_base(row: nn.Module) -> str:
    """What a layer is that :func:`is_plain` refuses."""
    kind = f"a {type(row).__name__}"
    if _is_patched(row):
        return f"{kind} whose forward was replaced"
    return f"{kind}, which does more than its base class"


def _only_multiplies(node: Any) -> bool:
    """Whether a bare parameter is nothing but a factor of what it meets (a layer scale)."""
    return bool(node.outputs) and all(
        node.grad_fn is not None
        and "MulBackward" in (after.grad_fn.name() if after.grad_fn else "")
        for after in node.outputs
    )


def units_by_channel(channels: Tensor, width: int) -> Tensor:
    """int64 [width] from [U, m] channels per unit: the unit of every channel, -1 where it has none."""
    units = torch.full((width,), -1, device="cpu")
    units[channels] = torch.arange(len(channels), device="cpu")[:, None]
    return units


def _channels_by_unit(idxs: list[int], root_idxs: list[int], n_units: int) -> Tensor | None:
    """[U, m] channels per unit, or None if units hold different numbers of channels."""
    if len(idxs) % n_units or None in root_idxs:  # Torch-Pruning lost track of some
        return None
    unit = torch.tensor(root_idxs, device="cpu") % n_units
    order = torch.argsort(unit, stable=True)
    if not torch.equal(
        unit[order], torch.arange(n_units, device="cpu").repeat_interleave(len(idxs) // n_units)
    ):
        return None
    return torch.tensor(idxs, device="cpu")[order].view(n_units, -1)
