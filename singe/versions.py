"""Which versions made a result."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

import torch

try:
    VERSION = version("singe")
except PackageNotFoundError:  # a checkout that was never installed
    VERSION = "0+unknown"


def versions() -> dict[str, str]:
    """What every file of results says."""
    return {"singe": VERSION, "torch": torch.__version__}
