"""Which units go for a budget: limits, rankings, and the search for the fewest that meet a target.

Within a group all units cost the same, so the lowest scores go first there, whatever the ranking. The
ranking says how groups take turns:

- ``"global"``: by score, all units compared with each other;
- ``"local"``: the same share of every group;
- ``"isomorphic"``: by score among groups of the same structure, the same share of every structure (after
  Isomorphic Pruning, arXiv 2407.04616);
- ``"cost"``: by score per unit of the budget that removal saves, the saving counted anew whenever a
  neighbour has shrunk. That is the greedy rule for the knapsack "keep the most score within the
  budget". With fixed savings it is optimal but for the last unit; what that one leaves of the budget
  is filled by putting units back, the best first.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from singe.cost import CostModel, CostState
from singe.errors import BudgetError
from singe.graph import Group
from singe.limits import Limits

RANKINGS = ("global", "local", "isomorphic", "cost")
Cost = dict[str, float]


# ---------------------------------------------------------------------- steps and their order


@dataclass(frozen=True)
class Step:
    """Units of one group that go together: one, or as many as rounding asks for."""

    group: str
    units: tuple[int, ...]
    score: float  # their sum
    forced: bool  # more than ``max_keep`` would be left without it

    @property
    def mean(self) -> float:
        return self.score / len(self.units)


def steps_of(group: Group, values: Tensor, limits: Limits) -> list[Step]:
    """The steps of one group, the first to go first."""
    n, most = group.n_units, limits.most[group.name]
    lowest = torch.argsort(values, stable=True).tolist()
    steps, before = [], n
    for k in limits.counts(group):
        units = tuple(lowest[n - before : n - k])
        score = float(values[list(units)].double().sum())
        steps.append(Step(group.name, units, score, forced=before > most))
        before = k
    return steps


def order_steps(
    steps: Mapping[str, Sequence[Step]],
    groups: Mapping[str, Group],
    ranking: str,
    cost: CostModel,
    kind: str,
    modules: Mapping[str, nn.Module],
) -> list[Step]:
    """All steps, the first to go first; ties keep the order of groups and units."""
    if ranking == "cost":
        return _by_saving(steps, cost, kind)
    keyed: list[tuple[bool, float, Step]] = []
    if ranking == "isomorphic":
        for names in _structures(groups, modules).values():
            pool = sorted((s for n in names for s in steps[n]), key=lambda s: s.mean)
            total, gone = sum(groups[n].n_units for n in names), 0
            for step in pool:
                gone += len(step.units)
                keyed.append((not step.forced, gone / total, step))
    else:
        for name, own in steps.items():
            gone = 0
            for step in own:
                gone += len(step.units)
                key = step.mean if ranking == "global" else gone / groups[name].n_units
                keyed.append((not step.forced, key, step))
    keyed.sort(key=lambda k: k[:2])
    return [step for _, _, step in keyed]


def _structures(
    groups: Mapping[str, Group], modules: Mapping[str, nn.Module]
) -> dict[Any, list[str]]:
    """Names of the groups by what they are made of: the types of all layers that hold or read them."""
    found: dict[Any, list[str]] = {}
    for name, group in groups.items():
        layers = [(m.kind, type(modules[m.name]).__name__) for m in group.members]
        readers = [("reader", type(modules[m.name]).__name__) for m in group.consumers]
        found.setdefault(tuple(sorted(layers + readers)), []).append(name)
    return found


def _by_saving(steps: Mapping[str, Sequence[Step]], cost: CostModel, kind: str) -> list[Step]:
    """Lowest score per saving first.

    Savings only fall while neighbours shrink, so the key of a step only grows: a step that is still
    the lowest after its key was computed anew is the lowest of all.
    """
    state = CostState(cost)
    order: list[Step] = []
    position = dict.fromkeys(steps, 0)
    names = list(steps)
    heap: list[tuple[bool, float, int]] = []

    def push(index: int) -> None:
        own = steps[names[index]]
        if position[names[index]] < len(own):
            step = own[position[names[index]]]
            heapq.heappush(heap, (not step.forced, _per_saving(step, state, kind), index))

    for index in range(len(names)):
        push(index)
    while heap:
        free, key, index = heapq.heappop(heap)
        step = steps[names[index]][position[names[index]]]
        now = _per_saving(step, state, kind)
        if heap and (free, now, index) > heap[0] and now > key:
            heapq.heappush(heap, (free, now, index))
            continue
        state.remove(step.group, len(step.units))
        order.append(step)
        position[names[index]] += 1
        push(index)
    return order


def _per_saving(step: Step, state: CostState, kind: str) -> float:
    saving = max(state.saving(step.group, len(step.units), kind), 1e-30)
    return step.score / saving if step.score >= 0 else step.score * saving


# ---------------------------------------------------------------------- meeting the target


@dataclass(frozen=True)
class Search:
    """Finds the shortest prefix of ``order`` whose *counted* cost meets a target.

    Attributes:
        predict: units gone per group -> predicted cost, in the target's unit; quick.
        measure: units gone -> counted (timed) cost; slow, the last word.
    """

    order: Sequence[Step]
    cost: CostModel
    kind: str
    target: float
    predict: Callable[[Mapping[str, int]], float]
    measure: Callable[[Mapping[str, Sequence[int]]], Cost]

    def removed(self, length: int) -> dict[str, list[int]]:
        """Units gone per group after so many steps."""
        return gather(self.order[:length])

    def predicted(self, length: int) -> float:
        return self.predict({name: len(units) for name, units in self.removed(length).items()})

    def measured(self, length: int) -> Cost:
        return self.measure(self.removed(length))

    def fewest(self, counts: int = 8) -> tuple[int, Cost]:
        """The fewest steps that meet the target, and the cost then; all of them if none do.

        The prediction leaves out activations and pooling. It chooses where to count next, corrected
        by how far off it was; after a few counts plain bisection takes over.
        """
        low, high = self.forced, len(self.order)  # low misses the target
        best: Cost | None = None
        aim, done = self.target, 0
        while high - low > 1:
            guess = self._shortest(aim) if done < counts else (low + high) // 2
            guess = min(max(guess, low + 1), high - 1)
            after = self.measured(guess)
            done += 1
            if after[self.kind] <= self.target:
                high, best = guess, after
            else:
                low = guess
            aim += self.target - after[self.kind]
        return high, best if best is not None else self.measured(high)

    @property
    def forced(self) -> int:
        """Steps that go whatever the target; they come first."""
        return sum(step.forced for step in self.order)

    def _shortest(self, target: float) -> int:
        """Fewest steps with a predicted cost of at most ``target``; cost falls with every step."""
        low, high = 0, len(self.order)
        while low < high:
            middle = (low + high) // 2
            if self.predicted(middle) <= target:
                high = middle
            else:
                low = middle + 1
        return low

    def fill(self, length: int, after: Cost) -> tuple[list[Step], Cost]:
        """Put steps back, the highest score first, as long as the target stays met.

        Returns:
            the steps that stay gone, and the counted cost.
        """
        gone, closed = list(self.order[:length]), set[str]()
        while back := self._that_fit(gone, self.target - after[self.kind], closed):
            while back:
                left = [step for step in gone if step not in back]
                counted = self.measure(gather(left))
                if counted[self.kind] <= self.target:
                    gone, after = left, counted
                    break
                closed.add(back.pop().group)  # the count knows better than the prediction
        return gone, after

    def _that_fit(self, gone: Sequence[Step], slack: float, closed: Collection[str]) -> list[Step]:
        """Steps that may come back by their predicted cost, the highest score first."""
        state, last = CostState(self.cost), dict[str, list[Step]]()
        for step in gone:
            state.remove(step.group, len(step.units))
            if not step.forced and step.group not in closed:
                last.setdefault(step.group, []).append(step)
        back: list[Step] = []
        while True:
            # Within a group the last to go is the first to come back.
            price = {
                name: -state.saving(name, -len(steps[-1].units), self.kind)
                for name, steps in last.items()
                if steps
            }
            able = [name for name, added in price.items() if added <= slack]
            if not able:
                return back
            step = last[max(able, key=lambda name: last[name][-1].score)][-1]
            if step.score <= 0:
                return back
            slack -= price[step.group]
            state.remove(step.group, -len(step.units))
            back.append(last[step.group].pop())

    def fewest_timed(
        self, confirm: Callable[[Mapping[str, Sequence[int]]], Cost]
    ) -> tuple[int, Cost]:
        """As :meth:`fewest` for a cost that is timed: every time is a little off, none is repeated.

        At most ten candidates are timed: two where the prediction says, then by bisection. The best
        is timed again and longer; as long as that one misses the target, a fiftieth of the steps
        more go.
        """
        low, high, aim = self.forced, len(self.order), self.target
        for trial in range(10):
            if high - low <= max(1, len(self.order) // 100):
                break
            guess = self._shortest(aim) if trial < 2 else (low + high) // 2
            guess = min(max(guess, low + 1), high - 1)
            after = self.measured(guess)[self.kind]
            if after <= self.target:
                high = guess
            else:
                low = guess
            if 0.0 <= self.target - after <= 0.01 * self.target:
                break
            aim += self.target - after
        after_all = confirm(self.removed(high))
        while after_all[self.kind] > self.target and high < len(self.order):
            high = min(len(self.order), high + max(1, len(self.order) // 50))
            after_all = confirm(self.removed(high))
        return high, after_all


def gather(steps: Iterable[Step]) -> dict[str, list[int]]:
    """Units per group."""
    gone: dict[str, list[int]] = {}
    for step in steps:
        gone.setdefault(step.group, []).extend(step.units)
    return gone


def left_out(rejected: Mapping[str, str]) -> str:
    """The layers that have no units and why, in a sentence; three reasons at most, empty without any."""
    names: dict[str, list[str]] = {}
    for name, why in rejected.items():
        names.setdefault(why, []).append(name)
    told = [
        f"{', '.join(layers[:3])}{', ...' if len(layers) > 3 else ''} ({why})"
        for why, layers in list(names.items())[:3]
    ] + (["..."] if len(names) > 3 else [])
    return f"Left out: {'; '.join(told)}" if told else ""


def require(
    reached: float, target: float, kind: str, full: float, rejected: Mapping[str, str]
) -> None:
    """Raise BudgetError where even the most that may be removed misses the target.

    Args:
        full: what the unpruned model costs.
        rejected: layers that have no units, and why.
    """
    if reached > target:
        unit = " ms" if kind == "latency" else ""
        advice = (
            "raise the target or max_pruning_ratio, lower min_keep or round_to, ignore less, or score more "
            "layers (a target up to 1 is a share of the model, a larger one an absolute number)"
        )
        if kind == "latency" and reached >= full:
            advice = (
                "the pruned model was no faster: it is too small for its layers to decide, or the machine "
                "was busy; time larger batches and more runs, timing=singe.Timing(batch_size=..., runs=...)"
            )
        raise BudgetError(
            f"a target of {target:.4g}{unit} {kind} cannot be met: the smallest reachable is "
            f"{reached / (full or 1.0):.4f} of the model's {full:.4g} ({reached:.4g}); "
            + ". ".join(filter(None, (advice, left_out(rejected))))
        )
