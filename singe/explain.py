"""Why a plan takes what it takes: per group what goes, what it saves, and what ended it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, TypeGuard

from singe.budget import Step
from singe.cost import CostModel
from singe.graph import Group
from singe.limits import Limits
from singe.scores import Scores

if TYPE_CHECKING:
    from singe.plan import Plan

TOLD = ("units", "removed", "kept", "macs_saved")  # numbers of every group


def explain_groups(
    groups: Mapping[str, Group],
    scores: Scores,
    removed: Mapping[str, Sequence[int]],
    steps: Mapping[str, Sequence[Step]],
    limits: Limits,
    cost: CostModel,
) -> dict[str, dict[str, Any]]:
    """Per group, JSON-ready.

    ``highest_removed`` and ``lowest_kept`` are scores; ``score_removed`` is the share of the group's
    score that goes, None where scores are negative or all zero; ``macs_saved`` and ``params_saved``
    are what would come back if only this group got its units back (savings of neighbours overlap, so
    they do not add up).
    """
    found = _sizes(groups.values(), removed, cost)
    for name, group in groups.items():
        values, units = scores[name].tolist(), set(removed.get(name, ()))
        cut, kept = [values[u] for u in units], [v for u, v in enumerate(values) if u not in units]
        total = sum(values)
        found[name] |= {
            "highest_removed": max(cut, default=None),
            "lowest_kept": min(kept),
            # Of scores that may be negative (signed, ablation) a share says nothing.
            "score_removed": sum(cut) / total if min(values) >= 0 and total > 0 else None,
            "why": _why(group, len(units), steps[name], limits),
        }
    return found


def explain_rounds(
    groups: Sequence[Group],
    removed: Mapping[str, Sequence[int]],
    rounds: Sequence[Mapping[str, int]],
    limits: Limits,
    cost: CostModel,
) -> dict[str, dict[str, Any]]:
    """The same of what several rounds took; ``why`` says which. Scores are not told: each round had its own.

    Args:
        groups: of the original model.
        removed: in all rounds together.
        rounds: group -> number of units left, after every round.
        limits: of the original model, like the next.
        cost: of it.
    """
    found, by_name = _sizes(groups, removed, cost), {group.name: group for group in groups}
    for name, row in found.items():
        left = [row["units"], *(kept[name] for kept in rounds)]
        lost = [before - after for before, after in pairwise(left)]
        told = [f"{units} in round {number}" for number, units in enumerate(lost, 1) if units]
        row |= dict.fromkeys(("highest_removed", "lowest_kept", "score_removed"))
        row["why"] = ", ".join(told) or "keeps all"
        if limit := _limit(by_name[name], row["kept"], limits):
            row["why"] += ("; at its limit: " if told else ": ") + limit
        elif told and row["kept"] == limits.most[name]:
            row["why"] += "; as much as max_keep asks for"
    return found


def _sizes(
    groups: Iterable[Group], removed: Mapping[str, Sequence[int]], cost: CostModel
) -> dict[str, dict[str, Any]]:
    """What is known of a group without its scores."""
    gone = {name: len(units) for name, units in removed.items()}
    after = cost(gone)
    found = {}
    for group in groups:
        restored = cost({n: k for n, k in gone.items() if n != group.name})
        taken = gone.get(group.name, 0)
        found[group.name] = {
            "layers": list(group.layers),
            "units": group.n_units,
            "removed": taken,
            "kept": group.n_units - taken,
            "channels_per_unit": group.root_channels.shape[1],
            "macs_saved": restored["macs"] - after["macs"],
            "params_saved": restored["params"] - after["params"],
        }
    return found


def _why(group: Group, gone: int, steps: Sequence[Step], limits: Limits) -> str:
    if limit := _limit(group, group.n_units - gone, limits):
        return f"at its limit: {limit}" if gone else f"keeps all: {limit}"
    forced = sum(len(step.units) for step in steps if step.forced)
    if forced and gone == forced:
        return "as much as max_keep asks for"
    if gone == 0:
        return "keeps all: every unit ranks above the cut"
    return "units below the cut"


def _limit(group: Group, kept: int, limits: Limits) -> str:
    """What keeps the rest of a group, or nothing where more could go."""
    n, least, counts = group.n_units, limits.least[group.name], limits.counts(group)
    if least >= n:
        return limits.why[group.name]
    if not counts:
        return f"no multiple of round_to={limits.round_to} between {least} and {n}"
    if kept > counts[-1]:
        return ""
    rounded = f", round_to={limits.round_to}" if counts[-1] > least else ""
    return f"{limits.why[group.name]}{rounded}"


def is_told(meta: Mapping[str, Any]) -> bool:
    """Whether a plan's tables hold all that :func:`table` and reports read; a file may have been edited."""
    before, after, groups = meta.get("before"), meta.get("after"), meta.get("groups")
    return (
        _has(meta.get("target"))
        and _has(after)
        and _has(before, "macs", "channels", *after)
        and all(before.values())
        and {"criterion", "ranking"} <= meta.keys()
        and isinstance(meta.get("rejected", {}), Mapping)
        and isinstance(groups, Mapping)
        and all(_has(row, *TOLD) and isinstance(row.get("why"), str) for row in groups.values())
    )


