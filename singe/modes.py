"""Training and evaluation mode, for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def in_mode(model: nn.Module, training: bool | None) -> Iterator[None]:
    """Training or evaluation mode in here (None: as it is); every module's own comes back afterwards.

    A model that is in training mode already stays as it is: what was set to ``eval()`` inside it, a frozen
    norm say, is not trained.
    """
    modes = {module: module.training for module in model.modules()}
    if training is not None and not (training and model.training):
        model.train(training)
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
