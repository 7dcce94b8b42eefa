"""How close the two kernels come to the memory bandwidth of the machine.

    python -m benchmarks.kernels [--device cpu]

Bytes are those that must move: every input read once, every output written once. The yardstick is a
plain copy on a GPU and a triad ``a = b + s * c`` on a CPU, on arrays far larger than the last cache.
Every call of a kernel works on other buffers than the one before, together as large as the
yardstick's, so nothing is in a cache from the call before. Kernel, yardstick and the alternatives run
in turn; shares are medians over the rounds. On the CPU run it with ``OMP_PROC_BIND=close
OMP_PLACES=cores`` (``make bench`` does), so that threads stay where their data was first touched.

On a GPU a call from Python takes the host longer (60 to 540 us) than most of these kernels run, so the
calls are captured in a CUDA graph and its replays are timed; the row's ``eager`` has the same for calls
from Python, and ``not captured`` what could only be timed that way, with the reason.

Alternatives: the plain torch reference, and, on a GPU or with ``--compile``, torch.compile's own fusion
of the same expression. That comes last, and the file is written after every kernel: compiling takes long.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable, Sequence
from functools import partial
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
COMPILED = "torch.compile"
CALLED = "calls from Python"
Call = tuple[
    Callable[..., Any], Sequence[tuple[Any, ...]], int
]  # what, its arguments in turn, bytes
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


def replay(run: Callable[..., Any], sets: Sequence[tuple[Any, ...]]) -> Callable[[], float]:
    """As :func:`cycle`, but of the GPU alone: all calls are one CUDA graph.

    Raises:
        RuntimeError: a call does what cannot be captured.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiling and loading kernels cannot be captured
        run(*sets[0])
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        # All are held until the end, so no call writes where the cache holds what one before it wrote.
        _ = [run(*arguments) for arguments in sets]
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def once() -> float:
        graph.replay()  # the GPU is busy with it until the one that counts has been sent
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / len(sets)

    return once


