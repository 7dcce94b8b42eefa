"""Why a plan takes what it takes: per group what goes, what it saves, and what ended it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from singe.budget import Step
from singe.cost import CostModel
from singe.graph import Group
from singe.limits import Limits
from singe.scores import Scores

if TYPE_CHECKING:
    from singe.plan import Plan


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
    gone = {name: len(units) for name, units in removed.items()}
    after = cost(gone)
    found: dict[str, dict[str, Any]] = {}
    for name, group in groups.items():
        values, units = scores[name].tolist(), set(removed.get(name, ()))
        cut, kept = [values[u] for u in units], [v for u, v in enumerate(values) if u not in units]
        total = sum(values)
        restored = cost({n: k for n, k in gone.items() if n != name})
        found[name] = {
            "layers": list(group.layers),
            "units": group.n_units,
            "removed": len(units),
            "kept": len(kept),
            "channels_per_unit": group.root_channels.shape[1],
            "highest_removed": max(cut, default=None),
            "lowest_kept": min(kept),
            # Of scores that may be negative (signed, ablation) a share says nothing.
            "score_removed": sum(cut) / total if min(values) >= 0 and total > 0 else None,
            "macs_saved": restored["macs"] - after["macs"],
            "params_saved": restored["params"] - after["params"],
            "why": _why(name, group, len(units), steps[name], limits),
        }
    return found


def _why(name: str, group: Group, gone: int, steps: Sequence[Step], limits: Limits) -> str:
    n, least = group.n_units, limits.least[name]
    if least >= n:
        return f"keeps all: {limits.why[name]}"
    if not steps:
        return f"keeps all: no multiple of round_to={limits.round_to} between {least} and {n}"
    forced = sum(len(step.units) for step in steps if step.forced)
    if gone == sum(len(step.units) for step in steps):
        return f"at its limit: {limits.why[name]}" if limits.round_to == 1 else "at its limit"
    if forced and gone == forced:
        return "as much as max_keep asks for"
    if gone == 0:
        return "keeps all: every unit ranks above the cut"
    return "units below the cut"


def table(plan: Plan) -> str:
    """The plan as text: the target, the cost before and after, and a line per group."""
    meta, rows = plan.meta, plan.rows()
    if not rows:
        lines = [f"{name}: {len(units)} units go" for name, units in plan.items()]
        return "\n".join([repr(plan), *lines])
    kind, value = next(iter(meta["target"].items()))
    before, after = meta["before"], meta["after"]
    head = [
        f"{plan.n_units} of {before['channels']:.0f} units go, by {meta['criterion']} scores, "
        f"ranking {meta['ranking']!r}, for at most {value:.4g} {kind}",
        "; ".join(
            f"{k} {before[k]:.4g} -> {after[k]:.4g} ({after[k] / before[k]:.2%})" for k in after
        ),
    ]
    titles = (
        "group",
        "units",
        "kept",
        "score lost",
        "highest out",
        "lowest in",
        "MACs saved",
        "why",
    )
    cells = [
        (
            row["group"],
            str(row["units"]),
            str(row["kept"]),
            "" if row["score_removed"] is None else f"{row['score_removed']:.1%}",
            "" if row["highest_removed"] is None else f"{row['highest_removed']:.3g}",
            f"{row['lowest_kept']:.3g}",
            f"{row['macs_saved'] / before['macs']:.2%}",
            row["why"],
        )
        for row in rows
    ]
    widths = [max(len(line[i]) for line in (titles, *cells)) for i in range(len(titles))]
    lines = [
        "  ".join(
            text.ljust(width) if i in (0, len(titles) - 1) else text.rjust(width)
            for i, (text, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in (titles, *cells)
    ]
    return "\n".join([*head, *lines])
