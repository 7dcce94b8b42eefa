"""The entwined loop itself: rounds of scoring, removal and fine-tuning, each step of it resumable."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from singe.checkpoint import Folder
from singe.choice import Choice
from singe.cost import count
from singe.data import device_of, first_batch
from singe.errors import BudgetError, OptionError
from singe.evaluation import Evaluate
from singe.finetune import FinetuneFunction, Stage, call_finetune
from singe.graph import unwrapped
from singe.limits import warn_of_target
from singe.modes import in_mode
from singe.original import Original
from singe.plain import finite
from singe.plan import Plan
from singe.recalibration import set_statistics
from singe.removal import Removals, kept_elements, remove_units
from singe.request import Request
from singe.rounds import (
    CompressReport,
    Pruning,
    Round,
    describe,
    minutes_left,
    network_after,
)
from singe.score_checkpoint import digest_of
from singe.scores import Scores
from singe.seeding import derive, seed_all
from singe.snapshot import Snapshot
from singe.telling import progress_bar, say
from singe.tuner import Tuner
from singe.units import find_groups, small

ROUNDS = 5


@dataclass
class Loop:
    """One run. What changes while it goes on is in its checkpoints, and nothing else is.

    Attributes:
        kept: per group, the units of the original model that are left, in order.
        current: what is known of a round whose network is pruned but not yet fine-tuned.
        good: the network of the last good round, if there is a floor.
    """

    model: nn.Module
    snapshot: Snapshot
    pruning: Pruning
    request: Request
    tuner: Tuner
    calibrate: Iterable[Any]
    train: Iterable[Any]
    measure: Evaluate | None
    floor: float | None
    finetune: FinetuneFunction | None
    finetune_steps: int
    final_steps: int
    recalibrate: bool
    folder: Folder | None
    checkpoint_every: int
    on_round: Callable[[Round, Scores, Plan], None] | None
    progress: bool
    seed: int
    kept: dict[str, list[int]] = field(default_factory=dict)
    current: dict[str, Any] | None = None
    good: dict[str, Any] | None = None
    finished: bool = False

    def run(self, state: Mapping[str, Any] | None) -> CompressReport:
        """All rounds, or the rest of them after a checkpoint's ``state``."""
        self._survey()
        if state is not None:
            self._load(state)
        else:
            self._begin()
        while not self.finished:
            if self.current is None:
                self._prune()
            self._tune()
        return self.report

    # ------------------------------------------------------------------ the original model

    def _survey(self) -> None:
        """What is the same in every process that works on this run."""
        pruning = self.pruning
        seed_all(self.seed, "survey", loader=self.calibrate)
        example = first_batch(self.calibrate, device_of(self.model))
        tensors = [t for t in tree_leaves(example.raw) if isinstance(t, Tensor)]
        self.data = digest_of(tensors) if self.folder else ""
        graph = find_groups(self.model, small(example), self.request.layers, self.request.ignore)
        timing = pruning.timing if pruning.kind == "latency" else None
        self.original = Original(self.model, self.snapshot, graph, example, timing)
        self.choice = Choice(
            self.model, self.original, pruning, self.request, self.calibrate, self.seed
        )
        full = self.original.full
        self.report = CompressReport(full["macs"], int(full["params"]), None)
        self.kept = self.original.everything()

    def _begin(self) -> None:
        self.report.metric_before = self._metric()
        before = self.report.metric_before
        if self.floor is not None and before is not None and not before >= self.floor:  # or NaN
            raise OptionError(
                f"the unpruned model's metric is {before:.4f}, below accuracy_floor={self.floor}; the floor "
                "is on the metric's own scale, accuracies from batches 0 to 1"
            )
        if self.pruning.order == "layerwise":
            self._scores, self._round_plan = self.choice.settle_visits(self.kept)
            self._write_decision(0)
        else:
            choice, groups = self.choice, self.original.graph.groups
            warn_of_target(
                self.pruning.kind, choice.target, choice.full, choice.limits, groups, stacklevel=6
            )
        self._note_plan()

    # ------------------------------------------------------------------ one round

    def _prune(self) -> None:
        index, began = len(self.report.rounds) + 1, time.perf_counter()
        if index > self.choice.rounds:  # nothing had to go
            self._finish()
            return
        try:
            scores, graph, plan = self.choice.of_round(index, self.kept)
        except BudgetError as error:
            if index == 1 or not self.choice.may_fall_short:
                raise
            # What is done stays, and another process may try this round again.
            self.report.stopped = (
                f"{self.choice.why_short(error)}; this is {network_after(index - 1)}"
            )
            warnings.warn(f"stopped: {self.report.stopped}", stacklevel=5)
            self._end()
            return
        self._remove([(g, plan[g.name]) for g in graph.groups if g.name in plan])
        for name, units in plan.items():
            gone = set(units)
            self.kept[name] = [k for u, k in enumerate(self.kept[name]) if u not in gone]
        changed = self.recalibrate and plan.n_units > 0
        if changed and set_statistics(self.model, self.calibrate, self.seed, index):
            self.tuner.restart_statistics()
        self._scores, self._round_plan = scores, plan
        self.current = {
            "units": plan.n_units,
            "metric": self._metric(),
            "seconds": time.perf_counter() - began,
            "tuned": 0.0,
        }
        self._write_decision(index)
        steps = self.finetune_steps + (self.final_steps if index == self.choice.rounds else 0)
        self.current["steps"] = steps
        self.tuner.start(0 if self.finetune else steps)
        self._save()

    def _remove(self, removals: Removals) -> None:
        if not removals:
            return
        if self.tuner.follows:
            shapes = {n: p.shape for n, p in unwrapped(self.model).named_parameters()}
            kept = kept_elements(self.model, self.original.batch, removals)
            self.tuner.follow(kept, shapes)
        remove_units(self.model, self.original.batch, removals)

    def _tune(self) -> None:
        if self.current is None:
            return
        index = len(self.report.rounds) + 1
        began = time.perf_counter()
        loss = self._finetune(index) if self.finetune else self._train(index)
        current = self.current
        training = current["tuned"] + time.perf_counter() - began
        with self.tuner.averaged():
            metric = self._metric()
        done = Round(
            *count(self.model, self.original.batch), current["units"], current["metric"], metric, loss,
            current["seconds"], current["tuned"] + time.perf_counter() - began, current["steps"],
            {name: len(units) for name, units in self.kept.items()},
        )  # fmt: skip
        self.current = None
        if self.floor is not None and metric is not None and not metric >= self.floor:  # or NaN
            self._roll_back(done, index)
        else:
            self.report.rounds.append(done)
            self._note_plan()
            self.good = self._network() if self.floor is not None else None
        self._tell(done, index, training)
        if self.report.stopped or index == self.choice.rounds:
            self._finish()
        else:
            self._save()

    def _train(self, index: int) -> float | None:
        title, last = f"round {index}/{self.choice.rounds}: fine-tuning", time.perf_counter()
        steps, done = self.tuner.steps, self.tuner.step
        with progress_bar(title, steps, self.progress, done) as advance:

            def after_step() -> None:
                nonlocal last
                advance()
                step = self.tuner.step
                if step % self.checkpoint_every == 0 and step < self.tuner.steps:
                    assert self.current is not None
                    now = time.perf_counter()
                    self.current["tuned"], last = self.current["tuned"] + now - last, now
                    self._save()

            return self.tuner.run(after_step)

    def _finetune(self, index: int) -> float | None:
        assert self.finetune is not None
        assert self.current is not None
        seed = derive(self.seed, "stage", index)
        seed_all(self.seed, "stage", index, loader=self.train)
        stage = Stage(
            index, self.choice.rounds, self.current["steps"], seed, self.train, self.tuner.teacher
        )
        return call_finetune(self.finetune, self.model, stage)

    def _roll_back(self, done: Round, index: int) -> None:
        self.report.abandoned = done
        self.report.stopped = (
            f"the metric after round {index} was {done.metric_finetuned:.4f}, below "
            f"accuracy_floor={self.floor}; this is {network_after(index - 1)}"
        )
        if self.good is None:
            self.original.restore()
            self.kept, self.tuner.average = self.original.everything(), None
        else:
            self._return_to(self.good)
        self.good = None

    def _finish(self) -> None:
        self._end()
        self._save()

    def _end(self) -> None:
        self.tuner.keep_average()
        self.finished = True
        if self.choice.may_fall_short:  # timed once, not after every round
            self._note_plan()

    # ------------------------------------------------------------------ checkpoints

    def _network(self) -> dict[str, Any]:
        """The network as it is: what is left of the original, its values and their average."""
        average = self.tuner.average
        return {
            "kept": {name: list(units) for name, units in self.kept.items()},
            "values": self.original.values(),
            "frozen": [n for n, p in self._parameters() if not p.requires_grad],
            "average": None if average is None else {n: t.clone() for n, t in average.items()},
        }

    def _return_to(self, network: Mapping[str, Any]) -> None:
        self.kept = {name: list(units) for name, units in network["kept"].items()}
        self.original.rebuild(self.kept, network["values"])
        for name, parameter in self._parameters():  # a finetune function may freeze and thaw
            parameter.requires_grad_(name not in network["frozen"])
        average, device = network["average"], device_of(self.model)
        self.tuner.average = (
            None if average is None else {n: t.to(device) for n, t in average.items()}
        )

    def _parameters(self) -> Iterable[tuple[str, nn.Parameter]]:
        return unwrapped(self.model).named_parameters()

    def _save(self) -> None:
        if self.folder is None:
            return
        report = tree_map(finite, self.report.to_dict())
        self.folder.write("report.json", json.dumps(report, indent=1, allow_nan=False))
        self.folder.write("plan.json", self.report.plan.to_json())
        self.folder.save(
            {
                "network": self._network(),
                "tuner": self.tuner.state(),
                "report": self.report.to_dict(),
                **self.choice.state(),
                "current": self.current,
                "good": self.good,
                "finished": self.finished,
                "max_memory": self.choice.request.max_memory,
                "threads": torch.get_num_threads(),
                "data": self.data,
            }
        )

    def _load(self, state: Mapping[str, Any]) -> None:
        if state["threads"] != torch.get_num_threads():
            warnings.warn(
                f"the run used {state['threads']} threads, this process has "
                f"{torch.get_num_threads()}: sums may differ in their last bits",
                stacklevel=5,
            )
        if state["data"] != self.data:
            warnings.warn(
                "the first calibration batch is not the one that the run began with; on other data, or in an "
                "order that no seed decides, it does not end as it would have",
                stacklevel=5,
            )
        self.report = CompressReport.from_dict(state["report"])
        self._return_to(state["network"])
        if not state["finished"]:
            self.tuner.load(state["tuner"])
        self.choice.load(state)
        self.current, self.good = state["current"], state["good"]
        self.finished = state["finished"]
        # What fits in memory decides how sums are cut into passes.
        choice = self.choice
        choice.request = replace(choice.request, max_memory=state["max_memory"])

    def _write_decision(self, index: int) -> None:
        if self.folder is None:
            return
        self.folder.write(f"round-{index:02d}.plan.json", self._round_plan.to_json())
        self.folder.keep(f"round-{index:02d}.scores.safetensors", self._scores.save)

    # ------------------------------------------------------------------ telling

    def _metric(self) -> float | None:
        if self.measure is None:
            return None
        # A metric of the user's may leave other modes.
        with in_mode(self.model, training=None), torch.enable_grad():
            return self.measure(self.model)

    def _note_plan(self) -> None:
        """The plan of the whole run, as far as it has come."""
        report = self.report
        left = float(sum(map(len, self.kept.values())))
        after = {"macs": report.macs_after, "params": report.params_after, "channels": left}
        if self.finished and self.original.watch is not None:
            after["latency"] = self.original.latency()
        meta = {
            "target": {self.pruning.kind: self.choice.target},
            "ranking": self.pruning.ranking,
            "criterion": self.request.criterion,
            "before": self.original.full,
            "after": after,
            "rejected": {**self.original.graph.rejected, **self.choice.failed},
        }
        rounds = [r.kept for r in report.rounds]
        report.plan = self.original.plan(self.kept, meta, rounds, self.choice.limits)

    def _tell(self, done: Round, index: int, training: float) -> None:
        left = minutes_left(
            done, training, self.choice.rounds - index, self.finetune_steps, self.final_steps
        )
        told = "" if self.report.stopped else left
        say(
            f"round {index}/{self.choice.rounds}: {describe(done, self.report)}{told}",
            self.progress,
        )
        if self.report.stopped:
            say(f"stopped: {self.report.stopped}", self.progress)
        if self.on_round is None:
            return
        if not hasattr(self, "_scores"):  # decided in the process that was continued
            assert self.folder is not None
            prefix = self.folder.path / f"round-{index:02d}"
            self._scores = Scores.load(f"{prefix}.scores.safetensors")
            self._round_plan = Plan.load(f"{prefix}.plan.json")
        self.on_round(done, self._scores, self._round_plan)
