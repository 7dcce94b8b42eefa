"""A new user's hour: from nothing to a pruned, fine-tuned, exported model and its report.

    python -m benchmarks.new_user [--images FOLDER] [--torch torch==2.13.0] [--keep FOLDER]

Makes a fresh virtual environment, installs torch, torchvision and this package into it (as the
constraints file pins them), and runs the two commands of docs/cli.md. Without ``--images``: 60 training
images of each class of ``data/cifar10-jpeg.tar.xz``, found in ``$SINGE_DATA`` or ``../shared``.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.record import ROOT, write

PER_CLASS = 60
MODEL = "torchvision:resnet18 --data images --image-size 64 --macs 0.5 --path network"
DRY_RUN = f"singe prune {MODEL} --dry-run"
COMPRESS = (
    f"singe compress {MODEL} --batch-size 32 --lr 0.02 --warmup-steps 100 --rounds 3 "
    "--finetune-steps 20 --final-steps 40 --out run --json"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path)
    parser.add_argument("--torch", default="torch==2.13.0", help="what pip installs first")
    parser.add_argument("--keep", type=Path, help="work here and leave everything")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        place = options.keep or Path(scratch)
        place.mkdir(parents=True, exist_ok=True)
        images = place / "images"
        if options.images is not None:
            images.symlink_to(options.images.resolve())
        elif not images.exists():
            unpack(images)
        write("new-user", run(place, options.torch))


def run(place: Path, torch: str) -> dict[str, Any]:
    steps: list[dict[str, Any]] = []
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    pinned = {n: str(ROOT / "constraints.txt") for n in ("PIP_CONSTRAINT", "PIP_BUILD_CONSTRAINT")}
    environment |= pinned
    environment["PATH"] = f"{place / 'venv' / 'bin'}{os.pathsep}{environment['PATH']}"

    def step(command: str, shown: str | None = None) -> str:
        print(f"$ {shown or command}", flush=True)
        start, before = time.perf_counter(), os.times()
        done = subprocess.run(
            shlex.split(command), cwd=place, env=environment, stdout=subprocess.PIPE, text=True
        )
        after = os.times()
        steps.append(
            {
                "command": shown or command,
                "seconds": round(time.perf_counter() - start, 1),
                "cpu_seconds": round(
                    sum(after[2:4]) - sum(before[2:4]), 1
                ),  # of children; what other work on the machine leaves of it
            }
        )
        if done.returncode:
            sys.exit(f"{command} ended with {done.returncode}")
        return done.stdout

    step(f"{sys.executable} -m venv --clear venv", "python -m venv venv")
    step(f"pip install -q {torch}")
    step("pip install -q --no-deps torchvision==0.28.0")
    step(f"pip install -q {shlex.quote(str(ROOT))}", "pip install .")
    plan = step(DRY_RUN)
    told = json.loads(step(COMPRESS))
    sizes = {kind: (place / path).stat().st_size for kind, path in told["files"].items()}
    told.pop("rounds")
    return {
        "images": sum(1 for _ in (place / "images").rglob("*.jpg")),
        "steps": steps,
        "plan": plan.splitlines(),
        "compressed": told,
        "bytes": sizes,
    }


def unpack(folder: Path) -> None:
    """The first images of every class."""
    places = [Path(os.environ.get("SINGE_DATA", "")), ROOT.parent / "shared"]
    found = [p / "data" / "cifar10-jpeg.tar.xz" for p in places]
    archive = next((p for p in found if p.is_file()), None)
    if archive is None:
        sys.exit("no data/cifar10-jpeg.tar.xz: set SINGE_DATA, or give --images")
    taken: Counter[str] = Counter()
    with tarfile.open(archive) as tar:
        for member in tar:
            path = Path(member.name)
            name = path.parent.name
            if not member.isfile() or "train" not in path.parts or taken[name] == PER_CLASS:
                continue
            taken[name] += 1
            (folder / name).mkdir(parents=True, exist_ok=True)
            (folder / name / path.name).write_bytes(tar.extractfile(member).read())  # type: ignore[union-attr]


if __name__ == "__main__":
    main()
