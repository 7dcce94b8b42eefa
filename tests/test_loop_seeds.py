"""A run draws by its seed: the same bits again, and from any place in its data."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from helpers import (
    one_thread,  # noqa: F401 - autouse
)
from helpers_loop import BATCHES, OPTIONS, SHAPE, network, same_weights
from torch.utils.data import DataLoader, Dataset, TensorDataset

import singe
from singe.seeding import Stream, seed_all


def loader(seed: int | None = None) -> DataLoader:
    x, y = torch.cat([b[0] for b in BATCHES]), torch.cat([b[1] for b in BATCHES])
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return DataLoader(TensorDataset(x, y), batch_size=5, shuffle=True, generator=generator)


@pytest.mark.parametrize("in_use", [True, False])
def test_gpus_that_are_not_in_use_are_not_seeded(monkeypatch, in_use):
    """They would take the seed when they are first used, long after the run."""
    seeded = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: in_use)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    with torch.random.fork_rng(devices=[]):
        seed_all(5)
        found = torch.initial_seed()
    assert seeded == ([found] if in_use else [])


@pytest.mark.parametrize("seed", [None, 3])
def test_the_same_seed_gives_the_same_bits(seed):
    """Whatever the caller's generators hold; and they are as they were afterwards."""
    results = []
    for start in (1, 2):
        torch.manual_seed(start)
        random.seed(start)
        np.random.seed(start)  # noqa: NPY002
        model = network()
        torch.manual_seed(start)
        states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
        singe.compress(model, macs=0.6, seed=7, **{**OPTIONS, "train": loader(seed)})
        results.append(model)
        assert torch.equal(torch.get_rng_state(), states[0])
        assert random.getstate() == states[1]
        assert np.random.get_state()[1].tolist() == states[2]  # noqa: NPY002
    assert same_weights(*results)
    other = network()
    singe.compress(other, macs=0.6, seed=8, **{**OPTIONS, "train": loader(seed)})
    assert not same_weights(other, results[0])


def test_calibration_data_is_drawn_by_the_seed_as_well():
    """Not by what is left in the loader's generator, which a run that goes on has anew."""
    results = []
    for start in (1, 2):
        model, calibrate = network(), loader(start)
        held = calibrate.generator.get_state()
        singe.compress(model, macs=0.6, seed=7, **{**OPTIONS, "calibrate": calibrate})
        assert torch.equal(calibrate.generator.get_state(), held)
        results.append(model)
    assert same_weights(*results)


def test_a_finetune_function_draws_by_the_seed_as_well():
    """Whatever the last stage has left in the loader's generator."""

    def finetune(model, stage):
        x, y = next(iter(stage.train))
        loss = torch.nn.functional.cross_entropy(model(x), y)
        for parameter, grad in zip(
            model.parameters(), torch.autograd.grad(loss, list(model.parameters())), strict=True
        ):
            parameter.data.sub_(grad, alpha=0.1)
        stage.train.generator.manual_seed(start)

    results = []
    for start in (1, 2):
        model = network()
        options = {k: v for k, v in OPTIONS.items() if k != "lr"}
        singe.compress(
            model, macs=0.6, seed=7, **{**options, "train": loader(start), "finetune": finetune}
        )
        results.append(model)
    assert same_weights(*results)


@pytest.mark.parametrize("taken", [0, 1, 3, 4, 7])
@pytest.mark.parametrize("seed", [None, 3])
def test_a_stream_returns_to_its_place(taken, seed):
    """Shuffling, and noise that the data set draws, are those of a stream that never stopped."""

    class Noisy(TensorDataset):
        def __getitem__(self, index):
            x, y = super().__getitem__(index)
            return x + torch.randn(()) + np.random.rand() + random.random(), y  # noqa: NPY002

    def noisy() -> DataLoader:
        plain = loader(seed)
        data = Noisy(*plain.dataset.tensors)
        return DataLoader(data, batch_size=5, shuffle=True, generator=plain.generator)

    whole = Stream(noisy(), seed=5)
    expected = [whole.next()[0].float() for _ in range(8)]
    assert len({float(x.sum()) for x in expected}) == 8
    first = Stream(noisy(), seed=5)
    for _ in range(taken):
        first.next()
        torch.randn(3)  # the model draws, too
    second = Stream(noisy(), seed=5)
    second.seek(first.state())
    for index in range(taken, 8):
        assert torch.equal(second.next()[0].float(), expected[index])


def test_epochs_are_announced():
    class Sampled(list):
        epochs: list = []  # noqa: RUF012

        def set_epoch(self, epoch):
            self.epochs.append(epoch)

    data = Sampled(BATCHES)
    stream = Stream(data, 0)
    for _ in range(7):
        stream.next()
    assert data.epochs == [0, 1, 2]


class Noisy(Dataset):
    """Samples with noise of torch's global generator, which a worker has of its own."""

    def __len__(self):
        return 12

    def __getitem__(self, index):
        return torch.full(SHAPE, float(index)) + torch.rand(()), index % 4


def test_a_loader_that_keeps_its_workers_is_followed_and_not_shared():
    loader = DataLoader(Noisy(), 4, shuffle=True, num_workers=1, persistent_workers=True)
    stream = Stream(loader, seed=1)
    whole = []
    for place in range(7):  # of three batches an epoch
        whole.append(stream.next()[0])
        if place == 3:
            next(iter(loader))  # somebody else starts it again: scoring
    again = Stream(loader, seed=1)
    again.seek({"epoch": 1, "taken": 2})
    assert torch.equal(again.next()[0], whole[5])
    assert torch.equal(again.next()[0], whole[6])
