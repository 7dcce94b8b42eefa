"""How close the two kernels come to the memory bandwidth of the machine.

    python -m benchmarks.kernels [--device cpu]

Bytes are those that must move: every input read once, every output written once. The yardstick is a
plain copy on a GPU and a triad ``a = b + s * c`` on a CPU, on arrays far larger than the last cache.
Every call of a kernel works on other buffers than the one before, together as large as the
yardstick's, so nothing is in a cache from the call before. Kernel, yardstick and the alternatives run
in turn; shares are medians over the rounds. On the CPU run it with ``OMP_PROC_BIND=close
OMP_PLACES=cores`` (``make bench`` does), so that threads stay where their data was first touched.

Alternatives: the plain torch reference, and, on a GPU or with ``--compile``, torch.compile's own fusion
of the same expression.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.record import interleaved, median_ratio, synchronize, write
from singe.kernels import native
from singe.kernels.integral import DTYPE_CODES, NORM_CODES, accumulate, accumulate_reference
from singe.kernels.masked_forward import masked_forward

SHAPES = {  # ResNet-50 at 224 pixels: (channels, side), and K of the layer's rows
    "layer1.conv2": (64, 56, 576),
    "layer2.conv2": (128, 28, 1152),
    "layer3.conv2": (256, 14, 2304),
    "layer4.conv2": (512, 7, 4608),
}
ALONE = "kernel alone"  # without the call from Python: checks, dispatcher, pointers
KERNELS = ("integral", "masked forward", "masked backward")
REFERENCE_CALLS = 4  # the float64 reference is slow: a few buffers tell its rate
MOST_SETS = 512


def nbytes(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def last_level_cache(device: str) -> int:
    """Bytes of the largest cache; 64 MiB where the system does not say."""
    if device == "cuda":
        return torch.cuda.get_device_properties(0).L2_cache_size
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    return max((int(p.read_text().strip().rstrip("K")) * 1024 for p in sizes), default=64 << 20)


def cycle(run: Callable[..., Any], sets: Sequence[tuple[Any, ...]]) -> Callable[[], float]:
    """Mean seconds of one call, over one call with every set of arguments."""

    def once() -> float:
        synchronize()
        start = time.perf_counter()
        for arguments in sets:
            run(*arguments)
        synchronize()
        return (time.perf_counter() - start) / len(sets)

    return once


def yardstick(total: int, device: str) -> tuple[Callable[[], float], int]:
    """Copy (GPU) or triad (CPU) over ``total`` bytes: how to time it, and the bytes moved."""
    if device == "cuda":
        a, b = torch.ones(2, total // 8, device=device)
        return cycle(a.copy_, [(b,)]), nbytes(a, b)
    a, b, c = (torch.ones(total // 12) for _ in range(3))
    return cycle(lambda: torch.add(b, c, alpha=3.0, out=a), [()]), nbytes(a, b, c)


def integral_sets(name: str, device: str, nodes: int, total: int) -> tuple[list[Any], int]:
    """Arguments of the integral, float32, p = 1, and the bytes that one call must move."""
    channels, _, k = SHAPES[name]

    def make() -> tuple[Any, ...]:
        grad = torch.randn(nodes, channels, k, device=device)
        weight = torch.randn(channels, k, device=device)
        omega = torch.full((nodes,), 1 / nodes, device=device)
        return torch.zeros(channels, device=device), grad, weight, omega, 1

    return fill(
        make, lambda score, grad, weight, omega, p: nbytes(grad, weight, score, score), total
    )


def pointers(sets: Sequence[tuple[Any, ...]]) -> list[tuple[int, ...]]:
    """The same arguments as the compiled kernel takes them: float32, p = 1."""
    float32, l1, threads = DTYPE_CODES[torch.float32], NORM_CODES["1"], torch.get_num_threads()
    return [
        (*(t.data_ptr() for t in (score, grad, weight, omega)), *grad.shape, float32, l1, threads)
        for score, grad, weight, omega, _ in sets
    ]


def masked_sets(
    name: str, device: str, variants: int, batch: int, total: int
) -> tuple[list[Any], int]:
    """One shared activation to gated variants with scale, shift, residual and ReLU; bytes forward."""
    channels, side, _ = SHAPES[name]

    def make() -> tuple[Any, ...]:
        y = torch.randn(1, batch, channels, side * side, device=device)
        gate = torch.rand(variants, channels, device=device)
        scale, shift = torch.rand(2, channels, device=device)
        return y, gate, scale, shift, torch.randn_like(y), "relu"

    return fill(make, lambda y, *rest: nbytes(y, y) + variants * nbytes(y), total)


def fill(
    make: Callable[[], tuple[Any, ...]], moved: Callable[..., int], total: int
) -> tuple[list[Any], int]:
    """As many sets of arguments as it takes to be ``total`` bytes."""
    first = make()
    each = moved(*first)
    count = min(MOST_SETS, max(2, -(-total // each)))
    return [first, *(make() for _ in range(count - 1))], each


def masked_expression(
    y: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, residual: Tensor, act: str
) -> Tensor:
    """What the masked forward computes, written down for torch.compile."""
    affine = y * scale[:, None] + shift[:, None]
    return torch.relu(gate[:, None, :, None] * affine + residual)


def integral_expression(
    score: Tensor, grad: Tensor, weight: Tensor, omega: Tensor, p: int
) -> Tensor:
    """What the integral computes for p = 1, written down for torch.compile."""
    return score.add_(((grad * weight).abs().sum(-1) * omega[:, None]).sum(0))


def both_ways(run: Callable[..., Tensor]) -> Callable[..., Any]:
    """Forward and backward through autograd."""

    def call(
        y: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, residual: Tensor, act: str
    ) -> Any:
        leaves = [t.detach().requires_grad_() for t in (y, gate, residual)]
        out = run(leaves[0], leaves[1], scale, shift, leaves[2], act)
        return torch.autograd.grad(out, leaves, out.detach())

    return call


def rows(
    runs: dict[str, tuple[Callable[[], float], int]], ours: str, rounds: int
) -> dict[str, Any]:
    """Rates, and the share of the yardstick, of things that run in turn."""
    for run, _ in runs.values():
        run()
        run()
    times = interleaved({name: run for name, (run, _) in runs.items()}, rounds)
    rates = {name: runs[name][1] / times[name]["median"] / 1e9 for name in runs}

    def share(name: str) -> float:
        scale = runs[name][1] / runs["yardstick"][1]
        return scale * median_ratio(times, "yardstick", name)

    return {
        "GB/s": rates,
        "share": share(ours),
        **({f"share of the {ALONE}": share(ALONE)} if ALONE in runs else {}),
        "seconds": {
            name: {k: spent[k] for k in ("median", "min")} for name, spent in times.items()
        },
        "over ours": {
            name: median_ratio(times, name, ours)
            for name in runs
            if name not in (ours, ALONE, "yardstick")
        },
    }


def integral(args: argparse.Namespace, total: int) -> dict[str, Any]:
    """The gradient-variation integral [S, C, K] at the sizes of ResNet-50's layers."""
    found = {}
    for name in SHAPES:
        sets, each = integral_sets(name, args.device, args.nodes, total)
        stick = yardstick(total, args.device)
        runs = {
            "yardstick": stick,
            "ours": (cycle(accumulate, sets), each),
            "torch reference": (cycle(accumulate_reference, sets[:REFERENCE_CALLS]), each),
        }
        if args.device == "cpu" and (core := native.core()) is not None:
            runs[ALONE] = (cycle(core.accumulate_cpu, pointers(sets)), each)
        if args.compile:
            compiled = torch.compile(integral_expression, dynamic=False)
            runs["torch.compile"] = (cycle(compiled, sets), each)
        shape = list(sets[0][1].shape)
        found[name] = {"shape": shape, "bytes": each, "buffers": len(sets)}
        found[name] |= rows(runs, "ours", args.rounds)
        print_row("integral", name, found[name])
    return found


