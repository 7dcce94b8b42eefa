"""fasterai: scores instead of one of its criteria.

    pruner = Pruner(model, 0.5, "global", criteria=fasterai.criterion, ...)
    fasterai.use(pruner, scores)
    pruner.prune_model()

fasterai's own criteria see one weight at a time, without its place in the group, skip depthwise layers
and take the mean over a group's members; a group's score cannot pass through that. ``use`` puts the
scores where fasterai hands groups to Torch-Pruning, which it is built on.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from singe.adapters.torch_pruning import Importance, importance
from singe.errors import OptionError
from singe.scores import Scores


def criterion(module: nn.Module, granularity: str, squeeze: bool = True) -> Tensor:
    """Stands in for fasterai's ``criteria`` until :func:`use` replaces the group's importance.

    Raises:
        OptionError: when it is called after all: ``use`` was forgotten.
    """
    raise OptionError(
        "fasterai asked for scores before singe.adapters.fasterai.use(pruner, scores) was called"
    )


def use(pruner: Any, scores: Scores, **options: Any) -> Importance:
    """Let a fasterai ``Pruner`` rank by ``scores``.

    Args:
        pruner: ``fasterai.prune.all.Pruner``; its own ratio, schedule and context stay.
        scores: of the very model it prunes.
        options: as for :func:`singe.adapters.torch_pruning.importance`; ``rescore`` for schedules of
            several steps. No ``max_pruning_ratio``: fasterai's own steps could not hold it.

    Returns:
        What the pruner now asks.

    Raises:
        OptionError: the object is no such pruner, or a ``max_pruning_ratio``.
    """
    inner = getattr(pruner, "pruner", None)
    if inner is None or not hasattr(inner, "importance"):
        raise OptionError(f"use() takes a fasterai Pruner, got {type(pruner).__name__}")
    if options.get("max_pruning_ratio", 1.0) != 1.0:
        raise OptionError(
            "fasterai removes units by itself, and max_pruning_ratio holds in "
            "singe.adapters.torch_pruning.step(pruner) only; leave it out"
        )
    scorer = importance(scores, **options)

    def on_its_device(group: Any) -> Tensor | None:
        found = scorer(group)
        return None if found is None else found.to(torch.float64)

    inner.importance = on_its_device
    return scorer
