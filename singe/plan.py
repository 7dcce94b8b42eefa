"""Which units go: a plan made from scores for a target, or by hand."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn

from singe.cost import CostModel, count
from singe.criteria import choose
from singe.data import Batch, device_of, example_batch
from singe.errors import BudgetError, OptionError, ScoresError
from singe.files import replacing
from singe.graph import ModelGraph, private_copy
from singe.removal import remove_units
from singe.scores import Scores
from singe.units import find_groups, small

RANKINGS = ("global", "local")
# A layer cut to a few channels does not recover in fine-tuning; a single round can do it.
MAX_PRUNING_RATIO = 0.75


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
        self._remove = {
            name: sorted({_unit(name, u) for u in units})
            for name, units in remove.items()
            if len(units)
        }
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

    def save(self, path: str | PathLike[str]) -> None:
        """Write as JSON, at once or not at all."""
        content = json.dumps({"remove": self._remove, "meta": self.meta}, indent=1)
        with replacing(path) as partial:
            partial.write_text(content)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Plan:
        """Read what :meth:`save` wrote.

        Raises:
            ScoresError: the file is no plan.
        """
        try:
            content = json.loads(Path(path).read_text())
            return cls(content["remove"], content.get("meta"))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ScoresError(f"cannot read a plan from {path}: {error}") from error


def _unit(name: str, unit: Any) -> int:
    if isinstance(unit, bool | float | str):
        raise ScoresError(f"the plan for {name!r} holds {unit!r}; units are integers")
    return int(unit)


def plan(
    model: nn.Module,
    scores: Scores,
    example_inputs: Any,
    *,
    macs: float | None = None,
    params: float | None = None,
    channels: float | None = None,
    ranking: str = "global",
    max_pruning_ratio: float = MAX_PRUNING_RATIO,
) -> Plan:
    """Choose the units to remove: the lowest scores that meet a target from below.

    Args:
        model: the model the scores were computed on; not changed.
        scores: what :func:`singe.score` returned.
        example_inputs: a tensor, a tuple of arguments or a dict, as for Torch-Pruning.
        macs: target in multiply-accumulates: a share of the model's (<= 1) or an absolute number.
        params: the same in parameters. Exactly one of ``macs``, ``params``, ``channels`` is given.
        channels: the same in units of the scored groups.
        ranking: ``"global"`` compares all units with each other, ``"local"`` takes the same share of
            every group.
        max_pruning_ratio: no group loses more than this share of its units, and none all of them.

    Returns:
        A :class:`Plan`; ``plan.meta`` holds the expected cost.

    Raises:
        ScoresError: scores of another model.
        BudgetError: the target cannot be met; names the smallest that can.
        OptionError: not exactly one target, or a value out of range.
    """
    scores.check(model)
    kind, value = target_of(macs=macs, params=params, channels=channels)
    check_ratio(max_pruning_ratio)
    batch = small(example_batch(example_inputs, device_of(model)))
    graph = find_groups(model, batch, layers=list(scores))
    floors = floors_of({g.name: g.n_units for g in graph.groups}, max_pruning_ratio)
    made = make_plan(model, graph, scores, batch, kind, value, ranking=ranking, floors=floors)
    made.meta["max_pruning_ratio"] = max_pruning_ratio
    return made


def make_plan(
    model: nn.Module,
    graph: ModelGraph,
    scores: Scores,
    batch: Batch,
    kind: str,
    target: float,
    *,
    ranking: str,
    floors: Mapping[str, int],
    last: float | None = None,
) -> Plan:
    """:func:`plan` for a graph that is at hand already.

    Args:
        kind: ``"macs"``, ``"params"`` or ``"channels"``.
        target: a share (<= 1) or an absolute number.
        floors: units that every group keeps at least.
        last: a later, lower target that must be reachable as well.
    """
    choose("ranking", ranking, RANKINGS)
    cost = CostModel(model, graph, batch)
    full = cost({})
    target = absolute(target, full[kind])
    groups = {g.name: g for g in graph.groups}
    order = _order(scores, {n: max(0, g.n_units - floors[n]) for n, g in groups.items()}, ranking)

    def removed(length: int) -> dict[str, list[int]]:
        gone: dict[str, list[int]] = {}
        for name, unit in order[:length]:
            gone.setdefault(name, []).append(unit)
        return gone

    def predicted(length: int) -> float:
        return cost({name: len(units) for name, units in removed(length).items()})[kind]

    def measured(length: int) -> dict[str, float]:
        twin = private_copy(model, trainable=True)
        remove_units(twin, batch, [(groups[n], u) for n, u in removed(length).items()])
        macs, params = count(twin, batch)
        return {"macs": macs, "params": params, "channels": full["channels"] - length}

    lowest = target if last is None else min(target, last)
    if predicted(len(order)) > lowest:
        _require(measured(len(order))[kind], lowest, kind, full[kind])
    if full[kind] <= target:
        length, after = 0, full
    else:
        length, after = _fewest(predicted, measured, len(order), kind, target)
        _require(after[kind], target, kind, full[kind])
    meta = {
        "target": {kind: target},
        "ranking": ranking,
        "criterion": scores.meta.get("criterion"),
        "fingerprint": scores.meta.get("fingerprint"),
        "before": full,
        "after": after,
    }
    return Plan(removed(length), meta)


def target_of(**targets: float | None) -> tuple[str, float]:
    """The one target that was given, ``(kind, value)``.

    Raises:
        OptionError: none or several, or not positive.
    """
    given = [(kind, value) for kind, value in targets.items() if value is not None]
    if len(given) != 1:
        raise OptionError(
            f"give exactly one target of {', '.join(targets)}, got "
            f"{', '.join(kind for kind, _ in given) or 'none'}"
        )
    kind, value = given[0]
    if not value > 0:
        raise OptionError(f"{kind} must be positive: a share (<= 1) or a number, got {value!r}")
    return kind, float(value)


def absolute(value: float, full: float) -> float:
    """A share (<= 1) of ``full``, or the number itself."""
    return value * full if value <= 1.0 else value


def check_ratio(max_pruning_ratio: float) -> None:
    """Raise OptionError unless the ratio lies in (0, 1]."""
    if not 0.0 < max_pruning_ratio <= 1.0:
        raise OptionError(f"max_pruning_ratio must lie in (0, 1], got {max_pruning_ratio!r}")


def floors_of(units: Mapping[str, int], max_pruning_ratio: float) -> dict[str, int]:
    """Units that every group keeps at least."""
    return {name: max(1, n - int(max_pruning_ratio * n)) for name, n in units.items()}


def _order(scores: Scores, caps: Mapping[str, int], ranking: str) -> list[tuple[str, int]]:
    """All units that may go, the first to go first; ties keep the order of groups and units."""
    candidates: list[tuple[float, str, int]] = []
    for name, values in scores.items():
        lowest = torch.argsort(values, stable=True)[: caps[name]]
        for rank, unit in enumerate(lowest.tolist()):
            key = float(values[unit]) if ranking == "global" else (rank + 1) / len(values)
            candidates.append((key, name, unit))
    candidates.sort(key=lambda c: c[0])
    return [(name, unit) for _, name, unit in candidates]


def _require(reached: float, target: float, kind: str, full: float) -> None:
    if reached > target:
        raise BudgetError(
            f"a target of {target:.4g} {kind} cannot be met: the smallest reachable is "
            f"{reached / full:.4f} of the model's {full:.4g} ({reached:.4g}); raise the target or "
            "max_pruning_ratio, or score more layers"
        )


def _fewest(
    predicted: Callable[[int], float],
    measured: Callable[[int], dict[str, float]],
    most: int,
    kind: str,
    target: float,
) -> tuple[int, dict[str, float]]:
    """The fewest units that meet the target by count, and the cost then; ``most`` if none do.

    The prediction leaves out activations and pooling. It chooses where to count next, corrected by
    how far off it was; after a few counts plain bisection takes over.
    """
    low, high = 0, most  # low misses the target
    best: dict[str, float] | None = None
    aim, counts = target, 0
    while high - low > 1:
        guess = _shortest(predicted, most, aim) if counts < 4 else (low + high) // 2
        guess = min(max(guess, low + 1), high - 1)
        after = measured(guess)
        counts += 1
        if after[kind] <= target:
            high, best = guess, after
        else:
            low = guess
        aim += target - after[kind]
    return high, best if best is not None else measured(high)


def _shortest(cost: Callable[[int], float], most: int, target: float) -> int:
    """Smallest length with ``cost(length) <= target``; cost falls with length."""
    low, high = 0, most
    while low < high:
        middle = (low + high) // 2
        if cost(middle) <= target:
            high = middle
        else:
            low = middle + 1
    return low
