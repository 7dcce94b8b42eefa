"""Which criterion is worth its name after fine-tuning, at equal MACs?

    python examples/cifar10/finetuned.py [--steps 200] [--speedup 2.11] [--seeds 3] [--criteria L1 ...]
    python examples/cifar10/finetuned.py --rounds 5 --steps 1000 --ranking cost [--between 0]
    python examples/cifar10/finetuned.py --train-images 1024 --ranking cost
    python examples/cifar10/finetuned.py --steps 0 --ranking cost
    python examples/cifar10/finetuned.py --max-pruning-ratio 0.9 --criteria "SInGE, layer" L2

A trained ResNet-56 loses the channels between the two convolutions of its blocks until 2.11 or 2.57
times fewer MACs are left. Pruner, guard, budget and fine-tuning are the same for all; the criterion
differs, and the ranking that turns its scores into a plan. Every seed takes other calibration images
and another order of the training images. With more than one round (:func:`singe.compress`) half of
the steps (``--between``) are shared out between the rounds, the others follow the last one.
With no steps only the BatchNorms' statistics are set again, on the calibration images.
``--train-images`` fine-tunes on so few images in place of all 50,000, ``--samples`` scores on more or fewer
than 256. Accuracies are those of the first half of the test images, ``--held-out`` takes the second, by which
nothing was chosen. A run that the results already hold is not repeated, so that the table can grow over days
and machines; ``--part 0/2`` does every other run, for two processes.
"""

from __future__ import annotations

import argparse
import copy
import fcntl
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import cifar10
import torch
import torch.nn.functional as F
from importances import OWN, SCORERS, VARIANTS, inner_layers
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

import singe

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from benchmarks.record import ROOT, earlier, environment, write

NAME = "cifar10-resnet56"
RANKINGS = ("global", "local", "cost")
SPEEDUPS = (2.11, 2.57)
BATCH, LR = 64, 0.02
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# bfloat16 that the processor does not compute in takes twice as long as float32.
BF16 = DEVICE == "cuda" or torch.cpu.get_capabilities().get("avx512_bf16", False)
KEY = ("criterion", "ranking", "speedup", "steps", "rounds", "lr", "seed")
# What rows that do not say were run with.
ALSO = {
    "samples": 256, "train_images": 50_000, "batch_size": BATCH, "between": 0.5,
    "max_pruning_ratio": 0.75, "held_out": False,
}  # fmt: skip
TEST_IMAGES = 5000  # of the 10,000
QUICK_IMAGES = 2000  # of those, while a network trains
Row = dict[str, Any]


