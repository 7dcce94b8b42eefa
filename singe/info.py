"""``singe info``: what is compiled and usable on this machine, and why something is not."""

from __future__ import annotations

import importlib
import os
import platform
import shutil
from typing import Any

import torch
from rich.table import Table
from rich.text import Text

from singe.kernels import masked_forward, native
from singe.versions import versions


def collect() -> dict[str, Any]:
    """Everything ``singe info`` knows, JSON-ready.

    Returns:
        ``versions``; ``native`` (see :func:`singe.kernels.native.status`); ``triton`` and
        ``torch_cuda``: ``version``, ``usable`` and ``reason`` (why not); ``devices``: name and,
        under ``kernels``, the implementation each kernel will use there; ``environment``: the
        variables that change the choice, where they are set.
    """
    devices = [{"device": "cpu", "name": _cpu_name()}]
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        name = f"{torch.cuda.get_device_name(index)}, sm_{major}{minor}"
        devices.append({"device": f"cuda:{index}", "name": name})
    return {
        "versions": versions() | {"python": platform.python_version()},
        "native": native.status(),
        "triton": _triton(),
        "torch_cuda": _torch_cuda(),
        "devices": [row | {"kernels": _kernels(torch.device(row["device"]))} for row in devices],
        "environment": {
            name: os.environ[name]
            for name in ("SINGE_INTEGRAL", "SINGE_KERNELS", "TRITON_INTERPRET")
            if name in os.environ
        },
    }


def _cpu_name() -> str:
    return f"{platform.machine()}, {torch.get_num_threads()} threads"


def _torch_cuda() -> dict[str, Any]:
    version = torch.version.cuda
    usable = torch.cuda.is_available()
    if usable:
        reason = ""
    elif version is None:
        reason = f"this torch ({torch.__version__}) was built without CUDA"
    else:
        reason = "torch finds no CUDA device or driver"
    return {"version": version, "usable": usable, "reason": reason}


def _triton() -> dict[str, Any]:
    try:
        version = importlib.import_module("triton").__version__
    except ImportError as error:
        reason = f"triton does not import ({error}); try `pip install triton`"
        return {"version": None, "usable": False, "reason": reason}
    reason = ""
    if os.environ.get("TRITON_INTERPRET") != "1":  # the interpreter needs neither of these
        if not torch.cuda.is_available():
            reason = "no CUDA device: the torch implementation serves the CPU"
        elif not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
            reason = "triton needs a C compiler when it runs: install gcc or clang, or set CC"
    return {"version": version, "usable": not reason, "reason": reason}


def _kernels(device: torch.device) -> dict[str, str]:
    """Kernel -> implementation; a sentence where the environment asks for what is not there."""
    problem = native.cpu_problem()
    if device.type == "cuda":
        problem = native.cuda_problem(device.index or 0)
    forced = os.environ.get("SINGE_INTEGRAL", "")
    if forced == "native" and problem:
        integral = f"error: SINGE_INTEGRAL=native, but: {problem}"
    elif forced not in ("", "native", "torch"):
        integral = f"error: SINGE_INTEGRAL={forced!r}; it can be native, torch or unset"
    else:
        integral = "torch" if problem or forced == "torch" else "native"
    try:
        forward = "torch" if masked_forward.backend(device) is None else "triton"
    except (RuntimeError, ImportError) as error:  # a KernelError, or a card without memory
        forward = f"error: {error}"
    return {"integral": integral, "masked_forward": forward}


def render(found: dict[str, Any]) -> Table:
    """:func:`collect`'s answer as a table of two columns."""
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True, style="bold")

    def row(name: str, value: str) -> None:
        table.add_row(name, Text(value))  # Text: square brackets in a reason are no markup

    for name, version in found["versions"].items():
        row(name, version)
    core, triton, cuda = found["native"], found["triton"], found["torch_cuda"]
    build = core["build"]
    if build:
        openmp = "OpenMP" if build["openmp"] else "no OpenMP: one thread"
        line = f"{build['version']}, {build['compiler']}, {openmp}, {build['cpu_isa']}"
    else:
        line = _state(core["cpu"])
    row("native core", line)
    if build.get("cuda"):
        driver = _number(core["cuda_driver"]) if core["cuda_driver"] else "none"
        line = f"CUDA {_number(build['cuda_version'])} for {', '.join(build['cuda_archs'])}"
        row("native CUDA", f"{line}; driver: {driver}; {_state(core['cuda'])}")
    else:
        row("native CUDA", _state(core["cuda"]))
    for device in core["cuda_devices"]:
        row(f"  device {device['index']}", _state(device))
    row("torch CUDA", f"{cuda['version'] or 'none'}; {_state(cuda)}")
    row("triton", f"{triton['version'] or 'none'}; {_state(triton)}")
    for device in found["devices"]:
        kernels = ", ".join(f"{kernel}: {how}" for kernel, how in device["kernels"].items())
        row(device["device"], f"{device['name']}\n{kernels}")
    for name, value in found["environment"].items():
        row(name, value)
    return table


def _state(part: dict[str, Any]) -> str:
    return "usable" if part["usable"] else f"not usable: {part['reason']}"


def _number(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"
