"""Objectives: what they compute, where they find logits and labels, and what they refuse."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    batch_of,
    one_thread,  # noqa: F401 - autouse
    run_engine,
)
from helpers_networks import CASES
from torch import nn

import singe
from singe.objectives import CrossEntropy, as_objective, class_dim, logits_of

RNG = torch.Generator().manual_seed(0)


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=RNG, dtype=torch.float64)


def total(objective, outputs, raw, reference=None) -> float:
    goal, batch = as_objective(objective), batch_of(raw)
    goal.check(outputs, batch)
    return float(goal.total(outputs, batch, reference))


def test_cross_entropy_is_the_sum_over_samples():
    logits, y = randn(5, 4), torch.tensor([0, 1, 2, 3, 0])
    expected = F.cross_entropy(logits, y, reduction="sum").item()
    assert total("cross_entropy", logits, (randn(5, 2), y)) == pytest.approx(expected)


def test_cross_entropy_of_class_probabilities():
    logits, y = randn(5, 4), randn(5, 4).softmax(1)
    expected = F.cross_entropy(logits, y, reduction="sum").item()
    assert total("cross_entropy", logits, (randn(5, 2), y)) == pytest.approx(expected)


def test_smoothing_reaches_both_kinds_of_labels():
    logits = randn(5, 4)
    for y in (torch.tensor([0, 1, 2, 3, 0]), randn(5, 4).softmax(1)):
        expected = F.cross_entropy(logits, y, reduction="sum", label_smoothing=0.3).item()
        assert total(CrossEntropy(0.3), logits, (randn(5, 2), y)) == pytest.approx(expected)


def test_probabilities_may_be_rounded_to_bfloat16():
    logits, y = randn(64, 4).bfloat16(), randn(64, 4).softmax(1).bfloat16()
    assert (y.double().sum(1) != 1).any()
    assert total("cross_entropy", logits, (randn(64, 2), y)) > 0


@pytest.mark.parametrize(
    "y",
    [
        torch.tensor([[0.5, -0.5, 1.0, 0.0]]),
        torch.tensor([[1.0, 1, 0, 0]]),
        torch.tensor([[0.5, 0.5, 0.02, 0]]),
        torch.tensor([[0.5, 0.5, torch.nan, 0]]),
    ],
)
def test_floats_that_are_no_probabilities(y):
    with pytest.raises(singe.DataError, match=r"do not sum to 1; for regression.*give objective="):
        total("cross_entropy", randn(1, 4), (randn(1, 2), y.double()))


def test_cross_entropy_of_pixels_is_their_mean():
    logits, y = randn(2, 4, 3, 3), torch.randint(4, (2, 3, 3), generator=RNG)
    expected = 2 * F.cross_entropy(logits, y).item()
    assert total("cross_entropy", logits, (randn(2, 1), y)) == pytest.approx(expected)


def test_cross_entropy_of_tokens_leaves_out_the_ignored():
    """[B, T, C] logits; every sample is the mean over its own valid tokens."""
    logits, y = randn(2, 3, 4), torch.tensor([[0, 1, -100], [2, -100, -100]])
    samples = [F.cross_entropy(logits[0, :2], y[0, :2]), F.cross_entropy(logits[1, :1], y[1, :1])]
    expected = float(sum(samples))
    assert total("cross_entropy", logits, (randn(2, 3), y)) == pytest.approx(expected)


def test_a_sample_whose_labels_are_all_ignored_adds_nothing():
    logits, y = randn(2, 3, 4), torch.tensor([[0, 1, 2], [-100, -100, -100]])
    expected = F.cross_entropy(logits[0], y[0]).item()
    assert total("cross_entropy", logits, (randn(2, 3), y)) == pytest.approx(expected)


def test_kl_is_the_divergence_from_the_original():
    logits, original = randn(5, 4), randn(5, 4)
    expected = F.kl_div(
        logits.log_softmax(1), original.log_softmax(1), reduction="sum", log_target=True
    ).item()
    assert total("kl", logits, randn(5, 2), original) == pytest.approx(expected)
    assert total("kl", original, randn(5, 2), original) == pytest.approx(0.0, abs=1e-15)


def test_the_dimension_of_the_classes():
    logits = randn(2, 3, 4)
    pixels, tokens = torch.zeros(2, 4, dtype=torch.long), torch.zeros(2, 3, dtype=torch.long)
    assert class_dim(logits) == class_dim(logits, pixels) == 1
    assert class_dim(logits, tokens) == class_dim(SimpleNamespace(logits=logits)) == 2
    assert class_dim(SimpleNamespace(logits=logits), pixels) == 1
    for images in (randn(2, 4), randn(2, 4, 5, 5)):  # classifiers and segmentation have names, too
        assert class_dim({"logits": images}) == 1


def test_as_many_tokens_as_classes():
    """A tie: torch's own convention for a tensor, that of language models under the name of logits."""
    logits, labels = randn(2, 3, 3), torch.tensor([[0, 1, 2], [2, 1, 1]])
    for outputs in (SimpleNamespace(logits=logits), {"logits": logits}):
        expected = 2 * F.cross_entropy(logits.flatten(0, 1), labels.flatten()).item()
        assert total("cross_entropy", outputs, (randn(2, 3), labels)) == pytest.approx(expected)
    expected = 2 * F.cross_entropy(logits, labels).item()
    assert total("cross_entropy", logits, (randn(2, 3), labels)) == pytest.approx(expected)


