"""Scores inside the pruning libraries people already use: one file per library, imported on demand.

No adapter knows how a score came about: each is a view of :class:`singe.Scores`. The library itself is
imported when an adapter is used, and its absence is named in the error.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from singe.errors import OptionError

ADAPTERS = (
    "captum",
    "channel_scores",
    "fasterai",
    "modelopt",
    "nni",
    "torch_ao",
    "torch_prune",
    "torch_pruning",
    "weight_tables",
)

__all__ = list(ADAPTERS)


def __getattr__(name: str) -> ModuleType:
    if name in ADAPTERS:
        return import_module(f"singe.adapters.{name}")
    raise AttributeError(f"singe.adapters has no {name!r}; it has {', '.join(ADAPTERS)}")


def required(module: str, package: str) -> ModuleType:
    """Import a library an adapter speaks to.

    Raises:
        OptionError: it is not installed; names the package.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise OptionError(
            f"this adapter needs {package}, and importing {module} failed ({error}); "
            f"install it with `pip install {package}`"
        ) from error
