"""BatchNorm's running statistics, set again on data: those of the larger network do not fit any more."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from singe.data import Batch, device_of, read_batches
from singe.graph import BATCH_NORMS, unwrapped
from singe.modes import eager, in_mode
from singe.seeding import seed_all


def set_statistics(model: nn.Module, data: Iterable[Any], seed: int, round: int) -> bool:
    """:func:`recalibrate` on what a round of a run with this seed draws from ``data``."""
    seed_all(seed, "recalibrate", round, loader=data)
    return recalibrate(model, read_batches(data, device_of(model)))


@torch.no_grad()
def recalibrate(model: nn.Module, batches: Iterable[Batch]) -> bool:
    """Set the BatchNorms' running statistics to the mean over ``batches``; nothing else moves.

    Norms that these batches do not reach (of an auxiliary head, of another domain) keep theirs. A batch
    counts by its samples: a short last one less than the others.

    Batches of a single sample are passed over where there are others. Where there are none they count,
    unless a norm sees a single value per channel, whose variance is not defined: then a warning says that
    all stays as it is.

    Returns:
        Whether anything was set.
    """
    norms: list[Any] = [
        m for m in model.modules() if isinstance(m, BATCH_NORMS) and m.running_mean is not None
    ]
    if not norms:
        return False
    before = [{k: t.clone() for k, t in norm.named_buffers()} for norm in norms]
    momenta = [norm.momentum for norm in norms]
    with in_mode(model, training=False):
        means = [_MeanOverSamples() for _ in norms]
        hooks = [
            norm.register_forward_pre_hook(of, with_kwargs=True)
            for norm, of in zip(norms, means, strict=True)
        ]
        for norm in norms:
            norm.reset_running_stats()
            norm.train()
        done = False
        try:
            with eager():
                done = _run(unwrapped(model), batches)
        except ValueError as error:
            if not lacks_variance(error):
                raise
            warnings.warn(
                "the BatchNorms keep the statistics of the larger network: calibration batches of one sample "
                "have no variance; give them two samples or more",
                stacklevel=2,
            )
        finally:
            for norm, momentum, hook in zip(norms, momenta, hooks, strict=True):
                norm.momentum = momentum
                hook.remove()
            for norm, of, buffers in zip(norms, means, before, strict=True):
                if done and of.seen:
                    continue
                for name, tensor in norm.named_buffers():
                    tensor.copy_(buffers[name])
    return done


def lacks_variance(error: ValueError) -> bool:
    """Whether a BatchNorm in training mode saw a single value per channel."""
    return "more than 1 value per channel" in str(error)


def _run(model: nn.Module, batches: Iterable[Batch]) -> bool:
    """Whether there was a batch to run; of one sample only where all are."""
    alone, ran = [], False
    for batch in batches:
        if batch.size > 1:
            batch.call(model)
            ran = True
        elif not ran:
            alone.append(batch)
    for batch in () if ran else alone:
        batch.call(model)
    return ran or bool(alone)


class _MeanOverSamples:
    """Before every call of a norm: the momentum with which its statistics stay the mean so far."""

    def __init__(self) -> None:
        self.seen = 0

    def __call__(self, norm: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        samples = len(args[0] if args else kwargs["input"])
        self.seen += samples
        norm.momentum = samples / max(1, self.seen)
