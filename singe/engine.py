"""The fused engine: every node of the path in one stacked pass, its prefix shared, and no gradient
computed that the criterion does not use."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from singe.batch_passes import BatchPasses
from singe.channel_update import ChannelUpdates
from singe.data import Batch, cut, device_of
from singe.decision import EarlyDecision, hardest_first
from singe.definition import Definition
from singe.divisible import first_few
from singe.errors import DataError, OptionError
from singe.graph import ModelGraph, unwrapped
from singe.memory import PeakMemory, is_out_of_memory
from singe.network import Network
from singe.passes import Variant, all_variants, gates_of
from singe.precision import lower
from singe.reduction import Reduction
from singe.result import Result, unit_sets
from singe.room import Room
from singe.score_checkpoint import ScoreCheckpoint
from singe.sums import Sums, set_of_units
from singe.sweep import Sweep
from singe.variants import variant
from singe.weight_scores import by_parameter, row_scales


class FusedEngine:
    """One scoring run; see :func:`singe.score` for the arguments.

    Args:
        max_memory: bytes that scoring may take beside the model and the data; None: see
            :func:`singe.memory.usual_budget`. On out-of-memory the pass is halved and repeated, then
            the batch.
        autocast: dtype of convolutions and linear layers, or None.
        n_batches: how many batches there are, or None if that is not known.
        decision: stops feeding units whose side of a cut is settled.
        checkpoint: where the state of the run is kept between batches.
        compile: run the passes through ``torch.compile``.
    """

    def __init__(
        self,
        model: nn.Module,
        graph: ModelGraph,
        definition: Definition,
        max_memory: int | None = None,
        autocast: torch.dtype | None = None,
        n_batches: int | None = None,
        decision: EarlyDecision | None = None,
        checkpoint: ScoreCheckpoint | None = None,
        compile: bool = False,
    ) -> None:
        self.model = unwrapped(model)
        self.groups = graph.groups
        self.definition = definition
        self.objective = definition.objective
        self.decision = decision
        self.checkpoint = checkpoint
        self.autocast = autocast
        self.device = device_of(model)
        self.network = Network(model, graph.groups, graph.folds, graph.overwritten)
        if autocast is not None:
            lower(self.network, autocast)
        if self.device.type == "cpu" and all(p.dtype == torch.float32 for p in model.parameters()):
            # ResNet-20, 64 images: the stacked pass takes 0.88 of the time in this layout.
            self.network.set_channels_last(True)
        one_by_one = definition.path == "neuron"
        # An update knows one gate for all samples.
        has_updates = one_by_one and not definition.each_sample
        updates = ChannelUpdates(self.network, graph.groups) if has_updates else None
        self.sets = set_of_units(self.groups, definition.path)
        self.jobs = all_variants(self.groups, definition)
        n_sets = 1 + max(int(index.max()) for index in self.sets.values())
        self.room = Room(self.network, graph.groups, definition, self.device, max_memory)
        # An early decision needs two folds: what was summed before, and the latest batch.
        self.room.folds = self.room.folds_for(n_batches) if decision is None else 2
        self.sums = Sums(self.room.folds, n_sets)
        scales = row_scales(self.network.module, graph.folds)
        self.reduction = Reduction(self.network, definition, self.sets, scales)
        self.sweep = Sweep(self.network, updates, definition, self.sums, self.device, compile)
        active = torch.ones(n_sets, dtype=torch.bool, device="cpu")
        self.passes = BatchPasses(self.sweep, definition, self.jobs, active, self.room)

    def run(
        self, batches: Iterable[Batch], on_pass: Callable[[float], None] = lambda variants: None
    ) -> Result:
        """Score every unit; ``batches`` is read once.

        Args:
            on_pass: called after every finished pass with the number of its variants (a share of it,
                where a batch was cut).
        """
        self.passes.on_pass = on_pass
        try:
            with PeakMemory(self.device) as peak:
                result = self._run(batches)
        except RuntimeError as error:
            if self.autocast is None or "dtype" not in str(error):
                raise
            raise OptionError(
                f"autocast cannot run this model: {error}. Something in it reads parameters outside "
                "of convolutions and linear layers; score it without autocast"
            ) from error
        finally:  # on a GPU what is remembered of the last batch is memory that others need
            self.network.clear()
            self.network.cache.clear()
            if self.sweep.updates is not None:
                self.sweep.updates.forget()
        result.meta["peak_memory"] = peak.bytes
        return result

    def _run(self, batches: Iterable[Batch]) -> Result:
        if self.decision is not None:
            batches = self._hardest_first(list(batches))
        to_come = batches if isinstance(batches, list) else []
        n_samples = 0
        for position, batch in enumerate(batches):
            n_samples += batch.size
            if self.checkpoint is not None and self.checkpoint.skips(batch, self):
                continue
            if self.decision is None:
                self.passes.run(batch, position % self.sums.folds)
            elif self.passes.active.any():
                self.passes.run(batch, 1)
                self._decide(batch, to_come[position + 1 :])
            if self.checkpoint is not None:
                self.checkpoint.save(self)
        if self.checkpoint is not None:
            self.checkpoint.finished()
        return self._result(n_samples)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What :meth:`load_state` needs to go on with the next batch, to the bit."""
        decided = {} if self.decision is None else self.decision.state()
        header = {
            "keys": list(self.sums.gradients),
            **self.room.state(),
            "evaluated": self.passes.evaluated,
            "sample_gates": self.sweep.sample_gates.known,
        }
        return {**self.sums.state(), **decided, "active": self.passes.active}, header

    def load_state(self, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
        """Take over what :meth:`state` gave."""
        self.sums.load(tensors, [(group, key) for group, key in header["keys"]], self.device)
        self.passes.active.copy_(tensors["active"])
        if self.decision is not None:
            self.decision.load(tensors)
        self.room.load(header)
        self.passes.evaluated = header["evaluated"]
        self.sweep.sample_gates.known = dict(header["sample_gates"])

    def variants_per_batch(self) -> int:
        """How many variants one batch takes: the unit of progress."""
        return sum(map(len, self.jobs))

    # ------------------------------------------------------------------ early decision

    @torch.no_grad()
    def _hardest_first(self, batches: list[Batch]) -> list[Batch]:
        losses = []
        for batch in batches:
            losses.append(self._sample_losses(batch))
            few = first_few(batch)
            if batch.size > 1 and (few is None or not self.passes.divisible(few)):
                raise DataError(
                    f"early decision sorts the samples, but those of batch {batch.index} cannot be "
                    "taken apart: its tensors must have one entry per sample, and the loss of a "
                    "sample must not depend on the others; leave `tolerance` at None"
                )
        return hardest_first(batches, losses)

    def _sample_losses(self, batch: Batch) -> Tensor:
        """[B], from halves of the batch where the whole does not fit into memory."""
        try:
            reference = self.sweep.record(batch)
            moved = self._moved(batch, reference)
            return self.objective.of_each_sample(moved, batch, reference, "tolerance")
        except RuntimeError as error:
            half = batch.size // 2
            halves = cut(batch, half, batch.size - half) if half else None
            if not is_out_of_memory(error) or halves is None:
                raise
        # Not in ``except``, where the failed pass's tensors are still there.
        return torch.cat([self._sample_losses(part) for part in halves])

    def _moved(self, batch: Batch, reference: Any) -> Any:
        """Outputs that tell hard samples from easy ones."""
        if not self.objective.needs_reference:
            return reference
        # Nothing is hard for a divergence where nothing has moved.
        halfway = Variant([(g, list(range(g.n_units))) for g in self.groups], 0, 0, 0.5)
        gates = gates_of(self.network, [halfway])
        return variant(self.sweep.runner(batch, gates, {})[0], 0)

    def _decide(self, batch: Batch, rest: Sequence[Batch]) -> None:
        assert self.decision is not None
        left = sum(b.size for b in rest)
        # What a settled unit has not seen counts as adding nothing: totals, not means.
        seen = {g.name: self.sums.samples[:, self.sets[g.name]].sum(0) for g in self.groups}
        totals = {g.name: self.reduction.scores(self.sums, g) * seen[g.name] for g in self.groups}
        own = {g.name: self.reduction.latest(self.sums, g) * batch.size for g in self.groups}
        self.sums.merge()
        settled = self.decision.update(totals, own, batch.size, left)
        # A set of units goes on while any of them is open.
        self.passes.active.fill_(False)
        for name, done in settled.items():
            self.passes.active[self.sets[name][~done]] = True

    # ------------------------------------------------------------------ what it amounts to

    def _result(self, n_samples: int) -> Result:
        result = Result.empty(self.groups, n_samples)
        result.meta = {
            "variants_per_pass": self.room.chunk,
            "stacked": self.sweep.runner.stacked,
            "evaluations": self.passes.evaluated,
        }
        if self.definition.each_sample:
            result.meta["sample_gates"] = all(self.sweep.sample_gates.known.values())
        if (compiler := self.sweep.runner.compiler) is not None:
            result.meta |= {"compiled": compiler.compiled, "uncompiled": compiler.refused}
        if self.definition.granularity == "weight":
            scores = partial(self.reduction.weights, self.sums)
            result.scores = by_parameter(self.model, self.groups, scores)
            if len(self.sums.used_folds()) > 1:
                stderr = partial(self.reduction.weights_stderr, self.sums)
                result.stderr = by_parameter(self.model, self.groups, stderr)
            return result
        if self.decision is not None:
            self.sums.samples[0] = n_samples  # what was not seen counts as adding nothing
        for group in self.groups:
            result.scores[group.name] = self.reduction.scores(self.sums, group)
        if self.decision is not None:
            together = self.decision.consistent(torch.cat(list(result.scores.values())) * n_samples)
            parts = (together / n_samples).split([g.n_units for g in self.groups])
            result.scores = dict(zip(result.scores, parts, strict=True))
        if self.decision is None and len(self.sums.used_folds()) > 1:
            result.stderr = {g.name: self.reduction.stderr(self.sums, g) for g in self.groups}
        if self.definition.criterion.integrand == "derivative":
            damage = self.reduction.damage(self.sums)
            for index, units in enumerate(unit_sets(self.groups, self.definition.path)):
                integral = sum(float(result.scores[g.name][u].sum()) for g, u in units)
                result.note_completeness(
                    units, self.definition.path, integral - float(damage[index])
                )
        return result
