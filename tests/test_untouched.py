"""Invariant 10: scoring leaves no trace on the model or the process, whether it succeeds or fails."""

from __future__ import annotations

import contextlib
import random

import numpy as np
import pytest
import torch
from helpers import (
    assert_close,
    assert_unchanged,
    clone,
    one_thread,  # noqa: F401 - autouse
    randomise,
    same_bits,
    snapshot,
)
from helpers_networks import CASES, channels_last
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import singe

CASE = CASES["residual"]
RUNS = [
    {"criterion": "singe", "path": "layer"},
    {"criterion": "singe", "path": "neuron", "p": 2},
    {"criterion": "signed", "path": "network"},
    {"criterion": "taylor"},
    {"criterion": "ablation"},
    {"criterion": "magnitude"},
    {"criterion": "random"},
    {"criterion": "singe", "objective": "kl", "norm": "outside"},
]


def used_model() -> nn.Module:
    """A model in the middle of its life: mixed modes, frozen parameters, gradients, hooks."""
    model = CASE.model().train()
    model[1].eval()
    model[0].weight.requires_grad_(False)
    for index, parameter in enumerate(model.parameters()):
        if parameter.requires_grad and index % 2:
            parameter.grad = torch.full_like(parameter, float(index))
    model[3].register_forward_hook(lambda module, args, out: None)
    model[3].body[0].register_forward_pre_hook(lambda module, args: None)
    model[4].register_full_backward_hook(lambda module, grads, outs: None)
    return model


def process_state() -> tuple:
    return (
        torch.get_rng_state().numpy().tobytes(),
        random.getstate(),
        str(np.random.get_state()),  # noqa: NPY002 - the global state is what must not move
        torch.is_grad_enabled(),
        torch.get_default_dtype(),
        torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(),
    )


@pytest.mark.parametrize("engine", ["fused", "naive"])
@pytest.mark.parametrize("options", RUNS, ids=lambda o: "-".join(map(str, o.values())))
def test_after_success(options, engine):
    model, batches = used_model(), CASE.batches()
    data = [(x.clone(), y.clone()) for x, y in batches]
    before, process = snapshot(model), process_state()
    singe.score(model, batches, engine=engine, progress=False, **options)
    assert_unchanged(model, before)
    assert process_state() == process
    for (x, y), (x0, y0) in zip(batches, data, strict=True):
        assert same_bits(x, x0)
        assert same_bits(y, y0)
        assert x.grad is None


@pytest.mark.parametrize("engine", ["fused", "naive"])
@pytest.mark.parametrize("options", RUNS, ids=lambda o: "-".join(map(str, o.values())))
def test_the_users_default_device_has_no_say(options, engine):
    """torch.set_default_device("cuda"), say: "meta" tensors fail wherever they meet others."""
    model, batches = used_model(), CASE.batches()
    expected = singe.score(model, batches, engine=engine, progress=False, **options)
    with torch.device("meta"):
        found = singe.score(model, batches, engine=engine, progress=False, **options)
        plan = singe.plan(model, found, batches[0][0], macs=0.7, ranking="global")
    assert all(same_bits(found[name], values) for name, values in expected.items())
    assert plan == singe.plan(model, expected, batches[0][0], macs=0.7, ranking="global")


@pytest.mark.parametrize("engine", ["fused", "naive"])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_after_an_exception_in_the_middle(engine, error):
    """The objective fails on the second batch, when the first has been through the whole path."""
    model, batches = used_model(), CASE.batches((3, 2, 2))
    before, process = snapshot(model), process_state()
    calls = []

    def objective(outputs, batch):
        calls.append(batch[0].shape[0])
        if len(batch[0]) == 2 and len(calls) > 3:
            raise error("stop here")
        return outputs.square().mean()

    with pytest.raises(error, match="stop here"):
        singe.score(model, batches, objective=objective, engine=engine, progress=False)
    assert 3 in calls
    assert_unchanged(model, before)
    assert process_state() == process


