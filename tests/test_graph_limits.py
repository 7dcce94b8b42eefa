"""What the first samples do not show of a model: layers that stand idle, shared parts, odd outputs."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass

import pytest
import torch
from helpers import one_thread  # noqa: F401 - autouse
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import singe

X = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
BATCHES = [(X, torch.arange(8) % 3)]
IMAGES = [(torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1)), torch.arange(4))]


class Branches(nn.Module):
    """An auxiliary head, in training mode or on demand."""

    def __init__(self, in_training: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 7)
        self.head, self.aux = nn.Linear(7, 3), nn.Linear(8, 3)
        self.in_training = in_training

    def forward(self, x: Tensor, extra: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        hidden = self.a(x).relu()
        out = self.head(self.b(hidden).relu())
        return (out, self.aux(hidden)) if extra or (self.training and self.in_training) else out


def test_layers_that_run_in_training_only_keep_their_inputs():
    model = Branches(in_training=True)
    scores = singe.score(model, BATCHES, progress=False)
    assert list(scores) == ["b"]
    assert scores.meta["rejected"]["a"].endswith("runs in training mode only reads it (aux)")
    singe.compress(model, train=BATCHES, channels=0.7, rounds=1, finetune_steps=2, progress=False)
    assert model.train()(X)[1].shape == (8, 3)


def test_what_reads_in_training_is_found_by_trying_where_no_trace_tells(monkeypatch):
    def no_trace(*_):
        raise RuntimeError("no trace")

    monkeypatch.setattr("singe.verification.readers_in_training", no_trace)
    scores = singe.score(Branches(in_training=True), BATCHES, progress=False)
    assert list(scores) == ["b"]
    assert "runs in training mode only reads it (" in scores.meta["rejected"]["a"]


def test_layers_that_never_run_are_named():
    with pytest.warns(UserWarning, match=r"aux: these layers do not run for the first samples"):
        singe.score(Branches(in_training=False), BATCHES, progress=False)


def test_weights_that_are_used_without_a_call_are_not_idle():
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = nn.functional.linear(x, self.a.weight, self.a.bias).relu()
            return self.c(self.b(h).relu())

    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert "b" in singe.score(Functional(), BATCHES, progress=False)


def test_a_permutation_that_leaves_the_middle_is_seen():
    class Flipped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(6, 7), nn.Linear(7, 5), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.b(self.a(x).relu().flip(1)).relu())

    scores = singe.score(Flipped(), BATCHES, progress=False)
    assert list(scores) == ["b"]
    assert "gating some of its units" in scores.meta["rejected"]["a"]


class Neighbours(nn.Module):
    """Channels that look at those beside them, at few units."""

    def __init__(self, units: int, mix: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.mix, self.b = nn.Conv2d(3, units, 3), mix, nn.Conv2d(units, 5, 1)
        self.c = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.mix(3 * self.a(x).relu())).relu().mean((2, 3)))


class Cumulative(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.cumsum(1)


@pytest.mark.parametrize(
    "mix", [nn.LocalResponseNorm(3, alpha=1.0), Cumulative()], ids=["lrn", "sum"]
)
@pytest.mark.parametrize("units", range(3, 13))
def test_neighbours_are_seen_however_few_units_there_are(units, mix):
    scores = singe.score(Neighbours(units, mix).eval(), IMAGES, criterion="magnitude")
    assert list(scores) == ["b"]
    assert "gating some of its units" in scores.meta["rejected"]["a"]


class Joined(Neighbours):
    """The same behind a sum with one half of a wider layer's channels."""

    def __init__(self, units: int, mix: nn.Module) -> None:
        super().__init__(units, mix)
        self.wide = nn.Conv2d(3, 2 * units, 3)

    def forward(self, x: Tensor) -> Tensor:
        joined = self.a(x) + self.wide(x).chunk(2, 1)[0]
        return self.c(self.b(self.mix(3 * joined.relu())).relu().mean((2, 3)))


@pytest.mark.parametrize("units", [4, 8, 12])
def test_nor_where_a_group_is_looked_at_alone(units):
    model = Joined(units, nn.LocalResponseNorm(3, alpha=1.0)).eval()
    scores = singe.score(model, IMAGES, criterion="magnitude")
    assert list(scores) == ["b"]


