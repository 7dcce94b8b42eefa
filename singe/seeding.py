"""Randomness that depends on the seed and the place in the run, not on what was drawn before.

A run that is continued in the middle then draws what the uninterrupted run drew.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from singe.errors import DataError


def derive(*parts: object) -> int:
    """A seed of 63 bits from a few numbers and words."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "little") >> 1


def seed_all(*parts: object, loader: Any = None) -> None:
    """Seed torch (all devices in use), numpy and Python from ``parts``, and what ``loader`` shuffles with."""
    seed = derive(*parts)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - what augmentations draw from
    if torch.cuda.is_available() and not torch.cuda.is_initialized():
        torch.default_generator.manual_seed(
            seed
        )  # GPUs would take the seed when they are first used
    else:
        torch.manual_seed(seed)
    for generator in _generators(loader):
        generator.manual_seed(seed)


@contextmanager
def random_state_kept(*data: Any) -> Iterator[None]:
    """Whatever is seeded and drawn in here, the caller's generators go on as before.

    So do those that the loaders among ``data`` shuffle with.
    """
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    loaders = [(g, g.get_state()) for batches in data for g in _generators(batches)]
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        for generator, state in loaders:
            generator.set_state(state)


def _owners(batches: Any) -> list[Any]:
    """A loader, its dataset and its samplers: whatever may shuffle."""
    owners = [
        batches,
        *(getattr(batches, n, None) for n in ("dataset", "sampler", "batch_sampler")),
    ]
    return [*owners, getattr(owners[-1], "sampler", None)]


def _generators(batches: Any) -> list[torch.Generator]:
    found = (getattr(owner, "generator", None) for owner in _owners(batches))
    return [generator for generator in found if isinstance(generator, torch.Generator)]


class Stream:
    """Training batches without end, epoch after epoch, with a place that can be returned to.

    Every epoch and every batch is seeded by its number. ``set_epoch(epoch)`` is called, and a
    ``torch.Generator`` called ``generator`` is seeded, wherever the data, its dataset or its samplers
    have them.

    Args:
        batches: re-iterable.
        seed: of the run.
    """

    def __init__(self, batches: Iterable[Any], seed: int) -> None:
        self._batches, self._seed = batches, seed
        self._epoch, self._taken = -1, 0
        self._iterator: Iterator[Any] = iter(())

    def state(self) -> dict[str, int]:
        """The place: epoch, and batches taken from it."""
        return {"epoch": self._epoch, "taken": self._taken}

    def seek(self, state: dict[str, int]) -> None:
        """Return to a place; the batches of the epoch before it are read and dropped.

        Raises:
            DataError: there are not so many batches.
        """
        if state["epoch"] < 0:
            return
        self._open(state["epoch"])
        for _ in range(state["taken"]):
            try:
                self._next()
            except StopIteration:
                raise DataError(
                    "the training data has fewer batches than when the checkpoint was written"
                ) from None

    def next(self) -> Any:
        """The next batch.

        Raises:
            DataError: the data is empty.
        """
        try:
            return self._next()
        except StopIteration:
            self._open(self._epoch + 1)
        try:
            return self._next()
        except StopIteration:
            raise DataError("the training data is empty: it gave no batch") from None

    def _next(self) -> Any:
        seed_all(self._seed, "batch", self._epoch, self._taken)
        raw = next(self._iterator)
        self._taken += 1
        return raw

    def _open(self, epoch: int) -> None:
        self._epoch, self._taken = epoch, 0
        for owner in _owners(self._batches):
            if callable(getattr(owner, "set_epoch", None)):
                owner.set_epoch(epoch)
        for generator in _generators(self._batches):
            generator.manual_seed(derive(self._seed, "generator", epoch))
        seed_all(self._seed, "epoch", epoch)
        loader = self._batches
        if isinstance(loader, DataLoader) and loader.persistent_workers:
            # Its one iterator goes on with its workers' random numbers, and others may start it again.
            self._iterator = loader._get_iterator()
        else:
            self._iterator = iter(loader)
