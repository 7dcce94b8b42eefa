"""Fine-tuning: its options, mixed precision, state that follows its parameters, recalibration."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    assert_unchanged,
    batch_of,
    clone,
    one_thread,  # noqa: F401 - autouse
    snapshot,
)
from helpers_loop import BATCHES, OPTIONS, network, same_weights, tuner_of
from torch import nn

import singe
from singe.objectives import CrossEntropy, as_objective
from singe.removal import kept_elements, remove_units
from singe.seeding import Stream
from singe.units import find_groups

# ---------------------------------------------------------------------- state that follows


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_average_of_half_types_follows_as_that_of_float32(dtype):
    """A thousandth of the way from 1 to 2 is less than half of what bfloat16 can tell apart."""
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).to(dtype)
    tuner = tuner_of(model, ema=0.999)
    tuner.total = 10**6
    for step in range(201):
        for tensor in tuner._floating().values():
            nn.init.constant_(tensor, 1.0 + (step > 0))
        tuner._follow_average(0.999)
        if step == 100:
            tuner.restart_statistics()
    expected = 2.0 - 0.999**200
    with tuner.averaged():
        told = [float(t.detach().flatten()[0]) for t in tuner._floating().values()]
    eps = torch.finfo(dtype).eps
    assert told == pytest.approx([expected] * 4 + [2.0] * 2, rel=max(eps, 1e-5))
    assert {t.dtype for t in tuner._floating().values()} == {dtype}
    assert float(model[0].bias.detach()[0]) == 2.0


def test_buffers_that_are_infinite_stay_so_in_the_average():
    """As causal masks are: no number lies between -inf and -inf."""
    model, mask = network(), torch.full((3, 3), -torch.inf).triu(1)
    model.register_buffer("mask", mask.clone())
    report = singe.compress(model, macs=0.7, ema=0.9, evaluate=BATCHES, **OPTIONS)
    assert torch.equal(model.mask, mask)
    assert report.metric_after is not None


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


@pytest.mark.parametrize("ambient", [False, True])
def test_autocast_sees_the_weights_of_every_step(ambient):
    """torch keeps cast weights until the outermost autocast ends, and the caller's may be that."""
    model, seen = network(), []
    model[0].register_forward_hook(lambda module, args, out: seen.append(out.detach().clone()))
    options = {
        **OPTIONS, "rounds": 1, "finetune_steps": 6, "lr": 0.5, "train": BATCHES[:1], "channels": 1.0,
        "criterion": "random",
    }  # fmt: skip
    with torch.autocast("cpu", torch.bfloat16, enabled=ambient):
        singe.compress(model, autocast=torch.bfloat16, **options)
    steps = [out for out in seen if out.dtype == torch.bfloat16]
    assert len(steps) == 6
    assert all(not torch.equal(a, b) for a, b in pairwise(steps))


def test_parameters_beside_the_model_gather_no_gradients():
    """An objective may have parameters of its own, and the user's optimizer may train them."""
    seen, own = [], torch.nn.Parameter(torch.zeros(()))
    own.register_hook(lambda gradient: seen.append(own.grad))
    model = network()
    singe.compress(
        model, macs=1.0, **{**OPTIONS, "rounds": 1},
        optimizer=lambda parameters: torch.optim.SGD([*parameters, own], lr=0.01),
        finetune_objective=lambda outputs, batch: outputs.float().square().mean() - own,
    )  # fmt: skip
    assert seen == [None] * 3
    assert float(own) > 0


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


@pytest.mark.parametrize(("distill", "temperature"), [(1.0, 1.0), (0.25, 3.0)])
def test_distillation_of_tokens_is_over_their_classes(distill, temperature):
    """At any temperature in the size of the task's gradients: times its square."""

    class Tokens(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, width), nn.Linear(width, 6)

        def forward(self, x):
            return self.b(self.a(x).relu())

    torch.manual_seed(0)
    student, teacher = Tokens(5), Tokens(7)
    x, y = torch.randn(3, 2, 4), torch.zeros(3, 2, dtype=torch.long)
    tuner = tuner_of(student, distill=distill, temperature=temperature)
    tuner.teacher = teacher
    with torch.no_grad():
        wanted = (teacher(x) / temperature).log_softmax(2)
        found = (student(x) / temperature).log_softmax(2)
        soft = temperature**2 * F.kl_div(found, wanted, reduction="sum", log_target=True) / 6
        task = F.cross_entropy(student(x).flatten(0, 1), y.flatten())
        loss = float(tuner._loss(batch_of((x, y))))
    assert loss == pytest.approx(float((1 - distill) * task + distill * soft))