@pytest.mark.parametrize("seed", range(4))
def test_an_output_that_is_rounding_alone_speaks_against_nobody(seed):
    """A penalty that is the small difference of large values is rounded as they are."""

    class Penalised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(seed)
            self.a, self.b, self.c = nn.Conv2d(3, 9, 3), nn.Conv2d(9, 7, 3), nn.Linear(7, 4)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            logits = self.c(self.b(self.a(x).relu()).relu().mean((2, 3)))
            normed = nn.functional.layer_norm(logits, (4,))
            return logits, normed.mean(1), logits.softmax(1).sum(1) - 1

    assert set(singe.score(Penalised().eval(), IMAGES, criterion="magnitude")) == {"a", "b"}


def test_an_output_in_pixels_hides_no_fault_in_the_logits():
    class Detector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.box = nn.Conv2d(3, 8, 3), nn.Linear(3, 4)
            self.b, self.c = nn.Linear(8, 6), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            tied = self.a(x).softmax(1).mean((2, 3))
            boxes = 1e4 * self.box(x.mean((2, 3))).sigmoid()
            return {"logits": self.c(self.b(tied).relu()), "boxes": boxes, "loss": 0 * boxes.sum()}

    scores = singe.score(Detector().eval(), IMAGES, criterion="magnitude")
    assert list(scores) == ["b"]
    assert "gating some of its units" in scores.meta["rejected"]["a"]


def test_a_shared_bias_stays_shared():
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    model[2].bias = model[0].bias
    with pytest.raises(singe.ModelError, match="shares a parameter with another layer"):
        singe.prune(model, {"0": [1]}, X)


def test_a_split_that_is_joined_again_leaves_the_rest_prunable():
    class Split(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.a, self.b = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 8, 1), nn.Conv2d(8, 5, 1)
            self.head = nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            p, q = self.a(self.stem(x).relu()).chunk(2, 1)
            return self.head(self.b(torch.cat([p.relu(), q.tanh()], 1)).relu().mean((2, 3)))

    images = [(torch.randn(4, 3, 5, 5), torch.arange(4) % 3)]
    assert {"stem", "b"} <= set(singe.score(Split(), images, progress=False))


@dataclass
class Answer:
    logits: Tensor


def test_an_output_that_torch_cannot_look_into_is_refused():
    class Answers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Answer:
            return Answer(self.b(self.a(x).relu()))

    with pytest.raises(singe.ModelError, match=r"its output is a Answer.*register_dataclass"):
        singe.score(Answers(), BATCHES, progress=False)


def test_what_a_forward_pass_counts_is_not_changed_by_pruning():
    class Observer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)
            self.register_buffer("largest", torch.zeros(()))
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.largest = torch.maximum(self.largest, x.abs().max())
            self.calls += 1
            return self.b(self.a(x).relu())

    model = Observer()
    largest = model.largest
    singe.prune(model, {"a": [0]}, X)
    assert model.largest is largest
    assert float(model.largest) == float(model.calls) == 0.0
    assert model.a.out_features == 7


def test_checkpointed_activations():
    class Saving(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 5), nn.Linear(5, 3)
            self.saves = True

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x).relu()
            h = checkpoint(self.b, h, use_reentrant=False) if self.saves else self.b(h)
            return self.c(h.relu())

    model = Saving()
    with pytest.raises(singe.ModelError, match=r"checkpoints its activations.*engine=\"naive\""):
        singe.score(model, BATCHES, progress=False)
    found = singe.score(model, BATCHES, engine="naive", progress=False)
    model.saves = False
    expected = singe.score(model, BATCHES, progress=False)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name])


def test_additive_masks_may_hold_minus_infinity():
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(5, 8)
            self.layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
            self.out = nn.Linear(8, 3)

        def forward(self, x: Tensor, pad: Tensor, causal: Tensor) -> Tensor:
            hidden = self.layer(self.inner(x), src_mask=causal, src_key_padding_mask=pad)
            return self.out(hidden)

    pad = torch.zeros(4, 7)
    pad[:, 5:] = -torch.inf
    causal = nn.Transformer.generate_square_subsequent_mask(7)
    x, y = torch.randn(4, 7, 5), torch.zeros(4, 7, dtype=torch.long)
    assert "layer.linear1" in singe.score(Tokens(), [((x, pad, causal), y)], progress=False)
    pad[0, 0] = torch.nan
    with pytest.raises(singe.NonFiniteError, match="1 NaN or infinite input"):
        singe.score(Tokens(), [((x, pad, causal), y)], progress=False)


