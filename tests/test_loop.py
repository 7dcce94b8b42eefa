"""The entwined loop's options: order, schedule, a training function of the user's."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    assert_unchanged,
    clone,
    one_thread,  # noqa: F401 - autouse
    randomise,
    snapshot,
)
from helpers_loop import BATCHES, OPTIONS, network, same_weights
from helpers_networks import CASES, residual, vgg
from torch import nn

import singe
from singe.rounds import Round, minutes_left, portions, target_after


def test_a_finetune_function_of_the_users():
    model, stages, losses = network(), [], []

    def finetune(m: nn.Module, stage: singe.Stage) -> float:
        assert m is model
        assert m.training
        stages.append(stage)
        loss = F.cross_entropy(m(stage.train[0][0]), stage.train[0][1])
        loss.backward()
        with torch.no_grad():
            for p in m.parameters():
                p -= 0.01 * p.grad
        m.eval()
        losses.append(float(loss.detach()))
        return losses[-1]

    report = singe.compress(model, macs=0.6, finetune=finetune, final_steps=2, **OPTIONS)
    assert [(s.round, s.rounds, s.steps) for s in stages] == [(1, 2, 3), (2, 2, 5)]
    assert stages[0].seed != stages[1].seed
    assert stages[0].teacher is None
    assert [r.finetune_loss for r in report.rounds] == losses
    assert all(p.grad is None for p in model.parameters())

    def ruins(m: nn.Module, stage: singe.Stage) -> None:
        m[16] = nn.Linear(3, 3)

    for wrong, told in (
        ([1, 2], r"\[1, 2\]"),
        (nn.ReLU, "<class .*ReLU'>"),
        (network(), "a Sequential"),
    ):
        with pytest.raises(
            singe.OptionError, match=rf"must return a loss as one number, or None; got {told}$"
        ):
            singe.compress(network(), macs=0.6, finetune=lambda m, s, w=wrong: w, **OPTIONS)
    report = singe.compress(network(), macs=0.6, finetune=lambda m, s: m, **OPTIONS)  # a habit
    assert [r.finetune_loss for r in report.rounds] == [None, None]

    def halves(m: nn.Module, stage: singe.Stage) -> None:
        m.bfloat16()

    for wrong, message in (
        (ruins, "finetune function changed names or shapes"),
        (halves, "left the model in torch.bfloat16 on cpu, and it came in torch.float32 on cpu"),
    ):
        model = network()
        F.cross_entropy(
            model(BATCHES[0][0]), BATCHES[0][1]
        ).backward()  # what training leaves behind
        before = snapshot(model)
        with pytest.raises(singe.ModelError, match=message):
            singe.compress(model, macs=0.6, finetune=wrong, **OPTIONS)
        assert_unchanged(model, before, versions=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": "steep"}, "schedule='steep'.*'cubic'"),
        ({"order": "random"}, "order='random'.*'layerwise'"),
        ({"visit": "back"}, "visit='back'.*'damage'"),
        ({"clip_grad_norm": 0.0}, "clip_grad_norm must be positive"),
        ({"autocast": torch.float64}, "autocast=torch.float64.*bfloat16"),
        ({"label_smoothing": 1.0}, r"label_smoothing must lie in \[0, 1\)"),
        ({"label_smoothing": 0.1, "finetune_objective": lambda o, b: o.mean()}, "label_smoothing needs"),
        ({"distill": 1.5}, r"distill must lie in \[0, 1\]"),
        ({"temperature": 0.0, "distill": 0.5}, "temperature must be positive"),
        ({"temperature": None, "distill": 0.5}, "temperature must be positive and finite, got None"),
        ({"distill": None}, r"distill must lie in \[0, 1\], got None"),
        ({"ema": torch.ones(2), "finetune": lambda m, s: None}, r"ema must lie in \(0, 1\), got tensor"),
        ({"distill": 1.0, "label_smoothing": 0.1}, "distill=1.0 .* label_smoothing has no say"),
        ({"distill": 1.0, "finetune_objective": lambda o, b: o.sum()}, "so finetune_objective has no say"),
        ({"ema": 1.0}, r"ema must lie in \(0, 1\)"),
        ({"ema": 0.9, "finetune": lambda m, s: None}, "ema belong to the built-in training"),
        ({"lr": 0.5, "finetune": lambda m, s: None}, "lr belong to the built-in training"),
        ({"temperature": 9.0, "finetune_objective": lambda o, b: o.sum(), "finetune": lambda m, s: None},
         "finetune_objective, temperature belong to the built-in"),
        ({"autocast": torch.bfloat16, "finetune": lambda m, s: None}, "autocast belong to the built-in"),
        ({"lr": 0.5, "optimizer": torch.optim.AdamW}, "lr is of the default optimizer; yours has its own"),
        ({"temperature": 9.0}, "temperature is of the distillation: give distill="),
        ({"schedule": "cubic", "order": "layerwise"}, "schedule shares the budget out over the rounds of"),
        ({"visit": "damage"}, "visit is the order of the groups under order='layerwise'"),
        ({"on_round": 5}, "on_round must be a callable"),
        ({"min_keep": {0: 0.5}}, "min_keep maps names of groups, .* got 0"),
        ({"min_keep": {"0": "half"}}, r"min_keep of '0' must lie in \[0, 1\], got 'half'"),
        ({"max_keep": torch.ones(2)}, r"max_keep must lie in \[0, 1\], got tensor"),
        ({"max_keep": 0.7, "round_to": 7}, "no number of channels there is a multiple of round_to=7"),
        ({"accuracy_floor": 0.5, "evaluate": lambda m: math.nan}, "nan, below accuracy_floor=0.5"),
        ({"accuracy_floor": 0.5}, "accuracy_floor needs evaluate"),
        ({"accuracy_floor": 0.5, "evaluate": lambda m: 0.4}, "0.4000, below accuracy_floor=0.5"),
        ({"final_steps": -1}, "final_steps must be a whole number >= 0"),
        ({"checkpoint_every": 0}, "checkpoint_every must be a whole number >= 1"),
        ({"checkpoint_every": 5}, "checkpoint_every needs checkpoint="),
        ({"checkpoint_every": 5, "checkpoint": "run", "finetune": lambda m, s: None},
         "inside it there are none"),
        ({"resume": True}, "resume=True needs checkpoint="),
        ({"finetune_objective": "kl"}, "'kl'.*distill=1.0"),
        ({"schedule": lambda done: 2.0}, r"schedule\(0.5\) must lie in \[0, 1\], got 2.0"),
        ({"round_to": 0}, "round_to must be"),
    ],
)  # fmt: skip
def test_options(options, message):
    model = network()
    before = snapshot(model)
    with pytest.raises(singe.OptionError, match=message):
        singe.compress(model, macs=0.6, **{**OPTIONS, **options})
    assert_unchanged(model, before, versions=False)


# ---------------------------------------------------------------------- order and schedule


def test_schedules():
    """From all to the target, never back; equal steps, equal factors, or ever smaller steps."""
    ways = {}
    for schedule in ("linear", "cubic", "geometric", lambda done: done**2):
        ways[schedule] = [target_after(schedule, i / 4, 100.0, 25.0) for i in range(5)]
        assert ways[schedule][0] == pytest.approx(100)
        assert ways[schedule][-1] == pytest.approx(25)
        assert all(a > b for a, b in zip(ways[schedule], ways[schedule][1:], strict=False))
    assert ways["linear"] == pytest.approx([100, 81.25, 62.5, 43.75, 25])
    factors = [b / a for a, b in zip(ways["geometric"], ways["geometric"][1:], strict=False)]
    assert factors == pytest.approx([math.sqrt(0.5)] * 4)
    assert ways["cubic"][1] == pytest.approx(25 + 75 * 0.75**3)


@pytest.mark.parametrize("schedule", ["cubic", "geometric"])
def test_every_round_meets_its_own_target(schedule):
    model = network()
    report = singe.compress(model, macs=0.5, schedule=schedule, **{**OPTIONS, "rounds": 3})
    full = report.macs_before
    for index, entry in enumerate(report.rounds, 1):
        target = target_after(schedule, index / 3, full, 0.5 * full)
        assert target - 0.15 * full < entry.macs <= target


def test_portions():
    assert portions(list("abcde"), None) == [["a"], ["b"], ["c"], ["d"], ["e"]]
    assert portions(list("abcde"), 2) == [["a", "b"], ["c", "d", "e"]]
    assert portions(list("ab"), 5) == [["a"], ["b"]]
    assert portions([], 3) == []


def test_the_time_left_is_told_after_every_round_but_the_last(capsys):
    last = Round(1.0, 1, 1, None, None, None, 60.0, 120.0, steps=4)
    told = partial(minutes_left, last, 80.0)  # 40 of the 120 seconds went into the metric
    assert told(2, steps=4, final_steps=0) == "; about 6.0 minutes left"
    assert told(1, steps=2, final_steps=6) == "; about 4.3 minutes left"
    assert told(0, steps=4, final_steps=0) == ""
    singe.compress(network(), macs=0.6, **OPTIONS | {"progress": True})
    said = capsys.readouterr().err.splitlines()
    assert ["minutes left" in line for line in said] == [True, False]


@pytest.mark.parametrize("visit", ["forward", "damage"])
def test_layerwise_prunes_one_group_after_the_other(visit):
    model = network()
    options = {**OPTIONS, "rounds": None, "calibrate": BATCHES, "macs": 0.5}
    scores = singe.score(model, BATCHES, p="fisher", progress=False)
    plan = singe.plan(model, scores, BATCHES[0][0], macs=0.5)
    names = [name for name in scores if name in plan]
    if visit == "damage":
        names.sort(key=lambda n: float(scores[n][plan[n]].sum()))
    visited = []

    def on_round(done, round_scores, round_plan):
        assert list(round_scores) == list(round_plan)
        visited.append((next(iter(round_plan)), done.units_removed))

    report = singe.compress(model, order="layerwise", visit=visit, on_round=on_round, **options)
    assert visited == [(name, len(plan[name])) for name in names]
    assert report.macs_after == pytest.approx(plan.meta["after"]["macs"])
    assert report.macs_after <= 0.5 * report.macs_before
    halves = singe.compress(network(), order="layerwise", **{**options, "rounds": 2})
    assert len(halves.rounds) == 2
    assert halves.macs_after == pytest.approx(report.macs_after)


class Backwards(nn.Module):
    """Defined back to front; ``c2`` is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.c3 = nn.Linear(9, 4), nn.Conv2d(8, 9, 3)
        self.c2, self.c1 = nn.Conv2d(8, 8, 1), nn.Conv2d(3, 8, 3)

    def forward(self, x):
        x = self.c2(self.c2(self.c1(x).relu()).relu())
        return self.head(self.c3(x.relu()).mean((2, 3)))


