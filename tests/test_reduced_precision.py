"""``autocast``: convolutions and linear layers in bf16 or fp16, sums in float32.

bf16 has 8 bits of mantissa: single scores are off by up to a few percent. What is promised is the
ranking: a Spearman correlation of 0.95 with float32 on these small networks of a dozen units (0.999
is measured on the 1,000 of ResNet-56), and 5 % in relative L2.
"""

from __future__ import annotations

import pytest
import torch
from helpers import (
    CPU,
    assert_unchanged,
    make_batches,
    one_thread,  # noqa: F401 - autouse
    relative_error,
    run_engine,
    snapshot,
)
from helpers_networks import CASES, Case, residual
from torch import nn

import singe
from singe.network import Network
from singe.precision import lower
from singe.units import find_groups

NAMES = ["mlp", "residual", "depthwise", "group_norm", "layer_norm", "tokens", "pre_activation"]


def spearman(left, right) -> float:
    ranks = [torch.cat(list(s.values())).argsort().argsort().double() for s in (left, right)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


def pair(name, dtype, **options):
    case = CASES[name]
    model = case.model(dtype=torch.float32)
    batches = case.batches((16, 9), dtype=torch.float32)
    exact = singe.score(model, batches, progress=False, **options)
    return exact, singe.score(model, batches, progress=False, autocast=dtype, **options)


@pytest.mark.parametrize("path", ["layer", "network", "neuron"])
@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_is_close(name, path):
    exact, low = pair(name, torch.bfloat16, path=path)
    together = relative_error(torch.cat(list(low.values())), torch.cat(list(exact.values())))
    assert 0 < together <= 0.05, "0: nothing was computed in bf16"
    assert spearman(exact, low) >= 0.95


@pytest.mark.parametrize(
    "options", [{"p": "sum"}, {"p": "fisher"}, {"criterion": "signed"}, {"norm": "outside"}]
)
def test_float16_is_close(options):
    exact, low = pair("residual", torch.float16, **options)
    assert 0 < relative_error(low["0"], exact["0"]) <= 0.02  # 11 bits of mantissa
    assert low.meta["autocast"] == "torch.float16"


def test_only_convolutions_and_linear_layers_are_lowered():
    case = CASES["group_norm"]
    model = case.model(dtype=torch.float32)
    graph = find_groups(model, _first(case))
    network = Network(model, graph.groups, graph.folds)
    lower(network, torch.bfloat16)
    kinds = {type(m): m.weight.dtype for m in network.module.modules() if hasattr(m, "weight")}
    assert kinds == {
        nn.Conv2d: torch.bfloat16, nn.Linear: torch.bfloat16, nn.GroupNorm: torch.float32,
    }  # fmt: skip


def _first(case: Case):
    from singe.data import first_batch

    return first_batch(case.batches(dtype=torch.float32), CPU)


def test_the_model_is_unchanged():
    model = CASES["residual"].model(dtype=torch.float32)
    before = snapshot(model)
    singe.score(
        model, CASES["residual"].batches(dtype=torch.float32), autocast=torch.bfloat16,
        progress=False,
    )  # fmt: skip
    assert_unchanged(model, before)


def test_attention_reads_its_childrens_weights_itself():
    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Linear(5, 8)
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.up, self.head = nn.Linear(8, 12), nn.Linear(12, 4)

        def forward(self, x):
            x = self.embed(x)
            x = x + self.attention(x, x, x, need_weights=False)[0]
            return self.head(self.up(x).relu().mean(1))

    torch.manual_seed(0)
    model = Attends().eval()
    batches = make_batches((3, 5), (8,), dtype=torch.float32)
    exact = singe.score(model, batches, layers=["up"], progress=False)
    low = singe.score(model, batches, layers=["up"], autocast=torch.bfloat16, progress=False)
    assert 0 < relative_error(low["up"], exact["up"]) <= 0.05


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"autocast": torch.float64}, "autocast=torch.float64 is not offered"),
        ({"autocast": True}, "autocast=True is not offered"),
        ({"autocast": torch.bfloat16, "engine": "naive"}, "engine='fused'"),
    ],
)
def test_what_is_refused(options, message):
    case = CASES["mlp"]
    model, batches = case.model(dtype=torch.float32), case.batches(dtype=torch.float32)
    with pytest.raises(singe.OptionError, match=message):
        singe.score(model, batches, progress=False, **options)


def test_a_model_that_reads_a_parameter_itself_is_refused():
    class Projected(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 8)
            self.projection = nn.Parameter(torch.randn(8, 4))

        def forward(self, x):
            return self.b(self.a(x).relu()) @ self.projection

    torch.manual_seed(0)
    model, batches = Projected(), make_batches((6,), (5,), dtype=torch.float32)
    with pytest.raises(singe.OptionError, match="autocast cannot run this model"):
        singe.score(model, batches, layers=["a"], autocast=torch.bfloat16, progress=False)


def test_a_float64_model_is_refused():
    case = Case(residual, (3, 6, 6))
    with pytest.raises(singe.OptionError, match="needs a float32 model"):
        singe.score(case.model(), case.batches(), autocast=torch.bfloat16, progress=False)


def test_gradients_keep_the_layout_of_a_sliced_image():
    """A strided slice in a channels-last network: its gradient must land where it belongs."""

    class Sliced(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 5, 3, padding=1)
            self.head = nn.Linear(5, 4)

        def forward(self, x):
            x = torch.nn.functional.silu(self.a(x))
            x = torch.nn.functional.silu(self.b(x[:, :, ::2, 1::2]))
            return self.head(x[..., 1:, :].mean((2, 3)))

    torch.manual_seed(0)
    model = Sliced().eval()
    batches = make_batches((3, 8, 8), (3,), dtype=torch.float32)
    fused = run_engine(model, batches).scores
    naive = run_engine(model, batches, engine="naive").scores
    for name in naive:
        assert relative_error(fused[name], naive[name]) <= 1e-5  # float32, smooth


@pytest.mark.parametrize("path", ["layer", "neuron"])
def test_a_view_needs_the_contiguous_layout(path):
    """``view`` cannot flatten a channels-last image; the engine takes the layout back."""

    class Viewed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 5, 3), nn.Conv2d(5, 4, 3)
            self.head = nn.Linear(4 * 16, 4)

        def forward(self, x):
            x = torch.nn.functional.silu(self.b(torch.nn.functional.silu(self.a(x))))
            return self.head(x.view(x.shape[0], -1))

    torch.manual_seed(0)
    model = Viewed().eval()
    batches = make_batches((3, 8, 8), (3,), dtype=torch.float32)
    fused = run_engine(model, batches, path=path).scores
    naive = run_engine(model, batches, path=path, engine="naive").scores
    for name in naive:
        assert relative_error(fused[name], naive[name]) <= 1e-5  # float32, smooth
