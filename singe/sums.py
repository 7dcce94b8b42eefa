"""What a run has summed so far: gradients and losses, kept apart in folds of the data.

Leaving out one fold at a time is what the error bars are made of (the delete-a-group jackknife), and
everything a run needs to go on later is in here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from singe.graph import Group
from singe.result import unit_sets


def set_of_units(groups: Sequence[Group], path: str) -> dict[str, Tensor]:
    """Per group int64 [U]: the index of the set of units (see ``unit_sets``) each unit moves with."""
    found = {
        group.name: torch.zeros(group.n_units, dtype=torch.int64, device="cpu") for group in groups
    }
    for index, units in enumerate(unit_sets(groups, path)):
        for group, chosen in units:
            found[group.name][chosen] = index
    return found


class Sums:
    """Sums over samples. Batch b belongs to fold ``b % folds``.

    Attributes:
        gradients: (group, site) -> [F, S, U, k] or [F, 1, U, k].
        samples: float64 [F, N]: how many samples each of the N sets of units has seen.
        base_loss: float64 [F, N]: the network's own loss, summed over those samples.
        end_loss: float64 [F, N]: the same with the set's gates at 0; 0 where it is not needed.
    """

    def __init__(self, folds: int, n_sets: int) -> None:
        self.folds = folds
        self.gradients: dict[tuple[str, str], Tensor] = {}
        self.samples = torch.zeros(folds, n_sets, dtype=torch.float64, device="cpu")
        self.base_loss = torch.zeros_like(self.samples)
        self.end_loss = torch.zeros_like(self.samples)

    def count(self, fold: int, sets: Tensor, size: int, loss: float) -> None:
        """A batch of ``size`` samples with summed ``loss`` has been seen by ``sets`` (bool [N])."""
        self.samples[fold, sets] += size
        self.base_loss[fold, sets] += loss

    def slot(self, key: tuple[str, str], shape: Sequence[int], like: Tensor) -> Tensor:
        """The [F, S, U, k] buffer of a group's site, zeros at first."""
        if key not in self.gradients:
            self.gradients[key] = like.new_zeros(self.folds, *shape)
        return self.gradients[key]

    def merge(self) -> None:
        """Put everything into the first fold."""
        for sums in (*self.gradients.values(), self.samples, self.base_loss, self.end_loss):
            sums[0] += sums[1:].sum(0)
            sums[1:] = 0

    def used_folds(self) -> list[int]:
        """Folds that have seen any sample."""
        return torch.nonzero(self.samples.sum(1)).flatten().tolist()

    def state(self) -> dict[str, Tensor]:
        """Everything as named tensors; :meth:`load` puts it back, to the bit."""
        named = {f"gradients/{i}": t for i, t in enumerate(self.gradients.values())}
        return {
            "samples": self.samples,
            "base_loss": self.base_loss,
            "end_loss": self.end_loss,
            **named,
        }

    def load(
        self, state: Mapping[str, Tensor], keys: Sequence[tuple[str, str]], device: torch.device
    ) -> None:
        """What :meth:`state` gave; ``keys`` are those of ``gradients``, in order."""
        self.samples, self.base_loss, self.end_loss = (
            state[name].clone() for name in ("samples", "base_loss", "end_loss")
        )
        self.gradients = {key: state[f"gradients/{i}"].to(device) for i, key in enumerate(keys)}