def test_after_an_exception_in_the_data():
    model, batches = used_model(), CASE.batches((3, 2, 2))
    before, process = snapshot(model), process_state()

    class Broken:
        def __iter__(self):
            yield batches[0]
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        singe.score(model, Broken(), progress=False)
    assert_unchanged(model, before)
    assert process_state() == process


def test_a_shuffling_loader_leaves_the_generator():
    (x, y), = CASE.batches((8,))  # fmt: skip
    loader = DataLoader(TensorDataset(x, y), batch_size=3, shuffle=True)
    model = used_model()
    torch.manual_seed(7)
    before = torch.get_rng_state()
    scores = singe.score(model, loader, progress=False)
    assert torch.equal(torch.get_rng_state(), before)
    straight = singe.score(model, [(x, y)], progress=False)
    assert_close(scores, straight, 1e-6)  # float32: shuffled data is the same data


class Wrapped:
    def __init__(self, loader: DataLoader) -> None:
        self.loader = loader

    def __iter__(self):
        return iter(self.loader)


@pytest.mark.parametrize("own", [True, False], ids=["own generator", "global generator"])
def test_loaders_draw_the_same_afterwards(own):
    (x, y), = CASE.batches((8,))  # fmt: skip
    generator = torch.Generator().manual_seed(3)
    options = {"batch_size": 3, "shuffle": True, "generator": generator if own else None}
    loader = DataLoader(TensorDataset(x, y), **options)
    model = used_model()
    torch.manual_seed(7)
    process, before = torch.get_rng_state(), generator.get_state()
    for batches in (loader,) if own else (loader, Wrapped(loader)):
        singe.score(model, batches, progress=False)
        singe.compress(
            model, train=batches, evaluate=batches, channels=0.8, rounds=1, finetune_steps=2,
            progress=False,
        )  # fmt: skip
    assert torch.equal(torch.get_rng_state(), process)
    assert torch.equal(generator.get_state(), before)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_pruning_in_the_callers_grad_mode(context):
    model, batches = CASE.model(), CASE.batches()
    x, options = batches[0][0], {"rounds": 1, "finetune_steps": 2, "progress": False}
    scores = singe.score(model, batches, progress=False)
    plan = singe.plan(model, scores, x, channels=0.7)
    pruned, compressed = clone(model), clone(model)
    inside = clone(model)
    singe.compress(compressed, train=batches, channels=0.7, **options)
    with context():
        assert dict(singe.plan(model, scores, x, channels=0.7)) == dict(plan)
        singe.prune(pruned, plan, x)
        singe.compress(inside, train=batches, channels=0.7, **options)
    state, other = inside.state_dict(), compressed.state_dict()
    assert all(same_bits(state[name], other[name]) for name in other)


def test_a_model_made_in_inference_mode_is_refused():
    with torch.inference_mode():
        model = CASE.model()
    for change in (
        lambda: singe.prune(model, {"0": [1]}, CASE.batches()[0][0]),
        lambda: singe.compress(model, train=CASE.batches(), channels=0.8),
    ):
        with pytest.raises(singe.ModelError, match="inference_mode"):
            change()


def test_extra_state_is_no_tensor_but_no_trouble(tmp_path):
    class WithState(nn.ReLU):
        def get_extra_state(self):
            return {"note": 1}

        def set_extra_state(self, state):
            assert state == {"note": 1}

    model = nn.Sequential(nn.Linear(4, 6), WithState(), nn.Linear(6, 3))
    batches = [(torch.randn(8, 4), torch.randint(0, 3, (8,)))]
    scores = singe.score(model, batches, progress=False)
    singe.prune(clone(model), singe.plan(model, scores, batches[0][0], channels=0.5), batches[0][0])
    singe.compress(
        model, train=batches, channels=0.5, rounds=1, finetune_steps=1, progress=False,
        checkpoint=tmp_path / "run",
    )  # fmt: skip