def test_tokens_that_are_their_own_labels():
    """Transformers' causal models shift them inside; the loss that the warning offers does the same."""
    ids, logits = torch.randint(5, (2, 4), generator=RNG), randn(2, 4, 5)
    raw = {"input_ids": ids, "labels": ids.clone()}
    expected = 2 * F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item()
    for outputs in (logits, SimpleNamespace(logits=logits), {"logits": logits}):
        with pytest.warns(UserWarning, match="labels are the input_ids") as caught:
            total("cross_entropy", outputs, raw)
        offered = str(caught[0].message).partition("give objective=")[2]
        next_token = eval(offered, {"F": F})
        assert total(next_token, outputs, raw) == pytest.approx(expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        total("cross_entropy", logits, {"input_ids": ids, "labels": torch.full_like(ids, -100)})


def test_kl_of_tokens_is_over_their_classes():
    logits, original = randn(2, 3, 4), randn(2, 3, 4)
    labels = torch.zeros(2, 3, dtype=torch.long)
    expected = F.kl_div(
        logits.log_softmax(2), original.log_softmax(2), reduction="sum", log_target=True
    )
    found = total("kl", logits, (randn(2, 3), labels), original)
    assert found == pytest.approx(expected.item() / 3)


def test_labels_of_any_integer_type():
    logits, y = randn(5, 4), torch.randint(4, (5,), generator=RNG)
    for dtype in (torch.int32, torch.uint8):
        found = total("cross_entropy", logits, (randn(5, 2), y.to(dtype)))
        assert found == total("cross_entropy", logits, (randn(5, 2), y))


def test_kl_needs_no_labels_and_is_blind_at_the_full_network():
    """Its gradient is zero at mu = 1, so Taylor sees nothing where the path integral does."""
    case = CASES["residual"]
    model = case.model()
    inputs = [x for x, _ in case.batches()]
    integral = run_engine(model, inputs, objective="kl").scores
    taylor = run_engine(model, inputs, objective="kl", criterion="taylor").scores
    for name, scores in integral.items():
        assert scores.norm() > 1e-3
        assert taylor[name].norm() < 1e-12


def test_labels_do_not_reach_kl():
    case = CASES["mlp"]
    model, batches = case.model(), case.batches()
    with_labels = run_engine(model, batches, objective="kl").scores
    without = run_engine(model, [x for x, _ in batches], objective="kl").scores
    assert all(torch.equal(with_labels[name], without[name]) for name in without)


def test_where_logits_are_found():
    logits = randn(2, 3)
    for outputs in (
        logits,
        SimpleNamespace(logits=logits),
        {"logits": logits},
        {"out": logits},
        (logits, randn(1)),
        [logits],
    ):
        assert logits_of(outputs) is logits
    with pytest.raises(singe.DataError, match="callable"):
        logits_of({"hidden": logits})


def test_a_users_objective_gets_outputs_and_the_batch_as_it_came():
    case = CASES["dict"]
    model, batches = case.model(), case.batches()
    seen = []

    def objective(outputs, batch):
        seen.append(batch)
        return F.cross_entropy(outputs["logits"], batch["labels"], reduction="none")

    mine = run_engine(model, batches, objective=objective).scores
    built_in = run_engine(model, batches).scores
    assert seen[0].keys() == batches[0].keys()
    assert all(torch.allclose(mine[n], built_in[n], rtol=1e-12) for n in built_in)


@pytest.mark.parametrize("criterion", ["signed", "ablation"])
def test_a_loss_that_is_infinite_at_the_end_of_the_path_names_its_batch(criterion):
    """The network's own is finite: only without its channels the outputs are zero."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.ReLU(), nn.Linear(4, 2, bias=False))
    data = [torch.rand(5, 3) + 0.1] * 2
    with pytest.raises(singe.NonFiniteError, match="batch 0"):
        singe.score(
            model, data, criterion=criterion, layers=["0"], progress=False,
            objective=lambda outputs, batch: -outputs.square().sum(1).log(),
        )  # fmt: skip


@pytest.mark.parametrize(
    ("objective", "outputs", "raw", "message"),
    [
        ("cross_entropy", randn(3, 4), randn(3, 2), "needs labels.*objective='kl'"),
        ("cross_entropy", randn(3, 4), (randn(3, 2), torch.tensor([0, 1, 9])), r"batch 0.*9"),
        ("cross_entropy", randn(3, 4), (randn(3, 2), torch.tensor([0, 1])), "shape"),
        ("cross_entropy", randn(3, 4), (randn(3, 2), randn(3)), "class probabilities"),
        (lambda o, b: o, randn(3, 4), randn(3, 2), r"shape \(3, 4\).*scalar mean"),
        (lambda o, b: 1.0, randn(3, 4), randn(3, 2), "float; expected a tensor"),
    ],
)
def test_what_does_not_fit(objective, outputs, raw, message):
    with pytest.raises(singe.DataError, match=message):
        total(objective, outputs, raw)


def test_unknown_objectives():
    with pytest.raises(singe.OptionError, match=r"cross_entropy.*kl.*callable"):
        as_objective("mse")
    with pytest.raises(singe.OptionError, match="None"):
        as_objective(None)


def test_a_model_has_no_loss_of_its_own():
    """Labels in a dict are the objective's; the convention elsewhere is that the model takes them."""

    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.head = nn.Linear(6, 5), nn.Linear(5, 4)

        def forward(self, x, labels=None):
            return {"logits": self.head(self.a(x).relu()), "loss": None}

    batches = [{"x": torch.randn(3, 6), "labels": torch.tensor([0, 1, 2])}]
    for objective in (
        lambda outputs, batch: outputs["losses"],
        lambda outputs, batch: outputs["loss"],
    ):
        with pytest.raises(singe.DataError, match=r"is not given batch\['labels'\].*cross_entropy"):
            singe.score(Named().eval(), batches, objective=objective, progress=False)
