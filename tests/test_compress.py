"""The entwined loop: it meets its target, trains only what is left, and undoes itself on failure."""

from __future__ import annotations

import json
import re

import pytest
import torch
import torch.nn.functional as F
import torch_pruning as tp
from helpers import (
    assert_unchanged,
    clone,
    make_batches,
    one_thread,  # noqa: F401 - autouse
    randomise,
    snapshot,
)
from helpers_loop import BATCHES, OPTIONS, SHAPE, network
from helpers_networks import CASES, residual
from torch import nn

import singe
from singe.evaluation import accuracy
from singe.objectives import CrossEntropy

# Torch-Pruning counts a linear layer's bias once per batch: its MACs per sample depend, by less than
# this, on how many samples it is shown.
MACS = 1e-3


def macs_of(model: nn.Module) -> float:
    return tp.utils.count_ops_and_params(model, BATCHES[0][0][:1])[0]


def params_of(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def test_the_users_default_device_has_no_say():
    plain, other = network(), network()
    options = {"distill": 0.5, "ema": 0.9, "evaluate": BATCHES, "accuracy_floor": 0.0}
    expected = singe.compress(plain, macs=0.6, **OPTIONS, **options)
    with torch.device("meta"):
        found = singe.compress(other, macs=0.6, **OPTIONS, **options)
    assert found.plan == expected.plan
    assert all(
        torch.equal(a, b) for a, b in zip(plain.parameters(), other.parameters(), strict=True)
    )


class Failing:
    """Training data that fails after so many batches, and counts the passes."""

    def __init__(self, batches, after: int, error: type[BaseException]) -> None:
        self.batches, self.after, self.error, self.given = batches, after, error, 0

    def __iter__(self):
        for batch in self.batches:
            if self.given == self.after:
                raise self.error("the disk is gone")
            self.given += 1
            yield batch


@pytest.mark.parametrize("ranking", ["global", "local"])
@pytest.mark.parametrize("kind", ["macs", "params", "channels"])
def test_the_target_is_met_from_below(kind, ranking):
    model = network()
    units = sum(m.out_channels for m in model if isinstance(m, nn.Conv2d)) + 12
    before = {"macs": macs_of(model), "params": params_of(model), "channels": units}
    report = singe.compress(model, ranking=ranking, **{kind: 0.5}, **OPTIONS)
    left = sum(m.out_channels for m in model if isinstance(m, nn.Conv2d)) + model[13].out_features
    after = {"macs": macs_of(model), "params": params_of(model), "channels": left}
    assert after[kind] <= 0.5 * before[kind]
    assert after[kind] >= 0.3 * before[kind], "far more was removed than was asked for"
    assert report.macs_after == pytest.approx(after["macs"], rel=MACS)
    assert report.params_after == after["params"]


def test_what_comes_back_is_an_ordinary_module():
    model = network().train()
    model[1].eval()
    kinds = [type(m) for m in model.modules()]
    modes = [m.training for m in model.modules()]
    singe.compress(model, macs=0.5, **OPTIONS)
    assert [type(m) for m in model.modules()] == kinds
    assert [m.training for m in model.modules()] == modes
    assert all("forward" not in m.__dict__ for m in model.modules())
    assert all(type(p) is nn.Parameter and p.is_leaf for p in model.parameters())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not any(h for m in model.modules() for h in (m._forward_hooks, m._backward_hooks))
    x = BATCHES[0][0]
    assert torch.equal(clone(model).eval()(x), model.eval()(x))


def test_no_layer_is_ever_emptied():
    model = network()
    singe.compress(model, macs=0.12, max_pruning_ratio=1.0, **OPTIONS)
    assert all(m.out_channels >= 1 for m in model if isinstance(m, nn.Conv2d))
    assert model(BATCHES[0][0]).shape == (4, 4)


def test_the_pruning_ratio_is_of_the_original_widths():
    """Over several rounds no group falls below what it may keep of its first width."""
    model = network()
    widths = [8, 10, 9]
    singe.compress(model, channels=0.55, max_pruning_ratio=0.5, **{**OPTIONS, "rounds": 3})
    left = [m.out_channels for m in model if isinstance(m, nn.Conv2d)]
    assert all(now >= was - was // 2 for now, was in zip(left, widths, strict=True))


def test_every_rounds_optimizer_holds_the_live_parameters_and_no_other():
    model = network()
    model[0].weight.requires_grad_(False)
    seen = []

    def factory(parameters):
        parameters = list(parameters)
        live = {id(p) for p in model.parameters() if p.requires_grad}
        assert {id(p) for p in parameters} == live
        seen.append(parameters)
        return torch.optim.AdamW(parameters, lr=1e-3)

    singe.compress(model, macs=0.5, optimizer=factory, **{**OPTIONS, "rounds": 3})
    assert len(seen) == 3
    sizes = [sum(p.numel() for p in parameters) for parameters in seen]
    assert sizes[0] > sizes[1] > sizes[2]
    last = {id(p) for p in seen[-1]}
    assert last == {id(p) for p in model.parameters() if p.requires_grad}
    assert not model[0].weight.requires_grad


def test_fine_tuning_trains():
    """Steps change the weights, the scheduler is stepped after each, and none means none."""
    rates = []

    def scheduler(optimizer, steps):
        assert steps == 5
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rates.append(step) or 1.0)

    tuned, raw = network(), network()
    options = {**OPTIONS, "rounds": 1, "macs": 0.7}
    report = singe.compress(tuned, **{**options, "finetune_steps": 5}, scheduler=scheduler)
    assert rates == [0, 1, 2, 3, 4, 5]
    assert report.rounds[0].finetune_loss > 0
    report = singe.compress(raw, **{**options, "finetune_steps": 0})
    assert report.rounds[0].finetune_loss is None
    assert tuned[0].weight.shape == raw[0].weight.shape
    assert not torch.equal(tuned[0].weight, raw[0].weight)
    assert not torch.equal(tuned[1].running_mean, raw[1].running_mean)


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_failure_half_way_puts_everything_back(error):
    """In the second round: the model has been pruned and trained by then."""
    model = network().train()
    model[1].eval()
    model[0].weight.requires_grad_(False)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    before = snapshot(model)
    shapes = []
    train = Failing(BATCHES, after=4, error=error)

    def evaluate(m):
        shapes.append(m[0].out_channels + m[4].out_channels + m[8].out_channels)
        return 0.0

    with pytest.raises(error, match="the disk is gone"):
        singe.compress(
            model, calibrate=BATCHES, macs=0.4, evaluate=evaluate, **{**OPTIONS, "train": train}
        )
    assert shapes[-1] < shapes[0], "nothing had been pruned: no test"
    assert_unchanged(model, before, versions=False)
    assert (model[0].out_channels, model[4].in_channels) == (8, 8)
    optimizer.step()  # it still holds the model's own parameters
    assert not torch.equal(model[4].weight, before["state"]["4.weight"])


def test_an_objective_that_diverges_puts_everything_back():
    model = network()
    before = snapshot(model)
    with pytest.raises(singe.NonFiniteError, match=r"diverged.*lower `lr`"):
        singe.compress(model, macs=0.5, lr=1e30, **OPTIONS)
    assert_unchanged(model, before, versions=False)


def test_fine_tuning_that_leaves_nothing_to_score_is_named():
    """One step at 1e5: its loss is finite, the network it leaves is not."""
    model = network()
    before = snapshot(model)
    with pytest.raises(singe.NonFiniteError, match=r"fine-tuning of round 1 .*lower `lr`"):
        singe.compress(model, macs=0.5, lr=1e5, **{**OPTIONS, "finetune_steps": 1})
    assert_unchanged(model, before, versions=False)


def test_a_target_out_of_reach_fails_before_anything_is_trained():
    """And the smallest reachable one it names is a share of the model that came in."""
    model = network()
    before, train = snapshot(model), Failing(BATCHES, after=10**9, error=OSError)
    options = {**OPTIONS, "train": train, "calibrate": BATCHES, "max_pruning_ratio": 0.5}
    with pytest.raises(singe.BudgetError, match="smallest reachable") as caught:
        singe.compress(model, macs=0.05, **options)
    assert_unchanged(model, before, versions=False)
    assert train.given == 0, f"{train.given} steps were trained first"
    share = float(re.search(r"smallest reachable is ([0-9.]+) of", str(caught.value)).group(1))
    report = singe.compress(model, macs=share + 0.001, **options)
    assert report.macs_after <= (share + 0.001) * report.macs_before
    assert report.macs_after >= (share - 0.001) * report.macs_before


def test_evaluate_takes_batches_or_a_callable():
    def by_hand(model: nn.Module) -> float:
        with torch.no_grad():
            right = [(model.eval()(x).argmax(1) == y).sum().item() for x, y in BATCHES]
        return sum(right) / 12

    model = network()
    expected = by_hand(model)
    report = singe.compress(model, macs=0.7, evaluate=BATCHES, **OPTIONS)
    assert report.metric_before == pytest.approx(expected)
    assert report.metric_after == pytest.approx(by_hand(model))

    calls = []

    def metric(m: nn.Module) -> float:
        calls.append(m)
        return float(len(calls))

    model = network()
    report = singe.compress(model, macs=0.7, evaluate=metric, **OPTIONS)
    assert all(m is model for m in calls)
    assert report.metric_before == 1.0
    metrics = [(r.metric_pruned, r.metric_finetuned) for r in report.rounds]
    assert metrics == [(2.0, 3.0), (4.0, 5.0)]
    assert report.metric_after == 5.0


def test_ignored_labels_do_not_count():
    model = network().eval()
    with torch.no_grad():
        batches = [(x, model(x).argmax(1)) for x, _ in BATCHES]
    batches[0][1][:3] = -100
    assert accuracy(model, batches) == 1.0


def test_the_accuracy_of_tokens():
    class Echo(nn.Linear):
        def forward(self, x):
            return F.one_hot(x, 4).double() + 0 * self.weight.sum()

    tokens = torch.randint(0, 4, (3, 5))
    assert accuracy(Echo(1, 1), [(tokens, tokens)]) == 1.0


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([(BATCHES[0][0], BATCHES[0][1][:, None])], r"shape \(4, 1\).*shape \(4,\)"),
        ([], "evaluation data is empty"),
        ([(BATCHES[0][0], torch.full((4,), -100))], "every label of the evaluation data is -100"),
    ],
)
def test_what_accuracy_cannot_be_taken_of(batches, message):
    with pytest.raises(singe.DataError, match=message):
        singe.compress(network(), macs=0.7, evaluate=batches, **OPTIONS)


