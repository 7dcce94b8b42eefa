"""Rankings, limits and latency: what a plan takes, and that it takes no more than it may."""

from __future__ import annotations

import itertools
import json
import statistics
from types import SimpleNamespace

import pytest
import torch
from helpers import (
    CPU,
    clone,
    one_thread,  # noqa: F401 - autouse
    randomise,
)
from helpers_networks import Residual, residual, vgg
from torch import nn

import singe
from singe import latency
from singe.budget import RANKINGS
from singe.cost import CostModel, CostState
from singe.data import example_batch
from singe.latency import Stopwatch, Timing, quartiles, resized
from singe.limits import limits_of, rounded_down
from singe.plan import Plan
from singe.scores import fingerprint
from singe.units import find_groups, small

IMAGE = (3, 8, 8)


def network(widths=(12, 16, 14), linear=20) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    return randomise(vgg(widths, linear)), torch.randn(2, *IMAGE)


def graph_of(model, x):
    batch = small(example_batch(x, CPU))
    return find_groups(model, batch), batch


def random_scores(model, x, seed=0, power=1) -> singe.Scores:
    graph, _ = graph_of(model, x)
    draw = torch.Generator().manual_seed(seed)
    values = {
        g.name: torch.rand(g.n_units, generator=draw) ** power
        * (0.2 + torch.rand(1, generator=draw))
        for g in graph.groups
    }  # fmt: skip
    layers = {g.name: g.layers for g in graph.groups}
    return singe.Scores(values, layers, {"fingerprint": fingerprint(model), "criterion": "test"})


def lost(plan, scores) -> float:
    return sum(float(scores[name][units].sum()) for name, units in plan.items())


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


def test_a_maximum_goes_whatever_the_target():
    model, x = network()
    scores = random_scores(model, x)
    plan = singe.plan(model, scores, x, macs=1.0, max_keep=0.75)
    assert {n: len(u) for n, u in plan.items()} == {"0": 3, "4": 4, "8": 4, "13": 5}
    # Containers name what is inside them.
    torch.manual_seed(0)
    model = randomise(residual())
    inside = singe.plan(model, random_scores(model, x), x, macs=1.0, max_keep={"3": 0.7})
    assert {n: len(u) for n, u in inside.items()} == {"0": 2, "3.body.0": 2}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"round_to": 0}, "round_to must be an integer >= 1"),
        ({"round_to": 2.0}, "round_to must be an integer >= 1"),
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


# ---------------------------------------------------------------------- a plan as data


def test_a_plan_on_disk(tmp_path):
    """One line per group, replayable on a fresh copy, refused by another model."""
    model, x = network()
    plan = singe.plan(model, random_scores(model, x), x, macs=0.5, ranking="cost")
    path = tmp_path / "plan.json"
    plan.save(path)
    lines = path.read_text().splitlines()
    for name, units in plan.items():
        assert sum(line.startswith(f' "{name}": {json.dumps(units)}') for line in lines) == 1
    loaded = singe.Plan.load(path)
    assert dict(loaded) == dict(plan)
    assert loaded.meta == plan.meta
    assert loaded.explain() == plan.explain()
    fresh, pruned = clone(model), clone(model)
    singe.prune(fresh, loaded, x)
    singe.prune(pruned, plan, x)
    assert torch.equal(fresh(x), pruned(x))
    with pytest.raises(singe.ScoresError, match="another model"):
        singe.prune(network((12, 16, 15))[0], loaded, x)


def test_the_explanation():
    model, x = network()
    scores = random_scores(model, x)
    plan = singe.plan(model, scores, x, macs=0.4, ignore=["13"], max_pruning_ratio=0.5)
    text = plan.explain()
    assert "macs" in text.splitlines()[0]
    for row in plan.rows():
        name, units = row["group"], plan.get(row["group"], [])
        assert (row["removed"], row["kept"]) == (len(units), len(scores[name]) - len(units))
        if units:
            assert row["highest_removed"] == float(scores[name][units].max())
        assert row["lowest_kept"] >= (row["highest_removed"] or 0)
        fewer = {n: u for n, u in plan.items() if n != name}
        back = singe.prune(clone(model), Plan(fewer), x).params_after
        assert row["params_saved"] == back - plan.meta["after"]["params"]
        (line,) = [line for line in text.splitlines() if line.startswith(name + " ")]
        assert line.endswith(row["why"])
    why = {row["group"]: row["why"] for row in plan.rows()}
    assert why["13"] == "keeps all: ignore"
    assert "at its limit: max_pruning_ratio" in why.values()
    assert "2 units go" in singe.Plan({"a": [0, 1]}).explain()


def test_a_share_of_scores_below_zero_is_not_given():
    model, x = network()
    scores = random_scores(model, x)
    for values in scores.values():
        values -= values.median()
    plan = singe.plan(model, scores, x, macs=0.4)
    assert all(row["score_removed"] is None for row in plan.rows())
    assert plan.explain().count("%") == 3 + len(plan.rows())  # costs in the head, MACs saved


def test_shares_are_not_lost_to_rounding():
    """0.29 * 100 is 28.999999999999996, and 0.07 * 100 is 7.000000000000001."""
    assert [rounded_down(share / 100, 100) for share in range(101)] == list(range(101))
    model, x = network((100, 8, 8))
    scores = random_scores(model, x)
    root = next(name for name, values in scores.items() if len(values) == 100)
    for kept in (7, 29):
        limits = {"min_keep": {root: kept / 100}, "max_keep": {root: kept / 100}}
        assert len(singe.plan(model, scores, x, macs=0.99, **limits)[root]) == 100 - kept


