"""One JSON file per measurement: numbers, machine, versions, commit and command."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
NOT_CODE = (":!benchmarks/results", ":!docs")
LIBRARIES = ("triton", "torch-pruning", "captum")  # that numbers depend on, where installed
LOAD_BEFORE = os.getloadavg()[0]  # of the machine, before anything of ours ran


def environment() -> dict[str, Any]:
    """What a reader needs to repeat or to doubt a number."""
    import singe
    from singe.kernels import native

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    commit, dirty = _commit()
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit,
        "dirty": dirty,
        "command": shlex.join(["python", *_relative(sys.orig_argv[1:])]),
        "machine": {
            "cpu": _cpu(),
            # A main thread that is pinned sees its own core only.
            "cores": max(len(os.sched_getaffinity(0)), torch.get_num_threads()),
            "gpu": gpu,
            "load_before": LOAD_BEFORE,
        },
        "threads": torch.get_num_threads(),
        "pinning": {k: v for k, v in sorted(os.environ.items()) if k.startswith("OMP_")},
        "versions": {
            "singe": singe.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            **{name: version for name in LIBRARIES if (version := _version(name))},
        },
        "native": native.status(),
    }


def _commit() -> tuple[str | None, bool | None]:
    """The commit, and whether files differ from it; None where neither git nor `make carry` says.

    ``SINGE_COMMIT``, which benchmarks/gpu.sh sets to what was carried, goes first: the checkout that it was
    carried into may be of another commit.
    """
    if (carried := _carried(os.environ.get("SINGE_COMMIT", ""))) is not None:
        return carried
    # Asked for by its path: without a .git git would answer for a repository further up.
    head = _git("rev-parse", "--short=12", "HEAD") if (ROOT / ".git").exists() else ""
    if head:
        # Results and the pages made of them are what the run writes.
        changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".", *NOT_CODE)
        return head, bool(changed)
    try:
        return _carried((ROOT / ".carry" / "commit").read_text()) or (None, None)
    except OSError:
        return None, None


def _carried(text: str) -> tuple[str, bool] | None:
    """What `make carry` wrote; None where it knew no commit."""
    head, _, state = text.strip().rpartition(" ")
    return (head, state == "dirty") if head else None


def _git(*arguments: str) -> str:
    """What git prints; nothing where it fails or is not installed."""
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    except FileNotFoundError:
        return ""
    return done.stdout.strip()


def _version(library: str) -> str | None:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None


def _relative(arguments: list[str]) -> list[str]:
    """Paths within the checkout, wherever the results are put for the time being."""
    elsewhere = os.environ.get("SINGE_RESULTS") or str(RESULTS)
    return [a.replace(elsewhere, str(RESULTS)).replace(f"{ROOT}/", "") for a in arguments]


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor()


def _folder() -> Path:
    return Path(os.environ.get("SINGE_RESULTS") or RESULTS)


def earlier(name: str) -> Any:
    """The results that :func:`write` left last, for what goes on with them; an empty dict if there are none.

    Where results are put elsewhere for the time being, the first write goes on with those of the checkout.
    """
    for folder in (_folder(), RESULTS):
        if (path := folder / f"{name}.json").is_file():
            return json.loads(path.read_text())["results"]
    return {}


def write(name: str, results: Any, folder: Path | None = None) -> Path:
    """Write ``{"environment", "results"}`` and say where."""
    path = (folder or _folder()) / f"{name}.json"
    save(path, {"environment": environment(), "results": results})
    print(f"wrote {path.name}", flush=True)
    return path


def save(path: Path, content: dict[str, Any]) -> None:
    """Whole or not at all: others may be reading it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    partial.replace(path)


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(run: Callable[[], Any]) -> float:
    """Wall time of one call, the GPU waited for."""
    synchronize()
    start = time.perf_counter()
    run()
    synchronize()
    return time.perf_counter() - start


def paired(runs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, dict[str, Any]]:
    """Time several things in turn, A B C A B C ..., after one warm-up of each.

    Returns:
        per name: all times, their median and minimum, in seconds.
    """
    for run in runs.values():
        run()
    timed = {name: lambda run=run: seconds(run) for name, run in runs.items()}
    return interleaved(timed, rounds)


def interleaved(runs: dict[str, Callable[[], float]], rounds: int) -> dict[str, dict[str, Any]]:
    """As :func:`paired`, for runs that say themselves how long they took; no warm-up."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(run())
    return {name: summary(t) for name, t in times.items()}


def summary(times: list[float]) -> dict[str, Any]:
    """Median, minimum and all of them."""
    return {"median": statistics.median(times), "min": min(times), "all": times}


def median_ratio(times: dict[str, dict[str, Any]], slow: str, fast: str) -> float:
    """Median over the rounds of ``slow / fast``: what drifts together cancels."""
    pairs = zip(times[slow]["all"], times[fast]["all"], strict=True)
    return statistics.median(a / b for a, b in pairs)
