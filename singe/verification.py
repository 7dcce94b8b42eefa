"""Groups proven on the model: gating a unit off equals removing it physically."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from singe.coupling import readers_in_training
from singe.data import Batch
from singe.errors import ModelError, NonFiniteError, first_line
from singe.graph import NORMS, ROWS, Group, ModelGraph, private_copy
from singe.memory import is_out_of_memory
from singe.network import Network, set_gates
from singe.removal import remove_units
from singe.seeding import random_state_kept

NOTHING = 1e-2  # beside the largest output; 1e-3 takes what float32 rounds there for a fault
MASKED = -5e3  # and lower: what classes that cannot be are given (-1e4, -1e9, the lowest there is)
MOST = 0.05  # that outputs in half precision may differ by; right couplings came to 0.01 at most
SMALL = 10  # units of a group; of fewer, those that are left may all have the neighbours they had
READ = "a layer that runs in training mode only reads it"
UNUSED = "it does not run for the first samples"


@torch.no_grad()
def verified(model: nn.Module, batch: Batch, graph: ModelGraph) -> ModelGraph:
    """Keep the groups in which gating units off equals removing them physically.

    A few units of every group at once; where that fails, of one half of the groups and of the other.
    Layers that run in training mode only (auxiliary heads) must still run after the removal.
    """
    network = Network(model, graph.groups, graph.folds)
    network.clear()
    base, overwritten = _run_once(network, batch)
    attention = {g.heads.module for g in graph.groups if g.heads}
    original, idle = _watched(private_copy(model), batch, attention)
    if not all(bool(torch.isfinite(t).all()) for t in original):
        raise NonFiniteError(
            f"{type(model).__name__} gives NaN or infinite outputs for the first batch in evaluation "
            "mode; check its parameters and running statistics"
        )
    if not distance(base, original) <= tolerance_of(original, model):
        raise ModelError(
            f"the folded copy of {type(model).__name__} differs from the model by "
            f"{distance(base, original):.2e} (relative); is its evaluation mode deterministic?"
        )
    idle = _without_a_part(private_copy(model), batch, idle) if idle else idle
    unused = {g.name: UNUSED for g in graph.groups if g.heads and g.heads.module in idle}
    trains, in_training = False, set[str]()  # the layers that run in training mode only
    if idle:
        try:
            in_training = idle - _watched(private_copy(model).train(), batch, attention)[1]
            idle -= in_training
            trains = True
        except Exception as error:  # losses inside, targets it wants, a single value per channel
            if is_out_of_memory(error):
                raise
    if idle:
        warnings.warn(
            f"{', '.join(sorted(idle)[:5])}{', ...' if len(idle) > 5 else ''}: these layers do not run for "
            "the first samples, so it is not known whose channels they read. If other data or arguments run "
            "them, put the layers before them in `ignore`",
            stacklevel=2,
        )

    def problem(
        groups: Sequence[Group], choose: Callable[[Group], list[int]] = _a_few
    ) -> str | None:
        units = [(g, choose(g)) for g in groups]
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
            return f"removing some of its units fails ({type(error).__name__}: {error})"
        if [t.shape for t in removed] != [t.shape for t in base]:
            return "removing some of its units changes the shape of the model's output"
        off = distance(gated, removed)
        if not off <= tolerance_of(base, model):
            return f"gating some of its units and removing them differ by {off:.1e} (relative)"
        trouble = _trouble_in_training(small_model, batch) if trains else None
        if trouble is not None:
            return f"{READ} ({trouble})"
        return None

    readers = _readers_in_training(model, batch, graph, in_training) if in_training else {}
    reasons = unused | {name: f"{READ} ({layer})" for name, layer in readers.items()}
    left = [g for g in graph.groups if g.name not in reasons]
    # Heads on their own: without a trace they are cheap.
    reasons |= with_problems([g for g in left if g.heads], problem)
    plain = [g for g in left if not g.suspicious and not g.heads]
    reasons |= with_problems(plain, problem)
    for suspicious in (g for g in left if g.suspicious):
        reasons |= with_problems([suspicious], problem)
    small = [g for g in left if not g.heads and 2 < g.n_units < SMALL and g.name not in reasons]
    reasons |= with_problems(small, partial(problem, choose=lambda group: [1]))
    failed = {layer: g.name for g in graph.groups if g.name in reasons for layer in g.layers}
    return replace(
        graph,
        groups=tuple(g for g in graph.groups if g.name not in reasons),
        rejected={**graph.rejected, **reasons},
        rejected_layers={**graph.rejected_layers, **failed},
        overwritten=overwritten,
    )


def _run_once(network: Network, batch: Batch) -> tuple[list[Tensor], frozenset[str]]:
    """Outputs, and the layers whose input is not what they read any more when the pass is over."""
    read: list[tuple[str, Tensor, int]] = []

    def note(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs.get("input")
        if isinstance(x, Tensor) and not x.is_inference():  # those have no versions
            read.append((name, x, x._version))

    hooks = [
        module.register_forward_pre_hook(
            lambda _, args, kwargs, name=name: note(name, args, kwargs), with_kwargs=True
        )
        for name, module in network.module.named_modules() if isinstance(module, ROWS)
    ]  # fmt: skip
    outputs = float_outputs(network(batch))
    for hook in hooks:
        hook.remove()
    return outputs, frozenset(name for name, x, version in read if x._version != version)


def _readers_in_training(
    model: nn.Module, batch: Batch, graph: ModelGraph, layers: set[str]
) -> dict[str, str]:
    """What one trace tells; whatever it cannot tell is found by trying: GoogLeNet, 1 try in place of 39."""
    groups = [g for g in graph.groups if not g.heads]
    try:
        with random_state_kept():
            return readers_in_training(model, batch, groups, layers)
    except Exception as error:  # of the trace or of Torch-Pruning, whose errors have no common type
        if is_out_of_memory(error):
            raise
        return {}


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


def _a_few(group: Group) -> list[int]:
    """Units that stand where no flip leaves all of them, and five where there are so many.

    A shuffle, which cuts the channels into 2, 3 or 4 parts, then fails by its shape, whatever the numbers
    show: in an untrained or a scaled-down branch it moves the output by less than rounding does.
    """
    n = group.n_units
    if n <= 2:
        return [n // 2]
    spread = dict.fromkeys([0, n // 2, n // 3, n // 5, n // 7, *range(n)])
    return sorted(list(spread)[: 5 if n > 5 else 3 if n > 3 else 2])


def _watched(
    model: nn.Module, batch: Batch, others: Collection[str]
) -> tuple[list[Tensor], set[str]]:
    """Outputs of a private copy in its mode, and the layers and ``others`` that were not called for them."""
    layers = {
        n: m for n, m in model.named_modules() if isinstance(m, (*ROWS, *NORMS)) or n in others
    }
    idle = set(layers)
    for name, layer in layers.items():
        layer.register_forward_pre_hook(lambda *_, name=name: idle.discard(name))
    with random_state_kept():
        return float_outputs(batch.call(model)), idle


def _without_a_part(model: nn.Module, batch: Batch, layers: set[str]) -> set[str]:
    """Those of the layers that the outputs do not depend on; F.linear(x, layer.weight) calls no layer."""
    firsts = {n: next(model.get_submodule(n).parameters(), None) for n in layers}
    named = {name: parameter for name, parameter in firsts.items() if parameter is not None}
    with torch.enable_grad():
        for parameter in named.values():
            parameter.requires_grad_()
        outputs = [t.sum() for t in float_outputs(batch.call(model)) if t.requires_grad]
        if not outputs:
            return set(named)
        grads = torch.autograd.grad(outputs, list(named.values()), allow_unused=True)
    return {name for name, grad in zip(named, grads, strict=True) if grad is None}


def _trouble_in_training(model: nn.Module, batch: Batch) -> str | None:
    """What a private copy raises in training mode, if it does."""
    with random_state_kept():
        try:
            batch.call(model.train())
        except Exception as error:
            if is_out_of_memory(error):
                raise
            return first_line(error)
    return None


def float_outputs(outputs: Any) -> list[Tensor]:
    """All floating-point tensors in a model's output, as far as torch looks into it; complex as pairs."""
    tensors = [t for t in tree_leaves(outputs) if isinstance(t, Tensor)]
    real = [torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in tensors]
    return [t for t in real if t.is_floating_point()]


