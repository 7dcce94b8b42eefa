"""The fused engine: every node of the path in one stacked pass, its prefix shared, and no gradient
computed that the criterion does not use."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from singe.channel_update import ChannelUpdates
from singe.data import Batch, cut, device_of, first_samples, shapes_of
from singe.decision import EarlyDecision, hardest_first
from singe.definition import Definition
from singe.divisible import TRIAL_SAMPLES, Divisible, first_few
from singe.errors import DataError, OptionError
from singe.graph import ModelGraph, unwrapped
from singe.memory import PeakMemory, free_memory, is_out_of_memory
from singe.network import Network, site_key
from singe.passes import Variant, all_variants, gates_of, merged
from singe.precision import lower
from singe.reduction import Reduction
from singe.result import Result, unit_sets
from singe.score_checkpoint import ScoreCheckpoint
from singe.sums import Sums, set_of_units
from singe.sweep import Sweep
from singe.variants import variant
from singe.weight_scores import by_parameter, row_scales

MAX_VARIANTS = 64  # per pass; beyond that a pass only takes more memory
# On a CPU a larger pass is a slower one once it outgrows the caches: ResNet-20, layer path, 4 nodes,
# seconds with 4 / 2 / 1 variants per pass: 16 images (12 MB a variant) 0.62 / 0.72 / 0.72, 64 images
# 2.1 / 2.1 / 2.2, 256 images 14.3 / 10.1 / 8.9.
CPU_PASS_BYTES = 200 << 20
ACTIVATION_COPIES = 3  # forward, what backward keeps, and the gradient
# Groups share a pass while it is so small that starting operations costs more than running them.
SHARED_PASS_BYTES = 2 << 20
MAX_FOLDS = 16  # of the data, for error bars
FOLD_BYTES = 256 << 20  # what their sums may take, unless max_memory says otherwise


class FusedEngine:
    """One scoring run; see :func:`singe.score` for the arguments.

    Args:
        max_memory: bytes that scoring may take beside the model and the data; None: a quarter of
            what is free. On out-of-memory the pass is halved and repeated, then the batch.
        autocast: dtype of convolutions and linear layers, or None.
        n_batches: how many batches there are, or None if that is not known.
        decision: stops feeding units whose side of a cut is settled.
        checkpoint: where the state of the run is kept between batches.
        compile: run the passes through ``torch.compile``.
        on_pass: called after every finished pass with the number of its variants (a share of it, where
            a batch was cut).
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
        on_pass: Callable[[float], None] = lambda variants: None,
    ) -> None:
        self.model = unwrapped(model)
        self.groups = graph.groups
        self.definition = definition
        self.objective = definition.objective
        self.max_memory = max_memory
        self.n_batches = n_batches
        self.decision = decision
        self.checkpoint = checkpoint
        self.autocast = autocast
        self.on_pass = on_pass
        self.device = device_of(model)
        self.network = Network(model, graph.groups, graph.folds)
        if autocast is not None:
            lower(self.network, autocast)
        if self.device.type == "cpu" and all(p.dtype == torch.float32 for p in model.parameters()):
            # ResNet-20, 64 images: the stacked pass takes 0.88 of the time in this layout.
            self.network.set_channels_last(True)
        one_by_one = definition.path == "neuron"
        # An update knows one gate for all samples.
        has_updates = one_by_one and not definition.each_sample
        self.updates = ChannelUpdates(self.network, graph.groups) if has_updates else None
        self.sets = set_of_units(self.groups, definition.path)
        self.jobs = all_variants(self.groups, definition)
        self.n_sets = 1 + max(int(index.max()) for index in self.sets.values())
        self.sums = Sums(self._folds(), self.n_sets)
        scales = row_scales(self.network.module, graph.folds)
        self.reduction = Reduction(self.network, definition, self.sets, scales)
        self.sweep = Sweep(self.network, self.updates, definition, self.sums, self.device, compile)
        self.active = torch.ones(self.n_sets, dtype=torch.bool)
        self.budget = max_memory or free_memory(self.device) // 4
        self.divisible = Divisible(self.objective, self.sweep.record)
        self.sample_bytes = 0.0  # activations of one sample, once they are known
        self.chunk = MAX_VARIANTS
        self.most = sys.maxsize  # samples of a batch that fit, as far as it is known
        self.evaluated = 0  # samples times variants

    def run(self, batches: Iterable[Batch]) -> Result:
        """Score every unit; ``batches`` is read once."""
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
            if self.updates is not None:
                self.updates.forget()
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
                self._run_batch(batch, position % self.sums.folds)
            elif self.active.any():
                self._run_batch(batch, 1)
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
            "budget": self.budget,
            "chunk": self.chunk,
            "most": self.most,
            "evaluated": self.evaluated,
            "sample_gates": self.sweep.sample_gates.known,
        }
        return {**self.sums.state(), **decided, "active": self.active}, header

    def load_state(self, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
        """Take over what :meth:`state` gave."""
        self.sums.load(tensors, [(group, key) for group, key in header["keys"]], self.device)
        self.active = tensors["active"].clone()
        if self.decision is not None:
            self.decision.load(tensors)
        self.budget, self.chunk = header["budget"], header["chunk"]
        self.evaluated = header["evaluated"]
        # Neither is in a state that was saved before they were there.
        self.most = header.get("most", sys.maxsize)
        self.sweep.sample_gates.known = dict(header.get("sample_gates", {}))

    def variants_per_batch(self) -> int:
        """How many variants one batch takes: the unit of progress."""
        return sum(map(len, self.jobs))

    # ------------------------------------------------------------------ what to run

    def _run_batch(self, batch: Batch, fold: int, share: float = 1.0) -> None:
        """All jobs of a batch; ``share`` of the user's batch, for the progress."""
        if self._needs_no_record(batch):
            self.sums.count(fold, self.active, batch.size, 0.0)
            self.network.cache.clear()
            for job in self.jobs:
                self._run_job(job, batch, None, fold, share)
            return
        reference = None
        if self.max_memory is None and batch.size <= self.most:
            reference = self._record_if_it_fits(batch)
        if reference is None or self._variants_that_fit() < 1:
            if (pieces := self._pieces(batch)) is not None:
                for piece in pieces:
                    self._run_batch(piece, fold, share * piece.size / batch.size)
                return
            reference = self._record_if_it_fits(batch)
            if reference is None:
                self._run_batch(batch, fold, share)  # in smaller pieces, now that this is known
                return
        if self.updates is not None and self.updates.needs_trial:
            self.updates.try_out(first_samples(batch, TRIAL_SAMPLES))
            reference = self.sweep.record(batch)
        loss = self.sweep.total(reference, batch, reference)
        self.objective.require_finite(loss, batch)
        self.sums.count(fold, self.active, batch.size, loss.item())
        self.chunk = max(1, min(self.chunk, self._variants_that_fit()))
        wanted = set(torch.nonzero(self.active).flatten().tolist())
        active = [[one for one in job if one.index in wanted] for job in self.jobs]
        shared = SHARED_PASS_BYTES // max(1, self.network.cache.bytes)
        for job in merged(active, min(shared, self.chunk)):
            self._run_job(job, batch, reference, fold, share)

    def _needs_no_record(self, batch: Batch) -> bool:
        """Whether the plain pass can be left out.

        On the network path hardly anything lies before the gates, so nothing is gained by remembering
        it; and the shapes at the gates are those of the last batch. Without this the path costs one
        forward more than its S passes.
        """
        return (
            self.definition.path == "network"
            and batch.size <= self.most
            and self.definition.criterion.integrand in ("variation", "gradient")
            and not self.objective.needs_reference
            and self.autocast is None  # there the remembered prefix is in full precision
            and self.sweep.recorded_shapes == shapes_of(batch)
            and self.chunk >= len(self.jobs[0])
        )

    def _record_if_it_fits(self, batch: Batch) -> Any:
        """Outputs of the plain pass, or None where it turns out that so many samples do not fit."""
        try:
            return self.sweep.record(batch)
        except RuntimeError as error:
            if not is_out_of_memory(error) or batch.size > self.most:  # known, and not to be helped
                raise
        self.most = batch.size // 2
        self._free()  # not in ``except``, where the failed pass's tensors are still there
        return None

    def _pieces(self, batch: Batch) -> list[Batch] | None:
        """The batch in parts of which at least one variant fits, where cutting changes nothing."""
        if (few := first_few(batch)) is None:
            return None
        try:
            return self._cut(batch, few)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        self._free()
        fewer = first_few(batch, 2)
        return None if fewer is None else self._cut(batch, fewer)

    def _cut(self, batch: Batch, few: Batch) -> list[Batch] | None:
        """:meth:`_pieces`, by what a few of its samples show."""
        if not self.sample_bytes:
            self.sweep.record(few)
            self.sample_bytes = self.network.cache.bytes / few.size
        size = int(self._room_with_record() // max(1, (1 + ACTIVATION_COPIES) * self.sample_bytes))
        count = -(-batch.size // max(1, min(size, self.most)))
        if count == 1 or not self.divisible(few):
            return None
        small, extra = divmod(batch.size, count)
        return cut(batch, *[small + 1] * extra, *[small] * (count - extra))

    def _run_job(
        self, job: list[Variant], batch: Batch, reference: Any, fold: int, share: float
    ) -> None:
        done = 0
        while done < len(job):
            if batch.size > self.most and (pieces := self._pieces(batch)) is not None:
                for piece in pieces:
                    own = self.sweep.record(piece)
                    self._run_job(job[done:], piece, own, fold, share * piece.size / batch.size)
                self.sweep.record(batch)  # for the jobs to come
                return
            variants = job[done : done + self.chunk]
            lack = self._add(variants, batch, reference, fold)
            if lack is None:
                done += len(variants)
                self.evaluated += len(variants) * batch.size
                self.on_pass(share * len(variants))
            elif len(variants) > 1:
                self.chunk = len(variants) // 2
            elif batch.size > self.most:  # known, and it cannot be cut
                raise lack
            else:
                self.most = batch.size // 2

    def _add(
        self, variants: list[Variant], batch: Batch, reference: Any, fold: int
    ) -> RuntimeError | None:
        """One pass. An error that says out of memory is returned, and nothing was added."""
        try:
            self.sweep.add(variants, batch, reference, fold)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            lack = error.with_traceback(None)  # whose frames hold the failed pass's tensors
        else:
            return None
        self._free()
        return lack

    def _free(self) -> None:
        """What a failed pass has left."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _sum_bytes(self) -> int:
        """What one fold of the gradient sums takes."""
        if self.definition.criterion.integrand == "loss":
            return 0
        slots = 1 if self.definition.nodes_in_one else len(self.definition.quadrature)
        entries = 0
        for group in self.groups:
            for member in group.members:
                site = self.network.sites[site_key(member)]
                is_rows = site.kind == "rows" and not self.definition.gates_only
                entries += member.channels.numel() * (site.row_size if is_rows else 1)
        key = next(iter(self.network.sites))
        return slots * entries * self.network.open_gate(key).element_size()

    def _folds(self) -> int:
        """As many folds as the data has batches and memory has room for; 1: no error bars.

        An early decision needs two: what was summed before, and the latest batch.
        """
        if self.decision is not None:
            return 2
        limit = FOLD_BYTES if self.max_memory is None else self.max_memory // 4
        folds = MAX_FOLDS if self.n_batches is None else min(MAX_FOLDS, self.n_batches)
        return max(1, min(folds, limit // max(1, self._sum_bytes())))

    def _room_with_record(self) -> int:
        """Bytes left beside the sums. Sums that leave nothing count as half: they cannot be cut."""
        return self.budget - min(self.sums.folds * self._sum_bytes(), self.budget // 2)

    def _variants_that_fit(self) -> int:
        per_variant = max(1, self.network.cache.bytes)
        fits = (self._room_with_record() - per_variant) // (ACTIVATION_COPIES * per_variant)
        if self.device.type == "cpu":
            fits = min(fits, max(1, CPU_PASS_BYTES // per_variant))
        return fits

    @torch.no_grad()
    def _hardest_first(self, batches: list[Batch]) -> list[Batch]:
        losses = []
        for batch in batches:
            reference = self.sweep.record(batch)
            moved = self._moved(batch, reference)
            losses.append(self.objective.of_each_sample(moved, batch, reference, "tolerance"))
            few = first_few(batch)
            if batch.size > 1 and (few is None or not self.divisible(few)):
                raise DataError(
                    f"early decision sorts the samples, but those of batch {batch.index} cannot be "
                    "taken apart: its tensors must have one entry per sample, and the loss of a "
                    "sample must not depend on the others; leave `tolerance` at None"
                )
        return hardest_first(batches, losses)

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
        self.active.fill_(False)
        for name, done in settled.items():
            self.active[self.sets[name][~done]] = True

    # ------------------------------------------------------------------ what it amounts to

    def _result(self, n_samples: int) -> Result:
        result = Result.empty(self.groups, n_samples)
        result.meta = {
            "variants_per_pass": self.chunk,
            "stacked": self.sweep.runner.stacked,
            "evaluations": self.evaluated,
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
