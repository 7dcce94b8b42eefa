"""A scoring run as it was asked for: the arguments of :func:`singe.score`, checked."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from os import PathLike
from typing import Any

import torch
from torch import nn

from singe.criteria import (
    GRANULARITIES,
    NORMS,
    OF_WEIGHTS,
    PATHS,
    POWERS,
    Criterion,
    as_criterion,
    choose,
    takes,
)
from singe.definition import Definition
from singe.errors import OptionError, expect
from singe.objectives import KL, CrossEntropy, Loss, Objective, as_objective
from singe.plain import POSITIVE, plain_count, plain_number
from singe.precision import OFFERED as LOWER
from singe.quadrature import Quadrature, as_quadrature
from singe.scores import Scores

Cut = Callable[[Scores], Mapping[str, Sequence[int]]]
ENDPOINT = Quadrature("endpoint", (1.0,), (1.0,))


@dataclass(frozen=True)
class Request:
    """See :func:`singe.score` for the meaning of each.

    Raises:
        OptionError: an argument value that is not offered, or two that contradict.
    """

    objective: str | Loss | Objective = "cross_entropy"
    criterion: str = "singe"
    path: str = "layer"
    quadrature: int | str | Quadrature = 4
    p: int | str = 1
    norm: str = "inside"
    layers: Iterable[str | nn.Module] | None = None
    ignore: Iterable[str | nn.Module] = ()
    engine: str = "fused"
    max_memory: int | None = None
    autocast: torch.dtype | None = None
    compile: bool = False
    tolerance: float | None = None
    pruning_ratio: float | Cut | None = None
    checkpoint: str | PathLike[str] | None = None
    granularity: str = "unit"
    progress: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("layers", "ignore"):  # an iterator would be used up by its first reader
            value = getattr(self, name)
            if value is not None and not isinstance(value, str | nn.Module):
                expect(name, value, Iterable, "names or modules of layers")
                object.__setattr__(self, name, tuple(value))
        as_criterion(self.criterion)
        choose("path", self.path, PATHS)
        choose("norm", self.norm, NORMS)
        choose("p", self.p, POWERS)
        choose("engine", self.engine, ("fused", "naive"))
        choose("autocast", self.autocast, (None, *LOWER))
        choose("granularity", self.granularity, GRANULARITIES)
        if self.engine == "naive":
            self._check_naive()
        if self.compile and self.checkpoint is not None:
            raise OptionError(
                "checkpoint promises the same bits, and compile=True cannot keep that: its first passes "
                "run plainly, and after a kill these are others; choose one of them"
            )
        object.__setattr__(self, "seed", plain_count("seed", self.seed))
        if self.max_memory is not None:
            memory = plain_number("max_memory", self.max_memory, POSITIVE, "bytes")
            object.__setattr__(self, "max_memory", math.ceil(memory))
        definition = self.definition
        if self.granularity == "weight":
            self._check_weights(definition.criterion)
        self._check_decision(definition.path, definition.criterion)
        self._check_fisher(definition)

    @cached_property
    def definition(self) -> Definition:
        """What decides the value of a score."""
        criterion = as_criterion(self.criterion)
        # At mu = 1 every path passes through the same point: one sweep serves all units.
        path = "network" if criterion.endpoint else self.path
        return Definition(
            objective=as_objective(self.objective),
            criterion=criterion,
            path="neuron" if criterion.name == "ablation" else path,
            quadrature=ENDPOINT if criterion.endpoint else as_quadrature(self.quadrature),
            p=self.p if isinstance(self.p, str) else int(self.p),  # 2.0 is as good as 2
            norm=self.norm,
            granularity=self.granularity,
        )

    def check_model(self, model: nn.Module) -> None:
        """Raise OptionError where the model does not allow what was asked for."""
        if self.autocast is not None:
            check_float32(model, "autocast")

    def _check_naive(self) -> None:
        if self.autocast is not None:
            raise OptionError("autocast belongs to engine='fused'; the definition runs as it is")
        if self.tolerance is not None or self.checkpoint is not None or self.compile:
            raise OptionError("tolerance, checkpoint and compile belong to engine='fused'")

    def _check_weights(self, criterion: Criterion) -> None:
        if criterion.name not in OF_WEIGHTS:
            raise OptionError(
                f"criterion={criterion.name!r} is about whole units; granularity='weight' has "
                f"{', '.join(OF_WEIGHTS)}"
            )
        if self.p != 1:
            raise OptionError(f"p={self.p!r} has no meaning for a single weight; leave it at 1")
        if self.tolerance is not None:
            raise OptionError(
                "tolerance settles which units are lowest; with granularity='weight' leave it at None"
            )

    def _check_fisher(self, definition: Definition) -> None:
        if not takes(definition.criterion, self.p):
            raise OptionError(
                f"p='fisher' is about derivatives along gates, which criterion={self.criterion!r} does "
                "not take; use 'singe' or 'taylor'"
            )
        if not definition.each_sample:
            return
        if self.norm == "outside":
            raise OptionError(
                "p='fisher' squares the derivative of every sample at every node: norm='inside'"
            )
        if self.tolerance is not None:
            raise OptionError(
                "tolerance bounds what samples still to come can add to a sum, and p='fisher' is the "
                "root of one; leave it at None"
            )

    def _check_decision(self, path: str, criterion: Criterion) -> None:
        tolerance, ratio = self.tolerance, self.pruning_ratio
        if tolerance is None and ratio is None:
            return
        if tolerance is None or ratio is None:
            raise OptionError("tolerance and pruning_ratio belong together: give both or neither")
        object.__setattr__(self, "tolerance", plain_number("tolerance", tolerance, "[0, 1)"))
        if not callable(ratio):
            object.__setattr__(
                self, "pruning_ratio", plain_number("pruning_ratio", ratio, "(0, 1)")
            )
        if path == "network" or criterion.endpoint or not criterion.needs_data:
            raise OptionError(
                f"tolerance saves nothing with criterion={criterion.name!r}, path={path!r}: all units "
                "come from the same passes; use path='neuron' or 'layer'"
            )


def power_for_pruning(options: Mapping[str, Any]) -> int | str:
    """The ``p`` for scores that a network is pruned by, where these options of a request leave it open.

    ``"fisher"`` on the layer path: ResNet-56 with 2.57 times fewer MACs and no training keeps 74.1 % with
    it and 68.4 % with p=1, and after training they are level within the noise (docs/cifar10.md). Not where
    it cannot be had: with ``norm="outside"``, with a ``tolerance``, and of a user's objective, which may give
    a mean.
    """
    usual = {"criterion": "singe", "path": "layer", "norm": "inside", "tolerance": None}
    known = isinstance(as_objective(options.get("objective", "cross_entropy")), CrossEntropy | KL)
    return "fisher" if known and all(options.get(k, v) == v for k, v in usual.items()) else 1


def check_float32(model: nn.Module, argument: str) -> None:
    """Raise OptionError where an argument is for models in float32 and this one is in something else."""
    other = {p.dtype for p in model.parameters() if p.is_floating_point()} - {torch.float32}
    if other:
        raise OptionError(
            f"{argument} needs a float32 model, this one has {sorted(map(str, other))}"
        )
