"""Which samples are trained on, calibrated on and measured on, and in what layout."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import (
    one_thread,  # noqa: F401 - autouse
)
from torch import nn

from singe.cli.data import Reading, Source, first_batches
from singe.errors import DataError

MODEL = nn.Conv2d(3, 2, 1)
FLAT = {"mean": (0.0,) * 3, "std": (1.0,) * 3}


def source_of(folder, **arrays):
    np.savez(folder / "d.npz", **arrays)
    return Source(str(folder / "d.npz"))


def numbered(count):
    """Features that are the sample's own number."""
    return {"x": np.arange(count)[:, None], "y": np.arange(count) % 2}


def samples(batches):
    return torch.cat([x for x, _ in batches])


def test_training_images_alone_are_augmented(tmp_path):
    draw = np.random.default_rng(0)
    images = draw.integers(0, 256, (20, 3, 8, 8), np.uint8)
    source = source_of(tmp_path, x=images, y=np.arange(20) % 2)
    plain = torch.from_numpy(images).float() / 255
    data = source.read(MODEL, Reading(batch_size=16, **FLAT))
    for part in (data.calibrate, data.evaluate):
        assert all((x == plain).flatten(1).all(1).any() for x in samples(part))
    assert not all((x == plain).flatten(1).all(1).any() for x in samples(data.train))


def test_a_part_of_the_held_out_samples_is_of_all_of_them(tmp_path):
    """Data are often sorted by class: the first would be of one."""
    held_out = {f"{k}_test": v for k, v in numbered(100).items()}
    train = {f"{k}_train": v for k, v in numbered(4).items()}
    source = source_of(tmp_path, **train, **held_out)
    chosen = samples(source.read(nn.Linear(1, 2), Reading(evaluation=10)).evaluate).flatten()
    assert len(chosen.unique()) == 10
    assert chosen.max() > 50
    other = source.read(nn.Linear(1, 2), Reading(evaluation=10, seed=1)).evaluate
    assert not torch.equal(samples(other).flatten(), chosen)


def test_nothing_held_out_is_nothing_to_measure_on(tmp_path):
    data = source_of(tmp_path, **numbered(6)).read(nn.Linear(1, 2), Reading(held_out=0.0))
    assert data.evaluate is None
    assert sorted(samples(data.train).flatten().tolist()) == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("shape", [(3, 4, 3), (1, 4, 3), (3, 4, 1)])
def test_channels_come_first_where_both_ends_could_be_channels(tmp_path, shape):
    images = np.arange(4 * 12 * 9, dtype=np.uint8)[: 4 * np.prod(shape)].reshape(4, *shape)
    data = source_of(tmp_path, x=images, y=np.arange(4) % 2).read(
        MODEL, Reading(held_out=0.0, augment=False, **FLAT)
    )
    assert samples(data.calibrate).shape == (4, *shape)


def test_workers_that_shuffle_do_not_outlive_an_epoch(tmp_path):
    data = source_of(tmp_path, **numbered(10)).read(nn.Linear(1, 2), Reading(workers=1))
    assert not data.train.persistent_workers
    assert data.evaluate.persistent_workers


@pytest.mark.parametrize(("count", "batches"), [(1, 1), (4, 1), (5, 2), (8, 2), (99, 3)])
def test_calibration_takes_whole_batches_and_no_more_than_it_needs(count, batches):
    assert len(first_batches([torch.zeros(4, 2)] * 3, count)) == batches


def test_labels_are_classes_that_fit_into_memory(tmp_path):
    with pytest.raises(DataError, match=f"labels up to {2**31}"):
        source_of(tmp_path, x=np.zeros((2, 2)), y=np.array([0, 2**31]))
