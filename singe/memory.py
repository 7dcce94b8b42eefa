"""How much memory is left, and what running out of it looks like."""

from __future__ import annotations

from pathlib import Path

import torch

UNKNOWN = 4 << 30  # bytes; where the system does not say


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on ``device``, page cache and freed blocks included."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    return min(_system_free(), _cgroup_free())


def _system_free() -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = next(line for line in lines if line.startswith("MemAvailable"))
        return int(available.split()[1]) * 1024
    except (OSError, StopIteration):
        return UNKNOWN


def _cgroup_free() -> int:
    """What the container may still take; a very large number without a limit."""
    root = Path("/sys/fs/cgroup")
    try:
        limit = (root / "memory.max").read_text().strip()
        if limit == "max":
            return 1 << 62
        return max(0, int(limit) - int((root / "memory.current").read_text()))
    except (OSError, ValueError):
        return 1 << 62


def is_out_of_memory(error: BaseException) -> bool:
    """CUDA has an exception type of its own; the CPU allocator raises a plain RuntimeError."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    text = str(error)
    return "DefaultCPUAllocator" in text and "allocate" in text


class PeakMemory:
    """How much more memory was in use at the peak than at the start.

    On CUDA what the allocator handed out; on the CPU the resident size of the process, whose
    high-water mark is reset at the start (Linux only).

    Attributes:
        bytes: the difference, or None where it cannot be measured.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.bytes: int | None = None
        self._before: int | None = None

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)
        else:
            try:
                Path("/proc/self/clear_refs").write_text("5")
                self._before = _status("VmRSS")
            except (OSError, StopIteration, ValueError):
                self._before = None
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is None:
            return
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.device)
        else:
            peak = _status("VmHWM")
        self.bytes = max(0, peak - self._before)


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field + ":")).split()[1]) * 1024
