"""What goes in each round of the entwined loop: which groups are scored, the round's target, its plan."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from singe.errors import NonFiniteError
from singe.graph import ModelGraph
from singe.limits import Limits, absolute, limits_of
from singe.original import Original
from singe.plan import Plan, make_plan
from singe.request import Request
from singe.rounds import Pruning, portions, target_after
from singe.scores import Scores
from singe.scoring import carry_out
from singe.seeding import random_state_kept, seed_all
from singe.units import groups_again

ROUNDS = 5
Kept = Mapping[str, list[int]]


@dataclass
class Choice:
    """Of one run.

    Methods are given what is ``kept``: per group, the units of the original model that are left, in order.

    Attributes:
        visits: the groups of each round, under ``order="layerwise"``.
        quota: units that each group still has to lose, under ``order="layerwise"``.
        failed: groups that did not pass their check any more after some round, and why.
    """

    model: nn.Module
    original: Original
    pruning: Pruning
    request: Request
    calibrate: Iterable[Any]
    seed: int
    visits: list[list[str]] | None = None
    quota: dict[str, int] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        pruning = self.pruning
        self.full = self.original.full[pruning.kind]
        self.target = absolute(pruning.target, self.full)
        self.limits: Limits = limits_of(
            self.model, self.original.graph, pruning.max_pruning_ratio, pruning.min_keep,
            pruning.max_keep, round_to=pruning.round_to,
        )  # fmt: skip

    @property
    def rounds(self) -> int:
        """How many rounds there are in all."""
        return self.pruning.rounds or ROUNDS if self.visits is None else len(self.visits)

    def settle_visits(self, kept: Kept) -> tuple[Scores, Plan]:
        """How many units each group loses, and which round it has, from one scoring of the whole network."""
        scores, graph = self._score(kept, kept, 0)
        plan = self._towards(self.target, kept, graph, scores, 0)
        self.quota = {name: len(units) for name, units in plan.items()}
        names = self.original.in_order_of_calls(plan)
        if self.pruning.visit == "damage":
            names.sort(key=lambda n: float(scores[n][plan[n]].sum()))
        self.visits = portions(names, self.pruning.rounds)
        if not names:
            warnings.warn(
                "the network meets the target as it is, so no layer is visited and nothing is fine-tuned",
                stacklevel=7,
            )
        return scores, plan

    def of_round(self, index: int, kept: Kept) -> tuple[Scores, ModelGraph, Plan]:
        """The scores of a round, the groups they are of, and what goes.

        Raises:
            BudgetError: the round's target is out of reach.
        """
        wanted = [name for name, units in kept.items() if len(units) > 1]
        if self.visits is not None:
            wanted = self.visits[index - 1]
        if not wanted:  # every group is down to its last unit
            return self._no_scores(), ModelGraph((), {}, {}, {}), Plan({})
        scores, graph = self._score_again(wanted, kept, index)
        self._note_failed(wanted, graph, index)
        if self.visits is not None:
            return scores, graph, self._settled(graph, scores)
        target = target_after(self.pruning.schedule, index / self.rounds, self.full, self.target)
        return scores, graph, self._towards(target, kept, graph, scores, index)

    @property
    def may_fall_short(self) -> bool:
        """Whether a later round's target may be out of reach: times are never exact, and groups may fail."""
        return self.original.watch is not None or bool(self.failed)

    def why_short(self, error: Exception) -> str:
        """Why a round's target is out of reach."""
        if not self.failed:
            return str(error)
        left = "; ".join(f"all units of {name!r} ({why})" for name, why in self.failed.items())
        return f"the target is out of reach with {left}"

    def state(self) -> dict[str, Any]:
        """What a checkpoint has to hold of it."""
        return {"visits": self.visits, "quota": self.quota, "failed": self.failed}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state` gave."""
        self.visits, self.quota = state["visits"], state["quota"]
        self.failed = state.get("failed", {})

    # ------------------------------------------------------------------ scores

    def _score(self, wanted: Collection[str], kept: Kept, index: int) -> tuple[Scores, ModelGraph]:
        """Of these groups; what else could be removed by now is not the run's."""
        seed_all(self.seed, "score", index, loader=self.calibrate)
        own = {
            g.name: (g.layers, len(kept[g.name]))
            for g in self.original.graph.groups
            if g.name in wanted
        }
        with random_state_kept():
            graph = groups_again(self.model, self.original.batch, own, self.request.ignore)
        if not graph.groups:
            return self._no_scores(), graph
        scores, _ = carry_out(self.request, self.model, self.calibrate, graph)
        assert isinstance(scores, Scores)
        return scores, graph

    def _score_again(
        self, wanted: Collection[str], kept: Kept, index: int
    ) -> tuple[Scores, ModelGraph]:
        try:
            return self._score(wanted, kept, index)
        except NonFiniteError as error:
            if index == 1:
                raise
            raise NonFiniteError(
                f"after the fine-tuning of round {index - 1} the network cannot be scored: {error}. If the "
                "fine-tuning diverged, lower `lr`"
            ) from error

    def _no_scores(self) -> Scores:
        return Scores({}, {}, {"criterion": self.request.criterion})

    def _note_failed(self, wanted: Iterable[str], graph: ModelGraph, index: int) -> None:
        """Training may undo what the check of a group relies on: a branch that was closed may open."""
        found = {g.name for g in graph.groups} | self.failed.keys()
        for name in [name for name in wanted if name not in found]:
            root = graph.rejected_layers.get(name, name)
            why = graph.rejected.get(root, "its units go with those of another by now")
            self.failed[name] = f"not in round {index}: {why}"
            warnings.warn(
                f"group {name!r} fails its check in round {index} and keeps its units, by which the target "
                f"may be missed: {why}",
                stacklevel=7,
            )

    # ------------------------------------------------------------------ plans

    def _towards(
        self, target: float, kept: Kept, graph: ModelGraph, scores: Scores, index: int
    ) -> Plan:
        last = self.target
        if self.pruning.kind == "channels":
            # Not in the graph are groups that are down to one unit, or failed their check.
            present = {g.name for g in graph.groups}
            left_out = sum(len(units) for name, units in kept.items() if name not in present)
            target, last = target - left_out, last - left_out
        timed = self.original.watch is not None
        return make_plan(
            self.model, graph, scores, self.original.batch, self.pruning.kind, target,
            ranking=self.pruning.ranking, limits=self.limits, last=last, watch=self.original.watch,
            milliseconds=self.original.latency() if timed and index > 1 else None,
        )  # fmt: skip

    def _settled(self, graph: ModelGraph, scores: Scores) -> Plan:
        """As many as were settled: no more, no less, and whatever the network costs then."""
        exact = {g.name: g.n_units - self.quota.get(g.name, 0) for g in graph.groups}
        limits = Limits(exact, exact, 1, dict.fromkeys(exact, "settled by the first scoring"))
        total = float(sum(g.n_units for g in graph.groups))
        return make_plan(
            self.model, graph, scores, self.original.batch, "channels", total, ranking="local",
            limits=limits,
        )  # fmt: skip
