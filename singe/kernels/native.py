"""The compiled core: loaded if it is there, and otherwise a sentence saying why not.

Importing the package never fails for want of it. The torch implementations take over, unless
``SINGE_INTEGRAL=native`` asks for the compiled one: then the call says what is missing.
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType
from typing import Any

import torch  # before _core: whichever comes first brings the OpenMP runtime both then share

# What the driver says of kernels that are not built for a GPU.
UNFIT = ("no kernel image", "invalid device function", "unsupported toolchain")
REBUILD = "SINGE_CUDA=ON pip install --force-reinstall --no-deps ."
_ready: set[int] = set()  # devices whose kernels have been found to load


@functools.cache
def _load() -> tuple[ModuleType | None, str]:
    """The module, or None and the reason."""
    try:
        return importlib.import_module("singe._core"), ""
    except ModuleNotFoundError:
        return None, "singe._core was not built; run `pip install .` in the source tree"
    except ImportError as error:  # built for another Python or libstdc++, or damaged
        return None, f"singe._core does not load ({error}); rebuild it with `pip install .`"


def core() -> ModuleType | None:
    """``singe._core``, or None where it was not built or does not load."""
    return _load()[0]


def cpu_problem() -> str:
    """Why the compiled CPU kernels cannot be used, or an empty string."""
    return _load()[1]


def cuda_problem(device: int) -> str:
    """Why the compiled CUDA kernels cannot be used on this device, or an empty string.

    Looks at the core, its build, the driver and the GPU's architecture, in this order.
    """
    return _setup_problem(device) or _device_problem(device)


@functools.cache
def _setup_problem(device: int) -> str:
    module, reason = _load()
    if module is None:
        return reason
    info = module.build_info()
    if not info["cuda"]:
        return f"singe._core was built without CUDA ({info['cuda_note']}); rebuild: `{REBUILD}`"
    built, driver = int(info["cuda_version"]), int(module.cuda_driver_version())
    if driver == 0:
        return "no NVIDIA driver was found"
    if driver // 1000 < built // 1000:  # within one major version older drivers do
        return (
            f"singe._core was built with CUDA {_version(built)}, the driver only knows "
            f"{_version(driver)}; update the driver, or rebuild with an older nvcc: `{REBUILD}`"
        )
    count = int(module.cuda_device_count())
    if device >= count:
        return f"there is no CUDA device {device}: {count} are visible"
    return ""


def _device_problem(device: int) -> str:
    """What passes, a card without memory left, is asked for again the next time."""
    if device in _ready:
        return ""
    module = core()
    assert module is not None
    said = str(module.cuda_problem(device))
    if not said:
        _ready.add(device)
    elif any(text in said for text in UNFIT) and torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability(device)
        return (
            f"{said}; the GPU is sm_{major}{minor}, rebuild for it: "
            f"`SINGE_CUDA_ARCHS={major}{minor} {REBUILD}`"
        )
    return said


def status() -> dict[str, Any]:
    """What is compiled, what of it can be used here, and why not.

    Returns a JSON-ready dict:
      - ``build``: version, compiler, openmp, cpu_isa (chosen at run time), cuda, cuda_version
        (13000 is 13.0), cuda_archs, cuda_note (why it was built without CUDA); empty without a
        core;
      - ``cpu``, ``cuda``: ``{"usable": bool, "reason": why not, or ""}``; cuda is usable if one
        device is;
      - ``cuda_driver``: newest CUDA the driver knows, 0 without one;
      - ``cuda_devices``: one ``{"index", "usable", "reason"}`` per visible device.
    """
    module, reason = _load()
    count = int(module.cuda_device_count()) if module is not None else 0
    problems = [cuda_problem(index) for index in range(count)]
    cuda_usable = "" in problems
    return {
        "build": dict(module.build_info()) if module is not None else {},
        "cpu": {"usable": module is not None, "reason": reason},
        "cuda": {
            "usable": cuda_usable,
            "reason": "" if cuda_usable else problems[0] if problems else cuda_problem(0),
        },
        "cuda_driver": int(module.cuda_driver_version()) if module is not None else 0,
        "cuda_devices": [
            {"index": index, "usable": not problem, "reason": problem}
            for index, problem in enumerate(problems)
        ],
    }


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"
