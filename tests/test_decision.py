"""Early decision: less work, the same units."""

from __future__ import annotations

import pytest
import torch
from helpers import (
    CPU,
    assert_unchanged,
    make_batches,
    one_thread,  # noqa: F401 - autouse
    snapshot,
)
from helpers_decision import fitted
from helpers_networks import CASES, mlp, vgg
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import singe
from singe.data import as_batch
from singe.decision import EarlyDecision, hardest_first
from singe.sweep import Sweep


def assert_lowest(early, full, count):
    """The lowest units of one are lowest in the other, too; which of equal ones is all the same."""
    found, truth = (torch.cat(list(s.values())) for s in (early, full))
    chosen = found.argsort(stable=True)[:count]
    assert truth[chosen].max() <= truth.sort().values[count - 1]


@pytest.mark.parametrize("ratio", [0.2, 0.5])
@pytest.mark.parametrize("options", [{}, {"p": "sum"}, {"p": 2, "norm": "outside"}], ids=str)
def test_the_same_units_for_less(options, ratio):
    model, batches = fitted(lambda: vgg((6, 8, 7)), (3, 8, 8))
    options = {"path": "neuron", "progress": False, **options}
    full = singe.score(model, batches, **options)
    early = singe.score(model, batches, tolerance=0, pruning_ratio=ratio, **options)
    assert_lowest(early, full, round(ratio * sum(map(len, full.values()))))
    assert full.meta["evaluations"] == 48 * 4 * sum(map(len, full.values()))
    assert early.meta["evaluations"] < 0.8 * full.meta["evaluations"]
    assert early.meta["samples"] == full.meta["samples"]


def test_more_tolerance_is_less_work():
    model, batches = fitted(mlp, (6,))
    work = [
        singe.score(
            model, batches, path="neuron", tolerance=t, pruning_ratio=0.3, progress=False
        ).meta["evaluations"]
        for t in (0, 0.5, 0.95)
    ]
    assert work[0] >= work[1] >= work[2]
    assert work[2] < work[0]


def test_a_budget_names_the_number_of_units():
    model, batches = fitted(lambda: vgg((6, 8, 7)), (3, 8, 8))
    seen = []

    def budget(scores):
        plan = singe.plan(model, scores, batches[0][0], macs=0.6)
        seen.append(plan.n_units)
        return plan

    early = singe.score(
        model, batches, path="neuron", tolerance=0, pruning_ratio=budget, progress=False
    )
    full = singe.score(model, batches, path="neuron", progress=False)
    assert_lowest(early, full, seen[-1])


@pytest.mark.parametrize(
    "options", [{"objective": "kl"}, {"criterion": "ablation"}, {"path": "layer"}]
)
def test_other_criteria_run(options):
    model, batches = fitted(mlp, (6,))
    options = {"path": "neuron", "progress": False, **options}
    early = singe.score(model, batches, tolerance=0.3, pruning_ratio=0.3, **options)
    assert all(bool(torch.isfinite(t).all()) for t in early.values())


def test_samples_come_hardest_first():
    batches = [as_batch(b, i, CPU) for i, b in enumerate(make_batches((6,), (5, 20, 9)))]
    losses = [torch.rand(b.size, generator=torch.Generator().manual_seed(b.size)) for b in batches]
    cut = hardest_first(batches, losses)
    order = torch.cat(losses).argsort(descending=True)
    assert torch.equal(
        torch.cat([b.args[0] for b in cut]), torch.cat([b.args[0] for b in batches])[order]
    )
    assert torch.equal(
        torch.cat([b.labels for b in cut]), torch.cat([b.labels for b in batches])[order]
    )
    assert [b.size for b in cut] == [3] * 11 + [1]


