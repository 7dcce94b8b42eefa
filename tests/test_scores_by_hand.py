"""Scores that somebody made himself, in front of every adapter."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import one_thread  # noqa: F401 - autouse
from helpers_attention import Conv1D
from helpers_networks import CASES
from helpers_torch_pruning import pruner_for
from torch import Tensor, nn
from torch.nn.utils import prune

import singe
from singe.adapters import channel_scores, torch_ao, torch_prune
from singe.adapters import torch_pruning as adapter
from singe.adapters.ranking import ranking

CASE = CASES["vgg"]


def widths_of(model: nn.Module) -> dict[str, int]:
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    return {n: len(layers[n].weight) for n in list(layers)[:-1]}


def by_torch_pruning(model: nn.Module, scores: singe.Scores, inputs: Tensor) -> Any:
    return adapter.step(pruner_for(model, inputs, adapter.importance(scores)))


USES: dict[str, Callable[[nn.Module, singe.Scores, Tensor], Any]] = {
    "plan": lambda model, scores, inputs: singe.plan(model, scores, inputs, channels=0.6),
    "torch_pruning": by_torch_pruning,
    "masks": lambda m, scores, inputs: torch_prune.global_structured(m, scores, inputs, amount=0.4),
    "importance": lambda m, scores, _: torch_prune.importance_scores(scores, m, "4"),
    "channels": lambda m, scores, _: channel_scores.channel_scores(scores, m),
    "torch_ao": lambda m, scores, _: torch_ao.config(scores, m),
}


@pytest.mark.parametrize("use", USES)
def test_lengths_and_names_are_looked_at(use: str) -> None:
    model, inputs = CASE.model().eval(), CASE.batches()[0][0]
    widths = widths_of(model)
    right = {name: torch.rand(width) for name, width in widths.items()}
    assert USES[use](copy.deepcopy(model), singe.Scores(right, {}, {}), inputs) is not None
    wrong = right | {"4": torch.rand(widths["4"] - 1)}
    with pytest.raises(singe.ScoresError, match=f"there are {widths['4'] - 1} scores"):
        USES[use](copy.deepcopy(model), singe.Scores(wrong, {}, {}), inputs)
    with pytest.raises(singe.ScoresError, match="nope"):
        USES[use](
            copy.deepcopy(model), singe.Scores({"nope": torch.rand(4)} | right, {}, {}), inputs
        )


@pytest.mark.parametrize("how", [None, "standarization", "gaussian", "max", "sentinel_0.9"])
def test_normalizers_keep_the_order_of_signed_scores(how: str | None) -> None:
    scores = torch.randn(40, generator=torch.Generator().manual_seed(0))
    table = ranking({"a": scores}, normalizer=how)["a"]
    assert table.argsort().tolist() == scores.argsort(stable=True).tolist()


@pytest.mark.parametrize("how", ["sum", "mean", "max", "lamp", "sentinel_0.5", lambda s: -s])
def test_a_normalizer_that_turns_the_order_round_is_refused(how: Any) -> None:
    scores = torch.randn(40, generator=torch.Generator().manual_seed(0))
    low = scores - scores.max() - 0.1 if how == "max" else scores - 1
    with pytest.raises(singe.ScoresError, match="turns the order of the units of 'a' round"):
        ranking({"a": low}, normalizer=how)


@pytest.mark.parametrize("how", ["sum", "mean", "max", "lamp", "sentinel_0.5", "sentinel_0"])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_no_normalizer_is_refused_for_rounding(how: str, scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(400, generator=generator).double() ** 40 * scale
    scores[::3] = scores[0]
    table = ranking({"a": scores}, normalizer=how)["a"]
    ordered = table[scores.argsort(stable=True)]
    # LAMP's quotients of equal scores differ by their place, and by rounding.
    assert float(ordered.diff().min()) >= -1e-12 * float(ordered.max() - ordered.min())


@pytest.mark.parametrize("how", [torch.sum, lambda s: s[:3], lambda s: None, lambda s: s.tolist()])
def test_a_normalizer_gives_one_number_per_unit(how: Any) -> None:
    with pytest.raises(singe.OptionError, match="must give one number per unit"):
        ranking({"a": torch.rand(5)}, normalizer=how)


def test_the_first_model_is_the_one_that_hand_made_scores_are_for() -> None:
    model, inputs = CASE.model().eval(), CASE.batches()[0][0]
    calls = []

    def rescore(pruned: nn.Module) -> singe.Scores:
        calls.append(pruned)
        return singe.Scores({n: torch.rand(u) for n, u in widths_of(pruned).items()}, {}, {})

    importance = adapter.importance(rescore(model), rescore=rescore)
    pruner = pruner_for(model, inputs, importance, iterative_steps=2)
    calls.clear()
    adapter.step(pruner)
    assert not calls
    adapter.step(pruner)
    assert len(calls) == 1


class Block(nn.Module):
    """GPT-2's way of writing a perceptron, beside a layer of torch's."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(6, 8), nn.Linear(8, 4)
        self.c_fc, self.c_proj = Conv1D(16, 8), Conv1D(8, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        return self.head((x + self.c_proj(self.c_fc(x).relu())).mean(1))


def test_conv1d_of_transformers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Block().eval(), torch.randn(4, 5, 6)
    scores = singe.score(model, [(x, torch.randint(4, (4,)))], progress=False)
    found = channel_scores.channel_scores(scores, model)
    assert {n: len(t) for n, t in found.items()} == {"embed": 8, "c_proj": 8, "c_fc": 16}
    assert channel_scores.save_activation_scores(scores, model, tmp_path).exists()
    assert torch_ao.config(scores, model) == [{"tensor_fqn": "embed.weight"}]
    importance = torch_prune.importance_scores(scores, model, "c_fc")
    assert importance.shape == (8, 16)
    masked = copy.deepcopy(model)
    options = {"amount": 4, "n": float("inf"), "dim": 1, "importance_scores": importance}
    prune.ln_structured(masked.c_fc, "weight", **options)
    gone = (masked.c_fc.weight_mask.sum(0) == 0).nonzero().flatten()
    assert gone.tolist() == sorted(scores["c_fc"].argsort()[:4].tolist())


def test_torch_pruning_does_not_cut_conv1d_along_the_wrong_dimension() -> None:
    torch.manual_seed(0)
    model, x = Block().eval(), torch.randn(4, 5, 6)
    scores = singe.score(model, [(x, torch.randint(4, (4,)))], progress=False)
    pruner = pruner_for(model, x, adapter.importance(scores), ignored_layers=[model.head])
    with (
        pytest.warns(UserWarning, match="a Conv1D, along the wrong dimension; use singe.prune"),
        pytest.raises(singe.BudgetError, match="removed nothing"),
    ):
        adapter.step(pruner)
    assert model(x).shape == (4, 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_ranks_of_half_precision_layers_are_apart(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(2, 3000), nn.ReLU(), nn.Linear(3000, 4)).to(dtype)
    scores = singe.Scores({"0": torch.rand(3000)}, {}, {})
    importance = torch_prune.importance_scores(scores, model, "0")
    assert len(importance.unique()) == 3000
    prune.ln_structured(
        model[0], "weight", amount=0.5, n=float("inf"), dim=0, importance_scores=importance
    )
    masked = (model[0].weight_mask.sum(1) == 0).nonzero().flatten()
    assert masked.tolist() == scores["0"].argsort(stable=True)[:1500].sort().values.tolist()


def test_hand_made_scores_of_former_shapes_are_refused() -> None:
    model = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 4))
    scores = singe.Scores(
        {"0": torch.rand(16)}, {}, {}
    )  # two channels each: half of them still fits
    pruner = pruner_for(model, torch.randn(2, 6), adapter.importance(scores), iterative_steps=2)
    adapter.step(pruner)
    with pytest.raises(singe.ScoresError, match=r"before it was pruned\..*rescore="):
        adapter.step(pruner)


def test_scores_under_a_coupled_layers_name() -> None:
    """The group has the name of its first layer."""
    case = CASES["residual"]
    model, x = case.model().eval(), case.batches()[0][0]
    found = singe.score(model, case.batches(), progress=False)
    group, layer = next((g, ls[-1]) for g, ls in found.groups.items() if ls[-1] != g)
    scores = singe.Scores({layer: found[group]}, {}, {})
    for use in ("plan", "masks"):
        with pytest.raises(singe.ScoresError, match="give their scores under that name"):
            USES[use](copy.deepcopy(model), scores, x)
