"""One batch in passes that fit: where memory ends, with fewer variants, then with fewer samples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from singe.data import Batch, cut, first_samples, shapes_of
from singe.definition import Definition
from singe.divisible import TRIAL_SAMPLES, Divisible, first_few
from singe.memory import is_out_of_memory
from singe.passes import Variant, merged
from singe.room import Room
from singe.sweep import Sweep


class BatchPasses:
    """Runs the variants of all jobs on a batch and adds what they give to the sums.

    Args:
        jobs: variants that follow each other, by :func:`singe.passes.all_variants`.

    Attributes:
        active: [sets of units] bool, which of them are still fed.
        evaluated: samples times variants so far.
        on_pass: called after every finished pass, see :meth:`singe.engine.FusedEngine.run`.
    """

    def __init__(
        self,
        sweep: Sweep,
        definition: Definition,
        jobs: list[list[Variant]],
        active: Tensor,
        room: Room,
    ) -> None:
        self.sweep = sweep
        self.network, self.updates, self.sums = sweep.network, sweep.updates, sweep.sums
        self.objective = definition.objective
        self.jobs = jobs
        self.active = active
        self.room = room
        self.divisible = Divisible(self.objective, sweep.record)
        self.on_pass: Callable[[float], None] = lambda variants: None
        self.evaluated = 0
        # On the network path hardly anything lies before the gates, so nothing is gained by remembering
        # it: without this the path costs one forward more than its S passes.
        self._can_go_without_record = (
            definition.path == "network"
            and definition.criterion.integrand in ("variation", "gradient")
            and not self.objective.needs_reference
            and not self.network.lowered  # what is remembered is in full precision
        )

    def run(self, batch: Batch, fold: int, share: float = 1.0) -> None:
        """All jobs of a batch; ``share`` of the user's batch, for the progress."""
        if self._needs_no_record(batch):
            self.sums.count(fold, self.active, batch.size, 0.0)
            self.network.cache.clear()
            for job in self.jobs:
                self._run_job(job, batch, None, fold, share)
            return
        reference = None
        if self.room.max_memory is None and batch.size <= self.room.most:
            reference = self._record_if_it_fits(batch)
        if reference is None or self.room.variants() < 1:
            if (pieces := self._pieces(batch)) is not None:
                for piece in pieces:
                    self.run(piece, fold, share * piece.size / batch.size)
                return
            reference = self._record_if_it_fits(batch)
            if reference is None:
                self.run(batch, fold, share)  # in smaller pieces, now that this is known
                return
        if self.updates is not None and self.updates.needs_trial:
            self.updates.try_out(first_samples(batch, TRIAL_SAMPLES))
            reference = self.sweep.record(batch)
        loss = self.sweep.total(reference, batch, reference)
        self.objective.require_finite(loss, batch)
        self.sums.count(fold, self.active, batch.size, loss.item())
        self.room.chunk = max(1, min(self.room.chunk, self.room.variants()))
        wanted = set(torch.nonzero(self.active).flatten().tolist())
        active = [[one for one in job if one.index in wanted] for job in self.jobs]
        for job in merged(active, self.room.shared_by()):
            self._run_job(job, batch, reference, fold, share)

    def _needs_no_record(self, batch: Batch) -> bool:
        """Whether the plain pass can be left out: the shapes at the gates are those of the last batch."""
        return (
            self._can_go_without_record
            and batch.size <= self.room.most
            and self.sweep.recorded_shapes == shapes_of(batch)
            and self.room.chunk >= len(self.jobs[0])
        )

    def _record_if_it_fits(self, batch: Batch) -> Any:
        """Outputs of the plain pass, or None where it turns out that so many samples do not fit."""
        try:
            return self.sweep.record(batch)
        except RuntimeError as error:
            # Known already, and not to be helped.
            if not is_out_of_memory(error) or batch.size > self.room.most:
                raise
        self.room.most = batch.size // 2
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
        if not self.room.sample_bytes:
            self.sweep.record(few)
            self.room.sample_bytes = self.network.cache.bytes / few.size
        count = -(-batch.size // self.room.samples())
        if count == 1 or not self.divisible(few):
            return None
        small, extra = divmod(batch.size, count)
        return cut(batch, *[small + 1] * extra, *[small] * (count - extra))

    def _run_job(
        self, job: list[Variant], batch: Batch, reference: Any, fold: int, share: float
    ) -> None:
        done = 0
        while done < len(job):
            if batch.size > self.room.most:
                if (pieces := self._pieces(batch)) is not None:
                    for piece in pieces:
                        own = self.sweep.record(piece)
                        self._run_job(job[done:], piece, own, fold, share * piece.size / batch.size)
                    return
                if self.sweep.recorded_shapes != shapes_of(batch):  # but of the few that were tried
                    reference = self.sweep.record(batch)
            left = len(job) - done
            passes = -(-left // self.room.chunk)
            # Of one size where that takes no more passes: a GPU chooses its kernels anew for every shape.
            size = self.room.chunk if left % passes else left // passes
            variants = job[done : done + size]
            lack = self._add(variants, batch, reference, fold)
            if lack is None:
                done += len(variants)
                self.evaluated += len(variants) * batch.size
                self.on_pass(share * len(variants))
            elif len(variants) > 1:
                self.room.chunk = len(variants) // 2
            elif batch.size > self.room.most:  # known, and it cannot be cut
                raise lack
            else:
                self.room.most = batch.size // 2

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
        if self.sweep.device.type == "cuda":
            torch.cuda.empty_cache()