def test_front_to_back_is_the_order_of_calls():
    visited = []
    singe.compress(
        randomise(Backwards()), channels=0.5, order="layerwise", ranking="local",
        on_round=lambda done, scores, plan: visited.extend(plan),
        **{**OPTIONS, "rounds": None},
    )  # fmt: skip
    assert visited == ["c2", "c3"], "c2 feeds itself: its units are those of c1, the first"


def test_a_target_above_the_whole_is_told():
    model = network()
    with pytest.warns(UserWarning, match="less than the target of 1e[+]12: nothing goes"):
        report = singe.compress(model, macs=1e12, **OPTIONS)
    assert report.macs_after == report.macs_before
    scores = singe.score(model, BATCHES, progress=False)
    with pytest.warns(UserWarning, match="the whole model costs .* params, less than the target"):
        plan = singe.plan(model, scores, BATCHES[0][0], params=10**9)
    assert plan.n_units == 0


def test_layers_without_units_are_told():
    model = network()
    nn.utils.parametrizations.weight_norm(model[4])
    report = singe.compress(model, macs=0.95, **OPTIONS)
    assert "computes its weight" in report.plan.meta["rejected"]["4"]
    assert "left out: 4: " in report.plan.explain()
    with pytest.raises(
        singe.BudgetError, match=r"cannot be met.*Left out: .*; 4, 0 \(4 computes its weight"
    ):
        singe.compress(model, macs=0.01, **OPTIONS)