def _has(numbers: Any, *keys: str) -> TypeGuard[Mapping[str, float]]:
    """Whether this is a table with a number for each of the keys; without keys, of numbers alone."""
    return (
        isinstance(numbers, Mapping)
        and bool(numbers)
        and all(isinstance(numbers.get(key), int | float) for key in keys or numbers)
    )


def table(plan: Plan) -> str:
    """The plan as text: the target, the cost before and after, and a line per group."""
    meta, rows = plan.meta, plan.rows()
    if not rows:
        lines = [f"{name}: {len(units)} units go" for name, units in plan.items()]
        edited = ["edited since it was planned"] if meta.get("groups") else []
        return "\n".join([repr(plan), *edited, *lines])
    kind, value = next(iter(meta["target"].items()))
    before, after = meta["before"], meta["after"]
    head = [
        f"{plan.n_units} of {before['channels']:.0f} units go, by {meta['criterion'] or 'given'} scores, "
        f"ranking {meta['ranking']!r}, for at most {value:.4g} {kind}"
        + (" (not reached)" if after.get(kind, 0.0) > value else ""),
        "; ".join(
            f"{k} {before[k]:.4g} -> {after[k]:.4g} ({after[k] / before[k]:.2%})" for k in after
        ),
    ]
    columns = {
        "group": [row["group"] for row in rows],
        "units": [str(row["units"]) for row in rows],
        "kept": [str(row["kept"]) for row in rows],
        "score lost": [_told(row, "score_removed", ".1%") for row in rows],
        "highest out": [_told(row, "highest_removed", ".3g") for row in rows],
        "lowest in": [_told(row, "lowest_kept", ".3g") for row in rows],
        "MACs saved": [f"{row['macs_saved'] / before['macs']:.2%}" for row in rows],
        "why": [row["why"] for row in rows],
    }
    lines = [""] * (1 + len(rows))
    for title, cells in columns.items():
        if not any(cells):
            continue
        width = max(map(len, (title, *cells)))
        for i, cell in enumerate((title, *cells)):
            text = cell.ljust(width) if title in ("group", "why") else cell.rjust(width)
            lines[i] = f"{lines[i]}  {text}" if lines[i] else text
    left_out = [f"left out: {name}: {why}" for name, why in meta.get("rejected", {}).items()]
    return "\n".join([*head, *(line.rstrip() for line in lines), *left_out])


def _told(row: Mapping[str, Any], key: str, form: str) -> str:
    value = row.get(key)
    return format(value, form) if isinstance(value, int | float) else ""