def distance(left: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    """Largest difference relative to the largest value of its tensor in ``right``.

    One of next to nothing beside the others counts as a hundredth of theirs: what is a small difference of
    large values (a penalty, a divergence) is rounded as those are. Masked logits, far below the others, count
    by themselves; a large positive constant among small values still hides what becomes of these.
    """
    masks = [(r <= MASKED) & (r > MASKED).any() for r in right]
    scales = [
        float(r[~m].abs().max()) if r.numel() else 0.0 for r, m in zip(right, masks, strict=True)
    ]
    least = NOTHING * max(scales, default=0.0) or 1.0
    off = []
    for a, b, mask, scale in zip(left, right, masks, scales, strict=True):
        if b.numel():
            size: Any = max(scale, least)
            if mask.any():
                size = b.abs().double().where(mask, size)
            off.append(((a.double() - b.double()).abs() / size).max().cpu())
    return float(torch.stack(off).max()) if off else 0.0  # unlike Python's, this max keeps NaN


def tolerance_of(outputs: Sequence[Tensor], model: nn.Module) -> float:
    """About 1e3 roundings: folding and removal change the order of sums, layer after layer.

    Of the coarsest type among outputs and parameters. Half-precision outputs have a few percent in all: 1e3
    of their roundings would let anything pass.
    """
    kinds = {t.dtype for t in (*outputs, *model.parameters()) if t.is_floating_point()}
    return min(MOST, max((1e3 * torch.finfo(kind).eps for kind in kinds), default=0.0))
