"""Whether one pass can give every sample of a batch gates of its own.

Their derivatives are then those of single samples. It takes a model in which the first dimension is the
batch wherever a gate sits: not so in attention over windows, or with the sequence in front. There every
sample needs a backward pass.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from singe.data import Batch, shapes_of
from singe.errors import ModelError, SingeError
from singe.layout import differentiate
from singe.memory import is_out_of_memory
from singe.network import Network
from singe.variants import VariantRunner

MU = 0.9  # of all gates: kl is flat at 1, and half-open gates leave little of a signal in a deep network
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-3}  # relative; in 16 bits small numbers round


class SampleGates:
    """Told by the numbers, once per shape of batch.

    The losses of the samples are weighted, neighbours differently, with powers of two, which round
    nothing. Where a sample's gates reach its own loss and no other, their gradients are those of the
    plain sum times the weight.

    Args:
        record: runs the plain pass that fills the prefix cache.
        losses: ``(outputs, variants, batch, reference) -> [V, B]``.

    Attributes:
        known: what was found, by the shapes of the batch.
    """

    def __init__(
        self,
        network: Network,
        record: Callable[[Batch], Any],
        losses: Callable[[Any, int, Batch, Any], Tensor],
    ) -> None:
        self._network, self._record, self._losses = network, record, losses
        self.known: dict[str, bool] = {}

    def __call__(self, batch: Batch, reference: Any) -> bool:
        """Whether the samples of this batch can have gates of their own."""
        shapes = str(shapes_of(batch))
        if shapes not in self.known:
            found = batch.size == 1 or self._reach_their_own(batch, reference)
            if found is None:  # nothing that could tell; another batch will
                return False
            self.known[shapes] = found
            if not found:
                warnings.warn(
                    "p='fisher' takes a backward pass for every sample, which is slower: in this model "
                    "the first dimension is not the batch at every gate, or a sample's loss depends on "
                    "the others",
                    stacklevel=2,
                )
        return self.known[shapes]

    def _reach_their_own(self, batch: Batch, reference: Any) -> bool | None:
        gates = {
            key: (MU * self._network.open_gate(key)).repeat(1, batch.size, site.channels)
            for key, site in self._network.sites.items()
        }
        leaves = [gate.requires_grad_() for gate in gates.values()]
        try:
            with torch.enable_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of a pass that cannot be stacked
                outputs, _ = VariantRunner(self._network, self._record)(batch, gates, {})
            losses = self._losses(outputs, 1, batch, reference)[0]
        except ModelError:  # another first dimension
            return False
        except Exception as error:  # a user's gate that expects one row
            if isinstance(error, SingeError) or is_out_of_memory(error):
                raise
            return False
        weights = 2.0 ** (3 * torch.arange(batch.size, device=losses.device) % 7)
        layout = self._network.channels_last
        plain = differentiate(losses.sum(), leaves, layout, keep_graph=True)
        weighted = differentiate((weights * losses).sum(), leaves, layout)
        expected = [grad * weights[:, None].to(grad) for grad in plain]
        size = _norm(expected)
        if not 0 < size < torch.inf:
            return None
        off = _norm([a - b for a, b in zip(weighted, expected, strict=True)])
        return off <= max(TOLERANCE[leaf.dtype] for leaf in leaves) * size


def _norm(parts: list[Tensor]) -> float:
    return float(torch.stack([part.double().square().sum().cpu() for part in parts]).sum().sqrt())
