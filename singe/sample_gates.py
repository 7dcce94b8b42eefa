"""Whether one pass can give every sample of a batch gates of its own.

The derivative along a gate is then that of one sample. It takes a model in which the first dimension is
the batch wherever a gate sits: not so in attention over windows, or with the sequence in front. There the
samples run one by one.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from singe.data import Batch
from singe.divisible import Divisible, first_few, single_samples
from singe.errors import ModelError
from singe.graph import Group
from singe.memory import is_out_of_memory
from singe.network import Network
from singe.passes import Variant, for_each_sample, gates_of
from singe.sweep import Sweep
from singe.variants import VariantRunner

# Relative. Below float64 rounding moves ReLUs at their kink, and convolutions may be in 16 bits; gates
# that reach the wrong samples are off by as much as there is.
TOLERANCE = {torch.float64: 1e-8, torch.float32: 0.05}


class SampleGates:
    """Told by the numbers, once per run: a few samples with gates of their own against each alone."""

    def __init__(
        self, network: Network, groups: Sequence[Group], sweep: Sweep, divisible: Divisible
    ) -> None:
        self._network, self._groups = network, groups
        self._sweep, self._divisible = sweep, divisible
        self._found: bool | None = None

    def __call__(self, batch: Batch) -> bool:
        """The answer for all batches, from the first one with several samples."""
        if self._found is None:
            few = first_few(batch)
            self._found = few is not None and self._divisible(few) and self._same_alone(few)
        return self._found

    def _same_alone(self, few: Batch) -> bool:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of a pass that cannot be stacked
                together = self._derivatives(few)
        except ModelError:
            return False
        except (RuntimeError, ValueError, IndexError) as error:
            if is_out_of_memory(error):
                raise
            return False
        alone = [self._derivatives(one) for one in single_samples(few)]
        return all(
            (found - torch.cat(wanted, 1)).norm() <= TOLERANCE[found.dtype] * found.norm()
            for found, *wanted in zip(together, *alone, strict=True)
        )

    def _derivatives(self, batch: Batch) -> list[Tensor]:
        """[1, B, C] per site, half-way along the network path."""
        reference = self._sweep.record(batch)
        halfway = Variant([(g, list(range(g.n_units))) for g in self._groups], 0, 0, 0.5)
        gates = for_each_sample(gates_of(self._network, [halfway]), batch.size)
        leaves = [gate.requires_grad_() for gate in gates.values()]
        runner = VariantRunner(self._network, self._sweep.record)
        with torch.enable_grad():
            outputs, _ = runner(batch, gates, {})
            loss = self._sweep.totals(outputs, 1, batch, reference).sum()
        return list(torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True))
