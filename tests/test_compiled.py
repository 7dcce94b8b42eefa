"""``compile=True``: the same scores through ``torch.compile``, and a plain pass where it cannot.

Inductor takes seconds for every pass, so it has a few of them; the others are traced, folded and
differentiated in the same way, and then run by torch (backend ``aot_eager``).
"""

from __future__ import annotations

import functools
import warnings

import pytest
import torch
from helpers import (
    assert_unchanged,
    make_batches,
    one_thread,  # noqa: F401 - autouse
    relative_error,
    run_engine,
    snapshot,
)
from helpers_networks import CASES
from helpers_trained import trained_resnet20
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

import singe
from singe.folding import fold_variants

NETWORKS = ["residual", "two_blocks", "group_norm", "tokens", "squeeze_excite", "depthwise"]


@pytest.fixture
def without_inductor(monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))


def compare(model, batches, tolerance, **options):
    """The compiled scores against the definition's; every pass must have run compiled.

    The first two uses of a pass are set against the plain one, so there are four batches of a size.
    """
    naive = run_engine(model, batches, engine="naive", **options).scores
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*runs uncompiled.*")
        result = run_engine(model, batches, compile=True, **options)
    assert result.meta["stacked"]
    assert result.meta["compiled"] > 0
    assert result.meta["uncompiled"] == 0
    for name in naive:
        assert relative_error(result.scores[name], naive[name]) <= tolerance, name


@pytest.mark.usefixtures("without_inductor")
@pytest.mark.parametrize("name", NETWORKS)
def test_compiled_is_the_definition(name):
    case = CASES[name]
    compare(case.model(), case.batches((3, 3, 3, 3, 2)), 1e-9, path="network")


@pytest.mark.usefixtures("without_inductor")
@pytest.mark.parametrize("precision", ["highest", "high"])
def test_what_was_checked_is_what_runs(precision):
    """Once: Dynamo compiles anew where products have another precision than when it was checked."""
    before = torch.get_float32_matmul_precision()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch.set_float32_matmul_precision(precision)
    try:
        case = CASES["residual"]
        run_engine(case.model(), case.batches((3,) * 5), compile=True, path="network")
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("name", ["residual", "tokens"])
def test_inductor_is_the_definition(name):
    case = CASES[name]
    compare(case.model(), case.batches((3, 3, 3, 3)), 1e-9, path="network")


@pytest.mark.usefixtures("without_inductor")
@pytest.mark.parametrize(
    "options",
    [
        {"path": "layer"},
        {"path": "neuron"},
        {"path": "layer", "p": "sum"},
        {"path": "layer", "p": "fisher"},
        {"path": "network", "criterion": "ig", "norm": "outside"},
        {"path": "neuron", "criterion": "signed"},
        {"path": "network", "objective": "kl"},
    ],
    ids=str,
)
def test_every_kind_of_pass(options):
    case = CASES["residual"]
    compare(case.model(), case.batches((3, 3, 3, 3)), 1e-9, **options)


@pytest.mark.usefixtures("without_inductor")
def test_a_trained_network():
    model = trained_resnet20()
    batches = make_batches((3, 32, 32), (4, 4, 4, 4), classes=10)
    compare(model, batches, 1e-9, path="network", quadrature=2)


def test_reduced_precision():
    case = CASES["residual"]
    model = case.model(dtype=torch.float32)
    batches = case.batches((6, 6, 6, 6), dtype=torch.float32)
    options = {"path": "network", "progress": False}
    exact = singe.score(model, batches, **options)
    low = singe.score(model, batches, autocast=torch.bfloat16, compile=True, **options)
    assert (low.meta["compiled"], low.meta["uncompiled"]) == (1, 0)
    for name in exact:
        # bf16 has 8 bits of mantissa; see test_reduced_precision.py.
        assert 0 < relative_error(low[name], exact[name]) <= 0.05


class Sorts(nn.Module):
    """Its graph depends on the numbers: no tracer can follow."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 5), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu()
        return self.b(x if float(x.detach().sum()) > 0 else -x)


def test_what_cannot_be_compiled_runs_plainly_and_says_so():
    torch.manual_seed(0)
    model, batches = Sorts().eval(), make_batches((6,), (5, 4), dtype=torch.float32)
    before = snapshot(model)
    with pytest.warns(UserWarning, match="torch.vmap cannot run this model"):
        plain = singe.score(model, batches, layers=["a"], progress=False)
    with pytest.warns(UserWarning, match="torch.vmap cannot run this model"):
        compiled = singe.score(model, batches, layers=["a"], compile=True, progress=False)
    assert torch.equal(plain["a"], compiled["a"])
    assert_unchanged(model, before)


class Scaled(nn.Module):
    """A layer scale: a parameter of its own among images of five dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 5, 3, padding=1), nn.Conv2d(5, 3, 3, padding=1)
        self.scale = nn.Parameter(torch.rand(3, 1, 1))
        self.head = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((x + self.scale * self.b(self.a(x).relu())).mean((2, 3)))