def test_averaged_statistics_start_anew_with_those_they_are_averages_of():
    """Those of the network before a removal would stay in the average for many steps."""
    model = network()
    tuner = tuner_of(model, ema=0.9)
    tuner.start(2)
    tuner.run()
    assert tuner.average is not None
    weights = {n: tuner.average[n].clone() for n, _ in model.named_parameters()}
    assert not torch.equal(tuner.average["1.running_mean"], model[1].running_mean)
    tuner.restart_statistics()
    for name in ("1.running_mean", "1.running_var"):
        assert torch.equal(tuner.average[name], model.get_buffer(name))
    assert all(torch.equal(tuner.average[n], w) for n, w in weights.items())
    tuner.start(2)
    tuner.run()
    assert not torch.equal(tuner.average["1.running_mean"], model[1].running_mean), "and part again"


def test_what_an_optimizer_gathered_goes_where_its_parameters_are():
    """After a checkpoint, which is read on the CPU; the meta device stands for another one."""
    for made, factory, with_step in (
        (torch.optim.Adafactor, torch.optim.Adafactor, False),
        (torch.optim.AdamW, partial(torch.optim.AdamW, capturable=True), True),
        (torch.optim.AdamW, torch.optim.AdamW, False),
    ):
        tuner = tuner_of(network(), made)
        tuner.start(3)
        tuner._one_step()
        gathered = tuner._by_name()
        moved = tuner_of(network().to("meta"), factory)
        moved.load({**tuner.state(), "gathered": gathered})
        entries = next(iter(moved._optimizer.state.values()))
        devices = {k: t.device.type for k, t in entries.items() if isinstance(t, torch.Tensor)}
        assert devices.pop("step") == ("meta" if with_step else "cpu")
        assert set(devices.values()) == {"meta"}


def test_an_optimizer_of_other_parameters_is_refused():
    """Made before the pruning it holds layers that are no more, and would train the others alone."""
    model, foreign = nn.Linear(3, 2), nn.Parameter(torch.zeros(2))
    tuner = tuner_of(model, lambda _: made)
    made = torch.optim.SGD(model.parameters(), 0.1)
    tuner.start(1)
    model.weight = nn.Parameter(model.weight[:, :2].clone())  # pruned
    with pytest.raises(singe.OptionError, match=r"holds 1 parameters that are not in the network"):
        tuner.start(1)
    made = torch.optim.SGD(nn.Linear(3, 2).parameters(), 0.1)
    with pytest.raises(singe.OptionError, match=r"holds 2 parameters that are not in the network"):
        tuner.start(1)
    for held in ([model.bias], [*model.parameters(), foreign], [model.bias, foreign]):
        made = torch.optim.SGD(held, 0.1)  # a part, and a loss's own, is fine
        tuner.start(1)


def test_a_scheduler_of_another_optimizer_is_refused():
    other = torch.optim.lr_scheduler.ConstantLR(torch.optim.SGD(network().parameters(), 0.1))
    with pytest.raises(singe.OptionError, match="scheduler is of another optimizer"):
        singe.compress(network(), macs=0.7, scheduler=lambda optimizer, steps: other, **OPTIONS)


def test_a_rest_of_one_sample_says_what_to_do():
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 6), nn.BatchNorm1d(6), nn.Linear(6, 4))
    tuner = tuner_of(model)
    tuner.stream = Stream([(x[:1], y[:1]) for x, y in BATCHES], 0)
    tuner.start(1)
    with pytest.raises(singe.DataError, match="drop_last=True"):
        tuner.run()


def test_messages_name_the_arguments_of_fine_tuning():
    with pytest.raises(singe.DataError, match=r"use distill=1\.0, which needs no labels"):
        singe.compress(
            network(), macs=0.7, train=[x for x, _ in BATCHES], objective="kl", finetune_steps=1,
            rounds=1, progress=False,
        )  # fmt: skip
    squared = [(x, y.float()[:, None].expand(-1, 4)) for x, y in BATCHES]
    with pytest.raises(singe.DataError, match="give finetune_objective=lambda outputs, batch"):
        singe.compress(
            network(), macs=0.7, train=squared, finetune_steps=1, rounds=1, progress=False,
            objective=lambda outputs, batch: (outputs - batch[1]).square().mean(1),
        )  # fmt: skip
