"""Rankings and limits: what a plan takes, and that it takes no more than it may."""

from __future__ import annotations

import itertools
import statistics

import pytest
import torch
from helpers import (
    clone,
    one_thread,  # noqa: F401 - autouse
    randomise,
)
from helpers_budget import IMAGE, graph_of, lost, network, random_scores
from helpers_networks import residual, vgg
from torch import nn

import singe
from singe.budget import RANKINGS, Step, order_steps
from singe.cost import CostModel, CostState
from singe.latency import Timing
from singe.limits import limits_of
from singe.plan import Plan

# ---------------------------------------------------------------------- cost-aware ranking


@pytest.mark.parametrize("seed", range(4))
def test_the_cost_aware_plan_against_every_possible_one(seed):
    """Parameters are predicted exactly, so the best plan can be found by trying all of them."""
    torch.manual_seed(seed)
    build = (lambda: vgg((6, 8, 7), 9)) if seed % 2 else residual
    model, x = randomise(build()), torch.randn(2, *IMAGE)
    scores = random_scores(model, x, seed, power=1 + seed % 3)
    graph, batch = graph_of(model, x)
    cost, least = CostModel(model, graph, batch), limits_of(model, graph).least
    prefix = {n: [0.0, *t.sort()[0].double().cumsum(0).tolist()] for n, t in scores.items()}
    total = sum(sums[-1] for sums in prefix.values())
    room = [range(g.n_units - least[g.name] + 1) for g in graph.groups]
    every = [
        (cost(dict(zip(prefix, counts, strict=True)))["params"],
         total - sum(prefix[n][k] for n, k in zip(prefix, counts, strict=True)))
        for counts in itertools.product(*room)
    ]  # fmt: skip
    shares = []
    for target in (0.7, 0.5, 0.35):
        best = max(kept for params, kept in every if params <= target * cost.params)
        plan = singe.plan(model, scores, x, ranking="cost", params=target)
        shares.append((total - lost(plan, scores)) / best)
    assert max(shares) <= 1 + 1e-6, "more than the best: the search over all plans is wrong"
    assert min(shares) > 0.96
    assert statistics.fmean(shares) > 0.98


@pytest.mark.parametrize("kind", ["macs", "params"])
def test_the_cost_aware_plan_keeps_the_most_score(kind):
    model, x = network()
    scores = random_scores(model, x, 3)
    kept = {
        r: -lost(singe.plan(model, scores, x, ranking=r, **{kind: 0.5}), scores) for r in RANKINGS
    }
    assert max(kept, key=kept.get) == "cost"


@pytest.mark.parametrize("kind", ["macs", "params", "channels"])
def test_no_unit_can_come_back(kind):
    """What the last unit left of the budget has been filled."""
    model, x = network()
    scores = random_scores(model, x, 1)
    plan = singe.plan(model, scores, x, ranking="cost", **{kind: 0.6})
    target = plan.meta["target"][kind]
    assert plan.meta["after"][kind] <= target
    for name, units in plan.items():
        best = max(units, key=lambda u, name=name: float(scores[name][u]))
        fewer = {**plan, name: [u for u in units if u != best]}
        copy = clone(model)
        report = singe.prune(copy, Plan(fewer), x)
        left = sum(map(len, scores.values())) - plan.n_units + 1
        after = {"macs": report.macs_after, "params": report.params_after, "channels": left}
        assert after[kind] > target


def test_units_that_do_harm_do_not_come_back():
    """They would fit into what the last unit left of the budget."""
    model, x = network()
    scores = random_scores(model, x)
    scores["13"].fill_(-0.1)
    plan = singe.plan(model, scores, x, macs=0.45)
    assert len(plan.get("13", [])) == 15, "all that may go"


@pytest.mark.parametrize("loss", [0.1, -0.1])
def test_of_equal_scores_the_dearest_unit_goes_first(loss):
    """Negative scores (criterion="signed") too: there the units are better gone, and the dear ones first."""
    model, x = network()
    cost = CostModel(model, *graph_of(model, x))
    scores = random_scores(model, x)
    left = {name: cost({name: 1})["macs"] for name in scores}
    cheapest, dearest = max(left, key=left.get), min(left, key=left.get)
    for values in scores.values():
        values.fill_(loss)
    plan = singe.plan(model, scores, x, ranking="cost", macs=0.9)
    assert dearest in plan
    assert cheapest not in plan


