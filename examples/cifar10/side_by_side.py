"""Forty epochs for every criterion: all pruned networks fine-tuned at once, on one GPU.

    python examples/cifar10/side_by_side.py --ranking cost --seeds 1 --epochs 0      (any machine)
    CUDA_DEVICE_MAX_CONNECTIONS=32 python examples/cifar10/side_by_side.py --ranking cost --seeds 1 \\
        --speedup 2.11 --batch-size 256 --lr 0.08                                    (with a GPU)

The same experiment as finetuned.py, in the same results. A step of a pruned ResNet-56 on 64 images is
hundreds of kernels of a few microseconds each, which leave most of a large GPU idle. So every network has
its step in a CUDA graph, on a stream of its own (of which a GPU runs 8 at once, if not told otherwise), and
all take the same batch at the same time: runs of one seed see the same images in the same order anyway.
Batches are full: 195 steps of 256 images are an epoch. Widths are filled up to multiples of 8 with channels
that are 0 and stay it. On an H200 a step of 17 networks takes 34 ms with 64 images, 25 with the widths filled
up, and 66 with 256 images: 40 epochs are 17, 13 and 9 minutes (``benchmarks/results/probes-h200.json``).

On a CPU with bfloat16 a network takes a core for about two hours (``seconds`` in the results), with
``--compile`` and memory in pages of 2 MB. What is trained is kept in ``out/``; the same command goes on:

    export OMP_NUM_THREADS=1 MALLOC_TRIM_THRESHOLD_=8000000000 MALLOC_MMAP_THRESHOLD_=8000000000
    export GLIBC_TUNABLES=glibc.malloc.hugetlb=1
    python examples/cifar10/side_by_side.py --ranking cost --seeds 1 --speedup 2.11 --batch-size 256 \\
        --lr 0.08 --compile --criteria L2

Plans are kept in ``--plans``. With ``--epochs 0`` nothing else is made, so that the hours of the GPU
go to training alone.
"""

from __future__ import annotations

import gc
import hashlib
import time
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import cifar10
import finetuned
import torch
import torch.nn.functional as F
from finetuned import ALSO, DEVICE, ROOT, Experiment, Row
from importances import SCORERS, VARIANTS
from torch import Tensor, nn

import singe
from singe.files import replacing

LOOKS = 4  # at the accuracy, on the way
WARM_UP = 3  # steps, before a graph is captured
KEEP = 250  # steps of which a CPU may lose the work
MULTIPLE = 8  # of channels, for which bfloat16 has its fast convolutions


class Member:
    """One network that is trained, step by step, on whatever lies in ``x`` and ``y``.

    Args:
        lr: a scalar tensor, read at every step.
        compiled: with :func:`torch.compile`, which saves a CPU passes over its memory.
    """

    def __init__(
        self, model: nn.Module, x: Tensor, y: Tensor, lr: Tensor, compiled: bool = False
    ) -> None:
        self.model = model.to(memory_format=torch.channels_last).train()
        self.forward = torch.compile(model) if compiled else model
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

    def momenta(self) -> list[Tensor]:
        """Of all parameters, in their order; there are some after the first step."""
        return [self.optimizer.state[p]["momentum_buffer"] for p in self.model.parameters()]

    def _step(self) -> None:
        with torch.autocast(DEVICE, torch.bfloat16, finetuned.BF16, cache_enabled=False):
            outputs = self.forward(self.x)
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
            for momentum in self.momenta():
                momentum.zero_()
        torch.cuda.synchronize()


class Progress:
    """What was seen on the way, and, with a ``path``, a file with all that is needed to go on."""

    def __init__(self, networks: int, path: Path | None = None) -> None:
        self.histories: list[dict[int, float]] = [{} for _ in range(networks)]
        self.path = path
        self.start = time.perf_counter()

    def seconds(self) -> float:
        """Spent so far, in earlier processes too."""
        return time.perf_counter() - self.start

    def save(self, step: int, members: list[Member]) -> None:
        if self.path is None:
            return
        state = {
            "step": step,
            "seconds": self.seconds(),
            "models": [m.model.state_dict() for m in members],
            "momenta": [m.momenta() for m in members],
            "histories": self.histories,
        }
        with replacing(self.path) as partial:
            torch.save(state, partial)

    def load(self, members: list[Member]) -> int:
        """The number of steps that ``members`` have behind them."""
        if self.path is None or not self.path.exists():
            return 0
        state = torch.load(self.path)
        for member, model, momenta in zip(members, state["models"], state["momenta"], strict=True):
            member.model.load_state_dict(model)
            for parameter, momentum in zip(member.model.parameters(), momenta, strict=True):
                member.optimizer.state[parameter]["momentum_buffer"] = momentum
        for mine, seen in zip(self.histories, state["histories"], strict=True):
            mine.update(seen)
        self.start -= state["seconds"]
        return int(state["step"])


