"""What a sweep costs as its work grows, beside what the cost model predicts.

    python -m benchmarks.growth [--axes nodes samples units depth]

- ``nodes``, ``samples``: ResNet-20, layer path, all inner groups.
- ``units``: ResNet-20, neuron path, ever more groups.
- ``depth``: CIFAR ResNets of 8 to 56 layers, random weights, layer path, all inner groups: deeper
  networks have more groups with more behind each, so this grows with the square of the depth.

The prediction is the floor (``benchmarks/floor.py``) from pieces measured at the same point in the same
round. All points of an axis run in turn.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks import floor as floors
from benchmarks.models import Work, cifar10, inner_layers, work
from benchmarks.record import write
from benchmarks.scoring import sweep

NODES = (1, 2, 4, 8, 16)
SAMPLES = (16, 32, 64, 128, 256)
GROUPS = (1, 2, 4, 6, 7)  # 16, 32, 80, 144, 208 units
BLOCKS = (1, 2, 3, 5, 9)  # ResNet-8, 14, 20, 32, 56


@dataclass(frozen=True)
class Point:
    """One work on one axis."""

    at: int
    work: Work
    path: str
    nodes: int = 4


def nodes(device: str) -> Iterator[Point]:
    todo = work("resnet20", 32, 32, device)
    for count in NODES:
        yield Point(count, todo, "layer", count)


def samples(device: str) -> Iterator[Point]:
    for images in SAMPLES:
        yield Point(images, work("resnet20", images, 64, device), "layer")


def units(device: str) -> Iterator[Point]:
    todo = work("resnet20", 8, 8, device)
    for count in GROUPS:
        part = Work(todo.name, todo.model, todo.batches, todo.layers[:count])
        yield Point(sum(g.n_units for g in part.graph().groups), part, "neuron")


def depth(device: str) -> Iterator[Point]:
    data = work("resnet20", 32, 32, device)
    for blocks in BLOCKS:
        torch.manual_seed(0)
        model = cifar10.CifarResNet(blocks).eval().to(device)
        name = f"resnet{6 * blocks + 2}"
        layers = tuple(inner_layers(name, model))
        yield Point(6 * blocks + 2, Work(name, model, data.batches, layers), "layer")


AXES: dict[str, Callable[[str], Iterator[Point]]] = {
    "nodes": nodes,
    "samples": samples,
    "units": units,
    "depth": depth,
}


def prediction(point: Point, pieces: floors.Pieces, units: list[int]) -> float:
    """The floor of the point; the pieces are of its first batch, the others count by their size."""
    batches = point.work.images / len(point.work.batches[0][1])
    return batches * floors.floor(point.path, pieces, point.nodes, units)


def measure(points: list[Point], rounds: int) -> list[dict[str, Any]]:
    """Seconds and prediction of every point, medians over rounds in which they take turns."""
    once = [floors.measurer(point.work) for point in points]
    sizes = [[g.n_units for g in point.work.graph().groups] for point in points]
    sweep(points[0].work, points[0].path, points[0].nodes)  # warm
    spent: list[list[float]] = [[] for _ in points]
    predicted: list[list[float]] = [[] for _ in points]
    for _ in range(rounds):
        for index, point in enumerate(points):
            pieces = floors.average([once[index]() for _ in range(3)])
            predicted[index].append(prediction(point, pieces, sizes[index]))
            found = sweep(point.work, point.path, point.nodes)
            spent[index].append(found.meta["seconds"]["sweep"])
    return [
        {
            "at": point.at,
            "seconds": statistics.median(spent[index]),
            "all": spent[index],
            "predicted": statistics.median(predicted[index]),
            "groups": len(sizes[index]),
            "units": sum(sizes[index]),
            "images": point.work.images,
            "nodes": point.nodes,
            "path": point.path,
            "model": point.work.name,
        }
        for index, point in enumerate(points)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--axes", nargs="+", default=list(AXES), choices=list(AXES))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    found: dict[str, Any] = {}
    for axis in args.axes:
        found[axis] = measure(list(AXES[axis](args.device)), args.rounds)
        row = ", ".join(
            f"{p['at']}: {p['seconds']:.2f} ({p['predicted']:.2f})" for p in found[axis]
        )
        print(f"{axis}, seconds (predicted): {row}", flush=True)
        settings = {k: v for k, v in vars(args).items() if k != "axes"}
        write(f"growth-{args.device}", {"settings": settings, "axes": found})


if __name__ == "__main__":
    main()
