"""The units of a model: groups of removable channels, checked by removing some."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from singe.coupling import read_graph
from singe.data import Batch, first_samples
from singe.errors import ModelError, NonFiniteError
from singe.graph import Group, ModelGraph, private_copy, unwrapped
from singe.memory import is_out_of_memory
from singe.network import Network, site_key
from singe.removal import remove_units

TRACE_SAMPLES = 2  # a batch of 1 would hide coupling along the batch dimension


def small(batch: Batch) -> Batch:
    """The first samples of a batch, for tracing."""
    return first_samples(batch, TRACE_SAMPLES)


def find_groups(
    model: nn.Module,
    batch: Batch,
    layers: Iterable[str | nn.Module] | None = None,
    ignore: Iterable[str | nn.Module] = (),
) -> ModelGraph:
    """Groups of prunable units, each proven on this model: gating equals removing.

    Args:
        model: any module in which Torch-Pruning finds groups; not changed.
        batch: real inputs; the first two samples are used.
        layers: only the groups that these layers (names or modules) belong to; default all but those
            that reach the output.
        ignore: layers (names or modules, containers included) that keep all their channels.

    Returns:
        The graph with the chosen groups in module order; ``rejected`` says why others are not there.

    Raises:
        ModelError: nothing to prune, an unknown layer, a layer that cannot be pruned (with reason).
    """
    model = unwrapped(model)
    names = dict(model.named_modules())
    ignored = frozenset(inside(names, names_of(names, ignore, "ignore")))
    wanted = None if layers is None else names_of(names, layers, "layers")
    graph = checked_groups(model, batch, ignored, wanted)
    if not graph.groups:
        reasons = "; ".join(f"{name}: {why}" for name, why in list(graph.rejected.items())[:5])
        raise ModelError(
            f"{type(model).__name__} has nothing to prune ({reasons or 'no conv or linear layer'})"
        )
    return graph


def checked_groups(
    model: nn.Module, batch: Batch, ignored: frozenset[str], wanted: Sequence[str] | None = None
) -> ModelGraph:
    """:func:`find_groups` by names of an unwrapped model; there may be no groups at all."""
    names = dict(model.named_modules())
    model, batch = full_precision(model, small(batch))
    graph = read_graph(model, batch, ignored)
    if graph.folds and not _folds_well(model, batch, graph):
        graph = read_graph(model, batch, ignored, fold=False)
    graph = _with_input_gates(model, batch, graph)
    if wanted is not None:
        graph = _select(graph, names, wanted)
    graph = _verified(model, batch, graph)
    if wanted is not None:
        _select(graph, names, wanted)  # name the reason if a wanted group failed its check
    return graph


def names_of(
    names: dict[str, nn.Module], layers: Iterable[str | nn.Module], argument: str
) -> list[str]:
    if isinstance(layers, str | nn.Module):
        layers = [layers]
    by_module = {module: name for name, module in names.items()}
    resolved = []
    for layer in layers:
        if isinstance(layer, nn.Module):
            if layer not in by_module:
                raise ModelError(f"`{argument}` holds a {type(layer).__name__} not in this model")
            resolved.append(by_module[layer])
        elif layer in names:
            resolved.append(layer)
        else:
            near = difflib.get_close_matches(str(layer), names, n=3, cutoff=0.4)
            hint = f"; did you mean {', '.join(map(repr, near))}?" if near else ""
            raise ModelError(f"`{argument}` names {layer!r}, which this model does not have{hint}")
    return resolved


def inside(names: dict[str, nn.Module], roots: Sequence[str]) -> set[str]:
    """The named modules and everything inside them."""
    return {n for n in names for root in roots if n == root or n.startswith(root + ".")}


def _select(graph: ModelGraph, names: dict[str, nn.Module], wanted: Sequence[str]) -> ModelGraph:
    """The groups of the wanted layers, and of all layers inside wanted containers."""
    chosen = set()
    for name in wanted:
        within = inside(names, [name])
        found = {g.name for g in graph.groups if within.intersection((g.name, *g.layers))}
        if not found:
            roots = {graph.rejected_layers[n] for n in within if n in graph.rejected_layers}
            why = "; ".join(graph.rejected[root] for root in sorted(roots))
            why = why or "it is no conv or linear layer with prunable outputs"
            raise ModelError(f"layer {name!r} cannot be pruned: {why}")
        chosen |= found
    return replace(graph, groups=tuple(g for g in graph.groups if g.name in chosen))


def full_precision(model: nn.Module, batch: Batch) -> tuple[nn.Module, Batch]:
    """Half-precision models are checked in float32: their own rounding would hide anything."""

    def widen(value: Any) -> Any:
        return value.float() if isinstance(value, Tensor) and _is_half(value) else value

    if not any(_is_half(p) for p in model.parameters()):
        return model, batch
    wide = replace(batch, args=tree_map(widen, batch.args), kwargs=tree_map(widen, batch.kwargs))
    return private_copy(model).float(), wide


def _is_half(tensor: Tensor) -> bool:
    return tensor.dtype in (torch.float16, torch.bfloat16)


@torch.no_grad()
def _folds_well(model: nn.Module, batch: Batch, graph: ModelGraph) -> bool:
    """Not where the model also returns what a folded layer gives before its norm."""
    try:
        folded = float_outputs(Network(model, (), graph.folds)(batch))
    except Exception:  # a model that reads a layer's weight or bias itself, say
        return False
    original = float_outputs(batch.call(private_copy(model)))
    return distance(folded, original) <= tolerance_of(original)


def float_outputs(outputs: Any) -> list[Tensor]:
    return [t for t in tree_leaves(outputs) if isinstance(t, Tensor) and t.is_floating_point()]


@torch.no_grad()
def _with_input_gates(model: nn.Module, batch: Batch, graph: ModelGraph) -> ModelGraph:
    """Gate the inputs of consumers that do not read zeros when every gate is at zero."""
    network = Network(model, graph.groups, graph.folds)
    seen: dict[str, Tensor] = {}

    def watch(name: str, module: nn.Module) -> None:
        dim = -1 if isinstance(module, nn.Linear) else 1

        def look(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
            x = args[0] if args else kwargs["input"]
            not_zero = x.movedim(dim, 0).flatten(1).abs().amax(1) != 0
            seen[name] = not_zero | seen.get(name, not_zero)

        module.register_forward_pre_hook(look, with_kwargs=True)

    for name in {m.name for g in graph.groups for m in g.consumers}:
        watch(name, network.module.get_submodule(name))
    set_gates(network, [(g, range(g.n_units)) for g in graph.groups], 0.0)
    network(batch)
    groups = []
    for group in graph.groups:
        leaky = {
            m.name for m in group.consumers if m.name in seen and seen[m.name][m.channels].any()
        }
        groups.append(group.with_input_gates(leaky) if leaky else group)
    return replace(graph, groups=tuple(groups))


def set_gates(network: Network, units: Iterable[tuple[Group, Iterable[int]]], value: float) -> None:
    """Set the gates of some units to ``value`` and of all others to 1."""
    network.clear()
    for group, indices in units:
        chosen = list(indices)
        for member in group.members:
            site = network.sites[site_key(member)]
            if site.gate is None:
                site.gate = network.open_gate(site.key).repeat(site.channels)
            site.gate[member.channels[chosen].flatten()] = value


@torch.no_grad()
def _verified(model: nn.Module, batch: Batch, graph: ModelGraph) -> ModelGraph:
    """Keep the groups in which gating a unit off equals removing it physically.

    One unit of every group at once; where that fails, of one half of the groups and of the other.
    """
    network = Network(model, graph.groups, graph.folds)
    network.clear()
    base = float_outputs(network(batch))
    original = float_outputs(batch.call(private_copy(model)))
    if not all(bool(torch.isfinite(t).all()) for t in original):
        raise NonFiniteError(
            f"{type(model).__name__} gives NaN or infinite outputs for the first batch in evaluation "
            "mode; check its parameters and running statistics"
        )
    if not distance(base, original) <= tolerance_of(original):
        raise ModelError(
            f"the folded copy of {type(model).__name__} differs from the model by "
            f"{distance(base, original):.2e} (relative); is its evaluation mode deterministic?"
        )

    def problem(groups: Sequence[Group]) -> str | None:
        units = [(g, [g.n_units // 2]) for g in groups]
        set_gates(network, units, 0.0)
        gated = float_outputs(network(batch))
        small_model = private_copy(model)
        try:
            with torch.enable_grad():
                remove_units(small_model, batch, units)
            removed = float_outputs(batch.call(small_model))
        except Exception as error:
            if is_out_of_memory(error):
                raise
            return f"removing one of its units fails ({type(error).__name__}: {error})"
        if [t.shape for t in removed] != [t.shape for t in base]:
            return "removing one of its units changes the shape of the model's output"
        off = distance(gated, removed)
        if not off <= tolerance_of(base):
            return f"gating one of its units and removing it differ by {off:.1e} (relative)"
        return None

    # Heads on their own: without a trace they are cheap.
    reasons = with_problems([g for g in graph.groups if g.heads], problem)
    plain = [g for g in graph.groups if not g.suspicious and not g.heads]
    reasons |= with_problems(plain, problem)
    for group in graph.groups:
        if group.suspicious:
            reasons |= with_problems([group], problem)
    failed = {layer: g.name for g in graph.groups if g.name in reasons for layer in g.layers}
    return replace(
        graph,
        groups=tuple(g for g in graph.groups if g.name not in reasons),
        rejected={**graph.rejected, **reasons},
        rejected_layers={**graph.rejected_layers, **failed},
    )


def with_problems(
    groups: Sequence[Group], problem: Callable[[Sequence[Group]], str | None]
) -> dict[str, str]:
    """Group -> its problem, in few runs where few have one: halves are tried where a whole has some."""
    why = problem(groups) if groups else None
    if why is None:
        return {}
    if len(groups) == 1:
        return {groups[0].name: why}
    middle = len(groups) // 2
    return with_problems(groups[:middle], problem) | with_problems(groups[middle:], problem)


def distance(left: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    """Largest difference relative to the largest value of ``right``."""
    scale = max((float(r.abs().max()) for r in right if r.numel()), default=0.0) or 1.0
    worst = max((float((a - b).abs().max()) for a, b in zip(left, right, strict=True)), default=0.0)
    return worst / scale


def tolerance_of(outputs: Sequence[Tensor]) -> float:
    """About 1e3 roundings: folding and removal change the order of sums, layer after layer."""
    return max((1e3 * torch.finfo(t.dtype).eps for t in outputs), default=0.0)
