"""How far several scorings of one model agree: rank correlations and the overlap of what would go."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from singe.errors import OptionError, ScoresError
from singe.plain import plain_number
from singe.scores import Scores

Values = NDArray[np.float64]


def require_two(count: int) -> None:
    """Raise OptionError for fewer scorings than can be compared."""
    if count < 2:
        raise OptionError(f"comparing needs at least two scorings, got {count}")


def compare(scores: Mapping[str, Scores], share: float = 0.3) -> dict[str, Any]:
    """Agreement of every pair of scorings.

    Args:
        scores: label -> scores of the same model and groups; two at least.
        share: the lowest share of all units, in (0, 1), whose overlap is measured.

    Returns:
        JSON-ready: ``names``; ``units`` (their number); ``share``; and three symmetric tables
        ``[len(names)][len(names)]``: ``spearman`` over all units together (what decides under global
        ranking), ``spearman_groups``, the mean over groups with two units or more (what decides
        under local ranking; None without any), and ``overlap``: the part of the lowest ``share``
        that two scorings have in common, 0..1.

    Raises:
        OptionError: fewer than two scorings, or a share out of range.
        ScoresError: scorings of different models or groups.
    """
    require_two(len(scores))
    share = plain_number("share", share, "(0, 1)")
    first, *others = scores.items()
    for name, other in others:
        _check_alike(*first, name, other)
    groups = list(first[1])
    values = [{g: s[g].double().numpy() for g in groups} for s in scores.values()]
    flat = [np.concatenate([v[g] for g in groups]) for v in values]
    count = max(1, round(share * len(flat[0])))
    lowest = [set(np.argsort(v, kind="stable")[:count].tolist()) for v in flat]
    several = [g for g in groups if len(first[1][g]) > 1]

    def table(entry: Any) -> list[list[float]]:
        indices = range(len(values))
        return [[float(entry(i, j)) for j in indices] for i in indices]

    def within(i: int, j: int) -> float:
        return float(np.mean([spearman(values[i][g], values[j][g]) for g in several]))

    return {
        "names": list(scores),
        "units": len(flat[0]),
        "share": share,
        "spearman": table(lambda i, j: spearman(flat[i], flat[j])),
        "spearman_groups": table(within) if several else None,
        "overlap": table(lambda i, j: len(lowest[i] & lowest[j]) / count),
    }


def spearman(a: Values, b: Values) -> float:
    """Pearson's correlation of the ranks, ties with their mean rank; 0 where all values are equal."""
    x, y = _ranks(a), _ranks(b)
    x, y = x - x.mean(), y - y.mean()
    length = float(np.sqrt((x @ x) * (y @ y)))
    return float(x @ y) / length if length else 0.0


def _ranks(values: Values) -> Values:
    _, position, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[position]


def _check_alike(name: str, scores: Scores, other_name: str, other: Scores) -> None:
    if scores.meta.get("fingerprint") != other.meta.get("fingerprint"):
        raise ScoresError(f"{name} and {other_name} are scores of different models")
    different = {g: len(v) for g, v in scores.items()}.items() ^ {
        g: len(v) for g, v in other.items()
    }.items()
    if different:
        raise ScoresError(
            f"{name} and {other_name} scored different groups, e.g. {min(different)[0]!r}; score "
            "with the same `layers` and `ignore`"
        )
