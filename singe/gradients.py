"""Gradients, whatever mode the caller is in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain

import torch
from torch import nn

from singe.errors import ModelError


@contextmanager
def gradients_on() -> Iterator[None]:
    """Autograd records in here, in the model's own precision.

    Also under the caller's ``no_grad``, ``inference_mode`` or ``autocast``.
    """
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        _no_autocast("cpu"),
        _no_autocast("cuda"),
    ):
        yield


def _no_autocast(kind: str) -> torch.autocast:
    # The cache of cast weights is emptied where the outermost context ends: training in an inner one
    # would go on with the weights of its first step.
    return torch.autocast(kind, enabled=False, cache_enabled=False)


def check_changeable(model: nn.Module) -> None:
    """Raise ModelError if the model was made in inference mode: torch lets nobody change it then."""
    if any(tensor.is_inference() for tensor in chain(model.parameters(), model.buffers())):
        raise ModelError(
            f"this {type(model).__name__} was made or copied under torch.inference_mode(), where its "
            "parameters cannot be changed; build or copy it outside"
        )