def masked(args: argparse.Namespace, total: int, backward: bool) -> dict[str, Any]:
    """The masked forward, alone or with its backward, at the sizes of ResNet-50's layers."""
    found = {}
    batch = 64 if args.device == "cuda" else 8
    op = torch.ops.singe.masked_forward_backward
    for name in SHAPES:
        sets, each = masked_sets(name, args.device, args.nodes, batch, total)
        y_bytes = nbytes(sets[0][0])
        if backward:
            grads = [torch.randn_like(masked_forward(*sets[0])) for _ in sets[:8]]
            calls = [
                (g, *s[:6], [True, True, True])
                for g, s in zip(itertools.cycle(grads), sets, strict=False)
            ]
            each = (
                args.nodes * y_bytes + 4 * y_bytes
            )  # gradient, y and residual in, two gradients out
            runs = {"ours": (cycle(op, calls), each)}
        else:
            runs = {"ours": (cycle(masked_forward, sets), each)}
        runs["yardstick"] = yardstick(total, args.device)
        kind = "backward" if backward else "forward"
        if args.compile and not backward:
            compiled = torch.compile(masked_expression, dynamic=False)
            runs["torch.compile"] = (cycle(compiled, sets), each)
        elif args.compile:
            fused = torch.compile(masked_expression, dynamic=False)
            runs["ours, forward and backward"] = (cycle(both_ways(masked_forward), sets), each)
            runs["torch.compile, forward and backward"] = (cycle(both_ways(fused), sets), each)
        shape = [args.nodes, *sets[0][0].shape[1:]]
        found[name] = {"shape": shape, "bytes": each, "buffers": len(sets)}
        found[name] |= rows(runs, "ours", args.rounds)
        print_row(f"masked {kind}", name, found[name])
    return found


def print_row(kernel: str, name: str, row: dict[str, Any]) -> None:
    rates = ", ".join(f"{k} {v:.1f} GB/s" for k, v in row["GB/s"].items())
    print(f"{kernel:15s} {name:13s} share {row['share']:.2f}; {rates}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--nodes", type=int, default=4)
    parser.add_argument(
        "--compile", action="store_true", help="also torch.compile; default on a GPU"
    )
    args = parser.parse_args()
    args.compile |= args.device == "cuda"
    cache = last_level_cache(args.device)
    total = max(384 << 20, 8 * cache)
    with torch.no_grad():
        found = {"integral": integral(args, total), "masked forward": masked(args, total, False)}
    found["masked backward"] = masked(args, total, True)
    settings = vars(args) | {"last level cache": cache, "working set": total}
    write(f"kernels-{args.device}", {"settings": settings, "kernels": found})


if __name__ == "__main__":
    main()