def test_scripted_and_lazy_models():
    with pytest.raises(singe.ModelError, match="TorchScript"):
        singe.score(torch.jit.trace(nn.Linear(6, 3), X), BATCHES, progress=False)
    with pytest.raises(singe.ModelError, match=r"0\.weight has no size yet"):
        singe.plan(nn.Sequential(nn.LazyLinear(5)), {}, X, macs=0.5)


def test_frozen_norms_of_a_model_in_training_are_not_trained():
    model = nn.Sequential(
        nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 6), nn.BatchNorm1d(6), nn.ReLU(),
        nn.Linear(6, 3),
    ).train()  # fmt: skip
    model[1].eval()
    mean = model[1].running_mean.clone(), model[4].running_mean.clone()
    singe.compress(
        model, train=BATCHES, channels=0.9, rounds=1, finetune_steps=2, recalibrate=False,
        layers=["3"], progress=False,
    )  # fmt: skip
    assert torch.equal(model[1].running_mean, mean[0])
    assert not torch.equal(model[4].running_mean, mean[1][: len(model[4].running_mean)])
    assert (model[1].training, model[4].training) == (False, True)


def test_the_callers_autocast_does_not_reach_the_scores():
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, 3))
    expected = singe.score(model, BATCHES, progress=False)
    with torch.autocast("cpu", torch.bfloat16):
        found = singe.score(copy.deepcopy(model), BATCHES, progress=False)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


class Shuffled(nn.Module):
    """A channel shuffle in a branch that hardly counts."""

    def __init__(self, scale: float, parts: int) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 4)
        self.a, self.b = nn.Conv2d(8, 12, 1), nn.Conv2d(12, 8, 1)
        self.scale, self.parts = nn.Parameter(torch.full((1,), scale)), parts

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).relu()
        y = self.a(x).unflatten(1, (self.parts, -1)).transpose(1, 2).flatten(1, 2)
        return self.head((x + self.scale * self.b(y).relu()).mean((2, 3)))


@pytest.mark.parametrize("parts", [2, 3, 4, 6])
@pytest.mark.parametrize("scale", [1.0, 1e-6])
def test_a_shuffle_is_found_however_little_its_branch_counts(scale, parts):
    """At 1e-6, as ConvNeXt starts its branches, its gates move the output by less than rounding does."""
    torch.manual_seed(0)
    scores = singe.score(Shuffled(scale, parts).eval(), IMAGES, criterion="magnitude")
    assert set(scores) == {"b"}
    assert "removing some of its units fails" in scores.meta["rejected"]["a"]


def test_a_network_that_does_not_run_without_some_units_says_so():
    """Where no few units show it: this one looks at how many are left."""

    class Wide(nn.Sequential):
        def forward(self, x):
            if self[0].out_channels < 6:
                raise RuntimeError("too narrow")
            return super().forward(x)

    torch.manual_seed(0)
    model = Wide(nn.Conv2d(3, 12, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12 * 36, 4)).eval()
    x, y = IMAGES[0]
    scores = singe.score(model, [(x, y)], criterion="magnitude")
    message = r"Wide does not run without the units that go \(too narrow\).*`ignore`.* one of 0"
    with pytest.raises(singe.ModelError, match=message):
        singe.plan(model, scores, x, macs=0.4)
    with pytest.raises(singe.ModelError, match=message):
        singe.prune(model, {"0": range(8)}, x)
    assert model[0].out_channels == 12


class Flipped(nn.Module):
    """Convolutions without a bias: of zeros, nothing comes."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.b = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        return self.head(torch.relu(self.b(torch.relu(self.a(x)).flip(1))).mean((2, 3)))


@pytest.mark.parametrize("example", [torch.randn, torch.zeros])
def test_zeros_as_example_prove_no_less(example):
    with pytest.raises(singe.ModelError, match="gating some of its units and removing them differ"):
        singe.prune(Flipped(), {"a": [0, 1]}, example(2, 3, 6, 6))
