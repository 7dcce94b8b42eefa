"""What a table of weight scores holds, what is left out of it and why, and how it is kept."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers import (
    CPU,
    assert_close,
    assert_unchanged,
    batch_of,
    make_batches,
    one_thread,  # noqa: F401 - autouse
    snapshot,
)
from helpers_networks import CASES, Case, Head
from helpers_trained import torchvision_models
from helpers_weights import assert_engines_agree, score, weights_of
from torch import Tensor, nn

import singe
from singe.data import first_batch
from singe.graph import Group, Member
from singe.weight_groups import find_weight_groups, uncovered


class Attention(nn.Module):
    """A layer whose output projection torch reads without calling it, and one nobody calls."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(5, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.unused = nn.Linear(4, 4)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = self.embed(x).tanh()
        return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))


def test_what_cannot_be_scored_is_named_with_the_reason():
    case = Case(Attention, (3, 5))
    model, batches = case.model(), case.batches()
    scores = score(model, batches)
    assert set(scores) == {"embed.weight", "unused.weight", "head.weight"}
    assert not scores["unused.weight"].any(), "nothing depends on it"
    assert "without calling it" in scores.meta["rejected"]["attention.out_proj"]
    with pytest.raises(
        singe.ModelError, match=r"out_proj' has no weights to score: .* without calling it"
    ):
        score(model, batches, layers=["attention.out_proj"])

    computed = nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3)), nn.ReLU(), Head(4)
    )
    scores = score(computed, make_batches((3, 6, 6), (2,), dtype=torch.float32))
    assert set(scores) == {"2.linear.weight"}
    assert "computed" in scores.meta["rejected"]["0"]
    with pytest.raises(singe.ModelError, match="no weights to score"):
        score(computed[:1].append(nn.Flatten()), make_batches((3, 3, 3), (2,), dtype=torch.float32))


def test_layers_and_ignore():
    model, batches = CASES["residual"].model(), CASES["residual"].batches()
    assert set(score(model, batches, layers=["4.linear"])) == {"4.linear.weight"}
    coupled = {"0.weight", "3.body.3.weight"}
    assert set(score(model, batches, layers=[model[0]])) == coupled
    found = score(model, batches, ignore=["3.body.3"])
    assert set(found) == {"0.weight", "3.body.0.weight", "4.linear.weight"}
    assert found.meta["rejected"]["3.body.3"] == "it is in `ignore`"
    alone = score(model, batches)
    assert_close({"4.linear.weight": alone["4.linear.weight"]},
                 score(model, batches, layers=["4.linear"]), 1e-6)  # fmt: skip
    with pytest.raises(singe.ModelError, match="did you mean"):
        score(model, batches, layers=["4.linaer"])
    with pytest.raises(singe.ModelError, match="no weights to score"):
        score(model, batches, layers=["2"])


def test_a_parameter_whose_rows_are_not_all_scored_is_left_out():
    """Rows may be shared out among groups; each moves with its own."""
    model, batches = CASES["mlp"].model(), CASES["mlp"].batches()
    graph = find_weight_groups(model, first_batch(batches, CPU), layers=["0"])

    def part(name, units):
        channels = torch.tensor(units)[:, None]
        return Group(name, len(units), channels, (Member("0", "rows", channels),))

    lower, upper = part("lower", [0, 2, 4, 6]), part("upper", [1, 3, 5, 7])
    both = replace(graph, groups=(lower, upper))
    found = assert_engines_agree(model, batches, graph=both)
    assert list(found) == ["0.weight"]
    assert not torch.allclose(
        found["0.weight"], weights_of(model, batches, graph=graph).scores["0.weight"]
    )
    assert not weights_of(model, batches, graph=replace(graph, groups=(lower,))).scores
    rest = uncovered("0", model[0], [lower])
    assert rest[0].name == "0:rest"
    assert rest[0].root_channels.flatten().tolist() == [1, 3, 5, 7]


def test_a_single_layer_needs_no_removable_channels():
    model = nn.Sequential(nn.Flatten(), nn.Linear(6, 4)).double()
    batches = make_batches((6,), (3,))
    with pytest.raises(singe.ModelError, match="nothing to prune"):
        singe.score(model, batches, progress=False)
    assert score(model, batches)["1.weight"].shape == (4, 6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"criterion": "signed"}, "'signed' is about whole units"),
        ({"criterion": "ablation"}, "'ablation' is about whole units"),
        ({"p": 2}, "p=2 has no meaning"),
        ({"p": "sum"}, "p='sum' has no meaning"),
        ({"tolerance": 0.1, "pruning_ratio": 0.5}, "tolerance"),
        ({"granularity": "rows"}, r"granularity='rows' is not offered; choose from \['unit'"),
    ],
)
def test_options_without_a_meaning_are_refused(options, message):
    model, batches = CASES["mlp"].model(), CASES["mlp"].batches()
    with pytest.raises(singe.OptionError, match=message):
        singe.score(model, batches, **({"granularity": "weight", "progress": False} | options))


