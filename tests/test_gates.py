"""Norms of other dialects, layer scales, attention kernels and layers of the user's own."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    CLASSES,
    assert_close,
    batch_of,
    make_batches,
    one_thread,  # noqa: F401 - autouse
    randomise,
    relative_error,
    run_engine,
    snapshot,
)
from helpers_networks import Head
from helpers_trained import torchvision_models
from torch import Tensor, nn

import singe
from singe.gates import dialect, unregister_layer, weighted_norm
from singe.network import Network, set_gates
from singe.removal import remove_units
from singe.units import find_groups


class LayerNorm2d(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class NormAct(nn.BatchNorm2d):
    """As timm's: the activation is part of the norm."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))


class Odd(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x


class StandardisedConv(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias, padding=self.padding)


class Scaled(nn.Module):
    """A ConvNeXt block in small: residual stream, LayerNorm2d in it, layer scale."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm, self.inner = LayerNorm2d(channels), nn.Conv2d(channels, channels, 1)
        self.scale = nn.Parameter(torch.linspace(0.5, 2, channels).view(-1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.inner(self.norm(x))


class RMSNorm(nn.Module):
    """The worked example of docs/adapters.md."""

    def __init__(self, channels: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight, self.eps, self.channels = (
            nn.Parameter(torch.rand(channels) + 0.5),
            eps,
            channels,
        )

    def forward(self, x: Tensor) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt() * self.weight


def gated_rms_norm(module, forward, x, gate):
    """The mean square is one over the channels that are left."""
    squares = x.square() / gate.clamp(min=1e-12)
    mean_square = squares.sum(-1, keepdim=True) / gate.sum()
    return x * (mean_square + module.eps).rsqrt() * module.weight


def assert_sound(model: nn.Module, shape, groups: int) -> None:
    """As many groups as named, gates are removals, and the engines agree."""
    batches = make_batches(shape, (3,))
    graph = find_groups(model, batch_of(batches[0]))
    assert len(graph.groups) == groups, graph.rejected
    found = run_engine(model, batches, criterion="ablation", graph=graph).scores
    x, y = batches[0]
    full = F.cross_entropy(model(x), y).item()
    for group in graph.groups:
        for unit in (0, group.n_units - 1):
            small = copy.deepcopy(model)
            singe.prune(small, singe.Plan({group.name: [unit]}), x)
            loss = F.cross_entropy(small(x), y).item()
            assert full + found[group.name][unit].item() == pytest.approx(loss, rel=1e-9)
    naive = run_engine(model, batches, engine="naive", graph=graph).scores
    assert_close(run_engine(model, batches, graph=graph).scores, naive, 1e-9)


def test_norms_of_other_dialects():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 5, 3), LayerNorm2d(5), nn.Conv2d(5, 4, 1), NormAct(4), nn.Conv2d(4, 6, 1),
        Scaled(6), Head(6),
    )  # fmt: skip
    assert_sound(randomise(model.double()), (3, 6, 6), 3)


def test_dialects_are_found_by_running_the_norm():
    assert dialect(LayerNorm2d(4)).dim == 1
    assert dialect(nn.LayerNorm(4)).dim == -1
    assert dialect(randomise(NormAct(4))).tail(torch.tensor(1.0)) == F.silu(torch.tensor(1.0))
    assert dialect(randomise(Odd(4))) is None
    plain = randomise(NormAct(4))
    plain.weight = plain.bias = None
    assert dialect(plain).tail(torch.tensor(1.0)) == F.silu(torch.tensor(1.0))


@pytest.mark.parametrize("layer", [Odd(5), StandardisedConv(5, 5, 3, padding=1)])
def test_layers_that_do_more_than_their_class_are_left_out(layer):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 5, 3), nn.ReLU(), layer, nn.ReLU(), nn.Conv2d(5, 4, 1), Head(4)
    )
    graph = find_groups(randomise(model.double()), batch_of(make_batches((3, 6, 6), (2,))[0]))
    assert any("does more than its base class" in why for why in graph.rejected.values())
    assert [g.name for g in graph.groups][-1] == "4", "what does not touch it stays"


def test_torchs_fused_attention_kernels_have_no_part_in_scoring():
    torch.manual_seed(0)
    options = {"image_size": 16, "patch_size": 8, "num_layers": 2, "num_heads": 2, "hidden_dim": 8}
    model = torchvision_models().VisionTransformer(**options, mlp_dim=12, num_classes=CLASSES)
    nn.init.normal_(model.heads.head.weight)
    model = randomise(model.double())
    before, enabled = snapshot(model), torch.backends.mha.get_fastpath_enabled()
    assert_sound(model, (3, 16, 16), 4)
    assert torch.backends.mha.get_fastpath_enabled() == enabled
    assert before["attributes"] == snapshot(model)["attributes"]


SMALL_SWIN = {
    "patch_size": [4, 4], "embed_dim": 12, "depths": [1, 1, 1], "num_heads": [2, 2, 2],
    "window_size": [4, 4],
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "groups", "options"),
    [("shufflenet_v2_x0_5", 18, {}), ("convnext_tiny", 22, {}), ("SwinTransformer", 6, SMALL_SWIN)],
)
def test_more_of_torchvision(name, groups, options):
    """The groups that docs/models.md counts, half of all their units at once, removed and gated.

    Window partitions, patch merging and channel shuffles: the graph must not take them for flattenings.
    """
    torch.manual_seed(0)
    model = getattr(torchvision_models(), name)(num_classes=CLASSES, **options)
    model = randomise(model.double())
    x, _ = make_batches((3, 32, 32), (2,))[0]
    batch = batch_of((x,))
    graph = find_groups(model, batch)
    assert len(graph.groups) == groups
    half = [(g, list(range(g.n_units // 2))) for g in graph.groups]
    network = Network(model, graph.groups, graph.folds)
    with torch.no_grad():
        set_gates(network, half, 0.0)
        gated = network(batch)
    remove_units(model, batch, half)
    assert relative_error(gated, model(x)) < 1e-9


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_recurrent_layers_are_refused_clearly(kind):
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.front, self.cell = nn.Linear(5, 6), kind(6, 7, batch_first=True)
            self.middle, self.head = nn.Linear(7, 8), nn.Linear(8, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.middle(self.cell(self.front(x))[0].mean(1)).relu())

    torch.manual_seed(0)
    model, batches = Recurrent().double().eval(), make_batches((3, 5), (2,))
    graph = find_groups(model, batch_of(batches[0]))
    assert [g.name for g in graph.groups] == ["middle"]
    assert "feed back into each other over time" in graph.rejected["cell"]
    with pytest.raises(singe.ModelError, match=f"it is a {kind.__name__}"):
        singe.score(model, batches, layers=["cell"], progress=False)


def test_matrices_of_somebodys_own_are_named():
    class Transposed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.rand(6, 5))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight

    torch.manual_seed(0)
    model = nn.Sequential(
        Transposed(), nn.ReLU(), nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, CLASSES)
    )
    graph = find_groups(model.double(), batch_of(make_batches((6,), (2,))[0]))
    assert [g.name for g in graph.groups] == ["2"]
    assert "it is a Transposed" in graph.rejected["0"]


# ---------------------------------------------------------------------- layers of the user's own


def rms_network() -> nn.Module:
    torch.manual_seed(0)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.norm = nn.Linear(5, 6), RMSNorm(6)
            self.up, self.down = nn.Linear(6, 7), nn.Linear(7, 6)
            self.head = nn.Linear(6, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            x = self.embed(x)
            x = x + self.down(F.silu(self.up(self.norm(x))))
            return self.head(x.mean(1))

    return Model().double().eval()


@pytest.fixture
def rms_norm_registered():
    singe.register_layer(
        RMSNorm, parameters={"weight": 0}, sizes=("channels",), gate=gated_rms_norm, channel_dim=-1
    )
    yield
    unregister_layer(RMSNorm)


def test_a_registered_layer(rms_norm_registered):
    model = rms_network()
    assert_sound(model, (3, 5), 2)
    model.norm.requires_grad_(False)
    singe.prune(model, singe.Plan({"embed": [0, 3]}), torch.randn(2, 3, 5, dtype=torch.float64))
    assert model.norm.weight.shape == (4,)
    assert model.norm.channels == 4
    assert not model.norm.weight.requires_grad


def test_without_registration_the_group_is_left_out():
    graph = find_groups(rms_network(), batch_of(make_batches((3, 5), (2,))[0]))
    assert [g.name for g in graph.groups] == ["up"]


def test_a_wrong_gate_is_found_out():
    singe.register_layer(RMSNorm, parameters={"weight": 0}, channel_dim=-1)  # the mean sees zeros
    try:
        graph = find_groups(rms_network(), batch_of(make_batches((3, 5), (2,))[0]))
        assert [g.name for g in graph.groups] == ["up"]
        assert "differ" in " ".join(graph.rejected.values())
    finally:
        unregister_layer(RMSNorm)


@pytest.mark.parametrize(
    ("layer", "options"),
    [(3, {"parameters": {"weight": 0}}), (RMSNorm, {"parameters": {}}),
     (RMSNorm, {"parameters": {"weight": 0}, "channel_dim": 2})],
)  # fmt: skip
def test_registration_is_checked(layer, options):
    with pytest.raises(singe.OptionError):
        singe.register_layer(layer, **options)


@pytest.mark.parametrize(
    "norm", [nn.LayerNorm(4), nn.GroupNorm(1, 4), nn.GroupNorm(2, 4)], ids=["layer", "group", "two"]
)
def test_norms_count_a_channel_as_often_as_its_gate_is_open(norm):
    """A gate of 1/2 beside gates of 1 is a channel that stands once where the others stand twice."""
    norm = norm.double()
    randomise(norm)
    gate, times = torch.tensor([1.0, 0.5, 0.75, 0.75]).double(), torch.tensor([4, 2, 3, 3])
    dim = -1 if isinstance(norm, nn.LayerNorm) else 1
    values = torch.randn((3, 5, 4) if dim == -1 else (3, 4, 5), dtype=torch.float64)
    many = values.repeat_interleave(times, dim)
    if dim == -1:
        expected = F.layer_norm(many, [12], eps=norm.eps)
    else:
        expected = F.group_norm(many, norm.num_groups, eps=norm.eps)
    expected = expected.index_select(dim, times.cumsum(0) - 1)
    expected = (expected.movedim(dim, -1) * norm.weight + norm.bias) * gate
    gated = (values.movedim(dim, -1) * gate).movedim(-1, dim)
    found = weighted_norm(norm, gated, gate).movedim(dim, -1)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
