"""What the package must show, line by line: target, measured value, pass or fail.

    python -m benchmarks.targets [--sections layer network neuron early equal_error memory]

Writes ``targets-<device>.json`` after every section. Naive runs are extrapolated from a stratified
sample of their steps; what was run is in the entry's detail. Ratios are medians of paired rounds
within this one run.
"""

from __future__ import annotations

import argparse
import json
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from benchmarks import early, equal_error, memory
from benchmarks import floor as floors
from benchmarks.models import folded, work
from benchmarks.record import write
from benchmarks.scoring import BF16, contest

CHUNKS = 4


@dataclass
class Entry:
    """One line of the table.

    Attributes:
        id: short and stable.
        claim: what is demanded, in words.
        relation: ``">="`` or ``"<="``.
        value: what was measured; None where it could not be, and ``status`` says why.
        detail: everything behind the number.
        demanded: whether it is a promise, or only good to know.
    """

    id: str
    claim: str
    relation: str
    target: float
    value: float | None = None
    status: str = "measured"
    detail: dict[str, Any] = field(default_factory=dict)
    demanded: bool = True

    @property
    def passed(self) -> bool:
        if self.value is None:
            return False
        return self.value >= self.target if self.relation == ">=" else self.value <= self.target

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"pass": self.passed}


def _spend(seconds: float) -> Callable[[], bool]:
    """True until so many seconds have passed: for further rounds."""
    end = time.monotonic() + seconds
    return lambda: time.monotonic() < end


def _of_contest(entry: Entry, found: dict[str, Any], ratio: str) -> Entry:
    """Take the entry's value from a contest."""
    refused = found["variants"][BF16]["refused"]
    if ratio.endswith(BF16) and refused is not None:
        entry.status = f"not offered: {refused}"
        return entry
    entry.value = found["ratios"][ratio]
    entry.detail = {"ratio": ratio, "whole_call": found["whole_call_ratios"].get(ratio)}
    return entry


def _spearman(entry: Entry, found: dict[str, Any]) -> Entry:
    bf16 = found["variants"][BF16]
    if bf16["refused"] is not None:
        entry.status = f"not offered: {bf16['refused']}"
    else:
        entry.value, entry.detail = bf16["spearman"], bf16
    return entry


def layer(args: argparse.Namespace) -> Iterator[Entry]:
    """ResNet-56, all inner groups, 128 images in batches of 64, 4 nodes."""
    todo = work("resnet56", 128, 64, args.device)
    found = contest(todo, "layer", 4, args.rounds, _spend(args.patience), per_group=1)
    what = "ResNet-56, layer path, 27 groups, 128 images, 4 nodes"
    first = Entry("layer-textbook", f"{what}, fp32: over the textbook naive", ">=", 3.0)
    first = _of_contest(first, found, "textbook over fused")
    first.detail["contest"] = found  # once is enough
    yield first
    yield _of_contest(
        Entry("layer-careful", f"{what}, fp32: over the careful naive", ">=", 1.5),
        found, "careful over fused",
    )  # fmt: skip
    yield Entry(
        "layer-floor", f"{what}, fp32: share of the floor that this network's measured forward "
        "and backward imply", ">=", 0.85, found["share_of_floor"],
        detail={"floor_seconds": found["floor_seconds"]},
    )  # fmt: skip
    tight = floors.measure(folded(todo), args.rounds)
    seconds = len(todo.batches) * floors.layer_floor(tight, 4)
    yield Entry(
        "layer-floor-folded", f"{what}, fp32: share of the floor of the same network with "
        "BatchNorms folded, channels-last (stricter, not demanded)", ">=", 0.85,
        seconds / found["seconds"]["fused"]["median"], demanded=False,
        detail={"floor_seconds": seconds, "floor_pieces": tight.describe()},
    )  # fmt: skip
    yield _of_contest(
        Entry("layer-bf16", f"{what}: bf16 autocast over the fp32 textbook naive", ">=", 5.0),
        found, f"textbook over {BF16}",
    )  # fmt: skip
    yield _spearman(
        Entry("layer-bf16-rank", f"{what}: Spearman of bf16 and fp32 scores", ">=", 0.999), found
    )


def neuron(args: argparse.Namespace) -> Iterator[Entry]:
    """ResNet-20, all inner groups, 64 images, 4 nodes; naive from six steps per group."""
    todo = work("resnet20", 64, 64, args.device)
    found = contest(todo, "neuron", 4, args.rounds, _spend(args.patience), per_group=6)
    what = "ResNet-20, neuron path, 336 units, 64 images, 4 nodes"
    first = Entry("neuron-textbook", f"{what}, fp32: over the textbook naive", ">=", 4.0)
    first = _of_contest(first, found, "textbook over fused")
    first.detail["contest"] = found
    yield first
    yield _of_contest(
        Entry("neuron-bf16", f"{what}: bf16 autocast over the fp32 textbook naive", ">=", 8.0),
        found, f"textbook over {BF16}",
    )  # fmt: skip


