"""A small network and its data, for the tests of the entwined loop."""

from __future__ import annotations

import torch
from helpers import make_batches, randomise
from helpers_networks import vgg
from torch import nn

from singe.finetune import Training, cosine, default_optimizer
from singe.objectives import CrossEntropy
from singe.seeding import Stream
from singe.tuner import Tuner

SHAPE = (3, 8, 8)
BATCHES = make_batches(SHAPE, (4, 4, 4), dtype=torch.float32)
OPTIONS = {"train": BATCHES, "rounds": 2, "finetune_steps": 3, "progress": False}


def network() -> nn.Module:
    torch.manual_seed(0)
    return randomise(vgg((8, 10, 9), 12))


def tuner_of(model: nn.Module, factory=None, **options) -> Tuner:
    training = Training(factory or default_optimizer(0.05), cosine, CrossEntropy(), **options)
    return Tuner(model, training, Stream(BATCHES, 0), seed=0)


def same_weights(left: nn.Module, right: nn.Module) -> bool:
    a, b = left.state_dict(), right.state_dict()
    return a.keys() == b.keys() and all(
        a[n].shape == b[n].shape and torch.equal(a[n], b[n]) for n in a
    )
