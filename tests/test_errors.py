"""What goes wrong says what it was, where, and what to do; and the model is as it was."""

from __future__ import annotations

import re

import pytest
import torch
from helpers import (
    assert_unchanged,
    clone,
    make_batches,
    one_thread,  # noqa: F401 - autouse
    snapshot,
)
from helpers_networks import CASES, Head
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import singe

CASE = CASES["residual"]


@pytest.fixture
def model():
    """A model with gradients, that must leave the test as it came."""
    model = CASE.model()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = snapshot(model)
    yield model
    assert_unchanged(model, before)


def score(model, batches, **options):
    return singe.score(model, batches, progress=False, **options)


def empty_loader() -> DataLoader:
    return DataLoader(TensorDataset(torch.empty(0, 3, 6, 6), torch.empty(0)), batch_size=2)


def used_generator():
    generator = (batch for batch in CASE.batches())
    next(generator)
    return generator


def with_value(index: int, value: float) -> list:
    batches = CASE.batches((2, 2, 2))
    batches[index][0][0, 0, 0, 0] = value
    return batches


class Stream(IterableDataset):
    def __init__(self, samples) -> None:
        self.samples = samples

    def __iter__(self):
        return iter(self.samples)


def used_stream() -> DataLoader:
    """Its samples come from a generator: the second pass over the loader has none left."""
    samples = [(x, y) for xs, ys in CASE.batches() for x, y in zip(xs, ys, strict=True)]
    return DataLoader(Stream(sample for sample in samples), batch_size=2)


def test_a_stream_that_starts_again_is_read_as_often_as_it_takes():
    samples = [(x, y) for xs, ys in CASE.batches() for x, y in zip(xs, ys, strict=True)]
    found = score(CASE.model(), DataLoader(Stream(samples), batch_size=2))
    assert found.meta["samples"] == len(samples)


class Rewinds(Stream):
    """An iterator of itself that starts again."""

    def __iter__(self):
        self.rest = iter(self.samples)
        return self

    def __next__(self):
        return next(self.rest)


class InWorkers(Stream):
    def __iter__(self):
        info = torch.utils.data.get_worker_info()
        return iter(self.samples[info.id :: info.num_workers])


@pytest.mark.parametrize(("stream", "workers"), [(Rewinds, 0), (InWorkers, 1)])
def test_streams_that_start_again_in_their_own_way(stream, workers):
    samples = [(x, y) for xs, ys in CASE.batches() for x, y in zip(xs, ys, strict=True)]
    found = score(CASE.model(), DataLoader(stream(samples), batch_size=2, num_workers=workers))
    assert found.meta["samples"] == len(samples)


def with_label(index: int, label: int) -> list:
    batches = CASE.batches((2, 2, 2))
    batches[index][1][0] = label
    return batches


@pytest.mark.parametrize("engine", ["fused", "naive"])
@pytest.mark.parametrize(
    ("batches", "error", "message"),
    [
        (list, singe.DataError, "empty.*at least one"),
        (empty_loader, singe.DataError, "empty.*at least one"),
        (lambda: (b for b in CASE.batches()), singe.DataError, "one-shot.*list or a DataLoader"),
        (used_generator, singe.DataError, "one-shot.*list or a DataLoader"),
        (lambda: iter(CASE.batches()), singe.DataError, "one-shot.*list or a DataLoader"),
        (used_stream, singe.DataError, r"reads a one-shot iterator \(Stream\)"),
        (
            lambda: [(x, y.tolist()) for x, y in CASE.batches()],
            singe.DataError,
            "labels of batch 0 are a list; make a tensor",
        ),
        (lambda: CASE.batches()[0], singe.DataError, r"one single batch.*\[\(x, y\)\]"),
        (lambda: CASE.batches()[0][0], singe.DataError, "one single batch"),
        (lambda: 3, singe.DataError, "re-iterable.*int"),
        (lambda: [(1, 2)], singe.DataError, "batch 0.*no input tensor"),
        (lambda: [CASE.batches()[0] * 2], singe.DataError, "batch 0.*4 items"),
        (lambda: [x for x, _ in CASE.batches()], singe.DataError, "batch 0 has none.*'kl'"),
        (
            lambda: [*CASE.batches(), (torch.empty(0, 3, 6, 6).double(), torch.empty(0).long())],
            singe.DataError,
            "batch 2 has no samples",
        ),
        (lambda: with_value(0, float("nan")), singe.NonFiniteError, "batch 0 has 1 NaN or inf"),
        (lambda: with_value(2, float("nan")), singe.NonFiniteError, "batch 2 has 1 NaN or inf"),
        (lambda: with_value(1, float("-inf")), singe.NonFiniteError, "batch 1 has 1 NaN or inf"),
        (lambda: with_label(1, 7), singe.DataError, "batch 1.*7"),
        (lambda: with_label(2, -3), singe.DataError, "batch 2.*-3"),
        (lambda: make_batches((2, 6, 6), (3,)), singe.ModelError, r"tracing.*model\(inputs\) runs"),
    ],
)
def test_data(model, batches, error, message, engine):
    with pytest.raises(error, match=message) as caught:
        score(model, batches(), engine=engine)
    assert isinstance(caught.value, singe.SingeError)


