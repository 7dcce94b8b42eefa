"""What torch.compile could save of a stacked pass, and what compiling it costs.

    python -m benchmarks.compiled [--images 256] [--device cpu]

The pass behind a group is made of the network's own operations, so the network itself stands for it:
ResNet-20, BatchNorms folded, channels-last, a forward and a backward pass for the gradient of its
input, at the size of 4 variants of 64 images. Every group has another pass to compile, and every shape.
"""

from __future__ import annotations

import argparse

import torch
import torch._inductor.config
import torch.nn.functional as F

from benchmarks.models import folded, work
from benchmarks.record import median_ratio, paired, seconds, write


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    todo = folded(work("resnet20", args.images, args.images, args.device))
    x, y = todo.batches[0]
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    for parameter in todo.model.parameters():
        parameter.requires_grad_(False)
    torch._inductor.config.force_disable_caches = True  # what a first run pays
    compiled = torch.compile(todo.model, dynamic=False)

    def run(model: torch.nn.Module) -> None:
        torch.autograd.grad(F.cross_entropy(model(x), y), x)

    first = seconds(lambda: run(compiled))
    times = paired(
        {"eager": lambda: run(todo.model), "compiled": lambda: run(compiled)}, args.rounds
    )
    ratio = median_ratio(times, "eager", "compiled")
    saved = times["eager"]["median"] - times["compiled"]["median"]
    results = {
        "settings": vars(args),
        "seconds": times,
        "eager_over_compiled": ratio,
        "compiling_seconds": first,
        "passes_until_it_pays": first / saved if saved > 0 else None,
    }
    print(f"eager / compiled {ratio:.2f}, compiling {first:.1f} s, pays after "
          f"{results['passes_until_it_pays']} passes of one group")  # fmt: skip
    write(f"compiled-{args.device}", results)


if __name__ == "__main__":
    main()