def test_the_report():
    model = network()
    before = macs_of(model), params_of(model)
    report = singe.compress(model, macs=0.5, **OPTIONS)
    assert report.macs_before == pytest.approx(before[0], rel=MACS)
    assert report.params_before == before[1]
    assert report.metric_before is None
    assert report.metric_after is None
    assert len(report.rounds) == 2
    first, second = report.rounds
    # Equal steps towards the target, each from below.
    full = report.macs_before
    assert second.macs <= 0.5 * full < first.macs <= 0.75 * full
    assert first.params > second.params == report.params_after
    for entry in report.rounds:
        assert entry.units_removed > 0
        assert entry.finetune_loss > 0
        assert entry.seconds_pruning > 0
        assert entry.seconds_finetuning > 0
    data = json.loads(json.dumps(report.to_dict()))
    assert len(data["rounds"]) == 2


@pytest.mark.parametrize(("round_to", "target"), [(1, 0.65), (4, 0.83)])
@pytest.mark.parametrize("order", ["global", "layerwise"])
def test_the_plan_says_why_no_more_goes(order, round_to, target):
    """As a plan of one shot does, behind what went in which round."""
    model = network()
    scores = singe.score(model, BATCHES, progress=False, p="fisher")
    first, second, *_ = scores
    options = {
        "channels": target, "ranking": "global", "round_to": round_to, "max_pruning_ratio": 0.5,
        "min_keep": {first: 1.0}, "max_keep": {second: 0.8},
    }  # fmt: skip
    once = singe.plan(model, scores, BATCHES[0][0], **options).rows()
    rows = singe.compress(model, order=order, **OPTIONS, **options).plan.rows()
    assert rows[0]["why"] == once[0]["why"] == "keeps all: min_keep"
    alike = [pair for pair in zip(rows, once, strict=True) if pair[0]["kept"] == pair[1]["kept"]]
    assert len(alike) > 1
    for row, other in alike:
        for ending in ("at its limit: ", "max_pruning_ratio", "round_to=4", "as much as max_keep"):
            assert (ending in row["why"]) == (ending in other["why"]), (row, other)
    assert any("at its limit: max_pruning_ratio" in row["why"] for row in rows)


