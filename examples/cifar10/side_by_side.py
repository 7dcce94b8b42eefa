"""Forty epochs for every criterion: all pruned networks fine-tuned at once, on one GPU.

    python examples/cifar10/side_by_side.py --ranking cost --seeds 1 --epochs 0      (any machine)
    python examples/cifar10/side_by_side.py --ranking cost --seeds 1 --speedup 2.11  (with a GPU)

The same experiment as finetuned.py, in the same results. A step of a pruned ResNet-56 on 64 images is
hundreds of kernels of a few microseconds each, which leave most of a large GPU idle. So every network
has its step in a CUDA graph, on a stream of its own, and all take the same batch at the same time: runs of
one seed see the same images in the same order anyway. Batches are full: 781 steps are an epoch.

Plans are kept in ``--plans``. With ``--epochs 0`` nothing else is made, so that the hours of the GPU
go to training alone.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import cifar10
import finetuned
import torch
import torch.nn.functional as F
from finetuned import ALSO, BATCH, DEVICE, Experiment, Row
from importances import SCORERS, VARIANTS
from torch import Tensor, nn

import singe

STEPS_PER_EPOCH = 50_000 // BATCH
LOOKS = 10  # at the accuracy, on the way
WARM_UP = 3  # steps, before a graph is captured


class Member:
    """One network that is trained, step by step, on whatever lies in ``x`` and ``y``.

    Args:
        lr: a scalar tensor, read at every step.
    """

    def __init__(self, model: nn.Module, x: Tensor, y: Tensor, lr: Tensor) -> None:
        self.model = model.to(memory_format=torch.channels_last).train()
        self.x, self.y = x, y
        self.optimizer = finetuned.sgd(model, lr, fused=x.is_cuda)
        self.graph: Any = None
        if x.is_cuda:
            self.stream, self.done = torch.cuda.Stream(), torch.cuda.Event()
            self._capture()

    def step(self, ready: Any) -> None:
        """One step; on a GPU queued behind the event ``ready``."""
        if self.graph is None:
            self._step()
            return
        self.stream.wait_event(ready)
        with torch.cuda.stream(self.stream):
            self.graph.replay()
            self.done.record()

    def wait(self) -> None:
        """Whatever comes on the current stream comes after this network's last step."""
        if self.graph is not None:
            torch.cuda.current_stream().wait_event(self.done)

    def _step(self) -> None:
        with torch.autocast(DEVICE, torch.bfloat16, finetuned.BF16, cache_enabled=False):
            outputs = self.model(self.x)
        self.optimizer.zero_grad()
        F.cross_entropy(outputs.float(), self.y).backward()
        self.optimizer.step()

    def _capture(self) -> None:
        """Record one step; the weights, statistics and momenta are what they were before."""
        tensors = [*self.model.parameters(), *self.model.buffers()]
        before = [t.detach().clone() for t in tensors]
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            for _ in range(WARM_UP):
                self._step()
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=self.stream):
            self._step()
        with torch.no_grad():
            for tensor, value in zip(tensors, before, strict=True):
                tensor.copy_(value)
            for state in self.optimizer.state.values():
                state["momentum_buffer"].zero_()
        torch.cuda.synchronize()


def train(
    models: list[nn.Module], batches: Iterator[tuple[Tensor, Tensor]], steps: int, lr: float
) -> Iterator[int]:
    """SGD with a cosine to zero for all of them, in place; yields ``LOOKS`` times how far it is."""
    x, y = next(batches)
    x, y = x.contiguous(memory_format=torch.channels_last), y.clone()
    rate = torch.tensor(lr, device=x.device)
    # Pruning traced these parameters; nodes of such a graph that are left, of the default stream, would break
    # the capture, and the graph lies in a reference cycle.
    gc.collect()
    members = [Member(model, x, y, rate) for model in models]
    ready = torch.cuda.Event() if x.is_cuda else None
    looks = {round(steps * (i + 1) / LOOKS) for i in range(LOOKS)}
    for step, lr_now in enumerate(finetuned.cosine(lr, steps)):
        batch = next(batches) if step else (x, y)
        for member in members:  # the next batch is made while they are at the last one
            member.wait()
        for source, target in zip(batch, (x, y), strict=True):
            target.copy_(source)
        rate.fill_(lr_now)
        if ready is not None:
            ready.record()
        for member in members:
            member.step(ready)
        if step + 1 in looks:
            for member in members:
                member.wait()
            yield step + 1
            for model in models:
                model.train()
    for model in models:
        model.to(memory_format=torch.contiguous_format).eval()


