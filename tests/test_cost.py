"""What a network costs: MACs per sample of layers and calls that Torch-Pruning miscounts."""

from __future__ import annotations

import sys

import pytest
import torch
import torch_pruning as tp
from helpers import (
    CPU,
    one_thread,  # noqa: F401 - autouse
)
from helpers_budget import graph_of
from helpers_networks import CASES
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import singe
from singe import ModelError
from singe.cost import CostModel, count, count_without
from singe.data import as_batch
from singe.graph import ModelGraph, private_copy


def macs(model: nn.Module, *inputs) -> float:
    return count(model.eval(), as_batch((inputs, None), 0, CPU))[0]


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("bias", [False, True])
def test_a_transposed_convolution(samples, bias):
    """Every input value meets a kernel: 8 x 8 positions, 6 channels in, 4 out, 4 x 4."""
    layer = nn.ConvTranspose2d(6, 4, 4, stride=4, bias=bias)
    expected = 64 * 6 * 4 * 16 + bias * 4 * 32 * 32
    assert macs(nn.Sequential(layer), torch.randn(samples, 6, 8, 8)) == expected


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize(
    "layer",
    [
        nn.LSTM(5, 4, num_layers=2, bidirectional=True, batch_first=True),
        nn.GRU(5, 4, batch_first=True),
        nn.LSTM(5, 4, proj_size=3, batch_first=True),
    ],
)
def test_a_recurrent_layer_uses_every_parameter_once_per_step(samples, layer):
    per_step = sum(p.numel() for p in layer.parameters())
    assert macs(nn.Sequential(layer), torch.randn(samples, 7, 5)) == 7 * per_step


def test_a_packed_sequence_has_as_many_steps_as_it_has():
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.GRU(5, 4, batch_first=True)

        def forward(self, x):
            return self.cell(pack_padded_sequence(x, [7, 3], batch_first=True))[1]

    model = Packed()
    per_step = sum(p.numel() for p in model.parameters())
    assert macs(model, torch.randn(2, 7, 5)) == (7 + 3) / 2 * per_step


class Lists(nn.Module):
    """Three pictures of every sample, in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, bias=False)

    def forward(self, pictures):
        return torch.cat([self.conv(x) for x in pictures], 1)


def test_a_list_of_inputs_is_not_a_batch():
    assert macs(Lists(), [torch.randn(4, 3, 6, 6)] * 3) == 3 * 16 * 4 * 27


class Clips(nn.Module):
    """Frames go through the convolutions as samples of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.mix, self.head = nn.Linear(8, 64), nn.Linear(64, 2)

    def forward(self, clip):
        frames = torch.relu(self.b(torch.relu(self.a(clip.flatten(0, 1))))).mean((2, 3))
        return self.head(torch.relu(self.mix(frames.view(*clip.shape[:2], -1).mean(1))))


def test_frames_in_the_batch_are_predicted_as_they_are_counted():
    torch.manual_seed(0)
    model, clip = Clips().eval(), torch.randn(2, 5, 3, 6, 6)
    cost = CostModel(model, *graph_of(model, clip))
    for name in ("a", "b", "mix"):
        predicted = cost({})["macs"] - cost({name: 1})["macs"]
        pruned = Clips().eval()
        report = singe.prune(pruned, {name: [0]}, clip)
        counted = report.macs_before - report.macs_after
        # ReLUs are counted and not predicted.
        assert predicted == pytest.approx(counted, rel=0.02)


def assert_predicted(model: nn.Module, inputs) -> None:
    """What two units of every group save: the parameters exactly, of the MACs all but the activations'."""
    graph, batch = graph_of(model, inputs)
    cost = CostModel(model, graph, batch)
    for group in graph.groups:
        copy = private_copy(model, trainable=True)
        macs, params = count_without(copy, batch, [(group, [0, 1])])
        predicted, counted = cost({group.name: 2}), cost.macs - macs
        assert predicted["params"] == params, group.name
        assert 0.9 * counted <= cost.macs - predicted["macs"] <= counted, group.name


@pytest.mark.parametrize(
    "name", ["mlp", "vgg", "residual", "depthwise", "twice", "sigmoid", "plain_norm", "tokens"]
)
def test_what_removal_saves_is_predicted(name):
    """In layers that run twice or are gated at their input too, and in norms without parameters."""
    case = CASES[name]
    inputs, _ = case.batches((2,), dtype=torch.float32)[0]
    assert_predicted(case.model(dtype=torch.float32), inputs)


class OwnConv(nn.Conv2d):
    """As many models have one: torch's, with an ``__init__`` of its own."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 3, padding=1)


class OwnNorm(nn.BatchNorm2d):
    """As timm's norms, which hold their activation."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.act = nn.ReLU()

    def forward(self, x):
        return self.act(super().forward(x))


