"""What can be removed from a model: its groups of coupled channels, read off Torch-Pruning's graph."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn

from singe.conv1d import with_linears
from singe.data import Batch
from singe.dependencies import build_dependency_graph, coupled
from singe.errors import ModelError
from singe.gates import BATCH_NORMS, dialect, registered
from singe.heads import Heads, find_heads

ROWS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
NORMS = (*BATCH_NORMS, nn.LayerNorm, nn.GroupNorm)
FUSED = (nn.MultiheadAttention, nn.TransformerEncoder, nn.TransformerEncoderLayer)


@dataclass(frozen=True)
class Member:
    """One layer in which the units of a group have channels.

    Attributes:
        name: the module's name in the model.
        kind: ``"rows"`` (a conv or linear whose output channels the units are), ``"norm"`` (a
            normalisation that is not folded into a row), ``"custom"`` (a registered layer),
            ``"input"`` (a consumer that needs a gate because something between maps 0 to another
            value).
        channels: int64 [U, m]; the m channels of the module that belong to each unit.
    """

    name: str
    kind: str
    channels: Tensor

    def is_whole(self, n_channels: int) -> bool:
        """Whether unit u is channel u of a module with ``n_channels``, so nothing needs gathering."""
        flat = self.channels.flatten()
        return len(flat) == n_channels and torch.equal(flat, torch.arange(n_channels))


@dataclass(frozen=True)
class Group:
    """Units that live in the same coupled layers; removed one by one, each as a whole.

    Attributes:
        name: the root module's name.
        n_units: number of units U.
        root_channels: int64 [U, m]; the root module's output channels of each unit (m > 1 where a
            grouped convolution or GroupNorm forces channels to go together).
        members: every layer that holds parameters or gates of the units.
        consumers: ``"input"`` members: the layers that read the units.
        units: layer -> int64 [C_out], the unit that each of its output channels belongs to, -1 where it
            is another group's. Channels of a unit need not be neighbours, nor at equal distances.
        heads: where the units are the heads of an attention module, what each takes with it.
    """

    name: str
    n_units: int
    root_channels: Tensor
    members: tuple[Member, ...]
    consumers: tuple[Member, ...] = field(default=(), repr=False)
    suspicious: bool = field(default=False, repr=False)
    units: Mapping[str, Tensor] = field(default_factory=dict, repr=False, hash=False)
    heads: Heads | None = field(default=None, repr=False, hash=False)

    @property
    def rows(self) -> tuple[Member, ...]:
        return tuple(m for m in self.members if m.kind == "rows")

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the convs and linears whose output channels the units are."""
        return tuple(self.heads.rows) if self.heads else tuple(m.name for m in self.rows)

    def with_input_gates(self, names: set[str]) -> Group:
        """The same group with gates at the inputs of the named consumers."""
        gated = tuple(m for m in self.consumers if m.name in names)
        return replace(self, members=self.members + gated)


@dataclass(frozen=True)
class ModelGraph:
    """All groups of a model, the norms that fold into rows, and what was left out and why."""

    groups: tuple[Group, ...]
    folds: dict[str, str]  # conv or linear -> the BatchNorm that directly follows it
    rejected: dict[str, str]  # root layer -> reason
    rejected_layers: dict[str, str]  # every layer of those groups -> root layer


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside a ``torch.compile`` or data-parallel wrapper, else the model itself."""
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        return unwrapped(model.module)
    return getattr(model, "_orig_mod", model)


def private_copy(model: nn.Module, trainable: bool = False) -> nn.Module:
    """A copy with its own module tree and buffers that shares the parameters' storage.

    Nothing that happens to the copy's ``.grad``, ``requires_grad``, hooks, mode or buffers reaches
    the original; writing into a parameter in place would, so nobody does.

    Raises:
        ModelError: the model cannot be deep-copied.
    """
    model = unwrapped(model)
    memo: dict[int, Any] = {
        id(p): nn.Parameter(
            p.detach().clone() if p.is_inference() else p.detach(),
            requires_grad=trainable and p.is_floating_point(),
        )
        for p in model.parameters()
    }
    memo.update({id(b): b.detach().clone() for b in model.buffers()})
    try:
        twin = copy.deepcopy(model, memo)
    except Exception as error:
        raise ModelError(
            f"{type(model).__name__} cannot be copied with copy.deepcopy ({error}); a model must be "
            "deep-copyable to be scored without being touched"
        ) from error
    for module in twin.modules():
        if isinstance(module, FUSED) and not isinstance(module.forward, partial):
            setattr(module, "forward", partial(_without_fast_path, module.forward))  # noqa: B010
    return twin.eval()


def _without_fast_path(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """torch's fused inference kernels for attention have no derivative and no vmap rule."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        return forward(*args, **kwargs)
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


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
    """Layers whose weight is also another layer's: removing from one would untie them."""
    users: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is not None:
            users.setdefault(id(weight), []).append(name)
    return {name for sharers in users.values() if len(sharers) > 1 for name in sharers}


