"""Training and evaluation mode, and compiled parts as they are, for a while."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from threading import Lock

import torch
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


class _Everybody:
    """The threads that want no compiled code now: torch's stance is one for all of them."""

    def __init__(self) -> None:
        self.lock, self.inside, self.undo = Lock(), 0, ExitStack()

    def enter(self) -> None:
        with self.lock:
            if self.inside == 0:
                self.undo.enter_context(torch.compiler.set_stance("force_eager"))
            self.inside += 1

    def leave(self) -> None:
        with self.lock:
            self.inside -= 1
            if self.inside == 0:
                self.undo.close()


_everybody = _Everybody()


@contextmanager
def eager() -> Iterator[None]:
    """Compiled parts run as they are: code that is compiled already knows nothing of new hooks.

    What they change from call to call (a momentum, gates) would have it compiled anew as well.
    """
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and the import takes a second
        yield
        return
    _everybody.enter()
    try:
        yield
    finally:
        _everybody.leave()
