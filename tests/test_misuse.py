"""Mistakes that only show while something runs: in a later batch, in a file, in what is evaluated."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import (
    assert_unchanged,
    make_batches,
    one_thread,  # noqa: F401 - autouse
    snapshot,
)
from helpers_networks import CASES
from torch import nn
from torch.nn.utils import prune as torch_prune

import singe

CASE = CASES["residual"]
X = CASE.batches((2,))[0][0]


def score(model, batches=None, **options):
    return singe.score(model, batches or CASE.batches(), progress=False, **options)


def compress(model, **options):
    shared = {
        "train": CASE.batches(),
        "macs": 0.8,
        "rounds": 1,
        "finetune_steps": 1,
        "progress": False,
    }
    return singe.compress(model, **shared | options)


def fails(call, error, message):
    """The call fails with this message and leaves the model as it was."""
    model = CASE.model()
    before = snapshot(model)
    with pytest.raises(error, match=message):
        call(model)
    assert_unchanged(model, before, versions=False)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (make_batches((2, 6, 6), (2,))[0], r"batch 1, inputs \[2, 2, 6, 6\] float64"),
        (make_batches((3, 6, 6), (2,), dtype=torch.float32)[0], r"float32 .*parameters: float64"),
    ],
    ids=["channels", "dtype"],
)
def test_a_batch_that_the_model_does_not_take(batch, message):
    fails(lambda m: score(m, [*CASE.batches(), batch][1:]), singe.DataError, message)


def test_half_precision_and_full_inputs():
    model = CASE.model(dtype=torch.bfloat16)
    with pytest.raises(singe.DataError, match=r"batch 0, .*float32 .*parameters: bfloat16"):
        score(model, CASE.batches(dtype=torch.float32))


def test_evaluation_labels_outside_the_classes():
    wrong = [(x, y + 50) for x, y in CASE.batches()]
    fails(lambda m: compress(m, evaluate=wrong), singe.DataError, r"evaluation batch 0: labels \[5")


@pytest.mark.parametrize("name", ["rounds", "finetune_steps", "final_steps", "checkpoint_every"])
@pytest.mark.parametrize("value", [1.5, -1, "2", True, np.float64(1), torch.tensor(1.5)], ids=str)
def test_counts_are_whole_numbers(name, value):
    fails(
        lambda m: compress(m, **{name: value}), singe.OptionError, f"{name} must be a whole number"
    )


@pytest.mark.parametrize("lr", [0.0, -1.0, float("nan"), float("inf"), "0.1"])
def test_a_learning_rate_that_cannot_be(lr):
    fails(lambda m: compress(m, lr=lr), singe.OptionError, "lr must be positive")


def test_a_seed_that_is_none():
    fails(lambda m: score(m, seed="a"), singe.OptionError, "seed must be a whole number")


def test_a_floor_on_another_scale():
    fails(
        lambda m: compress(m, evaluate=CASE.batches(), accuracy_floor=90),
        singe.OptionError,
        "accuracies from batches 0 to 1",
    )


def test_an_objective_without_a_gradient():
    def objective(outputs, batch):
        return F.cross_entropy(outputs.detach(), batch[1])

    fails(lambda m: score(m, objective=objective), singe.ModelError, "the loss has no gradient")


def test_arrays_in_place_of_tensors():
    batches = [(x.numpy(), y.numpy()) for x, y in CASE.batches()]
    fails(lambda m: score(m, batches), singe.DataError, "torch.as_tensor")


def test_labels_that_count_nothing():
    batches = [(x, torch.full_like(y, -100)) for x, y in CASE.batches()]
    with pytest.warns(UserWarning, match="labels that are all -100"):
        score(CASE.model(), batches)


def test_no_layer_of_a_name_like_that():
    fails(lambda m: score(m, layers=["zz"]), singe.ModelError, "it has '0', '1'")


def test_the_whole_model_is_a_container_too():
    model = CASE.model()
    scores = score(model)
    assert list(score(model, layers=[model])) == list(scores)
    with pytest.raises(singe.ModelError):
        score(model, ignore=[model])
    with pytest.raises(singe.BudgetError, match="ignore"):
        singe.plan(model, scores, X, macs=0.8, ignore=[model])


def test_a_model_without_values():
    with pytest.raises(singe.ModelError, match=r"0\.weight is on the meta device"):
        score(CASE.model().to("meta"))


def test_a_quantized_model():
    mlp = CASES["mlp"]
    with pytest.warns(DeprecationWarning, match="quantization"):
        quantized = torch.ao.quantization.quantize_dynamic(mlp.model(dtype=torch.float32))
    with pytest.raises(singe.ModelError, match="0 is quantized"):
        score(quantized, mlp.batches(dtype=torch.float32))


def test_float_models_that_can_be_quantized_are_scored():
    class Adds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 4)
            self.add = torch.ao.nn.quantized.FloatFunctional()

        def forward(self, x):
            return self.head(self.add.add(self.a(x).relu(), self.b(x)))

    assert score(Adds().double(), make_batches((6,), (3,)))


def test_masks_that_were_left_in_a_layer():
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4)).double()
    torch_prune.random_unstructured(model[0], "weight", 0.5)
    model(torch.rand(2, 6).double())
    with pytest.raises(singe.ModelError, match=r"0\.weight is masked; .*prune\.remove"):
        score(model, make_batches((6,), (2,)))


def test_a_checkpoint_that_cannot_be_one(tmp_path):
    for path, message in ((tmp_path, "is a folder"), (tmp_path / "no" / "run", "does not exist")):
        fails(lambda m, path=path: score(m, checkpoint=path), singe.CheckpointError, message)
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_no_plan(tmp_path):
    path = tmp_path / "report.json"
    path.write_text("{}")
    with pytest.raises(singe.ScoresError, match=r"report\.json holds no plan"):
        singe.Plan.load(path)


def test_a_plan_beside_a_model_it_was_not_carried_out_on(tmp_path):
    model = CASE.model()
    plan = singe.plan(model, score(model), X, macs=0.8)
    with pytest.raises(singe.ModelError, match="still has all that the plan removes"):
        singe.save_pruned(model, tmp_path / "saved", plan)
    assert not (tmp_path / "saved").exists()
    singe.prune(model, plan, X)
    singe.save_pruned(model, tmp_path / "saved", plan)