def _blocks_of(module: nn.Module) -> int:
    """Into how many equal blocks a layer cuts its channels: each must lose as many as the others."""
    if isinstance(module, nn.GroupNorm):
        return module.num_groups
    groups = getattr(module, "groups", 1)
    if isinstance(module, ROWS) and groups > 1 and groups != module.out_channels:
        return int(groups)
    return 1


def _width(module: Any, is_out: bool) -> int:
    """Output or input channels of a layer; those of a norm."""
    for name in ("out_channels", "out_features") if is_out else ("in_channels", "in_features"):
        if hasattr(module, name):
            return int(getattr(module, name))
    if isinstance(module, nn.LayerNorm):
        return module.normalized_shape[-1]
    return int(getattr(module, "num_features", None) or module.num_channels)


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
                return f"{name} does not hold as many channels of every unit"
            members.append(Member(name, "custom", channels))
            continue
        if not isinstance(module, (*ROWS, *NORMS)):
            return f"{name} is a {type(module).__name__}, which has no gate yet"
        if isinstance(module, nn.LayerNorm) and len(module.normalized_shape) > 1:
            return f"{name} normalises over several dimensions"
        if isinstance(module, ROWS) and not is_plain(module):
            return f"{name} is a {type(module).__name__}, which does more than its base class"
        if isinstance(module, NORMS) and dialect(module) is None:
            return f"{name} is a {type(module).__name__}, which does more than its base class"
        if isinstance(module, ROWS) and "weight" not in module._parameters:
            return f"{name} computes its weight; remove its weight_norm or parametrization first"
        if name in tied:
            return f"{name} shares its weight with another layer"
        if isinstance(module, BATCH_NORMS) and module.running_mean is None:
            return f"{name} keeps no running statistics"
        if max(item.idxs) >= _width(module, is_out):
            return f"something in front of {name} moves channels in a way that cannot be followed"
        channels = _channels_by_unit(item.idxs, item.root_idxs, n_units)
        if channels is None:
            return f"{name} does not hold as many channels of every unit"
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
    root_channels = torch.arange(n_channels).view(blocks, n_units).T.contiguous()
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
            return f"{name} shares its weight with another layer"
        module: Any = model.get_submodule(name)
        if isinstance(module, nn.MultiheadAttention):
            units[name] = units_by_channel(rows, len(module.in_proj_weight))
            continue
        if not is_plain(module):
            return f"{name} is a {type(module).__name__}, which does more than its base class"
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
    return any(
        type(row).forward is base.forward
        and getattr(base, "_conv_forward", None) is getattr(type(row), "_conv_forward", None)
        for base in bases
    )


def _only_multiplies(node: Any) -> bool:
    """Whether a bare parameter is nothing but a factor of what it meets (a layer scale)."""
    return bool(node.outputs) and all(
        node.grad_fn is not None
        and "MulBackward" in (after.grad_fn.name() if after.grad_fn else "")
        for after in node.outputs
    )


def units_by_channel(channels: Tensor, width: int) -> Tensor:
    """int64 [width] from [U, m] channels per unit: the unit of every channel, -1 where it has none."""
    units = torch.full((width,), -1)
    units[channels] = torch.arange(len(channels))[:, None]
    return units


def _channels_by_unit(idxs: list[int], root_idxs: list[int], n_units: int) -> Tensor | None:
    """[U, m] channels per unit, or None if units hold different numbers of channels."""
    if len(idxs) % n_units or None in root_idxs:  # Torch-Pruning lost track of some
        return None
    unit = torch.tensor(root_idxs) % n_units
    order = torch.argsort(unit, stable=True)
    if not torch.equal(unit[order], torch.arange(n_units).repeat_interleave(len(idxs) // n_units)):
        return None
    return torch.tensor(idxs)[order].view(n_units, -1)
