"""What is asked for, in numbers: the target of a budget, and what every group may come to."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from singe.errors import OptionError
from singe.graph import Group, ModelGraph, is_inside, unwrapped
from singe.plain import POSITIVE, plain_count, plain_number
from singe.units import names_of

# A layer cut to a few channels does not recover in fine-tuning; a single round can do it.
MAX_PRUNING_RATIO = 0.75

Share = float | Mapping[str, float]


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
    return kind, plain_number(kind, value, POSITIVE, "a share (<= 1) or a number")


def absolute(value: float, full: float) -> float:
    """A share (<= 1) of ``full``, or the number itself; 0.57 of 100 are 57, not 56.99999999999999."""
    return round(value * full, 9) if value <= 1.0 else value


def floor_of(units: int, max_pruning_ratio: float) -> int:
    """Units that a group of so many keeps at least."""
    return max(1, units - rounded_down(max_pruning_ratio, units))


def rounded_down(share: float, units: int) -> int:
    """``share * units`` without what floats do to it: 0.29 of 100 are 29, not 28.999999999999996."""
    return math.floor(round(share * units, 9))


def plain_ratio(max_pruning_ratio: float) -> float:
    """The largest share that a group may lose.

    Raises:
        OptionError: outside (0, 1].
    """
    return plain_number("max_pruning_ratio", max_pruning_ratio, "(0, 1]")


def plain_share(given: Share | None, argument: str) -> float | dict[str, float] | None:
    """Plain numbers, whatever they were given as (NumPy's, tensors of one element).

    Raises:
        OptionError: no number, or outside [0, 1].
    """
    if isinstance(given, Mapping):
        if wrong := [name for name in given if not isinstance(name, str)]:
            raise OptionError(
                f"{argument} maps names of groups, layers or containers to shares, got {wrong[0]!r}"
            )
        return {n: plain_number(f"{argument} of {n!r}", s, "[0, 1]") for n, s in given.items()}
    return None if given is None else plain_number(argument, given, "[0, 1]")


@dataclass(frozen=True)
class Limits:
    """What every group may come to, in units.

    Attributes:
        least: units that a group keeps at least.
        most: units that it keeps at most.
        round_to: channels kept in a pruned layer are a multiple of this.
        why: what set ``least``, for the explanation.
    """

    least: dict[str, int]
    most: dict[str, int]
    round_to: int
    why: dict[str, str]

    def counts(self, group: Group) -> list[int]:
        """Numbers of units that a group can come to by losing some, the largest first."""
        width, most = group.root_channels.shape[1], min(self.most[group.name], group.n_units - 1)
        wanted = range(most, self.least[group.name] - 1, -1)
        return [kept for kept in wanted if kept * width % self.round_to == 0]


def limits_of(
    model: nn.Module,
    graph: ModelGraph,
    max_pruning_ratio: float = MAX_PRUNING_RATIO,
    min_keep: Share | None = None,
    max_keep: Share | None = None,
    ignore: Iterable[str | nn.Module] = (),
    round_to: int = 1,
) -> Limits:
    """Limits in units from shares of the groups as they are in ``graph``.

    Raises:
        OptionError: a share out of range, a name that belongs to no group, limits that contradict.
        ModelError: ``ignore`` names what the model does not have.
    """
    max_pruning_ratio = plain_ratio(max_pruning_ratio)
    round_to = plain_count("round_to", round_to, 1)
    names = dict(unwrapped(model).named_modules())
    ignored = _groups_of(names_of(names, ignore, "ignore"), graph, "ignore")
    low = _shares(min_keep, graph, "min_keep")
    high = _shares(max_keep, graph, "max_keep")
    named = isinstance(min_keep, Mapping)
    least, most, why = {}, {}, {}
    for group in graph.groups:
        name, n = group.name, group.n_units
        alone = _least_of_grouped(group, names)
        guard = max(floor_of(n, max_pruning_ratio), alone)
        asked = n - rounded_down(1.0 - low.get(name, 0.0), n)  # rounded up
        least[name], why[name] = max(guard, asked), "max_pruning_ratio"
        if rounded_down(max_pruning_ratio, n) == n:
            why[name] = "the last unit stays"
        if name in low and (asked > guard or named):
            least[name], why[name] = max(alone, asked), "min_keep"
        if least[name] == alone > 1:
            why[name] = "a grouped convolution keeps two"
        if name in ignored:
            least[name], why[name] = n, "ignore"
        highest = max(alone, rounded_down(high.get(name, 1.0), n))
        most[name] = n if name in ignored else min(n, highest)
        if most[name] < least[name]:
            raise OptionError(
                f"group {name!r} of {n} units shall keep at most {most[name]} (max_keep) and at "
                f"least {least[name]} ({why[name]}); change one of them"
            )
        width = group.root_channels.shape[1]
        if most[name] < n and not any(
            kept * width % round_to == 0 for kept in range(least[name], most[name] + 1)
        ):
            raise OptionError(
                f"group {name!r} shall keep {least[name]} to {most[name]} of its {n} units (max_keep), "
                f"and no number of channels there is a multiple of round_to={round_to}; change one"
            )
    return Limits(least, most, round_to, why)


def warn_of_target(
    kind: str,
    target: float,
    full: float,
    limits: Limits,
    groups: Iterable[Group],
    stacklevel: int = 4,
) -> None:
    """Say that a target is none where the whole model costs less, unless ``max_keep`` takes some."""
    if target > full and all(limits.most[g.name] == g.n_units for g in groups):
        unit = " ms" if kind == "latency" else ""
        warnings.warn(
            f"the whole model costs {full:.4g}{unit} {kind}, less than the target of {target:.4g}: nothing "
            "goes (a target up to 1 is a share of the model, a larger one an absolute number)",
            stacklevel=stacklevel,
        )


def _least_of_grouped(group: Group, modules: Mapping[str, nn.Module]) -> int:
    """Two, where one unit is a channel in every group of a convolution, else one.

    With a single channel in each it would be depthwise, whose units are others.
    """
    for member in group.rows:
        groups = getattr(modules[member.name], "groups", 1)
        if group.n_units > 1 and member.channels.shape[1] == groups > 1:
            return 2
    return 1


def _groups_of(names: Iterable[str], graph: ModelGraph, argument: str) -> set[str]:
    """Groups with a layer of these names, or inside a container of these names."""
    found: set[str] = set()
    for name in names:
        hit = {
            g.name
            for g in graph.groups
            if any(is_inside(layer, name) for layer in (g.name, *g.layers))
        }
        # A layer that was never scored keeps its channels anyway.
        if not hit and argument != "ignore":
            raise OptionError(
                f"{argument} names {name!r}, which no scored group has; groups: "
                f"{', '.join(g.name for g in graph.groups[:8])}"
                + (", ..." if len(graph.groups) > 8 else "")
            )
        found |= hit
    return found


def _depth(item: tuple[str, float]) -> int:
    return item[0].count(".") + 1 if item[0] else 0


def _shares(given: Share | None, graph: ModelGraph, argument: str) -> dict[str, float]:
    plain = plain_share(given, argument)
    if not isinstance(plain, dict):
        return {} if plain is None else {g.name: plain for g in graph.groups}
    # Containers first: a layer's own share goes before that of what it is in.
    return {
        group: share
        for name, share in sorted(plain.items(), key=_depth)
        for group in _groups_of([name], graph, argument)
    }