def test_where_nothing_goes_statistics_stay():
    model = network()
    before = {name: t.clone() for name, t in model.named_buffers()}
    singe.compress(model, macs=1.0, **{**OPTIONS, "finetune_steps": 0, "rounds": 1})
    assert all(torch.equal(t, before[name]) for name, t in model.named_buffers())
    with pytest.warns(UserWarning, match="meets the target as it is, so no layer is visited"):
        singe.compress(model, macs=1.0, order="layerwise", **{**OPTIONS, "rounds": None})


@pytest.mark.parametrize("use", ["train", "evaluate"])
def test_data_that_the_model_does_not_run_on_is_named(use):
    wrong = [(x[:, :2], y) for x, y in BATCHES]
    options = {**OPTIONS, "calibrate": BATCHES, use: wrong}
    name = {"train": "training", "evaluate": "evaluation"}[use]
    with pytest.raises(
        singe.DataError, match=rf"does not run on {name} batch 0, inputs \[4, 2, 8, 8\]"
    ):
        singe.compress(network(), macs=0.6, **options)


def test_nothing_to_train_is_found_before_anything_is_scored():
    model = network().requires_grad_(False)
    scored: list[int] = []

    def objective(outputs, batch):
        scored.append(1)
        return nn.functional.cross_entropy(outputs, batch[1])

    with pytest.raises(
        singe.ModelError, match=r"no parameter requires a gradient.*requires_grad_\(\)"
    ):
        singe.compress(model, macs=0.7, objective=objective, **OPTIONS)
    assert not scored
    still = {**OPTIONS, "finetune_steps": 0, "final_steps": 0}
    report = singe.compress(model, macs=0.7, objective=objective, **still)
    assert report.macs_after <= 0.7 * report.macs_before
    assert scored