@pytest.mark.parametrize("order", ["global", "layerwise"])
def test_the_plan_of_the_run_rebuilds_the_network(order):
    """In indices of the original: a fresh copy takes the final shapes, and then the weights."""
    model = network()
    report = singe.compress(model, params=0.5, order=order, round_to=2, **OPTIONS)
    fresh = network()
    singe.prune(fresh, report.plan, BATCHES[0][0])
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(BATCHES[0][0]), model.eval()(BATCHES[0][0]))
    assert report.plan.meta["after"]["macs"] == report.macs_after
    assert sum(r.units_removed for r in report.rounds) == report.plan.n_units
    assert report.rounds[-1].kept["0"] == model[0].out_channels
    assert model[0].out_channels % 2 == 0


@pytest.mark.parametrize("order", ["global", "layerwise"])
def test_the_plan_of_the_run_tells_what_each_round_took(order):
    report = singe.compress(network(), macs=0.5, order=order, **OPTIONS)
    for row in report.plan.rows():
        assert row["kept"] == report.rounds[-1].kept[row["group"]]
        assert row["removed"] == len(report.plan.get(row["group"], []))
        told = [int(part.split()[0]) for part in row["why"].split(", ") if "round" in part]
        assert sum(told) == row["removed"] > 0
        assert row["macs_saved"] > 0
    assert len({row["why"] for row in report.plan.rows()}) > 1
    lines = report.plan.explain().splitlines()
    assert lines[0].endswith(f"for at most {0.5 * report.macs_before:.4g} macs")
    assert [line.split()[0] for line in lines[2:-1]] == ["group", *report.rounds[0].kept]
    assert lines[-1].startswith("left out: 16: its channels reach")
    assert "lowest in" not in lines[2]  # every round had scores of its own


