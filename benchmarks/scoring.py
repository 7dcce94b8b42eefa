"""Fused against naive scoring, and against ordinary forward + backward passes, side by side.

    python -m benchmarks.scoring [--depth 20] [--images 64] [--nodes 4] [--rounds 5] [--neurons 16]

Naive is the textbook: for every group (or unit) and node, set the weights, run the network, call
``loss.backward()``. It runs on the same network with the same norms folded into the convolutions,
which makes it faster than it would be on the user's model. An ordinary pass is a forward and a
backward of the user's model as it is, in evaluation mode, gradients for all parameters.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import singe
from benchmarks.record import ROOT, median_ratio, paired, summary, write

sys.path.insert(0, str(ROOT / "examples" / "cifar10"))
import cifar10


def inner_convs(model: nn.Module) -> list[str]:
    """The groups ``layerX.Y.conv1``."""
    return [name for name, _ in model.named_modules() if name.endswith("conv1") and "." in name]


def ordinary(model: nn.Module, x: Tensor, y: Tensor, passes: int) -> None:
    """So many forward + backward passes."""
    for _ in range(passes):
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()


def compare(
    model: nn.Module, batch: tuple[Tensor, Tensor], nodes: int, rounds: int, **options: Any
) -> dict[str, Any]:
    """Fused and naive in turn: times of the sweep and of the whole call, and how far they differ.

    The whole call also finds the groups and checks them by removing units; both engines do that alike.
    """
    found: dict[str, singe.Scores] = {}
    sweeps: dict[str, list[float]] = {"naive": [], "fused": []}

    def run(engine: str) -> None:
        found[engine] = singe.score(
            model, [batch], quadrature=nodes, engine=engine, progress=False, **options
        )
        sweeps[engine].append(found[engine].meta["seconds"]["sweep"])

    plain = {"ordinary": lambda: ordinary(model, *batch, passes=nodes)}
    runs = {"naive": lambda: run("naive"), "fused": lambda: run("fused"), **plain}
    calls = paired(runs, rounds)
    times = {"ordinary": calls["ordinary"]}
    times |= {name: summary(all_[1:]) for name, all_ in sweeps.items()}  # without the warm-up
    differences = [
        float((found["fused"][k] - found["naive"][k]).norm() / found["naive"][k].norm())
        for k in found["fused"]
    ]
    return {
        "sweep_seconds": times,
        "whole_call_seconds": {name: calls[name] for name in sweeps},
        "whole_call_naive_over_fused": median_ratio(calls, "naive", "fused"),
        "naive_over_fused": median_ratio(times, "naive", "fused"),
        "fused_over_ordinary": median_ratio(times, "fused", "ordinary"),
        "largest_relative_difference": max(differences),
        "units": sum(len(t) for t in found["fused"].values()),
        "variants_per_pass": found["fused"].meta["variants_per_pass"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--depth", type=int, default=20, choices=(20, 56))
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--nodes", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model = cifar10.trained(args.depth).to(args.device)
    x, y = cifar10.images("train")
    batch = (cifar10.normalise(x[: args.images]).to(args.device), y[: args.images].to(args.device))
    layers = inner_convs(model)
    results = {}
    for name, options in {
        "layer": {"path": "layer"},
        "network": {"path": "network"},
        "layer, p=sum": {"path": "layer", "p": "sum"},
        "neuron, one group": {"path": "neuron", "layers": [layers[0]]},
    }.items():
        options = {"layers": layers, **options}
        results[name] = compare(model, batch, args.nodes, args.rounds, **options)
        print(
            f"{name:20s} naive / fused {results[name]['naive_over_fused']:.2f}, fused / "
            f"{args.nodes} ordinary passes {results[name]['fused_over_ordinary']:.2f}",
            flush=True,
        )
    settings = vars(args) | {"model": f"resnet{args.depth}", "groups": layers}
    write(f"scoring-resnet{args.depth}-{args.device}", {"settings": settings, "paths": results})


if __name__ == "__main__":
    main()
