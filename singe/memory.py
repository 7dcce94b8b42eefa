"""How much memory is left, and what running out of it looks like."""

from __future__ import annotations

from pathlib import Path

import torch

UNKNOWN = 4 << 30  # bytes; where the system does not say
UNLIMITED = 1 << 62
# Versions 2 and 1: folder, limit, use, and the page cache in it that goes first.
CGROUPS = (
    (Path("/sys/fs/cgroup"), "memory.max", "memory.current", "inactive_file"),
    (
        Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.usage_in_bytes",
        "total_inactive_file",
    ),
)  # fmt: skip


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on ``device``, page cache and freed blocks included."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    return min(_system_free(), _cgroup_free())


def usual_budget(device: torch.device) -> int:
    """Bytes that scoring takes where nobody says: half of what is free on a GPU, a quarter elsewhere.

    What starts a pass costs the host more than a variant costs a GPU: ResNet-50's layer path on an H200 took
    0.55 s with one variant per pass, 0.35 with three (``benchmarks/results/probes-h200.json``).
    """
    return free_memory(device) // (2 if device.type == "cuda" else 4)


def _system_free() -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = next(line for line in lines if line.startswith("MemAvailable"))
        return int(available.split()[1]) * 1024
    except (OSError, StopIteration):
        return UNKNOWN


def _cgroup_free() -> int:
    """What the container may still take; a very large number without a limit."""
    for root, limit, used, cached in CGROUPS:
        try:
            allowed = (root / limit).read_text().strip()
            if allowed == "max":
                return UNLIMITED
            lines = (root / "memory.stat").read_text().splitlines()
            cache = next((int(v) for k, v in map(str.split, lines) if k == cached), 0)
            return max(0, int(allowed) - int((root / used).read_text()) + cache)
        except (OSError, ValueError):
            continue
    return UNLIMITED


# What a plain RuntimeError says where there is no memory left: drivers, Triton, cuBLAS and cuDNN 8, cuDNN 9.
TEXTS = (
    "out of memory",
    "_ALLOC_FAILED",
    "_ALLOCATION_FAILED",
    "unable to find an engine to execute this computation",
)


def is_out_of_memory(error: BaseException) -> bool:
    """CUDA has an exception type of its own; libraries and the CPU allocator raise plain RuntimeErrors."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    text = str(error)
    if any(known in text for known in TEXTS):
        return True
    return "DefaultCPUAllocator" in text and "allocate" in text


class PeakMemory:
    """How much more memory was in use at the peak than at the start.

    On CUDA what the allocator handed out; on the CPU the resident size of the process (Linux). No
    counter is reset, they are the user's too: where the process had used more before, the peak
    in between is not known.

    Attributes:
        bytes: the difference, or None where it is not known.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.bytes: int | None = None

    def __enter__(self) -> PeakMemory:
        self._now, self._highest = self._read()
        return self

    def __exit__(self, *_: object) -> None:
        highest = self._read()[1]
        if highest > self._highest > 0:
            self.bytes = highest - self._now

    def _read(self) -> tuple[int, int]:
        """Bytes in use, and the most there ever were."""
        if self.device.type == "cuda":
            return (
                torch.cuda.memory_allocated(self.device),
                torch.cuda.max_memory_allocated(self.device),
            )
        try:
            lines = Path("/proc/self/status").read_text().splitlines()
            sizes = {line.split(":")[0]: line.split()[1] for line in lines if line.startswith("Vm")}
            return int(sizes["VmRSS"]) * 1024, int(sizes["VmHWM"]) * 1024
        except (OSError, KeyError, ValueError):
            return 0, 0