@pytest.mark.usefixtures("without_inductor")
def test_a_layer_scale_folds():
    torch.manual_seed(0)
    compare(Scaled().double().eval(), make_batches((3, 6, 6), (2, 2, 2, 2)), 1e-9, layers=["a"])


class Hidden(nn.Module):
    """Does something that no trace of its tensors shows."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.a, self.b, self.what = nn.Linear(6, 5), nn.Linear(5, 4), what

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        x = self.a(x)
        if self.what == "no_grad":
            with torch.no_grad():
                scale = x.square().sum(-1, keepdim=True).sqrt()
            return self.b(x / (scale + 1))
        assert lengths is not None
        return self.b(x.tanh() * float(lengths.tolist()[0]))


@pytest.mark.usefixtures("without_inductor")
@pytest.mark.parametrize("what", ["no_grad", "host"])
def test_what_a_trace_does_not_show_is_noticed(what):
    torch.manual_seed(0)
    model = Hidden(what).double().eval()
    batches = make_batches((6,), (3, 3, 3, 3))
    if what == "host":
        batches = [
            {"x": x, "lengths": torch.full((3,), 1.0 + i), "labels": y}
            for i, (x, y) in enumerate(batches)
        ]
    plain = singe.score(model, batches, layers=["a"], progress=False)
    with pytest.warns(UserWarning, match="a pass runs uncompiled.*NotTheSame"):
        compiled = singe.score(model, batches, layers=["a"], compile=True, progress=False)
    assert torch.equal(plain["a"], compiled["a"])
    assert (compiled.meta["compiled"], compiled.meta["uncompiled"]) == (0, 1)


@pytest.mark.usefixtures("without_inductor")
def test_many_shapes_are_not_all_compiled():
    case = CASES["tokens"]
    model, batches = case.model(), case.batches(tuple(range(1, 13)))
    with pytest.warns(UserWarning, match="more than 8 shapes"):
        scores = singe.score(model, batches, path="network", compile=True, progress=False)
    assert (scores.meta["compiled"], scores.meta["uncompiled"]) == (8, 4)


def test_a_compiler_that_fails_costs_speed_only(monkeypatch):
    def broken(*args: object, **kwargs: object) -> object:
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(torch, "compile", broken)
    case = CASES["residual"]
    model, batches = case.model(), case.batches((4, 4))
    before = snapshot(model)
    plain = singe.score(model, batches, progress=False)
    with pytest.warns(UserWarning, match="a pass runs uncompiled.*no C.. compiler"):
        compiled = singe.score(model, batches, compile=True, progress=False)
    for name in plain:
        assert torch.equal(plain[name], compiled[name])
    assert_unchanged(model, before)


def test_a_failure_without_a_word(monkeypatch):
    def broken(*args: object, **kwargs: object) -> object:
        raise NotImplementedError

    monkeypatch.setattr(torch, "compile", broken)
    case = CASES["mlp"]
    with pytest.warns(UserWarning, match="a pass runs uncompiled.*NotImplementedError"):
        singe.score(case.model(), case.batches(), compile=True, progress=False)


def test_a_checkpoint_cannot_keep_its_promise(tmp_path):
    case = CASES["mlp"]
    with pytest.raises(singe.OptionError, match="choose one of them"):
        singe.score(
            case.model(), case.batches(), compile=True, checkpoint=tmp_path / "s", progress=False
        )


def test_the_definition_has_nothing_to_compile():
    case = CASES["mlp"]
    with pytest.raises(singe.OptionError, match="engine='fused'"):
        singe.score(case.model(), case.batches(), engine="naive", compile=True, progress=False)


def test_folding_keeps_the_values():
    """Shared, own and broadcast operands of every rank; a view that is no folding stays."""

    def run(own: Tensor, shared: Tensor, gate: Tensor, scalar: Tensor) -> list[Tensor]:
        own = own.view(2, 3, 4, 5, 5)
        y = torch.relu(gate.view(2, 1, 4, 1, 1) * own + shared) * scalar
        z = torch.sigmoid(y) - shared[:, :, :1]
        swapped = z.permute(1, 0, 2, 3, 4).reshape(6, 4, 5, 5)
        return [z.permute(0, 1, 2, 3, 4).reshape(6, 4, 5, 5), swapped, y, z.reshape(2, 12, 5, 5)]

    torch.manual_seed(0)
    inputs = torch.randn(6, 4, 5, 5), torch.randn(3, 4, 5, 5), torch.randn(2, 4), torch.randn(())
    traced = make_fx(run)(*inputs)
    expected = traced(*inputs)
    fold_variants(traced)
    for found, wanted in zip(traced(*inputs), expected, strict=True):
        assert torch.equal(found, wanted)
    elementwise = (torch.ops.aten.relu.default, torch.ops.aten.sigmoid.default)
    folded = [n for n in traced.graph.nodes if n.target in elementwise]
    assert next(n.args[0].target for n in folded) is torch.ops.aten.add.Tensor
    views = [n for n in traced.graph.nodes if n.target is torch.ops.aten.view.default]
    assert not any(tuple(n.args[1]) == (2, 3, 4, 5, 5) and n.args[0].op == "placeholder"
                   for n in views)  # fmt: skip
