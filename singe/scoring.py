"""``singe.score``: from a model and data to one number per unit."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from os import PathLike
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from singe.data import Batch, check_reiterable, device_of, input_shapes, read_batches
from singe.data_free import of_units, of_weights
from singe.decision import EarlyDecision
from singe.engine import FusedEngine
from singe.gradients import gradients_on
from singe.graph import ModelGraph, expect_model
from singe.naive import naive_scores
from singe.objectives import Loss, Objective
from singe.quadrature import Quadrature
from singe.request import Cut, Request
from singe.result import Result
from singe.score_checkpoint import ScoreCheckpoint, digest_of_model
from singe.scores import Scores, fingerprint
from singe.seeding import random_state_kept
from singe.telling import progress_bar
from singe.units import find_groups
from singe.versions import versions
from singe.weight_groups import find_weight_groups
from singe.weight_scores import WeightScores

# What to think of where every score is zero.
WITHOUT_GRADIENT = {
    "kl": "; 'kl' is flat at mu = 1, integrate over the path",
    "cross_entropy": " (a model that cannot learn, or labels that are all -100 and do not count)",
}


@overload
def score(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    objective: str | Loss | Objective = ...,
    criterion: str = ...,
    path: str = ...,
    quadrature: int | str | Quadrature = ...,
    p: int | str = ...,
    norm: str = ...,
    layers: Iterable[str | nn.Module] | None = ...,
    ignore: Iterable[str | nn.Module] = ...,
    engine: str = ...,
    max_memory: int | None = ...,
    autocast: torch.dtype | None = ...,
    compile: bool = ...,
    tolerance: float | None = ...,
    pruning_ratio: float | Cut | None = ...,
    checkpoint: str | PathLike[str] | None = ...,
    granularity: Literal["unit"] = ...,
    progress: bool = ...,
    seed: int = ...,
) -> Scores: ...


@overload
def score(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    granularity: Literal["weight"],
    objective: str | Loss | Objective = ...,
    criterion: str = ...,
    path: str = ...,
    quadrature: int | str | Quadrature = ...,
    norm: str = ...,
    layers: Iterable[str | nn.Module] | None = ...,
    ignore: Iterable[str | nn.Module] = ...,
    engine: str = ...,
    max_memory: int | None = ...,
    autocast: torch.dtype | None = ...,
    compile: bool = ...,
    checkpoint: str | PathLike[str] | None = ...,
    progress: bool = ...,
    seed: int = ...,
) -> WeightScores: ...


def score(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    objective: str | Loss | Objective = "cross_entropy",
    criterion: str = "singe",
    path: str = "layer",
    quadrature: int | str | Quadrature = 4,
    p: int | str = 1,
    norm: str = "inside",
    layers: Iterable[str | nn.Module] | None = None,
    ignore: Iterable[str | nn.Module] = (),
    engine: str = "fused",
    max_memory: int | None = None,
    autocast: torch.dtype | None = None,
    compile: bool = False,
    tolerance: float | None = None,
    pruning_ratio: float | Cut | None = None,
    checkpoint: str | PathLike[str] | None = None,
    granularity: str = "unit",
    progress: bool = True,
    seed: int = 0,
) -> Scores | WeightScores:
    """Score every prunable unit of ``model``, or every weight: higher = keep.

    The model is evaluated in evaluation mode and is never changed: all work happens on a copy that
    shares its parameters' storage.

    Args:
        model: an ``nn.Module`` whose first tensor dimension is the batch.
        batches: re-iterable: a list or DataLoader of ``(x, y)``, dicts of model arguments (with
            ``labels``), or ``x`` alone for label-free objectives. Moved to the model's device.
        objective: ``"cross_entropy"``, ``"kl"`` (label-free: divergence from the original outputs),
            or ``callable(outputs, batch)`` giving a loss per sample [B] or their mean; ``batch`` is
            what ``batches`` gave, ``(x, y)`` for instance, on the model's device.
        criterion: ``singe``, ``ig``, ``signed``, ``taylor``, ``gradient``, ``magnitude``,
            ``ablation`` or ``random``; see the README's table.
        path: which gates move together: ``"layer"`` (one group), ``"neuron"`` (one unit),
            ``"network"`` (everything: cheapest).
        quadrature: nodes on the path: an int (Gauss-Legendre), a :class:`Quadrature`, or a name.
        p: 1, 2, ``"sum"`` (absolute derivative along the gate; needs no weight gradient), or ``"fisher"``
            (root mean square over the samples of the derivative along the gate: what other samples want
            does not cancel it; with ``criterion="taylor"`` Fisher pruning, arXiv 1801.05787).
        norm: ``"inside"`` (integral of norms) or ``"outside"`` (norm of the integral).
        layers: only the groups of these layers (names or modules); default all prunable groups.
        ignore: layers that keep all their channels (names or modules, containers included).
        engine: ``"fused"``, or ``"naive"``: the definition, run literally.
        max_memory: bytes beside the model and the data; default a quarter of what is free, half of it on
            a GPU. Passes are cut to fit, batches too where not even one variant fits, down to one sample
            and one variant.
        autocast: ``torch.bfloat16`` or ``torch.float16``: convolutions and linear layers compute in
            it, sums stay float32. Float32 models and the fused engine only.
        compile: run the passes through ``torch.compile``. Every group's pass is compiled once for every
            shape of batch, which takes seconds each, and compared with the plain one on two batches:
            for large data, and the network path before all (one pass); see ``docs/scoring.md``. What
            cannot be compiled runs as it is, with a warning.
        tolerance: in [0, 1), or None: see every unit through. Else units stop being evaluated once
            ``pruning_ratio`` could not take another view of them; samples come hardest first. 0 keeps
            the whole bound on what is still to come, 0.5 half of it; see :mod:`singe.decision`.
        pruning_ratio: with ``tolerance``: the share of all units that is to go, or a callable from
            :class:`Scores` to a :class:`Plan` (or any ``{group: units}``), whose number of units counts.
        checkpoint: a file that follows the run. If it is there, the run goes on where it was killed,
            with the same result to the last bit; it is removed in the end. Batches must come in the
            same order; of a callable objective only the name is compared.
        granularity: ``"unit"``, or ``"weight"``: the norm over a unit's weights is not taken. Every weight
            of every convolution and linear layer is scored, in the user's own parameters, biases are
            not. Needs ``p=1`` and one of ``singe``, ``ig``, ``taylor``, ``gradient``, ``magnitude``,
            ``random``; a layer in no group moves as a group of its own.
        progress: show a progress bar when standard error is a terminal.
        seed: for ``criterion="random"``.

    Returns:
        :class:`Scores`, or :class:`WeightScores` for weights; float32 on the CPU.

    Raises:
        DataError: empty or one-shot data, labels missing or out of range (with the batch).
        NonFiniteError: NaN or infinity in an input or a loss (with the batch).
        ModelError: nothing to prune, an unknown layer, a model that cannot be traced.
        OptionError: an argument value that is not offered.
        CheckpointError: the checkpoint is damaged, or was made with other data, weights or options.

    The criteria follow SInGE (arXiv 2207.04089); the exact definitions are in ``docs/criteria.md``.
    """
    request = Request(
        objective=objective, criterion=criterion, path=path, quadrature=quadrature, p=p, norm=norm,
        layers=layers, ignore=ignore, engine=engine, max_memory=max_memory, autocast=autocast,
        compile=compile, tolerance=tolerance, pruning_ratio=pruning_ratio, checkpoint=checkpoint,
        granularity=granularity, progress=progress, seed=seed,
    )  # fmt: skip
    return carry_out(request, model, batches)[0]


def carry_out(
    request: Request, model: nn.Module, batches: Iterable[Any], graph: ModelGraph | None = None
) -> tuple[Scores | WeightScores, ModelGraph]:
    """What :func:`score` does, with the groups that were found on the way; ``graph`` if they are known."""
    expect_model(model)
    request.check_model(model)
    check_reiterable(batches)
    start = time.perf_counter()
    device = device_of(model)
    find = find_groups if request.granularity == "unit" else find_weight_groups
    with random_state_kept(batches), gradients_on():
        data = read_batches(batches, device)
        first = next(data)
        graph = graph or find(model, first, request.layers, request.ignore)
        found = time.perf_counter()
        result = _compute(request, model, graph, chain([first], data), _length(batches))
    end = time.perf_counter()
    definition = request.definition
    meta = {
        "model": type(model).__name__,
        "fingerprint": fingerprint(model),
        "criterion": request.criterion,
        "path": definition.path,
        "quadrature": definition.quadrature.name,
        "nodes": list(definition.quadrature.nodes),
        "weights": list(definition.quadrature.weights),
        "objective": definition.objective.name,
        "p": definition.p,
        "norm": request.norm,
        "granularity": request.granularity,
        "engine": request.engine,
        "samples": result.n_samples,
        "input_shapes": input_shapes(first),
        "seed": request.seed,
        "autocast": None if request.autocast is None else str(request.autocast),
        "compile": request.compile,
        "tolerance": request.tolerance,
        "seconds": {"groups": found - start, "sweep": end - found},
        "device": str(device),
        "rejected": graph.rejected,
        "heads": {g.name: g.heads.queries for g in graph.groups if g.heads is not None},
        "versions": versions(),
        **result.meta,
    }
    criterion, objective = definition.criterion, definition.objective
    if criterion.needs_data and not any(bool(t.any()) for t in result.scores.values()):
        warnings.warn(
            f"every score is zero: objective {objective.name!r} has no gradient where "
            f"criterion {criterion.name!r} looks" + WITHOUT_GRADIENT.get(objective.name, ""),
            stacklevel=3,
        )
    if request.granularity == "weight":
        return WeightScores(result.scores, meta, result.stderr), graph
    layers_of = {g.name: g.layers for g in graph.groups}
    units = {g.name: g.units for g in graph.groups}
    scores = Scores(result.scores, layers_of, meta, result.stderr, result.completeness, units)
    return scores, graph


def _compute(
    request: Request, model: nn.Module, graph: ModelGraph, data: Iterator[Batch], count: int | None
) -> Result:
    definition = request.definition
    if not definition.criterion.needs_data:
        if request.granularity == "weight":
            return of_weights(model, graph, definition.criterion, request.seed)
        return of_units(model, graph, definition.criterion, definition.p, request.seed)
    if request.engine == "naive":
        return naive_scores(model, graph, data, definition)
    fused = FusedEngine(
        model, graph, definition, request.max_memory, request.autocast, count,
        _decision(request, model, graph), _saved(request, model, graph, count), request.compile,
    )  # fmt: skip
    looks = count if request.tolerance is None else None
    total = None if looks is None else looks * fused.variants_per_batch()
    what = f"{definition.criterion.name}, {definition.path} path"
    with progress_bar(what, total, request.progress) as advance:
        return fused.run(data, advance)


def _decision(request: Request, model: nn.Module, graph: ModelGraph) -> EarlyDecision | None:
    if request.tolerance is None:
        return None
    ratio = request.pruning_ratio
    assert ratio is not None

    def removed(totals: Mapping[str, Tensor]) -> int:
        """How many units are to go, given the totals so far."""
        if not callable(ratio):
            return round(ratio * sum(map(len, totals.values())))
        layers = {g.name: g.layers for g in graph.groups}
        chosen = ratio(Scores(totals, layers, {"fingerprint": fingerprint(model)}))
        return sum(len(units) for units in chosen.values())

    return EarlyDecision(float(request.tolerance), removed)


def _saved(
    request: Request, model: nn.Module, graph: ModelGraph, count: int | None
) -> ScoreCheckpoint | None:
    if request.checkpoint is None:
        return None
    definition, ratio = request.definition, request.pruning_ratio
    signature = {
        "model": digest_of_model(model),
        "groups": [g.name for g in graph.groups],
        "criterion": request.criterion,
        "objective": definition.objective.name,
        "path": definition.path,
        "quadrature": [list(definition.quadrature.nodes), list(definition.quadrature.weights)],
        "p": definition.p,
        "norm": request.norm,
        "granularity": request.granularity,
        "max_memory": request.max_memory,
        "autocast": str(request.autocast),
        "tolerance": request.tolerance,
        "pruning_ratio": getattr(ratio, "__qualname__", ratio),
        "batches": count,
        "device": str(device_of(model)),
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }
    return ScoreCheckpoint(request.checkpoint, signature)


def _length(batches: Iterable[Any]) -> int | None:
    try:
        return len(batches)  # type: ignore[arg-type]
    except TypeError:  # no length, or a DataLoader over a dataset without one
        return None
