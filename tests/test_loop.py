"""The entwined loop's options: order, schedule, training, state that follows its parameters, roll-back."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import (
    CASES,
    CPU,
    assert_unchanged,
    batch_of,
    clone,
    make_batches,
    one_thread,  # noqa: F401 - autouse
    randomise,
    residual,
    snapshot,
    torchvision_models,
    trained_resnet20,
    vgg,
)
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import singe
from singe.data import first_batch
from singe.finetune import Training, cosine, default_optimizer, recalibrate
from singe.network import Network
from singe.objectives import CrossEntropy, as_objective
from singe.removal import kept_elements, remove_units, take
from singe.rounds import portions, target_after
from singe.seeding import Stream
from singe.tuner import Tuner
from singe.units import find_groups, set_gates

SHAPE = (3, 8, 8)
BATCHES = make_batches(SHAPE, (4, 4, 4), dtype=torch.float32)
OPTIONS = {"train": BATCHES, "rounds": 2, "finetune_steps": 3, "progress": False}


def network() -> nn.Module:
    torch.manual_seed(0)
    return randomise(vgg((8, 10, 9), 12))


def same_weights(left: nn.Module, right: nn.Module) -> bool:
    a, b = left.state_dict(), right.state_dict()
    return a.keys() == b.keys() and all(
        a[n].shape == b[n].shape and torch.equal(a[n], b[n]) for n in a
    )


# ---------------------------------------------------------------------- removal


def gated_and_removed(model: nn.Module, x: torch.Tensor, **target) -> float:
    """Largest difference of the outputs, relative to the largest output."""
    data = [(x, torch.zeros(len(x), dtype=torch.long))]
    scores = singe.score(model, data, criterion="random", progress=False)
    plan = singe.plan(model, scores, x, ranking="local", **target)
    graph = find_groups(model, batch_of(x), layers=list(scores))
    gated = Network(model, graph.groups, graph.folds)
    set_gates(gated, [(g, plan[g.name]) for g in graph.groups if g.name in plan], 0.0)
    pruned = clone(model)
    singe.prune(pruned, plan, x)
    with torch.no_grad():
        closed, removed = gated(batch_of(x)), pruned(x)
        change = float((removed - model(x)).abs().max() / removed.abs().max())
        assert change > 1e-3, "removing these units does nothing: the test would see no mistake"
    return float((closed - removed).abs().max() / removed.abs().max())


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_pruned_outputs_equal_gated_outputs(name):
    torch.manual_seed(0)
    model = randomise(getattr(torchvision_models(), name)(weights=None, num_classes=10))
    assert gated_and_removed(model, torch.randn(2, 3, 32, 32), channels=0.5) <= 1e-5


def test_pruned_outputs_equal_gated_outputs_of_a_trained_network():
    model = trained_resnet20().float()
    assert gated_and_removed(model, torch.randn(4, 3, 32, 32), params=0.4) <= 1e-5


@pytest.mark.parametrize("name", ["vgg", "residual", "depthwise", "pre_activation", "grouped"])
def test_which_elements_removal_keeps(name):
    """Every parameter and buffer of the pruned model is those elements of the original."""
    case = CASES[name]
    model = case.model()
    batch = first_batch(case.batches(), CPU)
    removals = [(g, [0, g.n_units // 2][: g.n_units - 1]) for g in find_groups(model, batch).groups]
    before = snapshot(model)
    kept = kept_elements(model, batch, removals)
    assert_unchanged(model, before)
    pruned = clone(model)
    remove_units(pruned, batch, removals)
    for name, tensor in pruned.state_dict().items():
        assert torch.equal(take(model.state_dict()[name], kept[name]), tensor), name
    cut = sum(t.shape != model.state_dict()[n].shape for n, t in pruned.state_dict().items())
    assert cut > 1


# ---------------------------------------------------------------------- state that follows


def tuner_of(model, factory=None, **options) -> Tuner:
    training = Training(factory or default_optimizer(0.05), cosine, CrossEntropy(), **options)
    return Tuner(model, training, Stream(BATCHES, 0), seed=0)


@pytest.mark.parametrize(
    ("factory", "keys"),
    [
        (lambda p: torch.optim.SGD(p, 0.01, momentum=0.9), {"momentum_buffer"}),
        (lambda p: torch.optim.AdamW(p, 1e-3, amsgrad=True),
         {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"}),
        (lambda p: torch.optim.RMSprop(p, 1e-3, momentum=0.5), {"square_avg", "momentum_buffer"}),
    ],
)  # fmt: skip
def test_optimizer_state_and_average_follow_their_parameters(factory, keys):
    """Tagged with the parameter it belongs to, an element of the state stays beside it."""
    model = network()
    tuner = tuner_of(model, factory, ema=0.5)
    tuner.start(4)
    tuner.run()
    for parameter in model.parameters():
        for key in keys:
            tuner._optimizer.state[parameter][key] = parameter.detach() ** 2
    tuner._gathered = tuner._by_name()
    tuner.average = {n: 3 * t.detach() for n, t in tuner._floating().items()}
    batch = batch_of(BATCHES[0])
    removals = [(g, [1, 3]) for g in find_groups(model, batch).groups]
    shapes = {n: p.shape for n, p in model.named_parameters()}
    tuner.follow(kept_elements(model, batch, removals), shapes)
    remove_units(model, batch, removals)
    tuner.start(4)
    steps = set()
    for name, parameter in model.named_parameters():
        state = tuner._optimizer.state[parameter]
        assert keys <= state.keys()
        for key in keys:
            assert torch.equal(state[key], parameter.detach() ** 2), (name, key)
        steps.add(float(state.get("step", 4)))
    assert steps == {4.0}, "bias correction goes on from where it was"
    for name, tensor in tuner._floating().items():
        assert torch.equal(tuner.average[name], 3 * tensor.detach()), name
    tuner.run()  # and it is fit to go on


def test_factored_moments_of_cut_parameters_start_again():
    model = network()
    tuner = tuner_of(model, lambda p: torch.optim.Adafactor(p, lr=1e-3))
    tuner.start(2)
    tuner.run()
    batch = batch_of(BATCHES[0])
    removals = [(g, [0]) for g in find_groups(model, batch).groups if g.name == "8"]
    shapes = {n: p.shape for n, p in model.named_parameters()}
    tuner.follow(kept_elements(model, batch, removals), shapes)
    remove_units(model, batch, removals)
    tuner.start(2)
    assert not tuner._optimizer.state[model[8].weight]
    assert tuner._optimizer.state[model[0].weight]
    assert tuner.run() > 0


def test_the_average_is_what_is_evaluated_and_what_comes_back():
    model, seen = network(), []

    def evaluate(m):
        seen.append(m[0].bias is None and m[16].weight.detach().clone())
        return 0.5

    singe.compress(model, macs=0.6, ema=0.9, lr=0.1, evaluate=evaluate, **OPTIONS)
    assert torch.equal(model[16].weight, seen[-1])
    plain = network()
    singe.compress(plain, macs=0.6, lr=0.1, **OPTIONS)
    assert not torch.equal(plain[16].weight, model[16].weight)


# ---------------------------------------------------------------------- training options


def test_clipping_bounds_the_whole_gradient():
    model = network()
    tuner = tuner_of(model, lambda p: torch.optim.SGD(p, lr=1.0), clip_grad_norm=1e-3)
    before = [p.detach().clone() for p in model.parameters()]
    tuner.start(1)
    tuner.run()
    moved = torch.cat([(p - b).flatten() for p, b in zip(model.parameters(), before, strict=True)])
    assert float(moved.detach().norm()) == pytest.approx(1e-3, rel=1e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_trains_float32_weights(dtype):
    """The first loss is off by a few roundings of the lower precision, and is not the same."""
    exact, mixed = network(), network()
    options = {**OPTIONS, "rounds": 1, "finetune_steps": 1}
    a = singe.compress(exact, macs=0.7, **options)
    b = singe.compress(mixed, macs=0.7, autocast=dtype, **options)
    assert all(p.dtype == torch.float32 for p in mixed.parameters())
    assert a.rounds[-1].finetune_loss != b.rounds[-1].finetune_loss
    rel = 4 * torch.finfo(dtype).eps
    assert a.rounds[-1].finetune_loss == pytest.approx(b.rounds[-1].finetune_loss, rel=rel)


def times(factor: float):
    """The cross-entropy, so many times."""
    return lambda outputs, batch: factor * F.cross_entropy(outputs.float(), batch[1])


def test_float16_keeps_gradients_that_would_vanish():
    """Below 6e-8 float16 has nothing: unscaled, every layer would stand still."""
    model = network()
    options = {"autocast": torch.float16, "finetune_objective": times(1e-9)}
    options["optimizer"] = lambda parameters: torch.optim.SGD(parameters, lr=1e7)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    singe.compress(model, macs=1.0, **OPTIONS, **options)
    still = [n for n, p in model.named_parameters() if torch.equal(p, before[n])]
    assert not still


def test_a_step_that_overflows_float16_is_passed_over():
    """Neither weights nor schedule move; the halved scale is in the state, and goes on from there."""
    model = network()
    sgd = lambda parameters: torch.optim.SGD(parameters, lr=1.0)  # noqa: E731
    tuner = tuner_of(model, sgd, autocast=torch.float16, clip_grad_norm=1e-3)
    tuner.training = replace(tuner.training, objective=as_objective(times(1e4)))
    tuner.start(60)
    before = clone(model).state_dict()
    tuner._one_step()
    assert tuner.state()["scaler"]["scale"] == 2.0**15
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert tuner._scheduler.last_epoch == 0
    other = tuner_of(model, autocast=torch.float16)
    other.load(tuner.state())
    assert other._scaler.get_scale() == 2.0**15
    while tuner._scheduler.last_epoch == 0:
        before = clone(model).state_dict()
        tuner._one_step()
    moved = [(p - before[n]).flatten() for n, p in model.named_parameters()]
    norm = float(torch.cat(moved).detach().norm())
    assert norm == pytest.approx(1e-3, rel=1e-2), "clipped after the scale was taken out"


def test_gradients_that_overflow_float16_at_every_scale():
    model = network()
    before = snapshot(model)
    broken = lambda outputs, batch: (0.0 * outputs.float()).sqrt().sum()  # noqa: E731 - 0, slope inf
    options = {**OPTIONS, "finetune_steps": 60}
    with pytest.raises(singe.NonFiniteError, match=r"overflow float16 at every scale.*bfloat16"):
        singe.compress(
            model, macs=0.7, autocast=torch.float16, finetune_objective=broken, **options
        )
    assert_unchanged(model, before, versions=False)


def test_label_smoothing_is_torchs():
    logits, labels = torch.randn(4, 5), torch.tensor([0, 3, 1, 4])
    batch = batch_of((torch.randn(4, 2), labels))
    for smoothing in (0.0, 0.1):
        expected = F.cross_entropy(logits, labels, label_smoothing=smoothing)
        assert CrossEntropy(smoothing).total(logits, batch) / 4 == pytest.approx(float(expected))


def test_distillation_needs_no_labels_and_follows_the_original():
    model = network()
    original = clone(model)
    images = [x for x, _ in BATCHES]
    options = {
        **OPTIONS, "train": images, "calibrate": images, "objective": "kl", "finetune_steps": 40,
        "rounds": 1, "macs": 0.7, "lr": 0.01,
    }  # fmt: skip

    def far(m: nn.Module) -> float:
        x = torch.cat(images)
        with torch.no_grad():
            return float(F.kl_div(m.eval()(x).log_softmax(1), original(x).softmax(1)))

    singe.compress(model, distill=1.0, **options)
    untrained = network()
    singe.compress(untrained, distill=1.0, **{**options, "finetune_steps": 0})
    assert far(model) < 0.5 * far(untrained)
    half = network()
    with pytest.raises(singe.DataError, match="needs labels"):
        singe.compress(half, distill=0.5, **options)
    assert same_weights(half, network())


def test_recalibration_sets_the_statistics_of_the_calibration_data():
    model = network()
    data = [batch_of(b) for b in BATCHES]
    weights = [p.detach().clone() for p in model.parameters()]
    recalibrate(model, data)
    with torch.no_grad():
        outputs = [model[0](x) for x, _ in BATCHES]
    means = torch.stack([o.mean((0, 2, 3)) for o in outputs]).mean(0)
    assert torch.allclose(model[1].running_mean, means, atol=1e-6)
    assert model[1].momentum == 0.1
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), weights, strict=True))
    assert not any(m.training for m in model.modules())
    again = clone(model)
    recalibrate(again, [batch_of((BATCHES[0][0][:1], BATCHES[0][1][:1]))])
    assert same_weights(again, model), "a single sample has no variance"


def test_recalibration_can_be_left_out():
    with_it, without = network(), network()
    options = {**OPTIONS, "finetune_steps": 0, "rounds": 1, "macs": 0.6}
    singe.compress(with_it, **options)
    report = singe.compress(without, recalibrate=False, **options)
    pruned = network()
    singe.prune(pruned, report.plan, BATCHES[0][0])
    assert same_weights(without, pruned)
    assert torch.equal(with_it[0].weight, without[0].weight)
    assert not torch.equal(with_it[1].running_mean, without[1].running_mean)


def test_a_finetune_function_of_the_users():
    model, stages = network(), []

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
        return float(loss.detach())

    report = singe.compress(model, macs=0.6, finetune=finetune, final_steps=2, **OPTIONS)
    assert [(s.round, s.rounds, s.steps) for s in stages] == [(1, 2, 3), (2, 2, 5)]
    assert stages[0].seed != stages[1].seed
    assert stages[0].teacher is None
    assert [r.finetune_loss for r in report.rounds] == [
        pytest.approx(r.finetune_loss) for r in report.rounds
    ]
    assert all(p.grad is None for p in model.parameters())

    def ruins(m: nn.Module, stage: singe.Stage) -> None:
        m[16] = nn.Linear(3, 3)

    model = network()
    before = snapshot(model)
    with pytest.raises(singe.ModelError, match="finetune function changed"):
        singe.compress(model, macs=0.6, finetune=ruins, **OPTIONS)
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
        ({"ema": 1.0}, r"ema must lie in \(0, 1\)"),
        ({"ema": 0.9, "finetune": lambda m, s: None}, "ema is of the built-in training"),
        ({"accuracy_floor": 0.5}, "accuracy_floor needs evaluate"),
        ({"accuracy_floor": 0.5, "evaluate": lambda m: 0.4}, "0.4000, below accuracy_floor=0.5"),
        ({"final_steps": -1}, "final_steps >= 0"),
        ({"checkpoint_every": 0}, "checkpoint_every must be >= 1"),
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


@pytest.mark.parametrize("visit", ["forward", "damage"])
def test_layerwise_prunes_one_group_after_the_other(visit):
    model = network()
    options = {**OPTIONS, "rounds": None, "calibrate": BATCHES, "macs": 0.5}
    scores = singe.score(model, BATCHES, progress=False)
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
    assert "latency" in report.plan.meta["target"]


# ---------------------------------------------------------------------- roll-back


@pytest.mark.parametrize("ema", [None, 0.9])
def test_below_the_floor_the_last_good_round_comes_back(ema):
    model, after = network(), []
    metrics = iter([1.0, 0.9, 0.95, 0.8, 0.85, 0.5, 0.6])
    report = singe.compress(
        model, macs=0.4, evaluate=lambda m: next(metrics), accuracy_floor=0.7, ema=ema,
        on_round=lambda *_: after.append(clone(model)), **{**OPTIONS, "rounds": 4},
    )  # fmt: skip
    assert len(report.rounds) == 2
    assert report.metric_after == 0.85
    assert report.abandoned.metric_finetuned == 0.6
    assert "after round 3 was 0.6000, below accuracy_floor=0.7" in report.stopped
    assert "after round 2" in report.stopped
    assert report.macs_after == report.rounds[1].macs > report.abandoned.macs
    assert [model[i].out_channels for i in (0, 4, 8)] == [
        after[1][i].out_channels for i in (0, 4, 8)
    ]
    if ema is None:
        assert same_weights(model, after[1])
    fresh = network()
    singe.prune(fresh, report.plan, BATCHES[0][0])
    fresh.load_state_dict(model.state_dict())
    torch.optim.SGD(model.parameters(), 0.1)  # an ordinary module
    F.cross_entropy(model.train()(BATCHES[0][0]), BATCHES[0][1]).backward()


def test_a_first_round_below_the_floor_gives_the_model_as_it_was():
    model = network()
    before = snapshot(model)
    metrics = iter([1.0, 0.2, 0.3])
    report = singe.compress(
        model, macs=0.4, evaluate=lambda m: next(metrics), accuracy_floor=0.7, **OPTIONS
    )
    assert report.rounds == []
    assert dict(report.plan) == {}
    assert report.macs_after == report.macs_before
    assert report.metric_after == 1.0
    assert_unchanged(model, before, versions=False)


# ---------------------------------------------------------------------- randomness


def loader(seed: int | None = None) -> DataLoader:
    x, y = torch.cat([b[0] for b in BATCHES]), torch.cat([b[1] for b in BATCHES])
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return DataLoader(TensorDataset(x, y), batch_size=5, shuffle=True, generator=generator)


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