def test_calibration_data_is_what_is_scored_on():
    """Without it the first samples of the training data are."""
    seen = []

    def objective(outputs, batch):
        seen.append(batch[0])
        return nn.functional.cross_entropy(outputs, batch[1])

    calibrate = make_batches(SHAPE, (5,), seed=9, dtype=torch.float32)
    options = {**OPTIONS, "rounds": 1, "macs": 0.8, "objective": objective}
    singe.compress(network(), calibrate=calibrate, **options)
    assert {len(x) for x in seen} == {5}
    seen.clear()
    singe.compress(network(), **options)
    assert {len(x) for x in seen} == {4}


def test_options_reach_the_scoring():
    model = network()
    singe.compress(model, channels=0.8, ignore=["0", "13"], criterion="magnitude", **OPTIONS)
    assert model[0].out_channels == 8
    assert model[13].out_features == 12


@pytest.mark.parametrize("argument", ["train", "calibrate", "evaluate"])
def test_one_shot_data_is_refused(argument):
    model = network()
    before = snapshot(model)
    with pytest.raises(singe.DataError, match=f"{argument} is a one-shot iterator"):
        singe.compress(model, macs=0.5, **{**OPTIONS, argument: iter(BATCHES)})
    assert_unchanged(model, before)


def test_empty_training_data():
    model = network()
    before = snapshot(model)
    with pytest.raises(singe.DataError, match="empty"):
        singe.compress(model, macs=0.5, calibrate=BATCHES, **{**OPTIONS, "train": []})
    assert_unchanged(model, before, versions=False)
    with pytest.raises(singe.DataError, match="empty"):
        singe.compress(model, macs=0.5, **{**OPTIONS, "train": []})
    assert_unchanged(model, before, versions=False)


def test_residual_networks():
    torch.manual_seed(0)
    model = randomise(residual())
    batches = CASES["residual"].batches((4, 4), dtype=torch.float32)
    report = singe.compress(model, macs=0.6, **{**OPTIONS, "train": batches})
    assert report.macs_after <= 0.6 * report.macs_before
    assert model[0].out_channels == model[3].body[3].out_channels


@pytest.mark.parametrize(
    ("options", "p"),
    [
        ({}, "fisher"),
        ({"objective": "kl"}, "fisher"),
        ({"objective": CrossEntropy()}, "fisher"),
        ({"p": 1}, 1),
        ({"path": "network"}, 1),
        ({"norm": "outside"}, 1),
        ({"criterion": "taylor"}, 1),
        ({"objective": lambda outputs, batch: F.cross_entropy(outputs, batch[1])}, 1),
    ],
    ids=["usual", "kl", "object", "1", "network", "outside", "taylor", "callable"],
)
def test_the_power_of_its_scores(options, p):
    """Samples by themselves on the layer path, where every loss is known to be one per sample."""
    seen = []
    singe.compress(
        CASES["vgg"].model(), train=CASES["vgg"].batches(), macs=0.8, rounds=1, finetune_steps=0,
        progress=False, on_round=lambda done, scores, plan: seen.append(scores.meta["p"]), **options,
    )  # fmt: skip
    assert seen == [p]


def test_a_norm_that_was_frozen_must_be_frozen_again(tmp_path):
    model = network().train()
    next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d)).eval()
    singe.compress(model, macs=0.7, checkpoint=tmp_path, **OPTIONS)
    with pytest.raises(singe.CheckpointError, match="in_evaluation"):
        singe.compress(network().train(), macs=0.7, checkpoint=tmp_path, resume=True, **OPTIONS)