# ---------------------------------------------------------------------- latency


class Slow(nn.Module):
    """Takes time in proportion to its channels, by a clock of its own: the real one is too noisy."""

    now = 0.0

    def __init__(self, per_channel: float = 1e-3) -> None:
        super().__init__()
        self.conv, self.per_channel = nn.Conv2d(3, 40, 1), per_channel
        self.head = nn.Linear(40, 4)

    def forward(self, x):
        x = self.conv(x)
        Slow.now += self.per_channel * x.shape[1]
        return self.head(x.mean((2, 3)))


@pytest.fixture
def clock(monkeypatch):
    monkeypatch.setattr(latency, "time", SimpleNamespace(perf_counter=lambda: Slow.now))


@pytest.mark.parametrize("ranking", ["global", "cost"])
@pytest.mark.parametrize("target", [0.6, 24.0])
def test_a_latency_target_is_met_by_measurement(clock, ranking, target):
    model, x = Slow().eval(), torch.randn(2, *IMAGE)
    scores = random_scores(model, x)
    plan = singe.plan(
        model, scores, x, latency=target, ranking=ranking, timing=Timing(runs=3, warmup=1)
    )
    assert plan.meta["before"]["latency"] == pytest.approx(40)
    assert plan.meta["target"]["latency"] == pytest.approx(24)
    assert plan.meta["after"]["latency"] <= 24 + 1e-6
    assert plan.n_units in (16, 17), "40 - 24 = 16 channels of a millisecond each"
    assert plan.meta["timing"]["runs"] == 3
    assert "latency 40" in plan.explain()


def test_a_latency_out_of_reach(clock):
    model, x = Slow().eval(), torch.randn(2, *IMAGE)
    with pytest.raises(singe.BudgetError, match=r"ms latency cannot be met: .* is 0\.2500 of"):
        singe.plan(model, random_scores(model, x), x, latency=0.05, timing=Timing(runs=3))


def test_a_latency_that_removal_does_not_change(clock):
    """As on a busy machine: no plan, the empty one least of all, and advice about the timing."""
    model, x = Slow(per_channel=0.0).eval(), torch.randn(2, *IMAGE)
    model.register_forward_hook(lambda *_: setattr(Slow, "now", Slow.now + 1e-3))
    with pytest.raises(singe.BudgetError, match=r"no faster.*singe\.Timing"):
        singe.plan(model, random_scores(model, x), x, latency=0.7, timing=Timing(runs=3))


def test_the_stopwatch(clock):
    model, x = Slow().eval(), torch.randn(2, *IMAGE)
    batch = example_batch(x, CPU)
    assert resized(batch, 5).args[0].shape == (5, *IMAGE)
    assert torch.equal(resized(batch, 5).args[0][4], x[0])
    watch = Stopwatch(model, batch, Timing(batch_size=3, runs=5))
    quick = clone(model)
    quick.per_channel = 2e-4
    found = watch.compare(quick)
    assert found.share == pytest.approx(0.2)
    assert found.share_quartiles == pytest.approx((0.2, 0.2))
    assert watch.reference_ms == pytest.approx(40)
    for bad in ({"runs": 0}, {"batch_size": 0}, {"warmup": -1}, {"threads": 0}):
        with pytest.raises(singe.OptionError, match="Timing"):
            Timing(**bad)


def test_quartiles_of_what_was_timed(clock):
    class Uneven(Slow):
        def forward(self, x):
            type(self).passes += 1
            Slow.now += 0.001 * (type(self).passes % 5)  # 0 to 4 ms more, in turn
            return super().forward(x)

    Uneven.passes = 0
    model, x = Slow().eval(), torch.randn(2, *IMAGE)
    watch = Stopwatch(model, example_batch(x, CPU), Timing(runs=5, warmup=0))
    found = watch.compare(Uneven().eval())
    assert (found.ms, *found.ms_quartiles) == pytest.approx((42, 41, 43))
    assert found.reference_quartiles == pytest.approx((40, 40))
    assert (found.share, *found.share_quartiles) == pytest.approx((1.05, 1.025, 1.075))
    assert quartiles([3.0]) == (3.0, 3.0)


def test_real_time_passes():
    model, x = network()
    batch = example_batch(x, CPU)
    watch = Stopwatch(model, batch, Timing(runs=3))
    found = watch.compare(model)
    assert found.ms > 0
    assert found.share > 0
    seconds = watch.layer_seconds(model)
    assert set(seconds) == {"0", "4", "8", "13", "16"}
    assert all(s > 0 for s in seconds.values())


def test_residual_blocks_are_groups_of_one_kind():
    """The structure, not the name, decides what is compared with what."""
    torch.manual_seed(0)
    body = [nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 6, 3, padding=1))
            for _ in range(2)]  # fmt: skip
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3),
        *map(Residual, body),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 4),
    ).eval()
    x = torch.randn(2, *IMAGE)
    scores = random_scores(model, x)
    tilted = singe.Scores(
        {n: t * (50.0 if n == "1.body.0" else 1.0) for n, t in scores.items()},
        scores.groups, scores.meta,
    )  # fmt: skip
    plan = singe.plan(model, tilted, x, ranking="isomorphic", channels=0.75)
    assert "1.body.0" not in plan
    assert len(plan["2.body.0"]) >= 3