class OwnLinear(nn.Linear): ...


class ImageNorm(nn.LayerNorm):
    """A LayerNorm over dimension 1, as in ConvNeXt."""

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def _network(own: bool) -> nn.Sequential:
    norm = [OwnNorm(6)] if own else [nn.BatchNorm2d(6), nn.ReLU()]
    return nn.Sequential(
        OwnConv(3, 6) if own else nn.Conv2d(3, 6, 3, padding=1),
        *norm,
        nn.Conv2d(6, 8, 3, padding=1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        OwnLinear(8, 4) if own else nn.Linear(8, 4),
    )


def test_a_subclass_counts_like_its_base():
    x = torch.randn(1, 3, 9, 9)
    own, plain = _network(own=True), _network(own=False)
    assert macs(own, x) == macs(plain, x)
    nn.utils.parametrizations.weight_norm(own[0])
    assert macs(own, x) == macs(plain, x)


def test_a_subclass_inside_a_module_that_is_counted_whole_counts_once():
    x = torch.randn(1, 5, 8)
    attention = nn.MultiheadAttention(8, 2, batch_first=True)

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = attention

        def forward(self, x):
            return self.attention(x, x, x)[0]

    before = macs(Wrapped(), x)
    attention.out_proj = OwnLinear(8, 8)
    assert macs(Wrapped(), x) == before


@pytest.mark.parametrize("norm", [OwnNorm, ImageNorm])
def test_what_removal_from_subclasses_saves_is_predicted(norm):
    """No activation or pooling is in the way, so the closed formula is the count."""
    model = nn.Sequential(OwnConv(3, 6), norm(6), OwnConv(6, 8)).eval()
    model[1].act = nn.Identity()
    graph, batch = graph_of(model, torch.randn(1, 3, 9, 7))
    cost = CostModel(model, graph, batch)
    group = next(g for g in graph.groups if g.name == "0")
    twin = private_copy(model, trainable=True)
    counted, params = count_without(twin, batch, [(group, [1, 4])])
    assert cost({"0": 2})["macs"] == counted
    assert cost({"0": 2})["params"] == params


class Odd(nn.Conv2d):
    """A layer with a signature of its own."""

    def __init__(self) -> None:
        super().__init__(6, 6, 1)

    def forward(self, scale, images):
        out = super().forward(torch.cat(images) if isinstance(images, list) else images)
        return scale * out, None


@pytest.mark.parametrize("how", ["positional", "keyword", "list"])
def test_a_subclass_may_take_and_return_what_it_likes(how):
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.odd = nn.Conv2d(3, 6, 1), Odd()

        def forward(self, x):
            x = self.first(x)
            if how == "keyword":
                return self.odd(images=x, scale=2.0)[0]
            return self.odd(2.0, [x] if how == "list" else x)[0]

    model, x = Model(), torch.randn(2, 3, 4, 4)
    assert macs(model, x) == 16 * (6 * 3 + 6 + 6 * 6 + 6)
    assert CostModel(model, ModelGraph((), {}, {}, {}), as_batch(x, 0, CPU)).macs == macs(model, x)


def test_what_is_in_a_subclass_counts_too():
    class Adapted(nn.Linear):
        """A layer with low-rank weights beside its own."""

        def __init__(self) -> None:
            super().__init__(8, 6, bias=False)
            self.a, self.b = OwnLinear(8, 2, bias=False), nn.Linear(2, 6, bias=False)

        def forward(self, x):
            return super().forward(x) + self.b(self.a(x))

    assert macs(nn.Sequential(Adapted()), torch.randn(3, 8)) == 8 * 6 + 8 * 2 + 2 * 6


def test_standard_output_is_left_to_the_process():
    """All threads share it: of two that plan at once, one would put back what the other had put there."""
    seen = []

    class Model(nn.Linear):
        def forward(self, x):
            seen.append(sys.stdout)
            return super().forward(x)

    before = sys.stdout
    macs(nn.Sequential(Model(3, 2)), torch.randn(2, 3))
    assert seen == [before]


class Calls(nn.Module):
    """One layer, and how it is called."""

    def __init__(self, layer: nn.Module, call) -> None:
        super().__init__()
        self.layer, self.call = layer, call

    def forward(self, x):
        return self.call(self.layer, x)


@pytest.mark.parametrize(
    "layer",
    [nn.Conv1d(7, 3, 3), nn.Linear(8, 3), nn.BatchNorm1d(7), nn.LayerNorm(8), nn.GELU(), nn.MaxPool1d(2),
     nn.ConvTranspose1d(7, 3, 3), nn.GRU(8, 4, batch_first=True)],
    ids=lambda layer: type(layer).__name__,
)  # fmt: skip
def test_inputs_may_be_given_by_name(layer):
    x = torch.randn(2, 7, 8)
    named = macs(Calls(layer, lambda layer, x: layer(input=x)), x)
    assert named == macs(nn.Sequential(layer), x) > 0


def test_a_state_that_is_named_before_the_input_is_not_the_input():
    x, layer = torch.randn(2, 7, 5), nn.GRU(5, 4, batch_first=True)
    named = macs(Calls(layer, lambda gru, x: gru(hx=torch.zeros(1, 2, 4), input=x)), x)
    assert named == macs(nn.Sequential(layer), x)


PADDING = torch.zeros(2, 7, dtype=torch.bool)
ATTENTION_CALLS = {
    "by name": lambda m, x: m(value=x, key=x, query=x),
    "some by name": lambda m, x: m(x, key=x, value=x, need_weights=False),
    "a mask by position": lambda m, x: m(x, x, x, PADDING),
    "all by position": lambda m, x: m(x, x, x, PADDING, False, None),
}


@pytest.mark.parametrize("call", ATTENTION_CALLS.values(), ids=ATTENTION_CALLS)
def test_attention_may_be_called_in_any_way(call):
    x, layer = torch.randn(2, 7, 8), nn.MultiheadAttention(8, 2, batch_first=True)
    plain = macs(Calls(layer, lambda m, x: m(x, x, x)), x)
    assert macs(Calls(layer, call), x) == plain > 0


def test_attention_without_a_batch_counts_as_a_batch_of_one():
    x, layer = torch.randn(7, 8), nn.MultiheadAttention(8, 2, batch_first=True)
    call = Calls(layer, lambda m, x: m(x, x, x)).eval()
    alone = count(call, as_batch(x, 0, CPU))[0] * 7  # the first dimension is taken for samples
    assert alone == pytest.approx(macs(call, x[None]))


@pytest.mark.parametrize("bias", [False, True])
def test_attention_with_keys_and_values_of_their_own_width(bias):
    """7 queries of 8, 3 keys of 5, 3 values of 6, two heads of 4."""

    class Cross(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.m = nn.MultiheadAttention(8, 2, bias=bias, kdim=5, vdim=6, batch_first=True)

        def forward(self, x, k, v):
            return self.m(x, k, v)[0]

    projected = 7 * 8 * (8 + bias) + 3 * 8 * (5 + bias) + 3 * 8 * (6 + bias)
    heads = 2 * (7 * 4 + 7 * 3 * (2 * 4 + 1))
    inputs = torch.randn(2, 7, 8), torch.randn(2, 3, 5), torch.randn(2, 3, 6)
    assert macs(Cross(), *inputs) == projected + heads + 7 * 8 * (8 + 1)


def test_models_that_name_their_inputs_are_planned_and_pruned():
    class Model(nn.Module):
        """As DETR calls its attention."""

        def __init__(self) -> None:
            super().__init__()
            self.embed, self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 16), nn.Linear(16, 8)
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 5)

        def forward(self, x):
            x = self.embed(input=x)
            x = self.norm(input=x + self.attention(query=x, key=x, value=x)[0])
            return self.head(input=(x + self.down(input=self.up(input=x).relu())).mean(1))

    torch.manual_seed(0)
    model, x = Model(), torch.randn(4, 6, 4)
    scores = singe.score(model, [(x, torch.arange(4))], progress=False)
    assert {"attention", "up"} <= set(scores)
    plan = singe.plan(model, scores, x, macs=0.8)
    report = singe.prune(model, plan, x)
    assert report.macs_after == plan.meta["after"]["macs"] <= 0.8 * report.macs_before


def test_what_no_formula_reads_names_the_layer():
    """Torch-Pruning wants a batch of a cell, and torch does not."""
    model = Calls(nn.GRUCell(8, 4), lambda cell, x: cell(x[0]))
    with pytest.raises(ModelError, match="MACs of Calls cannot be counted: its 'layer', a GRUCell"):
        macs(model, torch.randn(2, 8))


@pytest.mark.parametrize("name", ["mlp", "vgg", "residual", "depthwise"])
@pytest.mark.parametrize("samples", [1, 2, 5])
def test_a_sample_costs_what_torch_pruning_counts_of_one_alone(name, samples):
    """Several share a linear layer's bias in its count: 232.5 MACs per sample of two where one has 246."""
    case = CASES[name]
    model = case.model(dtype=torch.float32).eval()
    inputs, _ = case.batches((samples,), dtype=torch.float32)[0]
    alone, _ = tp.utils.count_ops_and_params(model, inputs[:1])
    assert macs(model, inputs) == alone
    layers = CostModel(model, *graph_of(model, inputs))._layers
    assert CostModel(model, *graph_of(model, inputs[:1]))._layers == layers
