"""Early decision: units whose side of the cut is settled get no more data.

Trained networks fit most samples, and a sample that is fitted hardly has a gradient: of 64 CIFAR-10
images a third makes up nearly all of a ResNet-20's scores. So the samples come hardest first, by the
loss of the network as it is, and after every look the contribution of those still to come is bounded
by that of the samples seen last:

    |T_u(all) - T_u(seen)| <= samples left * mean contribution per sample of the last two looks

with ``T_u`` the score times the number of samples. The triangle inequality makes this a bound where a
sample contributes no more than harder ones did. That is an assumption about the data, not a
confidence level: ``benchmarks`` measures how often the decision is the one of the full run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.utils._pytree import tree_unflatten

from singe.data import Batch, as_batch, by_sample
from singe.errors import DataError

LOOKS = 16  # the data is cut into so many batches
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
        self.settled = torch.zeros(0, dtype=torch.bool)
        self.removed = torch.zeros(0, dtype=torch.bool)
        self.recent = torch.zeros(0, 0, dtype=torch.float64)  # [looks, U] contribution per sample

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
        if not len(self.settled):
            self.settled = torch.zeros(len(total), dtype=torch.bool)
            self.removed = self.settled.clone()
            self.recent = latest.new_zeros(0, len(total))
        self.recent = torch.cat([self.recent, latest[None].abs() / size])
        if len(self.recent) >= FIRST_DECISION or left == 0:
            bound = (1 - self.tolerance) * left * self.recent[-RECENT:].mean(0)
            self._settle(total, bound, self.n_removed(totals))
        widths = [len(t) for t in totals.values()]
        return dict(zip(totals, self.settled.split(widths), strict=True))

    def _settle(self, total: Tensor, bound: Tensor, n_removed: int) -> None:
        is_open = ~self.settled
        to_go = n_removed - int(self.removed.sum())
        ranked = total[is_open].sort().values
        if not 0 < to_go < len(ranked):
            self.removed |= is_open & torch.tensor(to_go >= len(ranked))
            self.settled |= is_open
            return
        cut = (ranked[to_go - 1] + ranked[to_go]) / 2
        far = is_open & ((total - cut).abs() > bound)
        self.removed |= far & (total < cut)
        self.settled |= far

    def state(self) -> dict[str, Tensor]:
        """What :meth:`load` takes."""
        return {"settled": self.settled, "removed": self.removed, "recent": self.recent}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        self.settled, self.removed, self.recent = (
            tensors[name].clone() for name in ("settled", "removed", "recent")
        )


def hardest_first(batches: Sequence[Batch], losses: Sequence[Tensor]) -> list[Batch]:
    """The same samples by falling loss, in about ``LOOKS`` batches.

    Args:
        losses: [B] per batch.

    Raises:
        DataError: batches that cannot be taken apart by sample.
    """
    leaves = []
    for batch in batches:
        found = by_sample(batch)
        if found is None:
            raise DataError(
                f"early decision sorts the samples, but batch {batch.index} holds something other "
                "than tensors with one entry per sample; leave `tolerance` at None"
            )
        leaves.append(found[0])
        spec = found[1]
    order = torch.cat([loss.detach().flatten() for loss in losses]).argsort(
        descending=True, stable=True
    )
    columns = [torch.cat(column) for column in zip(*leaves, strict=True)]
    parts = order.split(-(-len(order) // LOOKS))
    device = columns[0].device
    return [
        as_batch(tree_unflatten([c[part] for c in columns], spec), i, device)
        for i, part in enumerate(parts)
    ]