def test_residual_streams_keep_their_indices_over_the_rounds():
    torch.manual_seed(0)
    model = randomise(residual())
    batches = CASES["residual"].batches((4, 4), dtype=torch.float32)
    original = clone(model)
    report = singe.compress(
        model,
        macs=0.4,
        rounds=3,
        finetune_steps=0,
        recalibrate=False,
        train=batches,
        progress=False,
    )
    singe.prune(original, report.plan, batches[0][0])
    assert same_weights(original, model)


def test_a_target_in_latency():
    """A second is met whatever else the machine is doing; ``max_keep`` alone makes units go."""
    model = network()
    report = singe.compress(
        model, latency=1000.0, timing=singe.Timing(runs=3), max_keep=0.8, **{**OPTIONS, "rounds": 1}
    )
    assert report.rounds[0].units_removed >= 8
    meta = report.plan.meta
    assert meta["target"] == {"latency": 1000.0}
    assert 0.0 < meta["after"]["latency"] < 1000.0
    assert 0.0 < meta["before"]["latency"] < 1000.0


@pytest.mark.parametrize("layers", [None, ["0", "4", "8"]])
@pytest.mark.parametrize("rounds", [1, 2, 5])
def test_a_target_in_channels_counts_groups_that_have_one_left(rounds, layers):
    """They leave the graph of the later rounds; what is left of them counts all the same."""
    torch.manual_seed(0)
    model = randomise(vgg((3, 10, 4), 12))
    options = {**OPTIONS, "rounds": rounds, "finetune_steps": 1, "criterion": "random"}
    options["layers"] = layers
    report = singe.compress(model, channels=9, max_pruning_ratio=1.0, ranking="local", **options)
    assert sum(report.rounds[-1].kept.values()) == 9
    assert report.plan.meta["after"]["channels"] == 9


def test_when_every_group_is_down_to_one_the_rest_is_fine_tuning():
    model = network()
    report = singe.compress(
        model, channels=4, schedule=lambda done: 1.0, max_pruning_ratio=1.0, **OPTIONS
    )
    assert set(report.rounds[0].kept.values()) == {1}
    assert [r.units_removed for r in report.rounds] == [35, 0]


def test_geometric_schedules_end_at_the_target():
    """49 * (16 / 49) ** 1.0 is below 16."""
    for full in range(2, 200):
        for last in range(1, full):
            assert target_after("geometric", 1.0, float(full), float(last)) == last


def test_iterators_of_layers_are_read_once():
    kept, same = network(), network()
    singe.compress(kept, macs=0.7, ignore=(name for name in ["0"]), **OPTIONS)
    singe.compress(same, macs=0.7, ignore=["0"], **OPTIONS)
    assert same_weights(kept, same)
    assert kept[0].out_channels == 8


def test_a_metric_may_leave_another_mode_and_gradients_do_not_stay():
    """Where the optimizer was given a few parameters only, the others gather no gradients either."""
    model = network().train()
    report = singe.compress(
        model, macs=0.7, evaluate=lambda m: float(m.eval().training), **OPTIONS,
        optimizer=lambda parameters: torch.optim.SGD(list(parameters)[:2], lr=0.01),
    )  # fmt: skip
    assert report.metric_after == 0.0
    assert all(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
