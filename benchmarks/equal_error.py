"""Time at equal integral error: the naive geometric schedule against fused Gauss-Legendre.

Error of a quadrature rule is the relative L2 distance of its scores, all units together, from those
with 16 Gauss-Legendre nodes. The naive loop computes the same scores as the engine with the same
rule, so the engine is used to find the error of both.
"""

from __future__ import annotations

from typing import Any

import singe
from benchmarks.models import Work
from benchmarks.record import interleaved, median_ratio
from benchmarks.sampling import plan
from benchmarks.scoring import flat, sweep
from benchmarks.textbook import NaiveLoop
from singe.quadrature import gauss_legendre, geometric

REFERENCE = 16
FUSED_NODES = (3, 4, 5, 6)


def error(scores: singe.Scores, reference: singe.Scores) -> dict[str, float]:
    """Relative L2 distance, over all units and in the worst group."""

    def off(left: Any, right: Any) -> float:
        return float((left - right).norm() / right.norm())

    groups = [off(scores[name], reference[name]) for name in reference]
    return {"all": off(flat(scores), flat(reference)), "worst_group": max(groups)}


def compare(todo: Work, rounds: int) -> dict[str, Any]:
    """Errors and seconds of the schedules; the ratio at equal error.

    ``ratio`` is naive geometric over the fused rule with the fewest nodes whose error is not above
    that of the geometric schedule.
    """
    schedule = geometric(0.9, 30)
    reference = sweep(todo, "layer", REFERENCE)
    naive_error = error(sweep(todo, "layer", schedule), reference)
    loop = NaiveLoop(todo.model, todo.graph(), "textbook")
    steps = plan("layer", [len(v) for v in reference.values()], len(schedule), len(todo.batches), 2)
    rules = {f"fused {gauss_legendre(n).name}": n for n in FUSED_NODES}
    errors: dict[str, dict[str, float]] = {}

    def fused(name: str) -> float:
        scores = sweep(todo, "layer", rules[name])
        errors[name] = error(scores, reference)
        return scores.meta["seconds"]["sweep"]

    naive = f"naive {schedule.name}"
    runs = {naive: lambda: loop.seconds(steps, todo.batches, schedule)}
    runs |= {name: lambda name=name: fused(name) for name in rules}
    times = interleaved(runs, rounds)
    times[naive] |= steps.describe()
    enough = [name for name in rules if errors[name]["all"] <= naive_error["all"]]
    return {
        **todo.describe(),
        "reference": gauss_legendre(REFERENCE).name,
        "errors": {naive: naive_error} | errors,
        "seconds": times,
        "naive": naive,
        "fused": enough[0] if enough else None,
        "ratio": median_ratio(times, naive, enough[0]) if enough else None,
    }