@pytest.mark.parametrize("engine", ["fused", "naive"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_names_its_batch(model, bad, engine):
    batches = CASE.batches((4, 3, 2))

    def objective(outputs, batch):
        return outputs.mean() * (bad if len(batch[0]) == 3 else 1.0)

    with pytest.raises(singe.NonFiniteError, match="loss of batch 1 is NaN or infinite"):
        score(model, batches, objective=objective, engine=engine)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_parameter_that_is_not_finite(bad):
    """Not a question of what can be pruned: the message must say that values are not finite."""
    model = CASE.model()
    with torch.no_grad():
        model[0].weight[0, 0, 0, 0] = bad
    before = snapshot(model)
    with pytest.raises(singe.SingeError, match=r"(?i)nan or infinit|not finite"):
        score(model, CASE.batches())
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": ["3.body.00"]}, r"`layers` names '3.body.00'.*did you mean.*'3\.body\.0'"),
        ({"layers": ["3.bdy.0"]}, r"did you mean.*'3\.body\.0'"),
        ({"ignore": ["3.bod"]}, r"`ignore` names '3.bod'.*did you mean.*'3\.body'"),
        ({"layers": [nn.Linear(2, 2)]}, "`layers` holds a Linear not in this model"),
        ({"layers": ["4.linear"]}, "'4.linear' cannot be pruned.*output"),
        ({"layers": ["2"]}, "'2' cannot be pruned.*no conv or linear"),
        ({"layers": ["3.body.0"], "ignore": ["3"]}, "'3.body.0' cannot be pruned.*`ignore`"),
        ({"ignore": ["0", "3"]}, "nothing to prune.*`ignore`"),
        ({"layers": []}, "nothing to prune"),
    ],
)
def test_layers(model, options, message):
    with pytest.raises(singe.ModelError, match=message):
        score(model, CASE.batches(), **options)


@pytest.mark.parametrize(
    "build",
    [
        lambda: nn.Sequential(nn.Linear(6, 4)),
        nn.Flatten,
        lambda: nn.Sequential(nn.LayerNorm(6), nn.Tanh()),
    ],
)
def test_nothing_to_prune(build):
    with pytest.raises(singe.ModelError, match="nothing to prune"):
        score(build(), make_batches((6,), (3,), dtype=torch.float32))


