"""Early decision: units whose side of the cut is settled get no more data.

Trained networks fit most samples, and a sample that is fitted hardly has a gradient: of 64 CIFAR-10
images a third makes up nearly all of a ResNet-20's scores. So the samples come hardest first, by the
loss of the network as it is, and after every look the contribution of those still to come is bounded
by that of the samples seen last:

    |T_u(all) - T_u(seen)| <= samples left * mean contribution per sample of the last two looks

with ``T_u`` the score times the number of samples. By the triangle inequality this holds where a
sample contributes no more than harder ones did. Every unit then has an interval, and it is settled
once enough other intervals lie wholly on one side of its own. The premise is one about the data, not a
confidence level: ``benchmarks`` measures how often the decision is the one of the full run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_unflatten

from singe.data import Batch, as_batch, by_sample
from singe.errors import DataError

LOOKS = 16  # the data is cut into so many batches at least
RECENT = 2  # looks that stand for what is to come
FIRST_DECISION = 3  # look after which units may be settled


class EarlyDecision:
    """Which units are settled, over all groups in order (U units).

    Args:
        tolerance: in [0, 1): the share of the bound that is given away.
        n_removed: called with ``{group: scores}``; how many units, the lowest, are to go.
    """

    def __init__(self, tolerance: float, n_removed: Callable[[Mapping[str, Tensor]], int]) -> None:
        self.tolerance = tolerance
        self.n_removed = n_removed
        self.removed = torch.zeros(0, dtype=torch.bool, device="cpu")  # settled, and to go
        self.kept = torch.zeros(0, dtype=torch.bool, device="cpu")  # settled, and to stay
        nothing = torch.zeros(0, dtype=torch.float64, device="cpu")
        self.low = self.high = nothing  # [U] bounds on the totals of all data
        self.recent = nothing[None]  # [looks, U] contribution per sample

    def update(
        self, totals: Mapping[str, Tensor], own: Mapping[str, Tensor], size: int, left: int
    ) -> dict[str, Tensor]:
        """Look at what has been summed so far.

        Args:
            totals: per group [U], score times samples.
            own: the same of the latest batch alone.
            size: samples in that batch.
            left: samples still to come.

        Returns:
            Per group bool [U]: settled.
        """
        total, latest = torch.cat(list(totals.values())), torch.cat(list(own.values()))
        if not len(self.low):
            self.removed = torch.zeros(len(total), dtype=torch.bool, device="cpu")
            self.kept = self.removed.clone()
            self.low, self.high = total.clone(), total.clone()
            self.recent = latest.new_zeros(0, len(total))
        self.recent = torch.cat([self.recent, latest[None].abs() / size])
        bound = (1 - self.tolerance) * left * self.recent[-RECENT:].mean(0)
        is_open = ~(
            self.removed | self.kept
        )  # settled units keep the bounds they were settled with
        self.low = torch.where(is_open, total - bound, self.low)
        self.high = torch.where(is_open, total + bound, self.high)
        if left == 0:
            self._settle_the_rest(total, is_open, self.n_removed(totals))
        elif len(self.recent) >= FIRST_DECISION:
            self._settle(is_open, self.n_removed(totals))
        widths = [len(t) for t in totals.values()]
        settled = (self.removed | self.kept).split(widths)
        return dict(zip(totals, settled, strict=True))

    def _settle(self, is_open: Tensor, n_removed: int) -> None:
        units = len(is_open)
        surely_below = torch.searchsorted(self.high.sort().values, self.low, right=False)
        surely_above = units - torch.searchsorted(self.low.sort().values, self.high, right=True)
        self.kept |= is_open & (surely_below >= n_removed)
        self.removed |= is_open & (surely_above >= units - n_removed) & ~self.kept

    def _settle_the_rest(self, total: Tensor, is_open: Tensor, n_removed: int) -> None:
        left = torch.nonzero(is_open).flatten()
        to_go = max(0, n_removed - int(self.removed.sum()))
        self.removed[left[total[left].argsort(stable=True)[:to_go]]] = True
        self.kept |= is_open & ~self.removed

    def consistent(self, totals: Tensor) -> Tensor:
        """[U] totals in which every unit that was decided to go lies below every other.

        A settled unit has not seen all data, so its total may lie on the other side of the cut: it is
        moved to the cut, and no further.
        """
        if not self.removed.any() or not self.kept.any():
            return totals
        lowest, highest = totals[self.kept].min(), totals[self.removed].max()
        if highest <= lowest:
            return totals
        seen_all = self.high == self.low
        below, above = totals[self.removed & seen_all], totals[self.kept & seen_all]
        cut = (below.max() if len(below) else lowest) + (above.min() if len(above) else highest)
        cut = cut / 2
        step = 1e-6 * totals.abs().max()
        moved = torch.where(self.removed, totals.clamp(max=cut - step), totals)
        return torch.where(self.kept, moved.clamp(min=cut + step), moved)

    def state(self) -> dict[str, Tensor]:
        """What :meth:`load` takes."""
        return {name: getattr(self, name) for name in self._STATE}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        for name in self._STATE:
            setattr(self, name, tensors[name].clone())

    _STATE = ("removed", "kept", "low", "high", "recent")


def hardest_first(batches: Sequence[Batch], losses: Sequence[Tensor]) -> list[Batch]:
    """The same samples by falling loss, in ``LOOKS`` batches or more, none larger than the largest.

    Args:
        losses: [B] per batch.

    Raises:
        DataError: batches that cannot be taken apart by sample, or do not fit together.
    """
    columns: list[list[Any]] = []
    spec: Any = None
    for batch in batches:
        found = by_sample(batch)
        if found is None or (columns and _shapes(found[0]) != _shapes(columns[0])):
            raise DataError(
                f"early decision sorts the samples, but batch {batch.index} holds something other "
                "than tensors with one entry per sample, shaped as in the other batches; leave "
                "`tolerance` at None"
            )
        columns.append(found[0])
        spec = found[1]
    order = torch.cat([loss.detach().flatten() for loss in losses]).argsort(
        descending=True, stable=True
    )
    joined = [None if c[0] is None else torch.cat(c) for c in zip(*columns, strict=True)]
    size = min(-(-len(order) // LOOKS), max(b.size for b in batches))
    device = order.device
    return [
        as_batch(tree_unflatten([t if t is None else t[part] for t in joined], spec), i, device)
        for i, part in enumerate(order.split(size))
    ]


def _shapes(leaves: Sequence[Tensor | None]) -> list[Any]:
    return [t if t is None else t.shape[1:] for t in leaves]