def network(args: argparse.Namespace) -> Iterator[Entry]:
    """Against as many plain forward + backward passes."""
    for model in ("resnet20", "resnet56"):
        todo = work(model, 128, 64, args.device)
        rounds = 2 * args.rounds + 1
        found = contest(todo, "network", 4, rounds, _spend(args.patience / 3), naive=False)
        claim = f"{model}, network path, 128 images, 4 nodes, fp32: cost over plain passes"
        ratio = 1 / found["ratios"]["ordinary over fused"]
        yield Entry(f"network-{model}", claim, "<=", 1.15, ratio, detail={"contest": found})


def early_decision(args: argparse.Namespace) -> Iterator[Entry]:
    """How much of the full run's work it takes to find its lowest 30 %."""
    what = f"ResNet-20, neuron path, lowest 30 %, {args.draws} draws"
    entries = (
        Entry("early-work", f"{what}: share of the full run's unit evaluations", "<=", 0.40),
        Entry("early-same", f"{what}: share of the same units chosen", ">=", 0.98),
    )
    refused = early.refused(args.early)
    if refused is not None:
        for entry in entries:
            entry.status = f"not offered: {refused}"
        yield from entries
        return
    found = early.draws(args.draws, args.early, args.device)
    entries[0].value, entries[1].value = found["mean_work"], found["mean_same"]
    entries[0].detail = found
    yield from entries


def integral_error(args: argparse.Namespace) -> Iterator[Entry]:
    """Naive geometric schedule against the cheapest fused rule that is at least as close."""
    found = equal_error.compare(work("resnet20", 128, 64, args.device), min(2, args.rounds))
    claim = (
        "ResNet-20, layer path, 128 images, fp32: fused over naive 0.9^s with 30 nodes, at an "
        "integral error not above its"
    )
    yield Entry("equal-error", claim, ">=", 20.0, found["ratio"], detail=found)


def peak_memory(args: argparse.Namespace) -> Iterator[Entry]:
    """The largest budget that forces at least four chunks per group."""
    found = memory.against_budgets("resnet20", 128, 16, args.device)
    forced = [run for run in found["budgeted"] if run["chunks"] >= CHUNKS]
    claim = "ResNet-20, layer path, 128 images, 16 nodes, a max_memory that forces >= 4 chunks"
    within = Entry("memory-peak", f"{claim}: measured peak over max_memory", "<=", 1.0)
    same = Entry("memory-same", f"{claim}: relative difference of the scores", "<=", 1e-6)
    within.detail = found
    if not forced:
        within.status = same.status = "no budget forced so many chunks"
    else:
        run = forced[0]
        within.value, same.value = run["peak_extra"] / run["budget"], run["relative_difference"]
        same.detail = {"identical": run["identical"], "chunks": run["chunks"]}
    yield from (within, same)


SECTIONS: dict[str, Callable[[argparse.Namespace], Iterator[Entry]]] = {
    "layer": layer,
    "neuron": neuron,
    "network": network,
    "equal_error": integral_error,
    "memory": peak_memory,
    "early": early_decision,
}


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """All sections, each kept from spoiling the others; the file is written after each."""
    entries: list[dict[str, Any]] = []
    for name in args.sections:
        start = time.monotonic()
        try:
            for entry in SECTIONS[name](args):
                entries.append(entry.as_json())
                verdict = "pass" if entry.passed else "FAIL"
                print(f"{verdict} {entry.id}: {entry.value} {entry.relation} {entry.target} "
                      f"({entry.status})", flush=True)  # fmt: skip
        except Exception as error:
            traceback.print_exc()
            claim = (SECTIONS[name].__doc__ or name).strip()
            status = f"failed: {type(error).__name__}: {error}"
            entries.append(Entry(name, claim, ">=", 1.0, None, status).as_json())
        print(f"-- {name}: {time.monotonic() - start:.0f} s", flush=True)
        settings = {k: v for k, v in vars(args).items() if k != "sections"}
        write(f"targets-{args.device}", {"settings": settings, "targets": entries})
    return entries


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sections", nargs="+", default=list(SECTIONS), choices=list(SECTIONS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--patience", type=float, default=90, help="seconds after which a section "
                        "starts no further round")  # fmt: skip
    parser.add_argument("--draws", type=int, default=10)
    parser.add_argument("--early", type=json.loads, default=early.OPTIONS, help="options of "
                        "singe.score for the early decision, as JSON")  # fmt: skip
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    run(parser.parse_args())


if __name__ == "__main__":
    main()
