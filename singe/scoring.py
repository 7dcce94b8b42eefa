"""``singe.score``: from a model and data to one number per unit."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from os import PathLike
from typing import Any, Literal, overload

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from singe.criteria import (
    GRANULARITIES,
    NORMS,
    OF_WEIGHTS,
    PATHS,
    POWERS,
    Criterion,
    as_criterion,
    choose,
)
from singe.data import check_reiterable, device_of, first_batch, read_batches
from singe.data_free import of_units, of_weights
from singe.decision import EarlyDecision
from singe.definition import Definition
from singe.engine import FusedEngine
from singe.errors import OptionError
from singe.graph import ModelGraph
from singe.naive import naive_scores
from singe.objectives import Loss, Objective, as_objective
from singe.precision import OFFERED as LOWER
from singe.quadrature import Quadrature, as_quadrature
from singe.result import Result
from singe.score_checkpoint import ScoreCheckpoint, digest_of_model
from singe.scores import Scores, fingerprint
from singe.units import find_groups
from singe.weight_groups import find_weight_groups
from singe.weight_scores import WeightScores

Cut = Callable[["Scores"], Mapping[str, Sequence[int]]]
ENDPOINT = Quadrature("endpoint", (1.0,), (1.0,))


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
            or ``callable(outputs, batch)`` giving a loss per sample [B] or their mean.
        criterion: ``singe``, ``ig``, ``signed``, ``taylor``, ``gradient``, ``magnitude``,
            ``ablation`` or ``random``; see the README's table.
        path: which gates move together: ``"layer"`` (one group), ``"neuron"`` (one unit),
            ``"network"`` (everything: cheapest).
        quadrature: nodes on the path: an int (Gauss-Legendre), a :class:`Quadrature`, or a name.
        p: 1, 2 or ``"sum"`` (absolute derivative along the gate; needs no weight gradient).
        norm: ``"inside"`` (integral of norms) or ``"outside"`` (norm of the integral).
        layers: only the groups of these layers (names or modules); default all prunable groups.
        ignore: layers that keep all their channels (names or modules, containers included).
        engine: ``"fused"``, or ``"naive"``: the definition, run literally.
        max_memory: bytes beside the model and the data; default a quarter of what is free. Passes are
            cut to fit, batches too where not even one variant fits.
        autocast: ``torch.bfloat16`` or ``torch.float16``: convolutions and linear layers compute in
            it, sums stay float32. Float32 models and the fused engine only.
        compile: run the passes through ``torch.compile``. Every group's pass is compiled once for every
            shape of batch, which takes seconds each: for large data, and the network path before all
            (one pass); see ``docs/scoring.md``. What cannot be compiled runs as it is, with a warning.
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
    chosen = as_criterion(criterion)
    choose("path", path, PATHS)
    choose("norm", norm, NORMS)
    choose("p", p, POWERS)
    p = "sum" if p == "sum" else int(p)  # 2.0 is as good as 2
    choose("engine", engine, ("fused", "naive"))
    _check_autocast(autocast, model, engine)
    if engine == "naive" and (tolerance is not None or checkpoint is not None or compile):
        raise OptionError("tolerance, checkpoint and compile belong to engine='fused'")
    if compile and checkpoint is not None:
        raise OptionError(
            "checkpoint promises the same bits, and compile=True cannot keep that: its first passes run "
            "plainly, and after a kill these are others; choose one of them"
        )
    if max_memory is not None and max_memory <= 0:
        raise OptionError(f"max_memory must be a positive number of bytes, got {max_memory!r}")
    rule = ENDPOINT if chosen.endpoint else as_quadrature(quadrature)
    target = as_objective(objective)
    check_reiterable(batches)
    # At mu = 1 every path passes through the same point: one sweep serves all units.
    path = "network" if chosen.endpoint else "neuron" if criterion == "ablation" else path
    choose("granularity", granularity, GRANULARITIES)
    if granularity == "weight":
        _check_weights(chosen, p, tolerance)
    _check_decision(tolerance, pruning_ratio, path, chosen)
    find = find_groups if granularity == "unit" else find_weight_groups

    start = time.perf_counter()
    device = device_of(model)
    # The caller may be in no_grad or inference mode; what is computed here needs gradients.
    with _random_state_kept(device), torch.inference_mode(False), torch.enable_grad():
        graph = find(model, first_batch(batches, device), layers, ignore)
        found = time.perf_counter()
        if not chosen.needs_data:
            if granularity == "unit":
                result = of_units(model, graph, chosen, p, seed)
            else:
                result = of_weights(model, graph, chosen, seed)
        else:
            definition = Definition(target, chosen, path, rule, p, norm, granularity)
            decision = None
            if tolerance is not None:
                assert pruning_ratio is not None
                cut = _number_removed(model, graph, pruning_ratio)
                decision = EarlyDecision(float(tolerance), cut)
            saved = None
            if checkpoint is not None:
                signature = {
                    "model": digest_of_model(model),
                    "groups": [g.name for g in graph.groups],
                    "criterion": criterion,
                    "objective": target.name,
                    "path": path,
                    "quadrature": [list(rule.nodes), list(rule.weights)],
                    "p": p,
                    "norm": norm,
                    "granularity": granularity,
                    "max_memory": max_memory,
                    "autocast": str(autocast),
                    "tolerance": tolerance,
                    "pruning_ratio": getattr(pruning_ratio, "__qualname__", pruning_ratio),
                    "batches": _length(batches),
                    "device": str(device),
                    "threads": torch.get_num_threads(),
                    "versions": _versions(),
                }
                saved = ScoreCheckpoint(checkpoint, signature)
            options = (max_memory, autocast, decision, saved, compile)
            result = _sweep(model, graph, batches, definition, engine, options, progress)
    end = time.perf_counter()
    meta = {
        "model": type(model).__name__,
        "fingerprint": fingerprint(model),
        "criterion": criterion,
        "path": path,
        "quadrature": rule.name,
        "nodes": list(rule.nodes),
        "weights": list(rule.weights),
        "objective": target.name,
        "p": p,
        "norm": norm,
        "granularity": granularity,
        "engine": engine,
        "samples": result.n_samples,
        "seed": seed,
        "autocast": None if autocast is None else str(autocast),
        "compile": compile,
        "tolerance": tolerance,
        "seconds": {"groups": found - start, "sweep": end - found},
        "device": str(device),
        "rejected": graph.rejected,
        "heads": {g.name: g.heads.queries for g in graph.groups if g.heads is not None},
        "versions": _versions(),
        **result.meta,
    }
    if chosen.needs_data and not any(bool(t.any()) for t in result.scores.values()):
        warnings.warn(
            f"every score is zero: objective {target.name!r} has no gradient where "
            f"criterion {criterion!r} looks"
            + ("; 'kl' is flat at mu = 1, integrate over the path" if target.name == "kl" else ""),
            stacklevel=2,
        )
    if granularity == "weight":
        return WeightScores(result.scores, meta, result.stderr)
    layers_of = {g.name: g.layers for g in graph.groups}
    units = {g.name: g.units for g in graph.groups}
    return Scores(result.scores, layers_of, meta, result.stderr, result.completeness, units)


def _sweep(
    model: nn.Module,
    graph: ModelGraph,
    batches: Iterable[Any],
    definition: Definition,
    engine: str,
    options: tuple[
        int | None, torch.dtype | None, EarlyDecision | None, ScoreCheckpoint | None, bool
    ],
    progress: bool,
) -> Result:
    data = read_batches(batches, device_of(model))
    if engine == "naive":
        return naive_scores(model, graph, data, definition)
    count = _length(batches)
    max_memory, autocast, decision, checkpoint, compile = options
    fused = FusedEngine(
        model, graph, definition, max_memory, autocast, count, decision, checkpoint, compile
    )
    looks = count if decision is None else None
    total = None if looks is None else looks * fused.variants_per_batch()
    what = f"{definition.criterion.name}, {definition.path} path"
    with _progress(what, total, progress) as advance:
        fused.on_pass = advance
        return fused.run(data)


def _length(batches: Iterable[Any]) -> int | None:
    try:
        return len(batches)  # type: ignore[arg-type]
    except TypeError:  # no length, or a DataLoader over a dataset without one
        return None


def _number_removed(
    model: nn.Module, graph: ModelGraph, pruning_ratio: float | Cut
) -> Callable[[Mapping[str, Tensor]], int]:
    """How many units are to go, given the totals so far."""

    def count(totals: Mapping[str, Tensor]) -> int:
        if not callable(pruning_ratio):
            return round(pruning_ratio * sum(map(len, totals.values())))
        layers = {g.name: g.layers for g in graph.groups}
        chosen = pruning_ratio(Scores(totals, layers, {"fingerprint": fingerprint(model)}))
        return sum(len(units) for units in chosen.values())

    return count


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_decision(
    tolerance: float | None, pruning_ratio: float | Cut | None, path: str, criterion: Criterion
) -> None:
    if tolerance is None and pruning_ratio is None:
        return
    if tolerance is None or pruning_ratio is None:
        raise OptionError("tolerance and pruning_ratio belong together: give both or neither")
    if not _is_number(tolerance) or not 0 <= tolerance < 1:
        raise OptionError(f"tolerance must lie in [0, 1), got {tolerance!r}")
    if not callable(pruning_ratio) and not (_is_number(pruning_ratio) and 0 < pruning_ratio < 1):
        raise OptionError(f"pruning_ratio must lie between 0 and 1, got {pruning_ratio!r}")
    if path == "network" or criterion.endpoint or not criterion.needs_data:
        raise OptionError(
            f"tolerance saves nothing with criterion={criterion.name!r}, path={path!r}: all units "
            "come from the same passes; use path='neuron' or 'layer'"
        )


def _check_weights(criterion: Criterion, p: int | str, tolerance: float | None) -> None:
    if criterion.name not in OF_WEIGHTS:
        raise OptionError(
            f"criterion={criterion.name!r} is about whole units; granularity='weight' has "
            f"{', '.join(OF_WEIGHTS)}"
        )
    if p != 1:
        raise OptionError(f"p={p!r} has no meaning for a single weight; leave it at 1")
    if tolerance is not None:
        raise OptionError(
            "tolerance settles which units are lowest; with granularity='weight' leave it at None"
        )


def _check_autocast(autocast: torch.dtype | None, model: nn.Module, engine: str) -> None:
    if autocast is None:
        return
    choose("autocast", autocast, (None, *LOWER))
    if engine == "naive":
        raise OptionError("autocast belongs to engine='fused'; the definition runs as it is")
    other = {p.dtype for p in model.parameters() if p.is_floating_point()} - {torch.float32}
    if other:
        raise OptionError(f"autocast needs a float32 model, this one has {sorted(map(str, other))}")


@contextmanager
def _random_state_kept(device: torch.device) -> Iterator[None]:
    """A shuffling DataLoader draws from the global generator: give that back as it was."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        yield


@contextmanager
def _progress(title: str, total: int | None, wanted: bool) -> Iterator[Callable[[float], None]]:
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True,
                  disable=not (wanted and console.is_terminal)) as bar:  # fmt: skip
        task = bar.add_task(title, total=total)
        yield lambda count: bar.advance(task, count)


def _versions() -> dict[str, str]:
    from singe import __version__

    return {"singe": __version__, "torch": torch.__version__}