def test_units_are_compared_and_not_the_steps_they_go_in():
    """Two that go together lose more than one that goes alone, but less each."""
    pair, single = Step("a", (0, 1), 1.0, forced=False), Step("b", (0,), 0.8, forced=False)
    order = order_steps({"a": [pair], "b": [single]}, {}, "global", None, "macs", {})
    assert order == [pair, single]


def test_savings_are_marginal():
    """Removing one more unit saves what the cost model says it saves, and less once neighbours shrank."""
    model, x = network()
    cost = CostModel(model, *graph_of(model, x))
    state = CostState(cost)
    first = state.saving("4", 1, "params")
    before = cost({})["params"] - cost({"4": 1})["params"]
    assert first == before
    state.remove("0", 6)
    state.remove("8", 5)
    then = cost({"0": 6, "8": 5})["params"] - cost({"0": 6, "8": 5, "4": 1})["params"]
    assert state.saving("4", 1, "params") == then < first
    state.remove("0", -6)
    state.remove("8", -5)
    assert state.saving("4", 1, "params") == first


# ---------------------------------------------------------------------- isomorphic ranking


def test_isomorphic_groups_share_one_ranking():
    """Every kind of group loses the same share, whatever the scale of its scores."""
    torch.manual_seed(0)
    model = randomise(vgg((8, 8, 8), 8))  # three convolutions and a linear layer
    x = torch.randn(2, *IMAGE)
    scores = random_scores(model, x)
    graph, _ = graph_of(model, x)
    assert [g.name for g in graph.groups] == ["0", "4", "8", "13"]
    big = singe.Scores(
        {n: t * (100.0 if n in ("4", "13") else 1.0) for n, t in scores.items()},
        scores.groups, scores.meta,
    )  # fmt: skip
    plan = singe.plan(model, big, x, ranking="isomorphic", channels=0.5)
    # Convolutions read by convolutions; one read by a linear layer; a linear layer.
    assert {name: len(units) for name, units in plan.items()} == {"0": 6, "4": 2, "8": 4, "13": 4}
    local = singe.plan(model, big, x, ranking="local", channels=0.5)
    assert {name: len(units) for name, units in local.items()} == dict.fromkeys(plan, 4)


# ---------------------------------------------------------------------- limits


@pytest.mark.parametrize("ranking", RANKINGS)
@pytest.mark.parametrize("multiple", [2, 4])
def test_rounding(ranking, multiple):
    model, x = network()
    scores = random_scores(model, x)
    plan = singe.plan(model, scores, x, macs=0.5, round_to=multiple, ranking=ranking)
    assert plan.meta["after"]["macs"] <= plan.meta["target"]["macs"]
    for name, units in plan.items():
        assert (len(scores[name]) - len(units)) % multiple == 0
        worst = torch.argsort(scores[name], stable=True)[: len(units)].tolist()
        assert units == sorted(worst), "within a group the lowest go"


