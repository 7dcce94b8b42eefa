"""Whether a batch may be taken apart: its parts must add up to what the whole gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from singe.data import Batch, cut
from singe.objectives import Objective
from singe.tf32 import full_float32

TRIAL_SAMPLES = 4  # of a batch, to find out about the network and the data


def first_few(batch: Batch, count: int = TRIAL_SAMPLES) -> Batch | None:
    """The first samples of a batch, labels and all, if there are several to take apart."""
    if batch.size <= count:
        return batch if batch.size > 1 else None
    parts = cut(batch, count, batch.size - count)
    return None if parts is None else parts[0]


class Divisible:
    """Whether the loss is one per sample, and that of a sample the same in a smaller batch.

    Not so for a user's mean with weights of its own, or where a tensor of as many entries as the batch
    is something else. Told by the numbers, once per run.

    Args:
        record: a plain pass over a batch, giving the model's outputs.
    """

    def __init__(self, objective: Objective, record: Callable[[Batch], Any]) -> None:
        self._objective, self._record = objective, record
        self._found: bool | None = None

    def __call__(self, few: Batch) -> bool:
        """The answer for all batches, from a few samples of the first that is asked about."""
        if self._found is None:
            halves = cut(few, few.size // 2, -(-few.size // 2))
            self._found = halves is not None and self._same_alone(few, halves[0])
        return self._found

    @full_float32()
    def _same_alone(self, whole: Batch, half: Batch) -> bool:
        outputs = self._record(whole)
        losses = self._objective.per_sample(outputs, whole, outputs)
        if losses.shape != (whole.size,):
            return False
        own = self._record(half)
        alone = self._objective.per_sample(own, half, own)
        pairs = [(alone, losses), *zip(tree_leaves(own), tree_leaves(outputs), strict=True)]
        return all(
            part.shape == all_of_it[: half.size].shape
            and torch.allclose(part, all_of_it[: half.size], rtol=1e-3, atol=1e-4)
            for part, all_of_it in pairs
            if isinstance(part, Tensor) and part.is_floating_point() and part.dim() > 0
        )