def train(
    models: list[nn.Module],
    batches: Iterator[tuple[Tensor, Tensor]],
    steps: int,
    lr: float,
    progress: Progress,
    compiled: bool = False,
) -> Iterator[int]:
    """SGD with a cosine to zero for all of them, in place; yields ``LOOKS`` times how far it is."""
    x, y = next(batches)
    x, y = x.contiguous(memory_format=torch.channels_last), y.clone()
    rate = torch.tensor(lr, device=x.device)
    # Pruning traced these parameters; nodes of such a graph that are left, of the default stream, would break
    # the capture, and the graph lies in a reference cycle.
    gc.collect()
    chosen_by_time = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True  # what is captured is what is chosen now
    try:
        members = [Member(model, x, y, rate, compiled) for model in models]
    finally:
        torch.backends.cudnn.benchmark = chosen_by_time
    ready = torch.cuda.Event() if x.is_cuda else None
    looks = {round(steps * (i + 1) / LOOKS) for i in range(LOOKS)}
    done = progress.load(members)
    for step, lr_now in enumerate(finetuned.cosine(lr, steps)):
        batch = next(batches) if step else (x, y)
        if step < done:
            continue
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
        if (step + 1) % KEEP == 0:
            progress.save(step + 1, members)
    for model in models:
        model.to(memory_format=torch.contiguous_format).eval()


@torch.no_grad()
def resize(model: nn.Module, to: list[int]) -> None:
    """Channels of zeros more between the convolutions of every block, or the last ones less; in place.

    Such a channel is 0 behind its BatchNorm and gets no gradient: momentum and decay leave it at 0.
    """
    blocks = [m for m in model.modules() if isinstance(m, cifar10.BasicBlock)]
    for block, width in zip(blocks, to, strict=True):
        for module, name, dim in (
            (block.conv1, "weight", 0), (block.conv2, "weight", 1), (block.bn1, "weight", 0),
            (block.bn1, "bias", 0), (block.bn1, "running_mean", 0), (block.bn1, "running_var", 0),
        ):  # fmt: skip
            old = getattr(module, name)
            both = min(width, old.shape[dim])
            new = old.new_zeros([*old.shape[:dim], width, *old.shape[dim + 1 :]])
            new.narrow(dim, 0, both).copy_(old.narrow(dim, 0, both))
            setattr(module, name, nn.Parameter(new) if isinstance(old, nn.Parameter) else new)
        block.conv1.out_channels = block.conv2.in_channels = block.bn1.num_features = width


def full_batches(data: finetuned.Data, seed: int, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Augmented training images, without end, on the device."""
    epochs = cifar10.Augmented(data.x.to(DEVICE), data.y.to(DEVICE), size, seed)
    return (batch for batch in finetuned.endless(epochs) if len(batch[1]) == size)


def plan_of(experiment: Experiment, job: Row, folder: Path) -> singe.Plan:
    """From the folder, or made and put there."""
    what = ("criterion", "ranking", "speedup", "samples", "max_pruning_ratio", "seed")
    name = f"{', '.join(str(job[k]) for k in what)}.json"
    if not (folder / name).exists():
        experiment.planned(job).save(folder / name)
    return singe.Plan.load(folder / name)


def run(
    experiment: Experiment,
    jobs: list[Row],
    plans: Iterable[singe.Plan],
    progress: Progress,
    compiled: bool = False,
) -> Iterator[Row]:
    """All jobs of one seed."""
    data, first = experiment.data, jobs[0]
    pruned = [experiment.pruned(plan) for plan in plans]
    models = [model for model, _ in pruned]
    before = [finetuned.accuracy(model, data.quick) for model in models]
    narrow = [finetuned.widths(model) for model in models]
    for model, own in zip(models, narrow, strict=True):
        resize(model, [-(-width // MULTIPLE) * MULTIPLE for width in own])
    torch.manual_seed(first["seed"])
    batches = full_batches(data, first["seed"], first["batch_size"])
    for step in train(models, batches, first["steps"], first["lr"], progress, compiled):
        for model, history in zip(models, progress.histories, strict=True):
            history[step] = finetuned.accuracy(model, data.quick)
        print(f"{step:,} of {first['steps']:,} steps, {progress.seconds():.0f} s", flush=True)
    for model, own in zip(models, narrow, strict=True):
        resize(model, own)
    seconds = progress.seconds() / len(jobs)
    for job, (model, report), at_once, history in zip(
        jobs, pruned, before, progress.histories, strict=True
    ):
        row = experiment.row(model, report, history) | {"seconds": seconds}
        yield job | {"pruned": at_once, "best": max(history.values())} | row


def kept(jobs: list[Row], plans: list[singe.Plan]) -> Path:
    """Where the training of these networks is kept; with other plans it is another file."""
    what = repr((jobs, [dict(plan) for plan in plans])).encode()
    folder = ROOT / "out" / finetuned.NAME / "training"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{hashlib.sha256(what).hexdigest()[:16]}.pt"


def main() -> None:
    parser = finetuned.options(__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--compile", action="store_true", help="faster on a CPU")
    parser.add_argument("--plans", type=Path, help="default: with the scores, in out/")
    args = parser.parse_args()
    finetuned.choose_criteria(parser, args, SCORERS, SCORERS | VARIANTS)
    args.rounds, args.train_images, args.between = 1, ALSO["train_images"], ALSO["between"]
    if args.batch_size > ALSO["train_images"]:
        parser.error(f"--batch-size: there are {ALSO['train_images']:,} training images")
    args.steps = args.epochs * (ALSO["train_images"] // args.batch_size)
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
        jobs, of_jobs = map(list, zip(*group, strict=True))
        progress = Progress(len(jobs), kept(jobs, of_jobs) if DEVICE == "cpu" else None)
        for row in run(experiment, jobs, of_jobs, progress, args.compile):
            finetuned.record(row | fixed)
            print(finetuned.told(row), flush=True)
        if progress.path:
            progress.path.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