def test_rounding_counts_channels_not_units():
    """In front of a grouped convolution a unit is two channels."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 24, 3), nn.ReLU(), nn.Conv2d(24, 16, 3, groups=2), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4),
    ).eval()  # fmt: skip
    x = torch.randn(2, *IMAGE)
    scores = random_scores(model, x)
    assert len(scores["0"]) == 12
    plan = singe.plan(model, scores, x, channels=0.6, round_to=8)
    singe.prune(model, plan, x)
    assert model[0].out_channels % 8 == 0
    assert model[2].out_channels % 8 == 0


@pytest.mark.parametrize("ranking", RANKINGS)
def test_shares_per_group(ranking):
    model, x = network()
    scores = random_scores(model, x)
    plan = singe.plan(
        model, scores, x, ranking=ranking, params=0.8, ignore=[model[4]],
        min_keep={"0": 0.9, "8": 0.1}, max_keep={"13": 0.5},
    )  # fmt: skip
    assert "4" not in plan
    assert len(plan.get("0", [])) <= 1
    assert len(plan["13"]) >= 10
    assert plan.meta["after"]["params"] <= plan.meta["target"]["params"]
    rows = {row["group"]: row for row in plan.rows()}
    assert "ignore" in rows["4"]["why"]


def test_a_layers_own_share_goes_before_its_containers():
    model = nn.Sequential(
        nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU()), nn.Linear(8, 3)
    )
    x = torch.randn(4, 6)
    scores = random_scores(model, x)
    for shares in ({"0.0": 0.9, "0": 0.25}, {"0": 0.25, "0.0": 0.9}):
        plan = singe.plan(model, scores, x, params=0.55, min_keep=shares)
        assert len(plan.get("0.0", [])) == 0


def test_a_named_minimum_lifts_the_guard():
    model, x = network()
    scores = random_scores(model, x)
    lifted = dict.fromkeys(scores, 0.1)
    free = singe.plan(
        model, scores, x, channels=15.0, max_pruning_ratio=0.75, min_keep=lifted
    )  # fmt: skip
    assert free.meta["after"]["channels"] == 15
    with pytest.raises(singe.BudgetError, match="smallest reachable"):
        singe.plan(model, scores, x, channels=15.0, max_pruning_ratio=0.75)
    with pytest.raises(singe.BudgetError, match="smallest reachable"):
        singe.plan(model, scores, x, channels=15.0, min_keep=0.1)  # a general one does not


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"round_to": 0}, "round_to must be a whole number >= 1"),
        ({"round_to": 2.0}, "round_to must be a whole number >= 1"),
        ({"min_keep": 1.2}, r"min_keep must lie in \[0, 1\]"),
        ({"max_keep": {"4": -0.1}}, "max_keep of '4' must lie"),
        ({"min_keep": {"5": 0.5}}, "min_keep names '5', which no scored group has.*groups: 0, 4"),
        (
            {"min_keep": 0.9, "max_keep": 0.2},
            r"at most 2 \(max_keep\) and at least 11 \(min_keep\)",
        ),
        ({"ranking": "fair"}, "ranking='fair'.*'cost'"),
        ({"timing": Timing(), "latency": 0}, "latency must be positive"),
    ],
)
def test_options(options, message):
    model, x = network()
    target = {} if "latency" in options else {"macs": 0.5}
    with pytest.raises(singe.OptionError, match=message):
        singe.plan(model, random_scores(model, x), x, **target, **options)


def test_rounding_that_makes_a_target_unreachable_says_so():
    model, x = network()
    with pytest.raises(singe.BudgetError, match=r"smallest reachable is 1\.0000"):
        singe.plan(model, random_scores(model, x), x, macs=0.5, round_to=64)


def test_a_grouped_convolution_keeps_two_channels_in_every_group():
    """With one it is depthwise, its units are others, and the next round would count in the wrong ones."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.ReLU(),
        nn.Conv2d(8, 8, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    ).eval()  # fmt: skip
    data = [(torch.randn(4, *IMAGE), torch.arange(4))]
    fresh = clone(model)
    report = singe.compress(
        model, train=data, channels=0.45, rounds=4, finetune_steps=1, criterion="magnitude",
        max_pruning_ratio=1.0, progress=False,
    )  # fmt: skip
    assert model[2].out_channels >= 4
    assert all(min(r.kept.values()) >= 1 for r in report.rounds)
    singe.prune(fresh, report.plan, data[0][0])
    assert [m.weight.shape for m in (fresh[0], fresh[2], fresh[4])] == [
        m.weight.shape for m in (model[0], model[2], model[4])
    ]
    graph, _ = graph_of(fresh, data[0][0])
    limits = limits_of(fresh, graph, 1.0)
    assert limits.least["2"] == min(2, model[2].out_channels // 2)
    assert limits.why["2"] == "a grouped convolution keeps two"
    most = limits_of(model, graph_of(model, data[0][0])[0], 1.0, max_keep=0.1).most
    assert most["2"] == min(2, model[2].out_channels // 2), "and no max_keep contradicts that"


@pytest.mark.parametrize(("share", "kept"), [(0.57, 57), (0.29, 29), (0.58, 58), (0.55, 55)])
def test_a_share_of_channels_is_not_rounded_away(share, kept):
    model, x = nn.Sequential(nn.Linear(3, 100), nn.ReLU(), nn.Linear(100, 2)), torch.randn(2, 3)
    plan = singe.plan(model, {"0": torch.rand(100)}, x, channels=share)
    assert plan.meta["after"]["channels"] == kept


@pytest.mark.parametrize("share", [0.376, 0.516, 0.712])
def test_nothing_more_fits(share):
    """Where the best unit does not fit after all, since its activations count, the next is tried."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2),
    )  # fmt: skip
    x = torch.randn(2, 3, 4, 4)
    scores = random_scores(model, x)
    plan = singe.plan(model, scores, x, macs=share)
    limit = plan.meta["target"]["macs"]
    for name, units in plan.items():
        best = max(units, key=lambda unit: float(scores[name][unit]))
        fewer = {**plan, name: [u for u in units if u != best]}
        assert singe.prune(clone(model), fewer, x).macs_after > limit