def yardstick(total: int, device: str) -> Call:
    """Copy (GPU) or triad (CPU) over ``total`` bytes."""
    if device == "cuda":
        a, b = torch.ones(2, total // 8, device=device)
        return a.copy_, [(b,)], nbytes(a, b)
    a, b, c = (torch.ones(total // 12) for _ in range(3))
    return lambda: torch.add(b, c, alpha=3.0, out=a), [()], nbytes(a, b, c)


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
    name: str, args: argparse.Namespace, total: int, of_samples: bool
) -> tuple[list[Any], int]:
    """One shared activation to gated variants with scale, shift, residual and ReLU; bytes forward."""
    channels, side, _ = SHAPES[name]
    device, variants, batch = args.device, args.nodes, batch_of(args.device)

    def make() -> tuple[Any, ...]:
        y = torch.randn(1, batch, channels, side * side, device=device)
        gate = torch.rand(variants, *([batch] * of_samples), channels, device=device)
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


def timed(runs: dict[str, Call], ours: str, rounds: int, device: str) -> dict[str, Any]:
    """:func:`rows`; on a GPU of replayed graphs, beside ``eager``, those of calls from Python."""
    called = {name: (cycle(run, sets), each) for name, (run, sets, each) in runs.items()}
    eager = rows(called, ours, rounds)
    if device != "cuda":
        return eager
    graphs, refused = {}, {}
    for name, (run, sets, each) in runs.items():
        try:
            graphs[name] = (replay(run, sets), each)
        except Exception as error:
            refused[name] = f"{type(error).__name__}: {error}"
    if refused.keys() & {ours, "yardstick"}:
        return {"clock": CALLED, **eager, "not captured": refused}
    found = {"clock": "CUDA graphs", **rows(graphs, ours, rounds), "eager": eager}
    return found | ({"not captured": refused} if refused else {})


def integral(
    name: str, args: argparse.Namespace, total: int, compiled: bool
) -> tuple[list[int], dict[str, Call]]:
    """The gradient-variation integral [S, C, K]: shape and what runs in turn."""
    sets, each = integral_sets(name, args.device, args.nodes, total)
    runs: dict[str, Call] = {
        "yardstick": yardstick(total, args.device),
        "ours": (accumulate, sets, each),
        "torch reference": (accumulate_reference, sets[:REFERENCE_CALLS], each),
    }
    if args.device == "cpu" and (core := native.core()) is not None:
        runs[ALONE] = (core.accumulate_cpu, pointers(sets), each)
    if compiled:
        runs[COMPILED] = (torch.compile(integral_expression, dynamic=False), sets, each)
    return list(sets[0][1].shape), runs


def forward(
    name: str, args: argparse.Namespace, total: int, compiled: bool, of_samples: bool = False
) -> tuple[list[int], dict[str, Call]]:
    """The masked forward alone; ``of_samples``, with gates for each of them."""
    sets, each = masked_sets(name, args, total, of_samples)
    runs: dict[str, Call] = {"ours": (masked_forward, sets, each)}
    runs["yardstick"] = yardstick(total, args.device)
    if compiled:
        runs[COMPILED] = (torch.compile(masked_expression, dynamic=False), sets, each)
    return [args.nodes, *sets[0][0].shape[1:]], runs


def backward(
    name: str, args: argparse.Namespace, total: int, compiled: bool, of_samples: bool = False
) -> tuple[list[int], dict[str, Call]]:
    """Its backward; against torch.compile both together, as that has no backward to call alone."""
    sets, _ = masked_sets(name, args, total, of_samples)
    y_bytes = nbytes(sets[0][0])
    each = args.nodes * y_bytes + 4 * y_bytes  # gradient, y and residual in, two gradients out
    with torch.no_grad():
        grads = [torch.randn_like(masked_forward(*sets[0])) for _ in sets[:8]]
    calls = [
        (g, *s[:6], [True, True, True]) for g, s in zip(itertools.cycle(grads), sets, strict=False)
    ]
    runs: dict[str, Call] = {"ours": (torch.ops.singe.masked_forward_backward, calls, each)}
    runs["yardstick"] = yardstick(total, args.device)
    if compiled:
        fused = torch.compile(masked_expression, dynamic=False)
        runs["ours, forward and backward"] = (both_ways(masked_forward), sets, each)
        runs[f"{COMPILED}, forward and backward"] = (both_ways(fused), sets, each)
    return [args.nodes, *sets[0][0].shape[1:]], runs


KERNELS = {"integral": integral, "masked forward": forward, "masked backward": backward}
# Not against torch.compile: on a lent GPU that takes most of the time.
OF_SAMPLES = {
    f"{name}, gates of samples": partial(KERNELS[name], of_samples=True)
    for name in ("masked forward", "masked backward")
}


def batch_of(device: str) -> int:
    return 64 if device == "cuda" else 8


def measure(
    kernel: str, name: str, args: argparse.Namespace, total: int, compiled: bool
) -> dict[str, Any]:
    """One kernel at the size of one of ResNet-50's layers."""
    with torch.set_grad_enabled(kernel == "masked backward"):
        shape, runs = (KERNELS | OF_SAMPLES)[kernel](name, args, total, compiled)
        buffers = len(runs["ours"][1])
        row = {"shape": shape, "bytes": runs["ours"][2], "buffers": buffers}
        row |= timed(runs, "ours", args.rounds, args.device)
    print_row(kernel, name, row)
    return row


def print_row(kernel: str, name: str, row: dict[str, Any]) -> None:
    rates = ", ".join(f"{k} {v:.1f} GB/s" for k, v in row["GB/s"].items())
    print(f"{kernel:33s} {name:13s} share {row['share']:.2f}; {rates}", flush=True)


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
    settings = vars(args) | {"last level cache": cache, "working set": total}
    found: dict[str, dict[str, Any]] = {}
    for compiled in (False, True) if args.compile else (False,):
        for kernel in KERNELS if compiled else KERNELS | OF_SAMPLES:
            of_kernel = found.setdefault(kernel, {})
            for name in SHAPES:
                try:
                    of_kernel[name] = measure(kernel, name, args, total, compiled)
                except Exception as error:
                    if not compiled:
                        raise
                    of_kernel[name][f"{COMPILED} failed"] = f"{type(error).__name__}: {error}"
            write(f"kernels-{args.device}", {"settings": settings, "kernels": found})


if __name__ == "__main__":
    main()
