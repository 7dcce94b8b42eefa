"""What a channel criterion is worth without any training: digits, BatchNorm set again, nothing else.

    python -m benchmarks.without_training

The network of ``singe demo`` is trained until no training image is wrong, so the gradient there
(Taylor) has little left to say. Every criterion scores on the same 256 training images, the plan takes
the same MACs, and the BatchNorms' statistics are set again on the same images.
"""

from __future__ import annotations

import copy
import statistics
from typing import Any

import torch

import singe
from benchmarks.record import write
from singe.data import read_batches
from singe.demo import Settings, load_data, train_network
from singe.evaluation import accuracy
from singe.recalibration import recalibrate

SEEDS = 5
MACS = (0.6, 0.5, 0.4)
RANKINGS = ("cost", "global")
CPU = torch.device("cpu")
CRITERIA: dict[str, dict[str, Any]] = {
    "random": {"criterion": "random"},
    "magnitude, p=1": {"criterion": "magnitude", "p": 1},
    "magnitude, p=2": {"criterion": "magnitude", "p": 2},
} | {
    f"{name}, p={p}": options | {"p": p}
    for name, options in (
        ("taylor", {"criterion": "taylor"}),
        ("singe, layer path", {"path": "layer"}),
        ("singe, network path", {"path": "network"}),
    )
    for p in (1, 2, "sum", "fisher")
}


def runs_of(seed: int) -> list[dict[str, Any]]:
    """Every criterion, ranking and budget on the network of one seed."""
    torch.manual_seed(seed)
    settings = Settings()
    train, ((x, y),), held_out = load_data(settings, CPU)
    calibration = list(zip(x.split(64), y.split(64), strict=True))
    model = train_network(seed, train, settings.train_steps)
    shared = {"seed": seed, "train": accuracy(model, train)}
    found = [shared | {"criterion": "none", "recalibrated": accuracy(model, held_out)}]
    for name, options in CRITERIA.items():
        scores = singe.score(model, calibration, progress=False, seed=seed, **options)
        for ranking in RANKINGS:
            for macs in MACS:
                pruned = copy.deepcopy(model)
                plan = singe.plan(pruned, scores, x[:1], macs=macs, ranking=ranking)
                done = singe.prune(pruned, plan, x[:1])
                right_after = accuracy(pruned, held_out)
                recalibrate(pruned, read_batches(calibration, CPU))
                found.append(
                    shared
                    | {
                        "criterion": name,
                        "ranking": ranking,
                        "macs": macs,
                        "macs_reached": done.macs_after / done.macs_before,
                        "right_after": right_after,
                        "recalibrated": accuracy(pruned, held_out),
                    }
                )
    return found


def main() -> None:
    torch.set_num_threads(1)
    runs = [run for seed in range(SEEDS) for run in runs_of(seed)]
    write("digits-without-training", {"settings": {"calibration": 256}, "runs": runs})
    for ranking in RANKINGS:
        for name in CRITERIA:
            means = [
                statistics.fmean(
                    r["recalibrated"]
                    for r in runs
                    if (r["criterion"], r.get("ranking"), r.get("macs")) == (name, ranking, macs)
                )
                for macs in MACS
            ]
            print(f"{ranking:7s} {name:28s}", *(f"{mean:.1%}" for mean in means))


if __name__ == "__main__":
    main()