@pytest.fixture(scope="module")
def scored():
    model, batches = CASES["residual"].model(), CASES["residual"].batches()
    return model, score(model, batches, quadrature=2)


def test_a_mapping_of_parameters(scored):
    model, scores = scored
    parameters = dict(model.named_parameters())
    assert list(scores) == [name for name in parameters if name in scores], "in the model's order"
    for name, values in scores.items():
        assert values.shape == parameters[name].shape
        assert values.dtype == torch.float32
        assert values.device.type == "cpu"
    total = sum(t.numel() for t in scores.values())
    assert repr(scores) == f"WeightScores(singe, 4 parameters, {total} weights, 5 samples)"
    assert scores.meta["granularity"] == "weight"
    assert scores.stderr is not None


def test_save_and_load(scored, tmp_path):
    model, scores = scored
    scores.save(tmp_path / "w.safetensors")
    loaded = singe.WeightScores.load(tmp_path / "w.safetensors", model)
    assert list(loaded) == list(scores)
    assert all(torch.equal(loaded[name], scores[name]) for name in scores)
    assert all(torch.equal(loaded.stderr[name], scores.stderr[name]) for name in scores)
    assert loaded.meta == scores.meta
    with pytest.raises(singe.ScoresError, match="it holds singe-weight-scores-1"):
        singe.Scores.load(tmp_path / "w.safetensors")
    with pytest.raises(singe.ScoresError, match="another model"):
        singe.WeightScores.load(tmp_path / "w.safetensors", nn.Linear(2, 2))
    with pytest.raises(singe.NonFiniteError, match=r"parameter 'a\.weight'"):
        singe.WeightScores({"a.weight": torch.tensor([float("nan")])}, {})


def test_a_run_that_was_killed_goes_on_to_the_same_bits(tmp_path):
    case = CASES["residual"]
    model, batches = case.model(), case.batches((2, 2, 1))

    class Killed(list):
        broken = True

        def __iter__(self):
            for position, batch in enumerate(list.__iter__(self)):
                if self.broken and position == 2:
                    raise KeyboardInterrupt
                yield batch

    expected = score(model, batches)
    killed, path, before = Killed(batches), tmp_path / "run", snapshot(model)
    with pytest.raises(KeyboardInterrupt):
        score(model, killed, checkpoint=path)
    assert_unchanged(model, before)
    assert path.exists()
    killed.broken = False
    with pytest.raises(singe.CheckpointError, match="granularity"):
        singe.score(model, killed, checkpoint=path, progress=False)
    found = score(model, killed, checkpoint=path)
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_autocast_and_half_precision_models():
    """Nearly the float32 scores; the tolerances are a few roundings of bf16 (2^-8)."""
    case = CASES["vgg"]
    model, batches = case.model(dtype=torch.float32), case.batches(dtype=torch.float32)
    expected = score(model, batches, criterion="taylor")
    lowered = score(model, batches, criterion="taylor", autocast=torch.bfloat16)
    assert_close(lowered, expected, 0.1)
    half = [(x.bfloat16(), y) for x, y in batches]
    assert_close(score(model.bfloat16(), half, criterion="taylor"), expected, 0.2)


def test_a_torchvision_network():
    """float32, and with rows that are coupled through the residual streams."""
    torch.manual_seed(0)
    model = torchvision_models().resnet18(weights=None, num_classes=10).eval()
    batches = make_batches((3, 32, 32), (2,), dtype=torch.float32, classes=10)
    scores = score(model, batches, path="network", quadrature=2)
    expected = [n for n, p in model.named_parameters() if p.dim() > 1]
    assert list(scores) == expected
    model.double()
    wide = score(model, [(x.double(), y) for x, y in batches], path="network", quadrature=2)
    assert_close(scores, wide, 2e-2)  # a few ReLUs flip: see test_definition_real


def test_layers_stand_in_the_order_of_the_model():
    """Also those whose channels nobody could remove."""

    class Shown(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(6, 5), nn.Linear(5, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            hidden = self.a(x)
            return self.c(self.b(hidden).relu()), hidden

    graph = find_weight_groups(Shown(), batch_of((torch.randn(2, 6),)))
    assert [group.name for group in graph.groups] == ["a", "b", "c"]