class Data:
    """Calibration, training and test images, decoded once."""

    def __init__(self, held_out: bool) -> None:
        self.x, self.y = cifar10.images("train")
        half = slice(TEST_IMAGES, None) if held_out else slice(TEST_IMAGES)
        self.test = cifar10.batches(*(t[half] for t in cifar10.images("test")), 250)
        self.quick = self.test[: QUICK_IMAGES // 250]
        self.example = self.test[0][0][:1]

    def calibration(self, seed: int, samples: int) -> list[tuple[Tensor, Tensor]]:
        part = slice(seed * samples, (seed + 1) * samples)
        return cifar10.batches(self.x[part], self.y[part], BATCH)

    def training(self, seed: int, images: int, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """All images, or the next ``images`` of them for every seed; augmented, without end."""
        start = seed * images if images < len(self.x) else 0
        part = slice(start, start + images)
        return endless(cifar10.Augmented(self.x[part], self.y[part], size, seed))


def endless(epochs: Iterable[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    """Epoch after epoch."""
    return chain.from_iterable(repeat(epochs))


def widths(model: nn.Module) -> list[int]:
    """Channels between the convolutions of every block."""
    return [model.get_submodule(n).out_channels for n in inner_layers(model)]


def mixed_precision() -> torch.autocast:
    return torch.autocast(DEVICE, torch.bfloat16, enabled=BF16)


def accuracy(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Top-1, in the precision of training."""
    model.eval()
    with torch.no_grad(), mixed_precision():
        right = [(model(x.to(DEVICE)).argmax(1).cpu() == y).float() for x, y in batches]
    return float(torch.cat(right).mean())


def sgd(model: nn.Module, lr: Any, **options: Any) -> torch.optim.SGD:
    """Of all runs."""
    return torch.optim.SGD(
        model.parameters(), lr, momentum=0.9, nesterov=True, weight_decay=5e-4, **options
    )


def cosine(lr: float, steps: int) -> list[float]:
    """The learning rate of every step, from ``lr`` to zero."""
    return [0.5 * lr * (1 + math.cos(math.pi * step / steps)) for step in range(steps)]


def train(
    model: nn.Module,
    batches: Iterator[tuple[Tensor, Tensor]],
    steps: int,
    lr: float,
    look: Callable[[int], None] = lambda step: None,
) -> None:
    """SGD with a cosine to zero, in bfloat16 where that is fast, channels-last; in place."""
    model.to(memory_format=torch.channels_last)
    optimizer = sgd(model, lr)
    for step, lr_now in enumerate(cosine(lr, steps)):
        for group in optimizer.param_groups:
            group["lr"] = lr_now
        x, y = next(batches)
        model.train()
        with mixed_precision():
            outputs = model(x.to(DEVICE, memory_format=torch.channels_last))
        optimizer.zero_grad()
        F.cross_entropy(outputs.float(), y.to(DEVICE)).backward()
        optimizer.step()
        look(step + 1)
    model.to(memory_format=torch.contiguous_format).eval()


class Experiment:
    """One network, its data, and the scores that several runs share, kept in ``out/``."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.model = cifar10.trained(56).to(DEVICE)
        self.data = Data(args.held_out)
        self.kept = ROOT / "out" / NAME / (environment()["commit"] or "unknown")
        self.kept.mkdir(parents=True, exist_ok=True)

    def calibration(self, job: Row) -> list[tuple[Tensor, Tensor]]:
        batches = self.data.calibration(job["seed"], job["samples"])
        return [(x.to(DEVICE), y.to(DEVICE)) for x, y in batches]

    def scored(self, job: Row) -> singe.Scores:
        path = self.kept / f"{job['criterion']}, {job['samples']}, {job['seed']}.safetensors"
        if not path.exists():
            scorer = (SCORERS | VARIANTS)[job["criterion"]]
            scorer(self.model, self.calibration(job), job["seed"]).save(path)
        return singe.Scores.load(path, self.model)

    def run(self, job: Row) -> Row:
        """Prune and fine-tune, at once or in rounds."""
        torch.manual_seed(job["seed"])
        batches = self.data.training(job["seed"], job["train_images"], job["batch_size"])
        return self.entwined(job, batches) if job["rounds"] > 1 else self.one_shot(job, batches)

    def entwined(self, job: Row, batches: Iterator[tuple[Tensor, Tensor]]) -> Row:
        """Score, prune and fine-tune in rounds."""
        model = copy.deepcopy(self.model)
        calibration = self.calibration(job)
        steps, rounds = job["steps"], job["rounds"]
        between = int(steps * job["between"] / rounds)
        history: dict[int, float] = {}

        def finetune(model: nn.Module, stage: singe.Stage) -> None:
            train(model, batches, stage.steps, job["lr"])
            history[stage.round] = accuracy(model, self.data.quick)

        report = singe.compress(
            model, train=calibration, calibrate=calibration, macs=1 / job["speedup"], rounds=rounds,
            ranking=job["ranking"], finetune_steps=between, final_steps=steps - rounds * between,
            finetune=finetune, layers=inner_layers(model), progress=False, seed=job["seed"],
            max_pruning_ratio=job["max_pruning_ratio"],
            **OWN[job["criterion"]],
        )  # fmt: skip
        return self.row(model, report, history)

    def planned(self, job: Row) -> singe.Plan:
        """What goes at once, by the scores of the network as it is."""
        return singe.plan(
            self.model, self.scored(job), self.data.example.to(DEVICE), macs=1 / job["speedup"],
            ranking=job["ranking"], max_pruning_ratio=job["max_pruning_ratio"],
        )  # fmt: skip

    def pruned(self, plan: singe.Plan) -> tuple[nn.Module, singe.PruneReport]:
        """A copy without what goes."""
        model = copy.deepcopy(self.model)
        return model, singe.prune(model, plan, self.data.example.to(DEVICE))

    def one_shot(self, job: Row, batches: Iterator[tuple[Tensor, Tensor]]) -> Row:
        """Prune at once, then fine-tune."""
        model, report = self.pruned(self.planned(job))
        pruned = accuracy(model, self.data.quick)
        history: dict[int, float] = {}
        steps = job["steps"]

        def look(step: int) -> None:
            if step % max(1, steps // 4) == 0:
                history[step] = accuracy(model, self.data.quick)

        if steps == 0:
            update_bn(self.calibration(job), model)
            return {"pruned": pruned} | self.row(model, report, history)
        train(model, batches, steps, job["lr"], look)
        best = max(history.values())  # entwined, earlier rounds have more MACs left
        return {"pruned": pruned, "best": best} | self.row(model, report, history)

    def row(self, model: nn.Module, report: Any, history: dict[int, float]) -> Row:
        """What is written down of a network that has been pruned and fine-tuned."""
        return {
            "macs": report.macs_after / report.macs_before,
            "params": report.params_after / report.params_before,
            "history": history,
            "last": accuracy(model, self.data.test),
            "widths": widths(model),
        }


def jobs(args: argparse.Namespace) -> Iterator[Row]:
    """Seed by seed, so that a table that is not finished compares like with like."""
    for seed in range(args.seeds):
        for speedup in args.speedup:
            for ranking in args.ranking:
                for criterion in args.criteria:
                    values = (criterion, ranking, speedup, args.steps, args.rounds, args.lr, seed)
                    yield dict(zip(KEY, values, strict=True)) | {k: vars(args)[k] for k in ALSO}


def recorded() -> list[Row]:
    return earlier(NAME).get("runs", [])


def is_done(job: Row) -> bool:
    return any((ALSO | row).items() >= job.items() for row in recorded())


def record(row: Row) -> None:
    """Add one run to the results; other processes may be doing the same."""
    with (Path(tempfile.gettempdir()) / f"{NAME}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if is_done({k: row[k] for k in (*KEY, *ALSO)}):  # by another process, in the meantime
            return
        write(NAME, {"runs": [*recorded(), row]})


def options(description: str) -> argparse.ArgumentParser:
    """What all runs can be asked for."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--speedup", type=float, nargs="+", default=SPEEDUPS)
    parser.add_argument("--ranking", nargs="+", default=RANKINGS, choices=RANKINGS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--criteria", nargs="+", help="default: all")
    parser.add_argument("--lr", type=float, default=LR)
    parser.add_argument("--batch-size", type=int, default=BATCH, help="to fine-tune with")
    parser.add_argument("--samples", type=int, default=ALSO["samples"], help="to score on")
    parser.add_argument(
        "--max-pruning-ratio", type=float, default=ALSO["max_pruning_ratio"], help="of every layer"
    )
    parser.add_argument("--held-out", action="store_true", help="test on the other 5,000 images")
    return parser


def choose_criteria(
    parser: argparse.ArgumentParser, args: Any, usual: Iterable[str], offered: Iterable[str]
) -> None:
    """Set ``args.criteria``, or say which of them is not offered."""
    args.criteria = args.criteria or list(usual)
    if unknown := set(args.criteria) - set(offered):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; offered: {', '.join(offered)}")


def where(experiment: Experiment) -> Row:
    """What every run says of the machine, and of the network before anything is removed."""
    base = accuracy(experiment.model, experiment.data.test)
    here = environment()
    gpu = {"gpu": here["machine"]["gpu"]} if DEVICE == "cuda" else {}
    precision = "bfloat16" if BF16 else "float32"
    return {
        "precision": precision,
        "cpu": here["machine"]["cpu"],
        **gpu,
        "commit": here["commit"],
        "base": base,
    }


def told(row: Row) -> str:
    """A finished run in one line."""
    return (
        f"{row['criterion']:30s} {row['ranking']:7s} {row['speedup']:.2f}x seed {row['seed']} "
        f"macs {row['macs']:.3f} last {row['last']:.1%}"
    )


def main() -> None:
    parser = options(__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--train-images", type=int, default=ALSO["train_images"])
    parser.add_argument("--between", type=float, default=ALSO["between"], help="see above")
    parser.add_argument("--part", default="0/1")
    args = parser.parse_args()
    known = (SCORERS, SCORERS | VARIANTS) if args.rounds == 1 else (OWN, OWN)
    choose_criteria(parser, args, *known)
    if args.rounds > 1 and not args.steps:
        parser.error("--steps 0 goes with one round")
    part, parts = map(int, args.part.split("/"))
    experiment = Experiment(args)
    fixed = where(experiment)
    for job in list(jobs(args))[part::parts]:
        if is_done(job):
            continue
        start = time.perf_counter()
        run = experiment.run(job)
        row = job | run | {"seconds": time.perf_counter() - start} | fixed
        record(row)
        print(told(row), flush=True)


if __name__ == "__main__":
    main()