class PadsChannels(nn.Module):
    """An option A shortcut: zero channels on both sides of what the shortcut carries."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 6, 3, padding=1)

    def forward(self, x):
        y = self.a(x).relu()
        return (nn.functional.pad(y, (0, 0, 0, 0, 1, 1)) + self.b(y)).relu()


@pytest.mark.parametrize(
    ("layers", "width", "left_out"),
    [
        ([PadsChannels()], 6, "0.b"),
        ([nn.Conv2d(3, 8, 3), nn.PixelShuffle(2)], 2, "0"),
        ([nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6, track_running_stats=False)], 6, "0"),
        ([nn.Conv2d(3, 6, 3), nn.InstanceNorm2d(6, affine=True)], 6, "0"),
        ([nn.Conv2d(3, 6, 3), nn.ReLU(), nn.ConvTranspose2d(6, 5, 2)], 5, "0"),
        ([nn.Conv2d(3, 6, 3), nn.Softmax(1)], 6, "0"),
    ],
    ids=["pad", "pixel_shuffle", "no_statistics", "instance_norm", "transposed", "softmax"],
)
def test_what_has_no_exact_gate_is_left_out_with_a_reason(layers, width, left_out):
    """And does not keep the rest of the network from being scored."""
    torch.manual_seed(0)
    rest = [nn.ReLU(), nn.Conv2d(width, 5, 3), nn.ReLU(), Head(5)]
    model = nn.Sequential(*(clone(layer) for layer in layers), *rest).double()
    last = str(len(layers) + 1)
    scores = score(model, make_batches((3, 8, 8), (3, 2)))
    assert list(scores) == [last]
    assert scores.meta["rejected"][left_out]
    with pytest.raises(singe.ModelError, match=f"'{left_out}' cannot be pruned: "):
        score(model, make_batches((3, 8, 8), (3, 2)), layers=[left_out])


def test_a_model_that_cannot_be_copied(model):
    class Stubborn(nn.Sequential):
        def __deepcopy__(self, memo):
            raise RuntimeError("not me")

    with pytest.raises(singe.ModelError, match=r"not me.*deep-copyable"):
        score(Stubborn(*model), CASE.batches())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"criterion": "l1"}, "criterion='l1'.*'singe'.*'magnitude'"),
        ({"path": "unit"}, "path='unit'.*'layer'.*'neuron'.*'network'"),
        ({"norm": "both"}, "norm='both'.*'inside'.*'outside'"),
        ({"p": 3}, "p=3.*1, 2, 'sum'"),
        ({"p": True}, "p=True"),
        ({"p": "1"}, "p='1'"),
        ({"engine": "quick"}, "engine='quick'.*'fused'.*'naive'"),
        ({"quadrature": 0}, ">= 1, got 0"),
        ({"quadrature": "simpson"}, "simpson.*gauss_legendre"),
        ({"objective": "mse"}, "'mse'.*'cross_entropy'"),
    ],
)
def test_options(model, options, message):
    with pytest.raises(singe.OptionError, match=message):
        score(model, CASE.batches(), **options)


@pytest.mark.parametrize("options", [{"max_memory": 0}, {"max_memory": -1}])
def test_memory_that_cannot_be(model, options):
    with pytest.raises(singe.OptionError, match="max_memory"):
        score(model, CASE.batches(), **options)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, singe.OptionError, "exactly one target of macs, params, channels, latency, got none"),
        ({"macs": 0.5, "params": 0.5}, singe.OptionError, "got macs, params"),
        ({"macs": 0.0}, singe.OptionError, "macs must be positive"),
        ({"macs": -1}, singe.OptionError, "macs must be positive"),
        ({"macs": "0.5"}, singe.OptionError, "macs must be positive.*'0.5'"),
        ({"macs": 0.5, "ignore": "3.boddy"}, singe.ModelError, r"did you mean.*'3\.body"),
        ({"macs": 0.5, "ignore": [nn.ReLU()]}, singe.ModelError, "holds a ReLU not in this model"),
        ({"params": float("nan")}, singe.OptionError, "params must be positive"),
        ({"macs": 0.5, "ranking": "fair"}, singe.OptionError, "ranking='fair'.*'global'.*'local'"),
        ({"macs": 0.5, "max_pruning_ratio": 0.0}, singe.OptionError, "max_pruning_ratio"),
        ({"macs": 0.5, "max_pruning_ratio": 1.1}, singe.OptionError, "max_pruning_ratio"),
        ({"macs": 0.001}, singe.BudgetError, "cannot be met.*smallest reachable"),
        ({"params": 3}, singe.BudgetError, "cannot be met.*smallest reachable"),
        ({"channels": 0.01}, singe.BudgetError, "cannot be met.*smallest reachable"),
    ],
)
def test_plans(model, options, error, message):
    scores = score(model, CASE.batches())
    with pytest.raises(error, match=message):
        singe.plan(model, scores, CASE.batches()[0][0], **options)


@pytest.mark.parametrize("kind", ["macs", "params", "channels"])
def test_the_smallest_reachable_target_is_reachable(model, kind):
    scores, x = score(model, CASE.batches()), CASE.batches()[0][0]
    with pytest.raises(singe.BudgetError) as caught:
        singe.plan(model, scores, x, **{kind: 1e-6})
    share = float(re.search(r"smallest reachable is ([0-9.]+) of", str(caught.value)).group(1))
    assert 0 < share < 1
    assert singe.plan(model, scores, x, **{kind: share + 0.0006}).n_units > 0  # three decimals
    with pytest.raises(singe.BudgetError):
        singe.plan(model, scores, x, **{kind: share - 0.002})


@pytest.mark.parametrize(
    ("plan", "error", "message"),
    [
        ({"3.body.0": 3}, singe.ScoresError, r"'3\.body\.0' is 3; give a list"),
        ({"3.body.0": [6]}, singe.ScoresError, r"unit 6 of '3\.body\.0'.*0\.\.5"),
        ({"3.body.0": [-1]}, singe.ScoresError, r"unit -1 of '3\.body\.0'"),
        ({"3.body.0": range(6)}, singe.ScoresError, "all 6 units.*keep at least one"),
        ({"3.body": [0]}, singe.ModelError, "'3.body' cannot be pruned"),
        ({"3.body.9": [0]}, singe.ModelError, r"did you mean.*'3\.body\."),
        ({"4.linear": [0]}, singe.ModelError, "output"),
    ],
)
def test_plans_by_hand(model, plan, error, message):
    with pytest.raises(error, match=message):
        singe.prune(model, singe.Plan(plan), CASE.batches()[0][0])


def test_a_plan_for_another_model(model):
    x = CASE.batches()[0][0]
    plan = singe.plan(model, score(model, CASE.batches()), x, channels=0.8)
    other = clone(model)
    singe.prune(other, plan, x)
    with pytest.raises(singe.ScoresError, match=r"another model.*Score the model again"):
        singe.prune(other, plan, x)


# What compress restores, it writes: the version counters of the tensors move, nothing else.
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rounds": 0}, "rounds must be a whole number >= 1"),
        ({"finetune_steps": -1}, "finetune_steps must be a whole number >= 0"),
        ({"macs": None}, "exactly one target"),
        ({"params": 0.5}, "exactly one target"),
        ({"criterion": "l1"}, "criterion='l1'"),
        ({"ranking": "fair"}, "ranking='fair'"),
    ],
)
def test_compress(options, message):
    model = CASE.model()
    before = snapshot(model)
    options = {"macs": 0.5, "rounds": 1, "finetune_steps": 1} | options
    with pytest.raises(singe.OptionError, match=message):
        singe.compress(model, train=CASE.batches(), progress=False, **options)
    assert_unchanged(model, before, versions=False)


def test_every_error_is_a_singe_error():
    errors = [getattr(singe, name) for name in singe.__all__ if name.endswith("Error")]
    assert len(errors) == 10
    assert all(issubclass(error, singe.SingeError) for error in errors)
    assert issubclass(singe.OptionError, ValueError)
    assert issubclass(singe.NonFiniteError, ArithmeticError)


X = CASE.batches()[0][0][:2]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, s: score("resnet18", CASE.batches()), "model must be an nn.Module, got str"),
        (
            lambda m, s: score(m, CASE.batches(), max_memory="1GB"),
            "max_memory must be positive and finite: bytes, got '1GB', a str",
        ),
        (
            lambda m, s: singe.plan(m, list(s), X, macs=0.5),
            "scores must be what singe.score returned",
        ),
        (lambda m, s: singe.plan(m, s, X, macs=0.5, timing=8), r"timing must be a singe\.Timing"),
        (lambda m, s: singe.plan(m, s, "x", macs=0.5), "example_inputs must hold an input"),
        (lambda m, s: singe.plan(m, s, X, macs=50.0), "up to 1 is a share"),
        (lambda m, s: singe.prune(m, s, X), r"holds scores; make a plan.*singe\.plan"),
        (lambda m, s: singe.Plan([3]), "remove must be a mapping.*got list"),
        (
            lambda m, s: singe.plan(
                m, singe.Scores({n: v[:-1] for n, v in s.items()}, s.groups, s.meta), X, macs=0.5
            ),
            r"there are \d+ scores for the \d+ units of",
        ),
        (lambda m, s: singe.prune(m, [3], X), "plan must be a singe.Plan, or a dict"),
        (
            lambda m, s: singe.prune(m, {"3.body.9": [1]}, X),
            "`plan` names '3.body.9'.*did you mean",
        ),
        (lambda m, s: compress(m, optimizer="adam"), "optimizer must be a callable.*got str"),
        (lambda m, s: compress(m, optimizer=torch.optim.LBFGS), "returned LBFGS.*no closure"),
        (lambda m, s: compress(m, scheduler=lambda o, n: None), "scheduler returned NoneType"),
        (
            lambda m, s: compress(m, scheduler=lambda o, n: ReduceLROnPlateau(o)),
            "ReduceLROnPlateau.*without a metric",
        ),
        (lambda m, s: compress(m, evaluate=lambda model: None), "evaluate must return a number"),
        (
            lambda m, s: compress(m, criterium="singe"),
            r"compress\(\) got an unexpected.*'criterium'",
        ),
        (
            lambda m, s: score(m, CASE.batches(), objective=nn.MSELoss()),
            r"MSELoss' failed on batch 0.*batch\[1\]",
        ),
        (
            lambda m, s: score(m, CASE.batches(), objective=nn.CrossEntropyLoss()),
            r"CrossEntropyLoss' failed on batch 0.*batch\[1\]",
        ),
    ],
)
def test_something_else_altogether(call, message):
    model = CASE.model()
    before = snapshot(model)
    scores = score(model, CASE.batches(), criterion="random")
    with pytest.raises((singe.SingeError, TypeError), match=message):
        call(model, scores)
    assert_unchanged(model, before, versions=False)


def compress(model, **options):
    return singe.compress(
        model, train=CASE.batches(), macs=0.5, rounds=1, finetune_steps=1, progress=False, **options
    )


def test_a_plan_can_be_a_dict():
    by_plan, by_dict = CASE.model(), CASE.model()
    name = next(iter(score(by_plan, CASE.batches(), criterion="random")))
    singe.prune(by_plan, singe.Plan({name: [1]}), X)
    singe.prune(by_dict, {name: [1]}, X)
    shapes = [t.shape for t in by_plan.state_dict().values()]
    assert shapes == [t.shape for t in by_dict.state_dict().values()]


def test_names_that_scores_do_not_have():
    scores = score(CASE.model(), CASE.batches(), criterion="random")
    group = next(g for g, layers in scores.groups.items() if len(layers) > 1)
    other = next(layer for layer in scores.groups[group] if layer != group)
    with pytest.raises(KeyError, match=f"'{other}' is coupled with '{group}'"):
        scores[other]
    with pytest.raises(KeyError, match=f"no scores of group '{group}0'; did you mean '{group}'"):
        scores[group + "0"]
    assert scores.get(other) is None


def test_a_folder_that_is_not_there(tmp_path):
    scores = score(CASE.model(), CASE.batches(), criterion="random")
    with pytest.raises(FileNotFoundError, match=r"no folder .*nowhere.* to write s.safetensors to"):
        scores.save(tmp_path / "nowhere" / "s.safetensors")


class GoesOn(IterableDataset):
    """A stream that goes on where it stopped, however often it is asked to start."""

    def __init__(self):
        self.left = [(x[i], y[i]) for x, y in CASE.batches() for i in range(len(x))]

    def __iter__(self):
        while self.left:
            yield self.left.pop(0)


@pytest.mark.parametrize("engine", ["fused", "naive"])
def test_a_stream_that_goes_on_loses_no_batch(engine):
    data = GoesOn()
    whole = list(data.left)
    scores = singe.score(
        CASE.model(), DataLoader(data, batch_size=2), engine=engine, progress=False
    )
    expected = singe.score(
        CASE.model(), DataLoader(whole, batch_size=2), engine=engine, progress=False
    )
    assert scores.meta["samples"] == len(whole)
    assert scores == expected
    with pytest.raises(singe.DataError, match="was it read before, and does not start again"):
        singe.score(CASE.model(), DataLoader(data, batch_size=2), progress=False)
