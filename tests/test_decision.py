"""Early decision: less work, the same units."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from helpers import (
    CASES,
    CPU,
    Case,
    assert_unchanged,
    make_batches,
    mlp,
    one_thread,  # noqa: F401 - autouse
    snapshot,
    vgg,
)
from torch import nn
from torch.nn import functional as F

import singe
from singe.data import as_batch
from singe.decision import EarlyDecision, hardest_first


class Confident(nn.Module):
    """A network with large logits: it is sure of nearly every sample, as trained networks are."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x):
        return 25 * self.body(x)


def fitted(build, shape, samples=48, wrong=6):
    """A model and data of which all but ``wrong`` labels are what the model says."""
    model = Case(lambda: Confident(build()), shape).model(dtype=torch.float32)
    x, _ = make_batches(shape, (samples,), dtype=torch.float32)[0]
    with torch.no_grad():
        labels = model(x).argmax(1)
    labels[:wrong] = (labels[:wrong] + 1) % 4
    return model, [(x[i : i + 10], labels[i : i + 10]) for i in range(0, samples, 10)]


def lowest(scores, share):
    values = torch.cat(list(scores.values()))
    return set(values.argsort()[: round(share * len(values))].tolist())


@pytest.mark.parametrize("ratio", [0.2, 0.5])
@pytest.mark.parametrize("options", [{}, {"p": "sum"}, {"p": 2, "norm": "outside"}], ids=str)
def test_the_same_units_for_less(options, ratio):
    model, batches = fitted(lambda: vgg((6, 8, 7)), (3, 8, 8))
    options = {"path": "neuron", "progress": False, **options}
    full = singe.score(model, batches, **options)
    early = singe.score(model, batches, tolerance=0, pruning_ratio=ratio, **options)
    assert lowest(early, ratio) == lowest(full, ratio)
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
    share = seen[-1] / sum(map(len, full.values()))
    assert lowest(early, share) == lowest(full, share)


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


def test_a_settled_unit_stays_settled():
    decision = EarlyDecision(0.0, lambda totals: 1)
    totals, own = torch.zeros(3).double(), torch.tensor([1.0, 5.0, 5.5]).double()
    settled = []
    for look in range(6):
        totals = totals + own
        found = decision.update({"a": totals}, {"a": own}, size=2, left=10 - 2 * look)
        settled.append(found["a"].tolist())
        own = own / 4
    assert settled[0] == settled[1] == [False] * 3, "too early to say"
    for before, after in pairwise(settled):
        assert all(b <= a for b, a in zip(before, after, strict=True))
    assert settled[-1] == [True] * 3
    assert decision.removed.tolist() == [True, False, False]


def test_refusals_leave_the_model_alone():
    model, batches = fitted(mlp, (6,))
    before = snapshot(model)

    def mean(outputs, batch):
        return F.cross_entropy(outputs, batch[1])

    share = {"tolerance": 0.1, "pruning_ratio": 0.3, "path": "neuron"}
    for options, error, message in [
        ({"tolerance": 0.1}, singe.OptionError, "belong together"),
        ({"pruning_ratio": 0.3}, singe.OptionError, "belong together"),
        ({**share, "tolerance": 1.0}, singe.OptionError, r"tolerance must lie in \[0, 1\)"),
        ({**share, "pruning_ratio": 1.5}, singe.OptionError, "pruning_ratio must lie between"),
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


def test_case_with_dict_batches():
    case = CASES["dict"]
    scores = singe.score(
        case.model(), case.batches((5, 9)), path="neuron", tolerance=0.2, pruning_ratio=0.4,
        progress=False,
    )  # fmt: skip
    assert all(len(t) for t in scores.values())