def test_memory_format():
    torch.manual_seed(0)
    model = randomise(channels_last().double())
    weights = [m.weight for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert all(w.is_contiguous(memory_format=torch.channels_last) for w in weights)
    before = snapshot(model)
    singe.score(model, CASE.batches(), criterion="ablation", progress=False)
    assert_unchanged(model, before)


def test_the_users_hooks_are_part_of_the_model():
    """They still fire afterwards, and what they do to the outputs is scored."""
    model, batches = CASE.model(), CASE.batches()
    plain = singe.score(model, batches, progress=False)
    model[4].register_forward_hook(lambda module, args, out: 2 * out)
    doubled = model(batches[0][0])
    hooked = singe.score(model, batches, progress=False)
    assert torch.equal(model(batches[0][0]), doubled)
    twice = CASE.model()
    with torch.no_grad():
        for parameter in twice[4].parameters():
            parameter.mul_(2)
    assert_close(hooked, singe.score(twice, batches, progress=False), 1e-6)
    assert not torch.allclose(hooked["0"], plain["0"])


def test_the_optimizer_keeps_working():
    """The same step with and without scoring in between, momentum included."""

    def two_steps(between) -> dict[str, torch.Tensor]:
        model, batches = CASE.model(), CASE.batches()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        model.train()
        for x, y in batches:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            between(model, batches)  # between backward and step: .grad counts
            optimizer.step()
        return model.state_dict()

    plain = two_steps(lambda model, batches: None)
    scored = two_steps(lambda model, batches: singe.score(model, batches, progress=False))
    assert all(same_bits(scored[name], plain[name]) for name in plain)


@pytest.mark.parametrize("engine", ["fused", "naive"])
@pytest.mark.parametrize("context", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_the_callers_grad_mode_does_not_matter(context, engine):
    model, batches = CASE.model(), CASE.batches()
    expected = singe.score(model, batches, engine="fused", progress=False)
    with context():
        found = singe.score(model, batches, engine=engine, progress=False)
    assert_close(found, expected, 1e-6)


def test_frozen_models_are_scored():
    """``requires_grad`` is the user's business: a frozen model has the same scores."""
    model, batches = CASE.model(), CASE.batches()
    expected = singe.score(model, batches, progress=False)
    model.requires_grad_(False)
    assert_close(singe.score(model, batches, progress=False), expected, 0.0)
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("engine", ["fused", "naive"])
def test_tied_parameters_stay_tied(engine):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 4))
    model[2].weight = model[0].weight
    model.double()
    before = snapshot(model)
    with contextlib.suppress(singe.SingeError):  # whether it can be pruned is another question
        singe.score(model, CASES["mlp"].batches(), engine=engine, progress=False)
    assert model[2].weight is model[0].weight
    assert_unchanged(model, before)


