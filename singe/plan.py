"""Which units go: a plan made from scores for a target, or by hand."""

from __future__ import annotations

import json
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from singe.budget import RANKINGS, Search, gather, order_steps, require, steps_of
from singe.cost import CostModel, count, count_without
from singe.criteria import choose
from singe.data import Batch, device_of, example_batch
from singe.errors import ScoresError, expect
from singe.explain import explain_groups, is_told, table
from singe.files import replacing
from singe.gradients import gradients_on
from singe.graph import ModelGraph, expect_model, private_copy, unwrapped
from singe.latency import Stopwatch, Timing, timing_of
from singe.limits import (
    MAX_PRUNING_RATIO,
    Limits,
    Share,
    absolute,
    limits_of,
    target_of,
    warn_of_target,
)
from singe.plain import plain
from singe.scores import Scores, require_one_per_unit, scores_for
from singe.units import find_groups, small

FORMAT = "singe-plan-1"


class Plan(Mapping[str, list[int]]):
    """Group name (or one of its layers) -> sorted indices of the units to remove.

    Indices are those of scores: where channels can only go together (grouped convolutions, GroupNorm),
    one unit is several channels.

    Attributes:
        meta: what it was made for and what it is expected to give (MACs, parameters); empty for a
            plan made by hand.
    """

    def __init__(
        self, remove: Mapping[str, Sequence[int]], meta: Mapping[str, Any] | None = None
    ) -> None:
        expect(
            "remove", remove, Mapping, "a mapping of groups or layers to units, {'conv1': [3, 7]}"
        )
        found = {name: _units(name, units) for name, units in remove.items()}
        self._remove = {name: units for name, units in found.items() if units}
        self.meta = dict(meta or {})

    def __getitem__(self, name: str) -> list[int]:
        return self._remove[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._remove)

    def __len__(self) -> int:
        return len(self._remove)

    @property
    def n_units(self) -> int:
        """Number of units that go."""
        return sum(map(len, self._remove.values()))

    def __repr__(self) -> str:
        return f"Plan({self.n_units} units of {len(self)} groups)"

    def rows(self) -> list[dict[str, Any]]:
        """One dict per group: units, kept, removed, the cut, what it saves, and why no more goes.

        Empty for a plan made by hand, or edited so that another number goes or a table has gaps: of that
        nothing is known but the units.
        """
        if not is_told(self.meta):
            return []
        found = self.meta["groups"]
        told = {name: row["removed"] for name, row in found.items() if row.get("removed")}
        if told != {name: len(units) for name, units in self.items()}:
            return []
        return [{"group": name, **row} for name, row in found.items()]

    def explain(self) -> str:
        """A table for reading: per group what goes, what that saves, and why."""
        return table(self)

    def save(self, path: str | PathLike[str]) -> None:
        """Write as JSON with one line per group, at once or not at all."""
        with replacing(path) as partial:
            partial.write_text(self.to_json())

    def to_json(self) -> str:
        """What :meth:`save` writes."""
        meta = {k: v for k, v in self.meta.items() if k != "groups"}
        remove, groups = _lines(self._remove), _lines(self.meta.get("groups", {}))
        return (
            f'{{\n"format": "{FORMAT}",\n"remove": {remove},\n"groups": {groups},\n'
            f'"meta": {json.dumps(meta, indent=1, allow_nan=False)}\n}}\n'
        )

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Plan:
        """Read what :meth:`save` wrote.

        Raises:
            ScoresError: the file is no plan.
        """
        try:
            return cls.from_json(Path(path).read_text())
        except OSError as error:
            raise ScoresError(f"cannot read a plan from {path}: {error}") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ScoresError(
                f"{path} holds no plan ({type(error).__name__}: {error}); give the plan.json that "
                "Plan.save, singe prune or singe compress wrote"
            ) from error

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The plan that :meth:`to_json` wrote."""
        content = json.loads(text)
        if content.get("format", FORMAT) != FORMAT:
            raise ValueError(f"its format is {content['format']!r}, and {FORMAT!r} is known here")
        meta, groups = dict(content.get("meta") or {}), content.get("groups")
        if groups and not all(isinstance(row, dict) for row in groups.values()):
            raise ValueError("its groups are no tables of what is known of them")
        if groups:
            meta["groups"] = groups
        return cls(content["remove"], meta)


def _lines(content: Mapping[str, Any]) -> str:
    """A JSON object with one entry per line, so that two plans can be compared by ``diff``."""
    entries = (f" {json.dumps(k)}: {json.dumps(v, allow_nan=False)}" for k, v in content.items())
    return "{\n" + ",\n".join(entries) + "\n}" if content else "{}"


def _units(name: str, units: Any) -> list[int]:
    if isinstance(units, Tensor) and units.dim() == 0:  # nonzero().squeeze() of a single one
        units = [units]
    if isinstance(units, str) or not isinstance(units, Iterable):
        raise ScoresError(f"the plan for {name!r} is {units!r}; give a list of units, [3, 7]")
    return sorted({_unit(name, unit) for unit in units})


def _unit(name: str, unit: Any) -> int:
    found = plain(unit)
    if isinstance(found, bool):
        raise ScoresError(
            f"the plan for {name!r} holds {found}; units are integers: of a mask, mask.nonzero().flatten()"
        )
    try:
        return operator.index(found)
    except TypeError:
        raise ScoresError(f"the plan for {name!r} holds {unit!r}; units are integers") from None


@gradients_on()
def plan(
    model: nn.Module,
    scores: Scores | Mapping[str, Tensor],
    example_inputs: Any,
    *,
    macs: float | None = None,
    params: float | None = None,
    channels: float | None = None,
    latency: float | None = None,
    ranking: str = "cost",
    round_to: int = 1,
    min_keep: Share | None = None,
    max_keep: Share | None = None,
    ignore: Iterable[str | nn.Module] = (),
    max_pruning_ratio: float = MAX_PRUNING_RATIO,
    timing: Timing | None = None,
) -> Plan:
    """Choose the units to remove: the lowest scores that meet a target from below.

    Args:
        model: the model the scores were computed on; not changed.
        scores: what :func:`singe.score` returned, or a mapping from layers to [U] numbers, higher = keep;
            of coupled layers the one after which :func:`singe.score` names the group.
        example_inputs: a tensor, a tuple of arguments or a dict, as for Torch-Pruning.
        macs: target in multiply-accumulates: a share of the model's (<= 1) or an absolute number.
        params: the same in parameters.
        channels: the same in units of the scored groups.
        latency: the same in *measured* time on the model's device: a share, or milliseconds (> 1).
            Exactly one of ``macs``, ``params``, ``channels``, ``latency`` is given.
        ranking: ``"cost"`` keeps the most score for the budget (the default: after fine-tuning it kept
            a point more accuracy on average over 17 criteria, ``docs/cifar10.md``), ``"global"``
            compares all units with each other, ``"local"`` takes the same share of every group,
            ``"isomorphic"`` the same share of every kind of group; see :mod:`singe.budget`.
        round_to: the channels kept in every pruned layer are a multiple of this.
        min_keep: share of its units that every group keeps at least: a number, or a mapping from
            names (of groups, their layers or containers) to numbers. A named group is exempt from
            ``max_pruning_ratio``.
        max_keep: share that every group, or a named one, keeps at most.
        ignore: layers that keep all their channels (names or modules, containers included).
        max_pruning_ratio: no group loses more than this share of its units, and none all of them.
        timing: batch size and number of runs for a target in ``latency``, not to be given with another;
            default one sample, 15 runs.

    Returns:
        A :class:`Plan`; ``plan.meta`` holds the expected cost.

    Raises:
        ScoresError: scores of another model, or none.
        NonFiniteError: NaN among them.
        BudgetError: the target cannot be met; names the smallest that can.
        OptionError: not exactly one target, or a value out of range.
    """
    expect_model(model)
    found = scores_for(scores, model)
    kind, value = target_of(macs=macs, params=params, channels=channels, latency=latency)
    timing = timing_of(timing, kind)
    choose("ranking", ranking, RANKINGS)
    batch = example_batch(example_inputs, device_of(model))
    watch = Stopwatch(model, batch, timing) if kind == "latency" else None
    batch = small(batch)
    graph = find_groups(model, batch, layers=list(found))
    for group in graph.groups:
        require_one_per_unit(found, group)
    limits = limits_of(model, graph, max_pruning_ratio, min_keep, max_keep, ignore, round_to)
    full = full_cost(model, graph, batch, watch)[kind]
    target = absolute(value, full)
    warn_of_target(kind, target, full, limits, graph.groups)
    return make_plan(
        model, graph, found, batch, kind, target, ranking=ranking, limits=limits, watch=watch
    )


def full_cost(
    model: nn.Module, graph: ModelGraph, batch: Batch, watch: Stopwatch | None = None
) -> dict[str, float]:
    """What the model costs as it is: MACs, parameters, units, and milliseconds if they are measured."""
    macs, params = count(model, batch)
    units = sum(g.n_units for g in graph.groups)
    full = {"macs": macs, "params": float(params), "channels": float(units)}
    return full | ({"latency": watch.reference_ms} if watch else {})


def make_plan(
    model: nn.Module,
    graph: ModelGraph,
    scores: Scores,
    batch: Batch,
    kind: str,
    target: float,
    *,
    ranking: str,
    limits: Limits,
    last: float | None = None,
    watch: Stopwatch | None = None,
    milliseconds: float | None = None,
) -> Plan:
    """:func:`plan` for a graph that is at hand already.

    Args:
        kind: ``"macs"``, ``"params"``, ``"channels"`` or ``"latency"``.
        target: in that unit; milliseconds for latency.
        limits: what every group may come to.
        last: a later, lower target that must be reachable as well.
        watch: measures latency; needed for that kind of target only.
        milliseconds: what the model takes as it is; default what the watch's reference takes.
    """
    groups = {g.name: g for g in graph.groups}
    seconds = watch.layer_seconds(model) if watch else None
    cost = CostModel(model, graph, batch, seconds)
    full = {k: v for k, v in cost({}).items() if k != "latency"}
    if watch:
        full["latency"] = watch.reference_ms if milliseconds is None else milliseconds

    def predict(gone: Mapping[str, int]) -> float:
        predicted = cost(gone)[kind]
        return predicted if not watch else full[kind] - 1e3 * (cost({})[kind] - predicted)

    def measure(gone: Mapping[str, Sequence[int]], runs: int | None = None) -> dict[str, float]:
        twin = private_copy(model, trainable=True)
        macs, params = count_without(twin, batch, [(groups[n], u) for n, u in gone.items()])
        left = full["channels"] - sum(map(len, gone.values()))
        after = {"macs": macs, "params": params, "channels": left}
        if watch:
            after["latency"] = watch.compare(twin, runs).share * watch.reference_ms
        return after

    confirm = partial(measure, runs=3 * watch.timing.runs if watch else None)
    whole = watch.reference_ms if watch else full[kind]
    steps = {g.name: steps_of(g, scores[g.name], limits) for g in graph.groups}
    modules = dict(unwrapped(model).named_modules())
    order = order_steps(steps, groups, ranking, cost, kind, modules)
    search = Search(order, cost, kind, target, predict, measure)
    lowest = target if last is None else min(target, last)
    if watch or search.predicted(len(order)) > lowest:
        reached = search.measured(len(order))[kind]
        if (
            watch and reached > lowest
        ):  # one slow pass is no reason to refuse: once more, and longer
            reached = confirm(search.removed(len(order)))[kind]
        require(reached, lowest, kind, whole, graph.rejected)
    first = search.measured(search.forced) if search.forced else full
    gone = order[: search.forced]
    if first[kind] <= target:
        after = first
    elif watch:
        length, after = search.fewest_timed(confirm)
        gone = order[:length]
    else:
        length, after = search.fewest()
        gone = order[:length]
        if ranking == "cost":
            gone, after = search.fill(length, after)
    require(after[kind], target, kind, whole, graph.rejected)
    removed = gather(gone)
    meta = {
        "target": {kind: target},
        "ranking": ranking,
        "criterion": scores.meta.get("criterion"),
        "fingerprint": scores.meta.get("fingerprint"),
        "round_to": limits.round_to,
        "before": full,
        "after": after,
        "rejected": graph.rejected,
        "groups": explain_groups(groups, scores, removed, steps, limits, cost),
    }
    if watch:
        meta["timing"] = asdict(watch.timing)
    return Plan(removed, meta)