def test_the_first_look_fits_into_memory(monkeypatch):
    """Which samples are hard is asked of all of them, in halves where a whole batch is too much."""
    model, batches = fitted(mlp, (6,))
    options = {"path": "layer", "tolerance": 0, "pruning_ratio": 0.3, "progress": False}
    expected = singe.score(model, batches, **options)
    record, sizes = Sweep.record, []

    def limited(self, batch):
        sizes.append(batch.size)
        if batch.size > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return record(self, batch)

    monkeypatch.setattr(Sweep, "record", limited)
    scores = singe.score(model, batches, **options)
    assert max(sizes) == 10
    assert 4 >= max(size for size in sizes if size < 5) > 1
    for name in expected:
        torch.testing.assert_close(scores[name], expected[name], rtol=1e-4, atol=1e-6)


def play(contributions, n_removed, tolerance=0.0):
    """Let a decision look at [looks, U] contributions; returns it, and the totals it saw."""
    decision = EarlyDecision(tolerance, lambda totals: n_removed)
    total = torch.zeros(contributions.shape[1], dtype=torch.float64)
    settled = torch.zeros(len(total), dtype=torch.bool)
    for look, own in enumerate(contributions):
        own = torch.where(settled, 0.0, own)  # settled units get no more data
        total = total + own
        left = len(contributions) - look - 1
        found = decision.update({"a": total}, {"a": own}, size=1, left=left)["a"]
        assert not (settled & ~found).any(), "a settled unit stays settled"
        settled = found
    assert settled.all()
    assert int(decision.removed.sum()) == n_removed
    assert torch.equal(decision.removed, ~decision.kept)
    return decision, total


@given(seed=st.integers(0, 10_000), n_removed=st.integers(1, 7))
def test_without_tolerance_the_decision_is_that_of_the_full_run(seed, n_removed):
    """Where the premise holds: what a sample adds only gets smaller."""
    generator = torch.Generator().manual_seed(seed)
    falling = torch.rand(16, 8, generator=generator, dtype=torch.float64)
    contributions = falling.sort(0, descending=True).values ** 3
    contributions *= torch.rand(8, generator=generator, dtype=torch.float64) + 0.5
    decision, seen = play(contributions, n_removed)
    lowest = contributions.sum(0).argsort()[:n_removed]
    assert set(torch.nonzero(decision.removed).flatten().tolist()) == set(lowest.tolist())
    # The scores a user ranks by say the same.
    ranked = decision.consistent(seen).argsort()[:n_removed]
    assert set(ranked.tolist()) == set(lowest.tolist())


def test_the_cut_moves_too():
    """A unit that adds nothing any more is not kept before the others can have passed it."""
    a = torch.tensor([10.0] + [0.0] * 15)
    b = torch.full((16,), 1.6)
    decision, _ = play(torch.stack([a, b], 1).double(), 1)
    assert decision.removed.tolist() == [True, False]


def test_easy_units_are_settled_early():
    scale = torch.tensor([0.001, 1.0, 1.1, 100.0], dtype=torch.float64)
    contributions = scale * (0.1 ** torch.arange(16, dtype=torch.float64))[:, None]
    decision = EarlyDecision(0.0, lambda totals: 2)
    total = torch.zeros(4, dtype=torch.float64)
    for look in range(3):
        total = total + contributions[look]
        settled = decision.update({"a": total}, {"a": contributions[look]}, size=1, left=15 - look)[
            "a"
        ]
        assert settled.any() == (look == 2), "not before the third look"
    assert settled.tolist() == [True, False, False, True]


def test_bounds_are_as_wide_as_contributions_are_large():
    """Of either sign; settled units keep the bounds they were settled with."""
    decision = EarlyDecision(0.0, lambda totals: 1)
    own = torch.tensor([-1.0, 2.0], dtype=torch.float64)
    decision.update({"a": own}, {"a": own}, size=2, left=4)
    assert decision.low.tolist() == [-3.0, -2.0]
    assert decision.high.tolist() == [1.0, 6.0]
    decision.removed[0] = True
    decision.update({"a": 2 * own}, {"a": own}, size=2, left=1)
    assert decision.low.tolist() == [-3.0, 3.0]
    assert decision.high.tolist() == [1.0, 5.0]


