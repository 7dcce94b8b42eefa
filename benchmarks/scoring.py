"""Fused against naive scoring, and against ordinary forward + backward passes, side by side.

    python -m benchmarks.scoring [--model resnet20] [--images 64] [--nodes 4] [--rounds 5]

What runs, in turn, round by round:

- ``fused``: the engine; ``fused, bf16``: under ``autocast=torch.bfloat16``; ``fused, compiled``: with
  ``compile=True``, which includes the time to compile.
- ``textbook``, ``careful``: the loops of ``benchmarks/textbook.py`` on the user's model as it is.
- ``naive engine``: ``engine="naive"``, the textbook loop on the package's own copy with its
  BatchNorms folded; measured once.
- ``ordinary``: as many forward + backward passes as there are nodes, of the user's model as it is, in
  evaluation mode, gradients for all parameters.

Times of the engines are those of the sweep; finding the groups and checking them by removing units
comes on top, and is given as ``whole_call``. Long naive runs are extrapolated from some of their
steps (``benchmarks/sampling.py``); the JSON says from how many.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import singe
from benchmarks import floor as floors
from benchmarks.models import MODELS, Work, work
from benchmarks.record import median_ratio, seconds, summary, write
from benchmarks.sampling import plan
from benchmarks.textbook import STRENGTHS, NaiveLoop
from singe.quadrature import as_quadrature

BF16, COMPILED = "fused, bf16", "fused, compiled"
VARIANTS: dict[str, dict[str, Any]] = {
    BF16: {"autocast": torch.bfloat16},
    COMPILED: {"compile": True},
}


def sweep(work: Work, path: str, nodes: Any, **options: Any) -> singe.Scores:
    """One call of :func:`singe.score` on the whole work."""
    options = {"layers": work.layers, **options}
    return singe.score(
        work.model, work.batches, path=path, quadrature=nodes, progress=False, **options
    )


def refusal(**options: Any) -> str | None:
    """Why ``singe.score`` does not take these options, or None if it does."""
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(72, 2))
    data = [(torch.ones(2, 1, 8, 8), torch.tensor([0, 1]))] * 2
    try:
        singe.score(model, data, progress=False, **options)
    except (singe.OptionError, TypeError) as error:
        return str(error)
    return None


def flat(scores: Mapping[str, Tensor]) -> Tensor:
    """All scores, group after group."""
    return torch.cat(list(scores.values()))


def relative_difference(left: singe.Scores, right: singe.Scores) -> float:
    """The largest relative L2 difference of a group."""
    return max(float((left[k] - right[k]).norm() / right[k].norm()) for k in right)


def spearman(left: singe.Scores, right: singe.Scores) -> float:
    """Rank correlation over all units together."""
    return float(torch.corrcoef(torch.stack([ranks(flat(left)), ranks(flat(right))]))[0, 1])


def ranks(values: Tensor) -> Tensor:
    """Ranks from 1 up, equal values sharing their mean rank, in float64."""
    _, inverse, counts = torch.unique(values, return_inverse=True, return_counts=True)
    return (counts.cumsum(0) - (counts - 1) / 2).double()[inverse]


def ordinary(model: nn.Module, x: Tensor, y: Tensor, passes: int) -> None:
    """So many forward + backward passes."""
    for _ in range(passes):
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()


def line(x1: float, y1: float, x2: float, y2: float, x: float) -> float:
    """The straight line through two points, at ``x``."""
    return y1 + (y2 - y1) / (x2 - x1) * (x - x1)


def naive_engine(work: Work, path: str, nodes: int, units: list[int]) -> dict[str, Any]:
    """Seconds of ``engine="naive"``: a line through two short runs, as it also has fixed costs.

    The short runs take one batch, 1 and 3 nodes, and up to three groups; one, the smallest, on the
    neuron path.
    """
    count = {"layer": min(3, len(units)), "neuron": 1, "network": len(units)}[path]
    order = sorted(range(len(units)), key=lambda g: units[g])
    chosen = order[:count] if path == "neuron" else order[:: -(-len(order) // count)]
    layers = [work.layers[g] for g in chosen]
    few = Work(work.name, work.model, work.batches[:1], tuple(layers))
    sets = {"layer": len(layers), "neuron": sum(units[g] for g in chosen), "network": 1}[path]
    whole = {"layer": len(units), "neuron": sum(units), "network": 1}[path]
    one, three = (sweep(few, path, n, engine="naive").meta["seconds"]["sweep"] for n in (1, 3))
    estimate = line(sets, one, 3 * sets, three, whole * nodes) * len(work.batches)
    steps = {"steps_run": 4 * sets, "steps_of_the_whole": whole * nodes * len(work.batches)}
    return {**summary([estimate]), "extrapolated": True, **steps, "groups": layers}


class Contest:
    """Everyone on the same work: call :meth:`others` and :meth:`fused` in turn, then :meth:`result`.

    Args:
        per_group: steps per group and round of the naive loops; None: all of them.
        variants: names out of ``VARIANTS``: the engine with other options, if they are offered.
        naive: also the naive loops.
    """

    def __init__(
        self, work: Work, path: str, nodes: int, per_group: int | None = 2,
        variants: Sequence[str] = (BF16,), naive: bool = True,
    ) -> None:  # fmt: skip
        self.work, self.path, self.nodes, self.naive = work, path, nodes, naive
        graph = work.graph()
        pairs = itertools.zip_longest(graph.groups, work.layers)
        if not all(group and layer in group.layers for group, layer in pairs):
            raise ValueError(f"{work.layers} are not one layer of each of {graph.groups}")
        self.units = [g.n_units for g in graph.groups]
        self.rule = as_quadrature(nodes)
        self.plan = plan(path, self.units, nodes, len(work.batches), per_group)
        self.loops = {s: NaiveLoop(work.model, graph, s) for s in STRENGTHS if naive}
        self.pieces_once = floors.measurer(work)
        self.pieces: list[floors.Pieces] = []
        self.variants = {name: {"refused": refusal(**VARIANTS[name])} for name in variants}
        self.times: dict[str, list[float]] = {}
        self.scores: dict[str, singe.Scores] = {}
        self.calls: list[float] = []

    def warm_up(self) -> None:
        """One batch of everything: caches, allocators, kernels chosen at the first call of a shape.

        In the order of a round: how many variants fit into a pass depends on what ran before.
        """
        for loop in self.loops.values():
            loop.step(self.plan.steps[0], self.work.batches, self.rule)
        ordinary(self.work.model, *self.work.batches[0], passes=1)
        self.work.model.zero_grad()
        first = Work(self.work.name, self.work.model, self.work.batches[:1], self.work.layers)
        path = "layer" if self.path == "neuron" else self.path
        for name, variant in self.variants.items():
            if variant["refused"] is None and name != COMPILED:
                sweep(first, path, self.nodes, **VARIANTS[name])
        sweep(first, path, self.nodes)

    def others(self) -> None:
        """One round of everyone but the fused engine."""
        for strength, loop in self.loops.items():
            self._note(strength, loop.seconds(self.plan, self.work.batches, self.rule))
        passes = min(self.nodes, 2)
        spent = sum(
            seconds(lambda b=b: ordinary(self.work.model, *b, passes=passes))
            for b in self.work.batches
        )
        self.work.model.zero_grad()
        self._note("ordinary", spent * self.nodes / passes)
        self.pieces += [self.pieces_once() for _ in range(3)]
        for name, variant in self.variants.items():
            if variant["refused"] is None:
                self._sweep(name, **VARIANTS[name])

    def fused(self) -> None:
        """One run of the fused engine."""
        start = time.perf_counter()
        self._sweep("fused")
        self.calls.append(time.perf_counter() - start)

    def _sweep(self, name: str, **options: Any) -> None:
        found = self.scores[name] = sweep(self.work, self.path, self.nodes, **options)
        self._note(name, found.meta["seconds"]["sweep"])

    def _note(self, name: str, spent: float) -> None:
        self.times.setdefault(name, []).append(spent)

    def result(self) -> dict[str, Any]:
        """Times, ratios and the floor, for the JSON."""
        times = {name: summary(spent) for name, spent in self.times.items()}
        for strength in self.loops:
            times[strength] |= self.plan.describe()
        calls = {"fused": summary(self.calls)}
        pieces = floors.average(self.pieces)
        batches = len(self.work.batches)
        floor = batches * floors.floor(self.path, pieces, self.nodes, self.units)
        ratios = {
            f"{name} over {ours}": median_ratio(times, name, ours)
            for ours in ("fused", *VARIANTS)
            for name in (*self.loops, "ordinary")
            if ours in times
        }
        whole = {f"{n} over fused": median_ratio(times | calls, n, "fused") for n in self.loops}
        if self.naive:
            times["naive engine"] = naive_engine(self.work, self.path, self.nodes, self.units)
            ratios["naive engine over fused"] = (
                times["naive engine"]["median"] / times["fused"]["median"]
            )
        fused = self.scores["fused"]
        variants: dict[str, dict[str, Any]] = {
            name: variant
            | {
                "spearman": spearman(self.scores[name], fused),
                "relative_difference": relative_difference(self.scores[name], fused),
            }
            if name in self.scores
            else variant
            for name, variant in self.variants.items()
        }
        return {
            **self.work.describe(),
            "path": self.path,
            "nodes": self.nodes,
            "units": sum(self.units),
            "seconds": times,
            "whole_call_seconds": calls["fused"],
            "ratios": ratios,
            "whole_call_ratios": whole,
            "floor_seconds": floor,
            "share_of_floor": floor / times["fused"]["median"],
            "floor_pieces": pieces.describe(),
            "variants": variants,
            "meta": {k: v for k, v in fused.meta.items() if k in KEPT_META},
        }


KEPT_META = ("variants_per_pass", "stacked", "evaluations", "peak_memory")


def contest(
    work: Work, path: str, nodes: int, rounds: int, again: Callable[[], bool] = lambda: True,
    **options: Any,
) -> dict[str, Any]:  # fmt: skip
    """A :class:`Contest` of so many rounds; no further round once ``again()`` is false."""
    running = Contest(work, path, nodes, **options)
    running.warm_up()
    for index in range(rounds):
        if index and not again():
            break
        running.others()
        running.fused()
    return running.result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="resnet20", choices=MODELS)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--nodes", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--paths", nargs="+", default=["layer", "network", "neuron"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    results = {}
    for path in args.paths:
        groups = 1 if path == "neuron" else None
        todo = work(args.model, args.images, args.batch_size, args.device, groups)
        results[path] = contest(todo, path, args.nodes, args.rounds)
        ratios = ", ".join(f"{k} {v:.2f}" for k, v in results[path]["ratios"].items())
        print(f"{path}: {ratios}", flush=True)
    write(f"scoring-{args.model}-{args.device}", {"settings": vars(args), "paths": results})


if __name__ == "__main__":
    main()
