"""From scores to a ranking without ties, in which every group keeps its best units.

Libraries that rank globally cut at a threshold (``score <= threshold``). Tied units all fall on the same
side of it, and a group that would lose every unit is usually left whole without a word. Both end
here: ties are broken, and the best units of each group stand above everything else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from singe.errors import OptionError, ScoresError
from singe.plain import plain_number
from singe.scores import require_units

Normalizer = str | Callable[[Tensor], Tensor] | None
NORMALIZERS = ("sum", "standarization", "mean", "max", "gaussian", "sentinel_<share>", "lamp")
EPSILON = 1e-8  # Torch-Pruning's
ROUNDING = 1e-9  # of the range of a group's scores


def normalized(scores: Tensor, how: Normalizer) -> Tensor:
    """Scores [U] of one group rescaled as Torch-Pruning's importances do, under the same names.

    Args:
        how: None, ``"sum"``, ``"mean"``, ``"max"``, ``"standarization"`` (that spelling),
            ``"gaussian"``, ``"sentinel_0.5"`` (divide by the unit at that share of the ranking),
            ``"lamp"`` (arXiv 2010.07611), or a callable.

    Raises:
        OptionError: an unknown name, or a share outside of [0, 1].
    """
    if how is None:
        return scores
    if callable(how):
        return how(scores)
    if how == "sum":
        return scores / scores.sum()
    if how == "mean":
        return scores / scores.mean()
    if how == "max":
        return scores / scores.max()
    if how in ("standarization", "standardization"):
        return (scores - scores.min()) / (scores.max() - scores.min() + EPSILON)
    if how == "gaussian":
        return (scores - scores.mean()) / (scores.std() + EPSILON)
    if how == "lamp":
        ordered, order = scores.sort(stable=True)
        still_there = scores.sum() - ordered.cumsum(0) + ordered
        return torch.empty_like(scores).scatter_(0, order, ordered / still_there)
    if isinstance(how, str) and how.startswith("sentinel_"):
        share = plain_number("the share of normalizer 'sentinel_<share>'", _number(how), "[0, 1]")
        position = min(int(share * len(scores)), len(scores) - 1)
        return scores / (scores.sort().values[position] + EPSILON)
    raise OptionError(f"unknown normalizer {how!r}; one of {', '.join(NORMALIZERS)}, a callable")


def _number(sentinel: str) -> float | str:
    text = sentinel.removeprefix("sentinel_")
    try:
        return float(text)
    except ValueError:
        return text


def ranking(
    scores: Mapping[str, Tensor],
    *,
    normalizer: Normalizer = None,
    keep: Mapping[str, int] | None = None,
) -> dict[str, Tensor]:
    """Float64 scores, no two alike, in the order of ``scores`` but for the units that are kept.

    Ties go by position: of two units with equal scores the one in the earlier group, then the one with
    the lower index, ranks lower. A tied unit moves up by less than half the distance to the next
    higher score.

    Args:
        scores: group -> [U].
        normalizer: applied to each group, see :func:`normalized`.
        keep: how many of each group's highest units are raised above all others, the very highest
            above these; default 1. A threshold that goes too far then takes units that should be kept,
            which can be seen, and not whole groups, which libraries leave alone in silence.

    Raises:
        OptionError: a normalizer that does not give one number per unit.
        ScoresError: all scores are equal, so that they rank nothing; or a normalizer gave NaN or infinity,
            or turned the order of units round, as dividing by a negative sum does.
    """
    require_units(scores)
    names = list(scores)
    parts = [normalized(scores[name].double(), normalizer) for name in names]
    for name, part in zip(names, parts, strict=True):
        _check(part, scores[name], name, normalizer)
    flat = torch.cat(parts) if parts else torch.empty(0, device="cpu")
    if len(flat) > 1 and bool((flat == flat[0]).all()):
        raise ScoresError(
            f"all {len(flat)} scores are {float(flat[0]):.3g}: they rank nothing. Did the objective "
            "have a gradient (is criterion='taylor' used with objective='kl')?"
        )
    untied = _without_ties(flat)
    lift = float(untied.max() - untied.min()) * 2 if len(untied) else 0.0
    result = dict(zip(names, untied.split([len(part) for part in parts]), strict=True))
    for name, part in result.items():
        order = part.argsort(descending=True)
        part[order[: (keep or {}).get(name, 1)]] += lift
        part[order[:1]] += lift
    return result


def _check(part: object, scores: Tensor, name: str, normalizer: Normalizer) -> None:
    """Raise where what a normalizer made of the scores of one group does not rank its units as they do."""
    if not isinstance(part, Tensor) or part.shape != scores.shape:
        given = tuple(part.shape) if isinstance(part, Tensor) else type(part).__name__
        raise OptionError(
            f"normalizer {normalizer!r} must give one number per unit, {tuple(scores.shape)} for {name!r}; "
            f"got {given}"
        )
    if not bool(torch.isfinite(part).all()):
        raise ScoresError(
            f"normalizer {normalizer!r} makes NaN or infinity of the scores of {name!r} (do they "
            "add up to zero?); use normalizer=None"
        )
    ordered = part[scores.argsort(stable=True)]
    if len(ordered) and bool((ordered.diff() < -ROUNDING * (ordered.max() - ordered.min())).any()):
        raise ScoresError(
            f"normalizer {normalizer!r} turns the order of the units of {name!r} round (its scores, some "
            "below zero, are divided by a negative number?); use normalizer=None or 'gaussian'"
        )


def _without_ties(flat: Tensor) -> Tensor:
    """Every run of equal values spread over the first half of the gap to the next higher value."""
    values, run, counts = flat.unique(return_inverse=True, return_counts=True)
    if len(values) == len(flat):
        return flat.clone()
    last = values.abs().max().clamp(min=1.0)
    gaps = torch.cat([values.diff(), last[None]])
    order = torch.argsort(run, stable=True)
    starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)[:-1]])
    place = torch.empty_like(order)
    place[order] = torch.arange(len(flat), device="cpu") - starts.repeat_interleave(counts)
    return flat + 0.5 * gaps[run] * place / counts[run]
