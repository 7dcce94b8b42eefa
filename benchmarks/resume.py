"""Kill a short CPU run at random moments, continue it, and compare the weights with a run left alone.

    python -m benchmarks.resume [--kills 20] [--seed 0]

The run prunes a small network on scikit-learn's digits in three rounds, with shuffled and augmented data
from a DataLoader, dropout, momentum, averaged weights and a checkpoint every five steps. SIGKILL comes
at a random moment between its start (libraries are loaded by then) and its end; a third of the runs are
killed a second time after they were continued.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import singe
from benchmarks.record import ROOT, write

STARTED, FINISHED = "started", "had finished"


class Net(nn.Module):
    """Three convolutions with BatchNorm, dropout and a linear layer, for 8x8 digits."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 1
        for stride in (1, 2, 1):
            layers += [nn.Conv2d(channels, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)]
            layers += [nn.ReLU(inplace=True)]
            channels = width
        self.body = nn.Sequential(*layers)
        self.dropout = nn.Dropout(0.2)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.dropout(self.body(x).mean((2, 3))))


class Digits(Dataset):
    """Images shifted at random by one pixel, drawn from torch's global generator."""

    def __init__(self) -> None:
        from sklearn.datasets import load_digits

        digits = load_digits()
        self.x = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
        self.y = torch.tensor(digits.target)

    def __len__(self) -> int:
        return 1200

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        shift = torch.randint(-1, 2, (2,)).tolist()
        return self.x[index].roll(shift, (1, 2)), self.y[index]


def work(folder: Path, out: Path, steps: int) -> None:
    """The run itself, continued where its folder says it was."""
    torch.manual_seed(0)
    model, data = Net(), Digits()
    calibrate = [(data.x[:128], data.y[:128])]
    singe.score(Net(), calibrate, progress=False)  # the first call loads libraries for seconds
    print(STARTED, flush=True)
    report = singe.compress(
        model,
        train=DataLoader(data, batch_size=32, shuffle=True),
        calibrate=calibrate,
        evaluate=[(data.x[1200:], data.y[1200:])],
        macs=0.5,
        rounds=3,
        finetune_steps=steps,
        ranking="cost",
        ema=0.9,
        lr=0.05,
        checkpoint=folder,
        checkpoint_every=5,
        resume=True,
        progress=False,
    )
    weights = {name: t.contiguous() for name, t in model.state_dict().items()}
    save_file(weights, out, {"accuracy": str(report.metric_after)})


def start(folder: Path, out: Path, steps: int) -> subprocess.Popen:
    command = [sys.executable, "-m", "benchmarks.resume", "--work", folder, out, str(steps)]
    process = subprocess.Popen(
        list(map(str, command)), cwd=ROOT, env={**os.environ}, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    if process.stdout.readline().strip() != STARTED:
        raise RuntimeError(f"the run in {folder} did not start")
    return process


def finish(folder: Path, out: Path, steps: int) -> float:
    """Seconds of a run that is left alone, once it has started."""
    process = start(folder, out, steps)
    began = time.perf_counter()
    if process.wait() != 0:
        raise RuntimeError(f"the run in {folder} failed")
    return time.perf_counter() - began


def kill_after(folder: Path, out: Path, steps: int, seconds: float) -> str:
    """Start, kill, and say what the folder held then."""
    process = start(folder, out, steps)
    try:
        process.wait(seconds)
        return FINISHED
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.wait()
    files = sorted(folder.glob("checkpoint-*")) if folder.exists() else []
    partial = any(folder.glob(".*.partial")) if folder.exists() else False
    return (files[-1].stem if files else "no checkpoint") + (" and half a file" if partial else "")


def same(left: Path, right: Path) -> bool:
    """Equal names, shapes, dtypes and bytes."""
    a, b = load_file(left), load_file(right)
    return a.keys() == b.keys() and all(
        a[n].shape == b[n].shape and a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a
    )


def measure(kills: int, seed: int, steps: int) -> dict[str, Any]:
    rng = random.Random(seed)
    runs: list[dict[str, Any]] = []
    attempt = 0
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        whole = finish(root / "alone", root / "alone.safetensors", steps)
        again = finish(root / "again", root / "again.safetensors", steps)
        repeats = same(root / "alone.safetensors", root / "again.safetensors")
        longest = min(whole, again)
        while len(runs) < kills:
            attempt += 1
            folder, out = root / f"run{attempt}", root / f"run{attempt}.safetensors"
            times = 1 + (len(runs) % 3 == 2)
            moments = [rng.uniform(0.0, longest) for _ in range(times)]
            found = [kill_after(folder, out, steps, seconds) for seconds in moments]
            if FINISHED in found:  # the machine has become faster: that was no kill
                longest *= 0.9
                continue
            finish(folder, out, steps)
            equal = same(root / "alone.safetensors", out)
            runs.append({"killed_after": moments, "found": found, "bitwise_equal": equal})
            print(f"{len(runs)}/{kills}: {moments}, {found}: equal {equal}", flush=True)
    return {
        "seconds_of_a_whole_run": [whole, again],
        "uninterrupted_runs_equal": repeats,
        "killed_before_the_first_checkpoint": sum(
            what.startswith("no") for r in runs for what in r["found"]
        ),
        "kills": sum(len(r["killed_after"]) for r in runs),
        "killed_runs": len(runs),
        "bitwise_equal": sum(r["bitwise_equal"] for r in runs),
        "runs": runs,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20, help="runs that are killed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=60, help="fine-tuning steps per round")
    parser.add_argument("--work", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        work(Path(args.work[0]), Path(args.work[1]), int(args.work[2]))
        return
    results = measure(args.kills, args.seed, args.steps)
    write("resume-cpu", results)
    if not (results["uninterrupted_runs_equal"] and results["bitwise_equal"] == args.kills):
        sys.exit("not every run ended with the same weights")


if __name__ == "__main__":
    main()