def test_a_budget_that_takes_fewer_in_the_end_takes_no_others():
    """What was settled stays, and of those that are open still none goes."""
    wanted = iter([3, 1])
    decision = EarlyDecision(0.0, lambda totals: next(wanted))
    total = torch.tensor([0.1, 0.2, 50.0, 51.0, 90.0, 99.0], dtype=torch.float64)
    for look, left in enumerate([4, 3, 1]):
        settled = decision.update({"a": total}, {"a": 0.1**look * total}, size=1, left=left)
    assert settled["a"].tolist() == [True, True, False, False, True, True]
    decision.update({"a": total}, {"a": 0.0 * total}, size=1, left=0)
    assert decision.removed.tolist() == [True, True, False, False, False, False]


def test_refusals_leave_the_model_alone():
    model, batches = fitted(mlp, (6,))
    before = snapshot(model)

    def mean(outputs, batch):
        return F.cross_entropy(outputs, batch[1])

    share = {"tolerance": 0.1, "pruning_ratio": 0.3, "path": "neuron"}
    for options, error, message in [
        ({"tolerance": 0.1}, singe.OptionError, "belong together"),
        ({"pruning_ratio": 0.3}, singe.OptionError, "belong together"),
        ({**share, "tolerance": "a"}, singe.OptionError, "tolerance must lie"),
        ({**share, "tolerance": 1.0}, singe.OptionError, r"tolerance must lie in \[0, 1\)"),
        ({**share, "pruning_ratio": 1.5}, singe.OptionError, r"pruning_ratio must lie in \(0, 1\)"),
        ({**share, "path": "network"}, singe.OptionError, "saves nothing"),
        ({**share, "criterion": "taylor"}, singe.OptionError, "saves nothing"),
        ({**share, "engine": "naive"}, singe.OptionError, "engine='fused'"),
        ({**share, "objective": mean}, singe.OptionError, "loss of every sample"),
    ]:
        with pytest.raises(error, match=message):
            singe.score(model, batches, progress=False, **options)
    assert_unchanged(model, before)
    with pytest.raises(singe.DataError, match="one entry per sample"):
        singe.score(
            model, [(batches[0][0], batches[0][1], ), (batches[1][0], batches[1][1][:1])],
            progress=False, objective=lambda o, b: o.square().sum(1), **share,
        )  # fmt: skip


def test_dict_batches():
    case = CASES["dict"]
    model, batches = case.model(), case.batches((5, 9))
    options = {"path": "neuron", "progress": False}
    early = singe.score(model, batches, tolerance=0, pruning_ratio=0.4, **options)
    assert_lowest(early, singe.score(model, batches, **options), round(0.4 * 9))


def test_looks_are_no_larger_than_the_batches():
    _, batches = fitted(mlp, (6,), samples=96)
    small = [(x[i : i + 2], y[i : i + 2]) for x, y in batches for i in range(0, len(x), 2)]
    assert {len(x) for x, _ in small} == {2}
    found = [as_batch(b, i, CPU) for i, b in enumerate(small)]
    cut = hardest_first(found, [torch.rand(b.size) for b in found])
    assert max(b.size for b in cut) == 2


def test_a_norm_without_a_channels_last_rule():
    """Sorting by divergence runs the network with half-open gates, before any pass has failed."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.GroupNorm(2, 6), nn.ReLU(),
        nn.Flatten(), nn.Linear(6 * 16, 4),
    )  # fmt: skip
    batches = make_batches((3, 8, 8), (20,), dtype=torch.float32)
    scores = singe.score(
        model, batches, layers=["0"], objective="kl", path="neuron", tolerance=0,
        pruning_ratio=0.3, progress=False,
    )  # fmt: skip
    assert len(scores["0"]) == 6


def test_samples_that_depend_on_each_other_are_refused():
    class Centred(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = mlp()

        def forward(self, x):
            return 5 * self.body(x - x.mean(0))

    torch.manual_seed(0)
    with pytest.raises(singe.DataError, match="cannot be taken apart"):
        singe.score(
            Centred(), make_batches((6,), (12,), dtype=torch.float32), path="neuron", tolerance=0,
            pruning_ratio=0.3, progress=False,
        )  # fmt: skip
