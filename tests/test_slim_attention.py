"""``nn.MultiheadAttention`` in its slim form: torch's own arguments, and what it has when heads are gone."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import (
    CPU,
    one_thread,  # noqa: F401 - autouse
)
from helpers_attention import TOKENS, WIDTH, Torchs, encoder
from torch import Tensor, nn

import singe
from singe.attention_cost import Tokens
from singe.attention_cost import macs as formula
from singe.cost import count
from singe.data import as_batch
from singe.slim import SlimMultiheadAttention, take_slim
from singe.units import find_groups

HEADS, LENGTH, SAMPLES = 3, 4, 2
PADDING = torch.tensor([[False] * 4, [False, False, True, True]])
CAUSAL = torch.ones(LENGTH, LENGTH).triu(1).bool()
EACH = torch.arange(SAMPLES * HEADS * LENGTH**2).double().sin().view(-1, LENGTH, LENGTH)


def both(**options) -> tuple[nn.MultiheadAttention, nn.MultiheadAttention]:
    """Torch's, and the same in slim form."""
    torch.manual_seed(0)
    own = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, **options).double()
    slim = copy.deepcopy(own)
    take_slim(slim)
    assert type(slim) is SlimMultiheadAttention
    return own, slim


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"attn_mask": CAUSAL},
        {"attn_mask": EACH},
        {"key_padding_mask": PADDING},
        {"attn_mask": CAUSAL, "key_padding_mask": PADDING},
        {"average_attn_weights": False},
    ],
    ids=["plain", "causal", "each", "padding", "both", "weights"],
)
def test_arguments_mean_what_they_mean_to_torch(options, need_weights):
    own, slim = both()
    q, k, v = torch.randn(3, SAMPLES, LENGTH, WIDTH, dtype=torch.float64)
    expected = own(q, k, v, need_weights=need_weights, **options)
    found = slim(q, k, v, need_weights=need_weights, **options)
    torch.testing.assert_close(found, expected)


def test_a_sequence_alone_may_be_padded():
    own, slim = both()
    x = torch.randn(LENGTH, WIDTH, dtype=torch.float64)
    torch.testing.assert_close(
        slim(x, x, x, key_padding_mask=PADDING[1]), own(x, x, x, key_padding_mask=PADDING[1])
    )


@pytest.mark.parametrize("need_weights", [False, True])
def test_attention_is_dropped_in_training_alone(need_weights):
    own, slim = both(dropout=0.5)
    x = torch.randn(SAMPLES, LENGTH, WIDTH, dtype=torch.float64)
    whole = own.eval()(x, x, x)[0]
    torch.testing.assert_close(slim.eval()(x, x, x, need_weights=need_weights)[0], whole)
    drops = [slim.train()(x, x, x, need_weights=need_weights)[0] for _ in range(2)]
    assert not torch.allclose(drops[0], drops[1])


def test_a_hint_without_its_mask_is_refused():
    x = torch.randn(SAMPLES, LENGTH, WIDTH, dtype=torch.float64)
    for module in both():
        with pytest.raises(RuntimeError, match="is_causal"):
            module(x, x, x, is_causal=True, need_weights=False)


def test_with_all_heads_it_costs_what_torch_pruning_counts():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x, x[:, :2], x[:, :2])[0]

    model = Model().eval()
    counted, _ = count(model, as_batch(torch.randn(1, LENGTH, WIDTH), 0, CPU))
    assert formula(model.attention, Tokens(LENGTH, 2, LENGTH * 2)) == counted


def test_keys_of_zeros_have_no_head():
    class Zeros(Torchs):
        def __init__(self) -> None:
            super().__init__(True)
            self.attention = nn.MultiheadAttention(WIDTH, 3, add_zero_attn=True, batch_first=True)

    torch.manual_seed(0)
    model = encoder(Zeros, 1)().double().eval()
    batch = as_batch(torch.randn(3, *TOKENS, dtype=torch.float64), 0, CPU)
    reason = find_groups(model, batch).rejected["blocks.0.attn.attention"]
    assert "entries of their own" in reason


def test_gradients_are_cut_with_their_parameters():
    torch.manual_seed(0)
    model, x = encoder(lambda: Torchs(True), 1)().double(), torch.randn(3, *TOKENS).double()
    model(x).square().sum().backward()
    attention = model.blocks[0].attn.attention
    weight, grad = attention.in_proj_weight.detach().clone(), attention.in_proj_weight.grad.clone()
    singe.prune(model, {"blocks.0.attn.attention": [1]}, x)
    kept = torch.arange(3 * WIDTH).view(3, HEADS, -1)[:, [0, 2]].flatten()
    assert torch.equal(attention.in_proj_weight, weight[kept])
    assert torch.equal(attention.in_proj_weight.grad, grad[kept])


class Padded(nn.Module):
    """Torch's encoder, which leaves padding out in inference where its layers allow it."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 6, dropout=0.0, batch_first=True)
        self.embed, self.encoder = nn.Linear(5, WIDTH), nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        padding = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
        padding[1:, 2:] = True
        return self.head(self.encoder(self.embed(x), src_key_padding_mask=padding)[:, :2].mean(1))


@pytest.mark.parametrize("layer", [0, 1])
def test_padding_is_seen_the_same_in_torchs_inference(layer):
    torch.manual_seed(0)
    model, x = Padded().double().eval(), torch.randn(3, *TOKENS, dtype=torch.float64)
    singe.prune(model, {f"encoder.layers.{layer}.self_attn": [0]}, x)
    expected = model(x)
    with torch.inference_mode():
        torch.testing.assert_close(model(x), expected)
