"""How much of a scoring run fits into memory: folds of sums, samples of a batch, variants of a pass."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping

import torch

from singe.definition import Definition
from singe.graph import Group
from singe.memory import usual_budget
from singe.network import Network, site_key

MAX_VARIANTS = 64  # per pass; beyond that a pass only takes more memory
# On a CPU a larger pass is a slower one once it outgrows the caches: ResNet-20, layer path, 4 nodes,
# seconds with 4 / 2 / 1 variants per pass: 16 images (12 MB a variant) 0.62 / 0.72 / 0.72, 64 images
# 2.1 / 2.1 / 2.2, 256 images 14.3 / 10.1 / 8.9.
CPU_PASS_BYTES = 200 << 20
ACTIVATION_COPIES = 3  # forward, what backward keeps, and the gradient
# Where nobody gave a limit, on a GPU: 0.7 (ResNet-50) to 1.9 (ConvNeXt-T) were seen, and memory that runs out
# all the same is a pass that is repeated.
EXPECTED_COPIES = 2
# Groups share a pass while it is so small that starting operations costs more than running them.
SHARED_PASS_BYTES = 2 << 20
MAX_FOLDS = 16  # of the data, for error bars
FOLD_BYTES = 256 << 20  # what their sums may take, unless max_memory says otherwise


class Room:
    """What is known about the memory of a run, and what was found out on the way.

    Args:
        max_memory: bytes that scoring may take beside the model and the data; None:
            :func:`singe.memory.usual_budget`.

    Attributes:
        budget: those bytes.
        folds: of the sums, each of which takes memory of its own.
        chunk: variants of a pass that fit, as far as it is known.
        most: samples of a batch that fit, as far as it is known.
        sample_bytes: activations of one sample, 0 until they are known.
    """

    def __init__(
        self,
        network: Network,
        groups: Iterable[Group],
        definition: Definition,
        device: torch.device,
        max_memory: int | None,
    ) -> None:
        self._cache = network.cache
        self._on_cpu = device.type == "cpu"
        rows = [(group, _row_bytes(network, group, definition)) for group in groups]
        whole = sum(size for _, size in rows)
        slots = 1 if definition.nodes_in_one else len(definition.quadrature)
        self._sum_bytes = slots * whole
        self._variant_bytes = {  # of the gradients of the rows that a variant moves
            "network": whole,
            "layer": max(size for _, size in rows),
            "neuron": max(size // group.n_units for group, size in rows),
        }[definition.path]
        self.max_memory = max_memory
        self.budget = max_memory or usual_budget(device)
        bold = max_memory is None and not self._on_cpu
        self._copies = EXPECTED_COPIES if bold else ACTIVATION_COPIES
        self.folds = 1
        self.chunk = MAX_VARIANTS
        self.most = sys.maxsize
        self.sample_bytes = 0.0

    def folds_for(self, n_batches: int | None) -> int:
        """As many folds as the data has batches and memory has room for; 1: no error bars."""
        limit = FOLD_BYTES if self.max_memory is None else self.max_memory // 4
        folds = MAX_FOLDS if n_batches is None else min(MAX_FOLDS, n_batches)
        return max(1, min(folds, limit // max(1, self._sum_bytes)))

    @property
    def beside_sums(self) -> int:
        """Bytes left beside the sums. Sums that leave nothing count as half: they cannot be cut."""
        return self.budget - min(self.folds * self._sum_bytes, self.budget // 2)

    def samples(self) -> int:
        """How many samples leave room for one variant, by :attr:`sample_bytes`; at least 1."""
        size = int(self.beside_sums // max(1, (1 + self._copies) * self.sample_bytes))
        return max(1, min(size, self.most))

    def variants(self) -> int:
        """How many variants of the recorded batch fit beside its record; 0: none does."""
        record = max(1, self._cache.bytes)
        left, activations = self.beside_sums - record, self._copies * record
        if left < activations:
            return 0
        # Not less than one for the rows' sake: a smaller batch has the same.
        fits = max(1, left // (activations + self._variant_bytes))
        return min(fits, max(1, CPU_PASS_BYTES // record)) if self._on_cpu else fits

    def state(self) -> dict[str, int]:
        """What :meth:`load` needs for the same passes again."""
        return {"budget": self.budget, "chunk": self.chunk, "most": self.most}

    def load(self, state: Mapping[str, int]) -> None:
        """Take over what :meth:`state` gave."""
        self.budget, self.chunk, self.most = state["budget"], state["chunk"], state["most"]

    def shared_by(self) -> int:
        """How many variants of the recorded batch make one pass, where groups share it."""
        return min(SHARED_PASS_BYTES // max(1, self._cache.bytes), self.chunk)


def _row_bytes(network: Network, group: Group, definition: Definition) -> int:
    """What the gradients of a group's rows take, at one node."""
    if definition.criterion.integrand == "loss":
        return 0
    entries = 0
    for member in group.members:
        site = network.sites[site_key(member)]
        is_rows = site.kind == "rows" and not definition.gates_only
        entries += member.channels.numel() * (site.row_size if is_rows else 1)
    return entries * network.open_gate(site_key(group.members[0])).element_size()
