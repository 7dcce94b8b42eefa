"""The units of a model: groups of removable channels, checked by removing some."""

from __future__ import annotations

import difflib
import threading
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils._pytree import tree_leaves, tree_map

from singe.coupling import read_graph
from singe.data import Batch, first_samples
from singe.errors import ModelError
from singe.graph import ModelGraph, is_inside, private_copy, unwrapped
from singe.memory import is_out_of_memory
from singe.modes import eager
from singe.network import Network, set_gates
from singe.seeding import random_state_kept
from singe.tf32 import full_float32
from singe.verification import distance, float_outputs, tolerance_of, verified

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

    def chosen(graph: ModelGraph) -> ModelGraph:
        return graph if wanted is None else _select(graph, names, wanted)

    graph = checked_groups(model, batch, ignored, chosen)
    chosen(graph)  # names the reason if a wanted group failed its check
    if not graph.groups:
        reasons = "; ".join(f"{name}: {why}" for name, why in list(graph.rejected.items())[:5])
        raise ModelError(
            f"{type(model).__name__} has nothing to prune ({reasons or 'no conv or linear layer'})"
        )
    return graph


def groups_again(
    model: nn.Module,
    batch: Batch,
    wanted: Mapping[str, tuple[tuple[str, ...], int]],
    ignore: Iterable[str | nn.Module] = (),
) -> ModelGraph:
    """Of the groups that :func:`find_groups` found once, those that still pass their check.

    Args:
        wanted: name -> its layers and the number of units it has by now; what runs through other layers
            since is another group.
    """
    model = unwrapped(model)
    names = dict(model.named_modules())
    ignored = frozenset(inside(names, names_of(names, ignore, "ignore")))
    return checked_groups(
        model, batch, ignored,
        lambda graph: replace(
            graph,
            groups=tuple(g for g in graph.groups if wanted.get(g.name) == (g.layers, g.n_units)),
        ),
    )  # fmt: skip


@full_float32()
@eager()
def checked_groups(
    model: nn.Module,
    batch: Batch,
    ignored: frozenset[str],
    chosen: Callable[[ModelGraph], ModelGraph] = lambda graph: graph,
) -> ModelGraph:
    """:func:`find_groups` by names of an unwrapped model; there may be no groups at all.

    Args:
        chosen: leaves out of a graph what need not be checked.
    """
    batch = small(batch)
    _require_own_layers(model, batch)
    model, batch = full_precision(model, _telling(batch))
    graph = read_graph(model, batch, ignored)
    if graph.folds and not _folds_well(model, batch, graph):
        graph = read_graph(model, batch, ignored, fold=False)
    return verified(model, batch, chosen(_with_input_gates(model, batch, graph)))


def _require_own_layers(model: nn.Module, batch: Batch) -> None:
    """Refuse a model whose copies run the model's own layers: they would read and write its buffers.

    A layer without any, a ReLU, does no harm; a dropout does, in the model's own mode.

    Raises:
        ModelError: which; copy.deepcopy hands functions on as they are, with what they hold.
    """
    twin, thread = private_copy(model), threading.get_ident()
    own = {
        module: name
        for name, module in model.named_modules()
        if module is model
        or isinstance(module, _DropoutNd)
        or any(True for _ in chain(module.parameters(), module.buffers()))
    }

    def refuse(module: nn.Module, _: Any) -> None:
        if module not in own or threading.get_ident() != thread:
            return
        held = f"the layer {own[module]!r}" if own[module] else "the model itself"
        raise ModelError(
            f"a copy of this {type(model).__name__} runs {held}: a function that was made with it (a lambda "
            "in __init__, a wrapped forward) holds it, and copies share functions; make that a method"
        )

    hook = register_module_forward_pre_hook(refuse)  # one in the layers would be copied with them
    try:
        with random_state_kept(), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # compiled parts advise against such hooks
            batch.call(twin)
    except ModelError:
        raise
    except Exception as error:  # the trace says it better
        if is_out_of_memory(error):
            raise
    finally:
        hook.remove()


def names_of(
    names: dict[str, nn.Module], layers: Iterable[str | nn.Module], argument: str
) -> list[str]:
    if isinstance(layers, str | nn.Module):
        layers = [layers]
    if not isinstance(layers, Iterable):
        raise ModelError(f"`{argument}` must hold names or modules, got {layers!r}")
    by_module = {module: name for name, module in names.items()}
    resolved = []
    for layer in layers:
        if isinstance(layer, nn.Module):
            if layer not in by_module:
                raise ModelError(f"`{argument}` holds a {type(layer).__name__} not in this model")
            resolved.append(by_module[layer])
        elif isinstance(layer, str) and layer in names:
            resolved.append(layer)
        else:
            near = difflib.get_close_matches(str(layer), names, n=3, cutoff=0.4)
            known = [name for name in names if name][:8]
            hint = f"did you mean {_listed(near)}?" if near else f"it has {_listed(known)}, ..."
            raise ModelError(
                f"`{argument}` names {layer!r}, which this model does not have; {hint}"
            )
    return resolved


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))


def inside(names: dict[str, nn.Module], roots: Sequence[str]) -> set[str]:
    """The named modules and everything inside them."""
    return {n for n in names for root in roots if is_inside(n, root)}


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


def _telling(batch: Batch) -> Batch:
    """Random numbers in [0, 1) where all inputs are zeros: there a wrong removal shows nowhere."""
    tensors = [t for t in tree_leaves((batch.args, batch.kwargs)) if isinstance(t, Tensor)]
    if any(not t.is_floating_point() or bool(t.any()) for t in tensors):
        return batch
    random = torch.Generator().manual_seed(0)

    def fill(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        numbers = torch.rand(value.shape, generator=random, device="cpu")
        return numbers.to(value.device, value.dtype)

    return replace(batch, args=tree_map(fill, batch.args), kwargs=tree_map(fill, batch.kwargs))


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
    except Exception as error:  # a model that reads a layer's weight or bias itself, say
        if is_out_of_memory(error):
            raise
        return False
    original = float_outputs(batch.call(private_copy(model)))
    return distance(folded, original) <= tolerance_of(original, model)


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