def full_batches(data: finetuned.Data, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Augmented training images, without end, on the device."""
    epochs = cifar10.Augmented(data.x.to(DEVICE), data.y.to(DEVICE), BATCH, seed)
    while True:
        yield from (batch for batch in epochs if len(batch[1]) == BATCH)


def plan_of(experiment: Experiment, job: Row, folder: Path) -> singe.Plan:
    """From the folder, or made and put there."""
    what = ("criterion", "ranking", "speedup", "samples", "max_pruning_ratio", "seed")
    name = f"{', '.join(str(job[k]) for k in what)}.json"
    if not (folder / name).exists():
        experiment.planned(job).save(folder / name)
    return singe.Plan.load(folder / name)


def run(experiment: Experiment, jobs: list[Row], plans: Iterable[singe.Plan]) -> Iterator[Row]:
    """All jobs of one seed."""
    start = time.perf_counter()
    data, first = experiment.data, jobs[0]
    pruned = [experiment.pruned(plan) for plan in plans]
    models = [model for model, _ in pruned]
    before = [finetuned.accuracy(model, data.quick) for model in models]
    histories: list[dict[int, float]] = [{} for _ in jobs]
    torch.manual_seed(first["seed"])
    for step in train(models, full_batches(data, first["seed"]), first["steps"], first["lr"]):
        for model, history in zip(models, histories, strict=True):
            history[step] = finetuned.accuracy(model, data.quick)
        spent = time.perf_counter() - start
        print(f"{step:,} of {first['steps']:,} steps, {spent:.0f} s", flush=True)
    for job, (model, report), at_once, history in zip(jobs, pruned, before, histories, strict=True):
        row = experiment.row(model, report, history)
        yield job | {"pruned": at_once, "best": max(history.values())} | row


def main() -> None:
    parser = finetuned.options(__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--plans", type=Path, help="default: with the scores, in out/")
    args = parser.parse_args()
    finetuned.choose_criteria(parser, args, SCORERS, SCORERS | VARIANTS)
    args.rounds, args.train_images, args.between = 1, ALSO["train_images"], ALSO["between"]
    args.steps = args.epochs * STEPS_PER_EPOCH
    experiment = Experiment(args)
    folder = args.plans or experiment.kept / "plans"
    folder.mkdir(parents=True, exist_ok=True)
    # Without epochs the results may hold the job: what is fine-tuned later is another.
    todo = [job for job in finetuned.jobs(args) if not (args.epochs and finetuned.is_done(job))]
    plans = [plan_of(experiment, job, folder) for job in todo]
    print(f"{len(plans)} plans in {folder}", flush=True)
    if not args.epochs:
        return
    fixed = finetuned.where(experiment)
    pairs = zip(todo, plans, strict=True)
    for _, group in groupby(pairs, key=lambda pair: pair[0]["seed"]):
        jobs, of_jobs = zip(*group, strict=True)
        start = time.perf_counter()
        rows = list(run(experiment, list(jobs), of_jobs))
        spent = {"seconds": (time.perf_counter() - start) / len(rows)}
        for row in rows:
            finetuned.record(row | spent | fixed)
            print(finetuned.told(row), flush=True)


if __name__ == "__main__":
    main()
