"""``singe.prune``: carry out a plan, physically and in place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from singe.cost import count, count_without
from singe.data import device_of, example_batch
from singe.errors import ModelError, OptionError, ScoresError, expect
from singe.gradients import check_changeable, gradients_on
from singe.graph import Group, expect_model, private_copy, unwrapped
from singe.plan import Plan
from singe.removal import remove_units
from singe.scores import ScoreTable, fingerprint
from singe.snapshot import Snapshot
from singe.units import find_groups, names_of, small


@dataclass(frozen=True)
class PruneReport:
    """What pruning changed.

    Attributes:
        macs_before: per sample, as Torch-Pruning counts them; likewise ``macs_after``.
        params_before: number of parameters; likewise ``params_after``.
        removed: group -> number of units that went; only groups of the plan, like the next one.
        kept: group -> number of units that are left.
    """

    macs_before: float
    macs_after: float
    params_before: int
    params_after: int
    removed: dict[str, int]
    kept: dict[str, int]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"{sum(self.removed.values())} units removed: MACs {self.macs_before:.4g} -> "
            f"{self.macs_after:.4g} ({self.macs_after / self.macs_before:.1%}), parameters "
            f"{self.params_before:,} -> {self.params_after:,} "
            f"({self.params_after / self.params_before:.1%})"
        )


@gradients_on()
def prune(
    model: nn.Module, plan: Plan | Mapping[str, Sequence[int]], example_inputs: Any
) -> PruneReport:
    """Remove the units of ``plan`` from ``model``, in place.

    Parameters of the touched layers are new, smaller objects afterwards: make a new optimizer. The
    removal is rehearsed on a copy first, so that a plan that does not fit leaves the model as it was.

    Args:
        model: pruned in place; mode and ``requires_grad`` flags are kept.
        plan: from :func:`singe.plan`, or by hand: ``{"layer1.0.conv1": [3, 7]}``, the units to remove.
        example_inputs: a tensor, a tuple of arguments or a dict, as for Torch-Pruning.

    Returns:
        A :class:`PruneReport`; ``print`` shows it in a line.

    Raises:
        ScoresError: the plan was made for another model, or names units that are not there.
        ModelError: a layer of the plan is unknown or cannot be pruned, or the model was made in
            inference mode.
    """
    expect_model(model)
    check_changeable(model)
    if isinstance(plan, ScoreTable):
        raise OptionError(
            "plan holds scores; make a plan of them first: singe.plan(model, scores, ...)"
        )
    expect("plan", plan, Mapping, "a singe.Plan, or a dict of the units to remove from each layer")
    if not isinstance(plan, Plan):
        plan = Plan(plan)
    expected = plan.meta.get("fingerprint")
    if expected is not None and expected != fingerprint(model):
        raise ScoresError(
            "this plan was made for another model (names or shapes differ); was it pruned since? "
            "Score the model again and make a new plan"
        )
    batch = small(example_batch(example_inputs, device_of(model)))
    removals = [] if not plan else _resolve(model, plan, batch)
    rehearsal = private_copy(model, trainable=True)
    macs_before, params_before = count(model, batch)
    macs_after, params_after = count_without(rehearsal, batch, removals)
    with Snapshot(model) as snapshot:  # an interrupt between two groups would leave it inconsistent
        remove_units(model, batch, removals)
        snapshot.discard()
    return PruneReport(
        macs_before,
        macs_after,
        params_before,
        params_after,
        {group.name: len(units) for group, units in removals},
        {group.name: group.n_units - len(units) for group, units in removals},
    )


def _resolve(model: nn.Module, plan: Plan, batch: Any) -> list[tuple[Group, list[int]]]:
    names_of(dict(unwrapped(model).named_modules()), plan, "plan")
    graph = find_groups(model, batch, layers=list(plan))
    covered = {name for group in graph.groups for name in (group.name, *group.layers)}
    for name in plan:
        if name not in covered:
            raise ModelError(f"layer {name!r} cannot be pruned: a plan names layers, no containers")
    removals = []
    for group in graph.groups:
        names = [name for name in plan if name == group.name or name in group.layers]
        units = sorted({unit for name in names for unit in plan[name]})
        if units[0] < 0 or units[-1] >= group.n_units:
            raise ScoresError(
                f"the plan removes unit {units[0] if units[0] < 0 else units[-1]} of {group.name!r}, "
                f"which has units 0..{group.n_units - 1}"
            )
        if len(units) == group.n_units:
            raise ScoresError(
                f"the plan removes all {group.n_units} units of {group.name!r}; a layer must keep "
                "at least one"
            )
        removals.append((group, units))
    return removals
