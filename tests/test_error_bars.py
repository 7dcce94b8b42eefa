"""Error bars: the jackknife over batches, checked against scoring again without each batch."""

from __future__ import annotations

import pytest
import torch
from helpers import (
    assert_close,
    one_thread,  # noqa: F401 - autouse
    run_engine,
)
from helpers_networks import CASES

import singe
from singe import room

OPTIONS = [
    {"criterion": "singe", "path": "layer"},
    {"criterion": "singe", "path": "network", "norm": "outside", "p": 2},
    {"criterion": "singe", "path": "neuron", "p": "sum"},
    {"criterion": "singe", "path": "layer", "p": "fisher"},
    {"criterion": "ig", "path": "layer"},
    {"criterion": "signed", "path": "neuron"},
    {"criterion": "ablation"},
    {"criterion": "taylor"},
]


def by_hand(model, batches, **options):
    """Score without each batch in turn; the spread of the pseudo-values, batches weighted by size."""
    full = run_engine(model, batches, **options).scores
    sizes = [len(batch[1]) for batch in batches]
    h = torch.tensor([sum(sizes) / size for size in sizes], dtype=torch.float64)[:, None]
    found = {}
    for name, theta in full.items():
        without = torch.stack(
            [
                run_engine(model, batches[:i] + batches[i + 1 :], **options).scores[name]
                for i in range(len(batches))
            ]
        )
        center = len(sizes) * theta - ((1 - 1 / h) * without).sum(0)
        pseudo = h * theta - (h - 1) * without
        found[name] = ((pseudo - center).square() / (h - 1)).mean(0).sqrt()
    return found


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_jackknife(options):
    case = CASES["residual"]
    model, batches = case.model(), case.batches((3, 2, 4, 3))
    found = run_engine(model, batches, n_batches=4, **options).stderr
    assert_close(found, by_hand(model, batches, **options), 1e-8)


@pytest.mark.parametrize("criterion", ["signed", "ablation"])
def test_for_a_mean_over_samples_it_is_the_standard_error_of_batch_means(criterion):
    case = CASES["mlp"]
    model, batches = case.model(), case.batches((4,) * 6)
    options = {"criterion": criterion, "path": "neuron"}
    found = run_engine(model, batches, n_batches=6, **options).stderr
    each = [run_engine(model, [batch], **options).scores for batch in batches]
    for name, stderr in found.items():
        means = torch.stack([scores[name] for scores in each])
        assert torch.allclose(stderr, means.std(0) / 6**0.5, rtol=1e-8, atol=0)


def test_a_small_last_batch_counts_for_little():
    """Sizes 32 and 1: the truth is the spread of scores over other draws of as many samples."""
    case = CASES["mlp"]
    model = case.model()
    draws = [case.batches((32, 1), seed=seed) for seed in range(30)]
    options = {"criterion": "signed", "path": "neuron"}
    results = [run_engine(model, draw, n_batches=2, **options) for draw in draws]
    for name in results[0].scores:
        truth = torch.stack([r.scores[name] for r in results]).std(0)
        said = torch.stack([r.stderr[name] for r in results]).square().mean(0).sqrt()
        assert 0.3 < float((said / truth).nanmedian()) < 3  # two folds say no more


def test_batches_beyond_the_folds_share_them(monkeypatch):
    monkeypatch.setattr(room, "MAX_FOLDS", 3)
    case = CASES["mlp"]
    model, batches = case.model(), case.batches((2,) * 7)
    folds = [
        tuple(torch.cat([b[part] for b in batches[i::3]]) for part in (0, 1)) for i in range(3)
    ]
    found = run_engine(model, batches, n_batches=7).stderr
    assert_close(found, by_hand(model, folds), 1e-8)


def test_more_data_means_smaller_bars():
    case = CASES["residual"]
    model = case.model(dtype=torch.float32)
    few, many = (
        singe.score(model, case.batches((4,) * n, dtype=torch.float32), progress=False)
        for n in (8, 128)
    )
    ratio = torch.cat(list(many.stderr.values())) / torch.cat(list(few.stderr.values()))
    assert 0.1 < ratio.nanmedian() < 0.6  # 1 / sqrt(16) is 0.25


def test_the_same_data_again_and_again_leaves_no_doubt():
    case = CASES["mlp"]
    model, batches = case.model(), case.batches((4,)) * 5
    result = run_engine(model, batches, n_batches=5)
    for name, stderr in result.stderr.items():
        assert bool((stderr <= 1e-12 * result.scores[name].max()).all())


def test_one_batch_has_no_error_bars():
    case = CASES["mlp"]
    scores = singe.score(case.model(), case.batches((4,)), progress=False)
    assert scores.stderr is None


def test_sums_that_do_not_fit_are_kept_once():
    case = CASES["residual"]
    model, batches = case.model(), case.batches((3, 3))
    small = singe.score(model, batches, max_memory=1000, progress=False)
    assert small.stderr is None
    assert_close(small, singe.score(model, batches, progress=False), 1e-6)  # float32 results


def test_error_bars_are_saved(tmp_path):
    case = CASES["residual"]
    scores = singe.score(case.model(), case.batches((3, 3)), progress=False)
    scores.save(tmp_path / "s.safetensors")
    loaded = singe.Scores.load(tmp_path / "s.safetensors")
    assert all(torch.equal(loaded.stderr[name], scores.stderr[name]) for name in scores)
    assert all(bool((scores.stderr[name] > 0).any()) for name in scores)
