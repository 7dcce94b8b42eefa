"""How close the two kernels come to the memory bandwidth of the machine.

    python -m benchmarks.kernels [--device cpu]

Bytes are those that must move: every input read once, every output written once. The yardstick is a
plain copy on a GPU and a triad ``a = b + s * c`` on a CPU, measured in the same run at the same size.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.record import seconds, write
from singe.kernels.integral import accumulate, accumulate_reference
from singe.kernels.masked_forward import masked_forward

SHAPES = {  # ResNet-50 at 224 pixels: (batch, channels, side), and K of the layer's rows
    "layer1.conv2": (64, 64, 56, 576),
    "layer2.conv2": (64, 128, 28, 1152),
    "layer3.conv2": (64, 256, 14, 2304),
    "layer4.conv2": (64, 512, 7, 4608),
}


def best(run: Callable[[], Any], repeats: int) -> dict[str, float]:
    """Median and minimum seconds after three warm-ups."""
    for _ in range(3):
        run()
    times = [seconds(run) for _ in range(repeats)]
    return {"median": statistics.median(times), "min": min(times)}


def rate(moved: int, times: dict[str, float]) -> float:
    """GB/s at the median."""
    return moved / times["median"] / 1e9


def nbytes(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def yardstick(elements: int, device: str, repeats: int) -> float:
    """Copy (GPU) or triad (CPU) bandwidth in GB/s for about so many float32 numbers moved."""
    if device == "cuda":
        a, b = torch.empty(2, elements // 2, device=device)
        return rate(nbytes(a, b), best(lambda: a.copy_(b), repeats))
    a, b, c = torch.ones(3, elements // 3)
    return rate(nbytes(a, b, c), best(lambda: torch.add(b, c, alpha=3.0, out=a), repeats))


def integral(device: str, repeats: int, nodes: int = 4) -> dict[str, Any]:
    """The gradient-variation integral [4, C, K], float32, p = 1, against its torch reference."""
    rows = {}
    for name, (_, channels, _, k) in SHAPES.items():
        grad = torch.randn(nodes, channels, k, device=device)
        weight, omega = torch.randn(channels, k, device=device), torch.full((nodes,), 0.25)
        omega, score = omega.to(device), torch.zeros(channels, device=device)
        arguments = (score, grad, weight, omega, 1)
        native = best(lambda arguments=arguments: accumulate(*arguments), repeats)
        torch_ = best(lambda arguments=arguments: accumulate_reference(*arguments), 5)
        moved = nbytes(grad, weight, omega, score, score)
        stick = yardstick(moved // 4, device, repeats)
        rows[name] = {
            "shape": [nodes, channels, k], "bytes": moved, "seconds": native,
            "GB/s": rate(moved, native), "yardstick GB/s": stick,
            "share": rate(moved, native) / stick,
            "reference over native": torch_["median"] / native["median"],
        }  # fmt: skip
    return rows


def masked(device: str, repeats: int, batch: int, variants: int = 4) -> dict[str, Any]:
    """One shared activation to four gated variants with BN, residual and ReLU; forward and backward."""
    rows = {}
    for name, (_, channels, side, _) in SHAPES.items():
        y = torch.randn(1, batch, channels, side * side, device=device)
        residual = torch.randn_like(y)
        gate = torch.rand(variants, channels, device=device)
        scale, shift = torch.rand(2, channels, device=device)
        arguments = (y, gate, scale, shift, residual, "relu")
        out = masked_forward(*arguments)
        grad = torch.randn_like(out)
        forward = best(lambda a=arguments: masked_forward(*a), repeats)
        needs = [True, True, True]
        op = torch.ops.singe.masked_forward_backward
        backward = best(lambda a=arguments, g=grad, n=needs, op=op: op(g, *a, n), repeats)
        moved_forward = nbytes(y, residual, out)
        moved_backward = nbytes(grad, y, residual, y, residual)
        stick = yardstick(moved_forward // 4, device, repeats)
        rows[name] = {
            "shape": [variants, batch, channels, side * side],
            "forward GB/s": rate(moved_forward, forward),
            "backward GB/s": rate(moved_backward, backward),
            "yardstick GB/s": stick,
            "forward share": rate(moved_forward, forward) / stick,
            "backward share": rate(moved_backward, backward) / stick,
            "seconds": {"forward": forward, "backward": backward},
        }
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=20)
    args = parser.parse_args()
    batch = 64 if args.device == "cuda" else 8
    results = {
        "settings": vars(args) | {"batch of masked forward": batch},
        "integral": integral(args.device, args.repeats),
        "masked_forward": masked(args.device, args.repeats, batch),
    }
    for kernel in ("integral", "masked_forward"):
        for name, row in results[kernel].items():
            shares = {k: round(v, 2) for k, v in row.items() if "share" in k}
            print(f"{kernel:15s} {name:14s} {shares}")
    write(f"kernels-{args.device}", results)


if __name__ == "__main__":
    main()