class InPlace(nn.Module):
    """Normalises what it is given where it lies."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x.sub_(0.5).div_(0.25)).relu())


@pytest.mark.parametrize("engine", ["fused", "naive"])
def test_a_model_that_writes_into_its_inputs(engine):
    model, x = InPlace(), torch.rand(9, 6)
    data, given = [(x, torch.arange(9) % 4)], x.clone()
    scores = singe.score(model, data, engine=engine, progress=False)
    assert torch.equal(x, given)
    singe.compress(
        model, train=data, channels=0.7, rounds=1, finetune_steps=2, evaluate=data, progress=False
    )
    assert torch.equal(x, given)
    plain = nn.Sequential(InPlace().a, nn.ReLU(), InPlace().b)
    expected = singe.score(plain, [((given - 0.5) / 0.25, data[0][1])], progress=False)
    torch.testing.assert_close(scores["a"], expected["0"])


@pytest.mark.parametrize("trained", [False, True])
def test_a_model_that_remembers_what_it_computed(trained):
    """Features and attention maps in attributes: torch.deepcopy refuses them, a copy of ours does not."""

    class Remembers(InPlace):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.features = [self.a(x).relu()]
            return self.b(self.features[0])

    model, x, y = Remembers(), torch.rand(9, 6), torch.arange(9) % 4
    if trained:
        nn.functional.cross_entropy(model(x), y).backward()
    scores = singe.score(model, [(x, y)], progress=False)
    assert hasattr(model, "features") == trained
    singe.prune(model, singe.plan(model, scores, x, params=0.7), x)
    assert model.a.out_features < 8
    report = singe.compress(
        model, train=[(x, y)], params=0.8, rounds=2, finetune_steps=1, distill=0.5, progress=False
    )
    assert report.params_after <= 0.8 * report.params_before


def test_heads_are_planned_and_pruned_without_drawing():
    torch.manual_seed(0)

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.MultiheadAttention(8, 4, batch_first=True)
            self.out = nn.Linear(8, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(self.mix(x, x, x)[0].mean(1))

    model, x = Attention(), torch.randn(6, 7, 8)
    scores = singe.score(model, [(x, torch.arange(6) % 4)], progress=False)
    process = process_state()
    plan = singe.plan(model, scores, x, params=0.8)
    assert process_state() == process
    singe.prune(model, plan, x)
    assert process_state() == process


def test_pruned_weights_lie_as_they_lay():
    model = randomise(channels_last().double()).to(memory_format=torch.channels_last)
    data = CASES["residual"].batches()
    scores = singe.score(model, data, criterion="magnitude")

    def lie() -> list[bool]:
        kernels = [p for p in model.parameters() if p.dim() == 4 and p[0, 0].numel() > 1]
        return [p.stride()[1] == 1 for p in kernels]

    before = lie()
    singe.prune(model, singe.plan(model, scores, data[0][0], params=0.6), data[0][0])
    assert before == lie()
    assert any(before)


def test_planning_changes_nothing():
    model, batches = used_model(), CASE.batches()
    scores = singe.score(model, batches, progress=False)
    before, process = snapshot(model), process_state()
    singe.plan(model, scores, batches[0][0], macs=0.7)
    assert_unchanged(model, before)
    assert process_state() == process


@pytest.mark.parametrize(
    "plan",
    [{"3.body.0": [99]}, {"3.body.0": [0, 1, 2, 3, 4, 5]}, {"nowhere": [0]}, {"4.linear": [0]}],
)
def test_a_plan_that_does_not_fit_changes_nothing(plan):
    model, batches = used_model(), CASE.batches()
    before = snapshot(model)
    with pytest.raises(singe.SingeError):
        singe.prune(model, singe.Plan(plan), batches[0][0])
    assert_unchanged(model, before)


class Held(nn.Module):
    """A function made with the model holds its layers, and copies of the model hold that function."""

    def __init__(self, whole):
        super().__init__()
        self.a, self.norm, self.head = nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Linear(5, 4)
        norm = self.norm
        self.normed = (lambda x: self.norm(x)) if whole else (lambda x: norm(x))

    def forward(self, x):
        return self.head(self.normed(self.a(x)).relu().mean((2, 3)))


@pytest.mark.parametrize("whole", [True, False])
def test_a_model_whose_copies_run_its_own_layers_is_refused(whole):
    model = Held(whole).train()
    before = snapshot(model)
    with pytest.raises(singe.ModelError, match="a copy of this Held runs the layer 'norm'"):
        singe.score(model, [(torch.randn(4, 3, 8, 8), torch.zeros(4).long())], progress=False)
    assert_unchanged(model, before)


def test_a_function_that_holds_a_layer_without_state_does_no_harm():
    class Activated(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.relu, self.head = nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Linear(5, 4)
            self.activation = lambda x: self.relu(x)

        def forward(self, x):
            return self.head(self.activation(self.a(x)).mean((2, 3)))

    batches = [(torch.randn(4, 3, 8, 8), torch.zeros(4).long())]
    assert list(singe.score(Activated().train(), batches, progress=False)) == ["a"]
