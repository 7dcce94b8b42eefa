"""What is exported computes what the pruned model computes, and loads without pickle."""

from __future__ import annotations

import copy
import enum
import logging
import sys
import zipfile
from threading import Event, Thread
from typing import NamedTuple

import pytest
import torch
from helpers import (
    one_thread,  # noqa: F401 - autouse
)
from helpers_trained import torchvision_models
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import singe
from singe import export
from singe.errors import ExportError, ModelError
from singe.export import export_onnx, export_pt2, load_pruned, save_pruned
from singe.gates import unregister_layer
from singe.scores import fingerprint

X = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


class Tied(nn.Module):
    """Two layers that share one weight, a LayerNorm without parameters, and a buffer."""

    def __init__(self, hidden: int = 12) -> None:
        super().__init__()
        self.first = nn.Linear(6, hidden)
        self.norm = nn.LayerNorm(hidden, elementwise_affine=False)
        self.middle = nn.Linear(hidden, hidden)
        self.out = nn.Linear(hidden, 6)
        self.again = nn.Linear(hidden, 6, bias=False)
        self.again.weight = self.out.weight
        self.register_buffer("scale", torch.tensor(2.0))

    def forward(self, x):
        hidden = self.middle(self.norm(self.first(x)).relu()).relu()
        return self.out(hidden) + self.scale * self.again(hidden)


def convnet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 12, 3, groups=2), nn.GroupNorm(3, 12), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 4),
    )  # fmt: skip


def pruned(build, inputs, channels=0.6):
    torch.manual_seed(0)
    model = build().eval()
    scores = singe.score(model, [inputs], criterion="random", progress=False)
    plan = singe.plan(model, scores, inputs, channels=channels)
    singe.prune(model, plan, inputs)
    return model, plan


@pytest.mark.parametrize(
    ("build", "inputs"),
    [
        (convnet, X),
        (Tied, X[:, 0, 0, :6]),
        (lambda: torchvision_models().mobilenet_v2(num_classes=5), X),
    ],
    ids=["convnet", "tied", "mobilenet_v2"],
)
def test_a_saved_model_is_rebuilt_from_its_class(build, inputs, tmp_path):
    model, plan = pruned(build, inputs)
    written = save_pruned(model, tmp_path, plan)
    plain = tmp_path / "plain"
    plain.touch()
    assert {p.stat().st_mode for p in written.values()} == {plain.stat().st_mode}
    again = load_pruned(build().eval(), tmp_path)
    assert torch.equal(again(inputs), model(inputs))
    assert singe.Plan.load(written["plan"]) == plan
    for name, module in model.named_modules():  # torch's own printing shows every size
        assert repr(module) == repr(again.get_submodule(name))
    # Replaying the plan on the original gives the same sizes.
    replayed = build().eval()
    replayed_plan = singe.Plan(dict(plan))
    singe.prune(replayed, replayed_plan, inputs)
    shapes = {n: t.shape for n, t in model.state_dict().items()}
    assert {n: t.shape for n, t in replayed.state_dict().items()} == shapes


def test_tied_weights_stay_tied_and_frozen_ones_frozen(tmp_path):
    model, plan = pruned(Tied, X[:, 0, 0, :6])
    save_pruned(model, tmp_path, plan)
    fresh = Tied()
    fresh.first.requires_grad_(False)
    load_pruned(fresh, tmp_path / "model.safetensors")
    assert fresh.again.weight is fresh.out.weight
    assert not fresh.first.weight.requires_grad
    assert fresh.out.weight.requires_grad
    fresh(X[:, 0, 0, :6]).sum().backward()
    assert fresh.out.weight.grad is not None


class Scale(nn.Module):
    """A factor per channel that ``state_dict()`` does not show."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("factor", torch.linspace(0.5, 2.0, channels), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor.view(-1, 1, 1)


def test_buffers_outside_the_state_dict_that_were_cut_are_kept(tmp_path):
    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 6, 3), Scale(6), nn.Conv2d(6, 2, 3)).eval()

    x = torch.randn(2, 3, 8, 8)
    singe.register_layer(Scale, parameters={"factor": 0})
    try:
        model = build()
        singe.prune(model, {"0": [1, 4]}, x)
        files = save_pruned(model, tmp_path)
    finally:
        unregister_layer(Scale)
    loaded = load_pruned(build(), tmp_path)
    assert torch.equal(loaded(x), model(x))
    assert "1.factor" not in loaded.state_dict()
    whole = load_file(files["weights"])
    with safe_open(str(files["weights"]), framework="pt") as content:
        header = content.metadata()
    del whole["1.factor"]
    save_file(whole, files["weights"], header)
    with pytest.raises(ModelError, match=r"1\.factor has another size"):
        load_pruned(build(), tmp_path)


class Window(NamedTuple):
    height: int
    width: int


class Mode(enum.IntEnum):
    MEAN = 1


class Configured(nn.Sequential):
    """With attributes that hold integers, and are read by other names than theirs."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(nn.Conv2d(3, 6, 3), nn.Conv2d(6, 2, 3))
        self.window, self.mode, self.shape = Window(2, 3), Mode.MEAN, torch.Size([3, 8])
        self.nested, self.several, self.flag = ((1, 2), (3, 4)), [1, 2], True

    def forward(self, x: Tensor) -> Tensor:
        assert self.mode.name == "MEAN"
        return super().forward(x) * self.window.height


def test_attributes_that_pruning_leaves_alone_are_left_alone_by_loading(tmp_path):
    x = X[:, :, :8, :8]
    model, fresh = Configured().eval(), Configured().eval()
    before = dict(vars(fresh))
    singe.prune(model, {"0": [1, 4]}, x)
    model.shape, model.nested = torch.Size([3, 6]), ((1, 2), (3, 5))  # as a layer of the user's may
    save_pruned(model, tmp_path)
    assert load_pruned(fresh, tmp_path) is fresh
    assert torch.equal(fresh(x), model(x))
    assert (fresh.shape, fresh.nested) == ((3, 6), ((1, 2), (3, 5)))
    for name in ("window", "mode", "several", "flag"):
        assert vars(fresh)[name] is before[name]
    # Files of earlier versions name them as sizes.
    layers = {"": {"type": "Configured", "sizes": {"window": [2, 3], "mode": 1}, "shapes": {}}}
    export._resize(fresh, layers, set())
    assert fresh.window is before["window"]
    assert fresh.mode is Mode.MEAN


def test_another_architecture_is_refused_and_left_alone(tmp_path):
    model, plan = pruned(convnet, X)
    save_pruned(model, tmp_path, plan)
    for other in (Tied(), nn.Sequential(nn.Linear(3, 3)), convnet().append(nn.Linear(4, 4))):
        before = copy.deepcopy(other.state_dict())
        with pytest.raises(ModelError, match="does not fit"):
            load_pruned(other, tmp_path)
        after = other.state_dict()
        assert list(before) == list(after)
        assert all(torch.equal(before[k], after[k]) for k in before)


def test_a_model_of_fewer_classes_does_not_get_the_saved_head(tmp_path):
    build = torchvision_models().mobilenet_v2
    model, plan = pruned(lambda: build(num_classes=5), X)
    save_pruned(model, tmp_path, plan)
    other = build(num_classes=3)
    with pytest.raises(ModelError, match=r"classifier\.1\.weight is larger there"):
        load_pruned(other, tmp_path)
    assert other.classifier[1].out_features == 3


def test_a_model_that_was_pruned_twice_is_rebuilt_from_its_class(tmp_path):
    model, plan = pruned(convnet, X)
    save_pruned(model, tmp_path, plan)
    again = load_pruned(convnet().eval(), tmp_path)
    first = next(iter(plan))
    second = singe.Plan({first: [0]}, {"fingerprint": fingerprint(again)})
    singe.prune(again, second, X)
    save_pruned(again, tmp_path / "again", second)
    assert torch.equal(load_pruned(convnet().eval(), tmp_path / "again")(X), again(X))


def test_a_file_where_the_folder_should_be(tmp_path):
    (tmp_path / "taken").write_text("")
    for folder in (tmp_path / "taken", tmp_path / "taken" / "below" / "it", "/dev/null/x"):
        with pytest.raises(ModelError, match=r"save_pruned writes a folder, and .* cannot be one"):
            save_pruned(convnet(), folder)


class WithState(nn.Linear):
    def get_extra_state(self):
        return {"calls": 7}

    def set_extra_state(self, state):
        pass


def test_state_that_is_no_tensor_cannot_be_saved(tmp_path):
    with pytest.raises(ModelError, match=r"_extra_state \(get_extra_state\)"):
        save_pruned(WithState(3, 3), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", [b"", b"not safetensors", None])
def test_a_file_that_is_no_pruned_model(content, tmp_path):
    path = tmp_path / "model.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ModelError, match="cannot read weights"):
        load_pruned(convnet(), path)


def test_scores_are_no_model(tmp_path):
    model = convnet().eval()
    scores = singe.score(model, [X], criterion="magnitude", progress=False)
    scores.save(tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="no model that save_pruned wrote"):
        load_pruned(model, tmp_path)


def test_pt2_runs_alone_for_any_batch_size(tmp_path):
    model, _ = pruned(convnet, X)
    model.train()
    path = export_pt2(model, X[:1], tmp_path / "model.pt2")
    assert model.training
    program = torch.export.load(path).module()
    for size in (1, 2, 3):
        torch.testing.assert_close(program(X[:size]), model.eval()(X[:size]))
    pickles = [n for n in zipfile.ZipFile(path).namelist() if "sample_inputs" in n]
    sizes = {n: zipfile.ZipFile(path).getinfo(n).file_size for n in pickles}
    assert all(size == 0 for size in sizes.values()), sizes
    assert [p.name for p in tmp_path.iterdir()] == ["model.pt2"]


def test_onnx_equals_the_model_for_any_batch_size(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, _ = pruned(lambda: torchvision_models().resnet18(num_classes=5), X)
    path = tmp_path / "model.onnx"
    assert export_onnx(model, X[:1], path) <= 1e-4
    runner = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (name,) = [i.name for i in runner.get_inputs()]
    for size in (1, 3):
        (got,) = runner.run(None, {name: X[:size].numpy()})
        torch.testing.assert_close(torch.from_numpy(got), model(X[:size]), rtol=1e-4, atol=1e-4)


def test_a_different_onnx_is_not_written(tmp_path):
    pytest.importorskip("onnxscript")
    with pytest.raises(ExportError, match="off by"):
        export_onnx(convnet().eval(), X, tmp_path / "model.onnx", tolerance=-1.0)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("samples", [1, 2])
def test_inputs_that_are_not_per_sample_keep_their_size(samples, tmp_path):
    class Mixed(nn.Module):
        """Mixes five tokens as a table says, which is one for all samples."""

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 4)

        def forward(self, x, table):
            return self.layer(x).transpose(1, 2) @ table

    model, table = Mixed().eval(), torch.eye(5)
    path = export_pt2(model, (torch.randn(samples, 5, 6), table), tmp_path / "model.pt2")
    x = torch.randn(3, 5, 6)
    torch.testing.assert_close(torch.export.load(path).module()(x, table), model(x, table))


def test_keyword_inputs(tmp_path):
    class Keywords(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = convnet()

        def forward(self, pixel_values):
            return {"logits": self.body(pixel_values)}

    model = Keywords().eval()
    program = torch.export.load(
        export_pt2(model, {"pixel_values": X}, tmp_path / "model.pt2")
    ).module()
    torch.testing.assert_close(program(pixel_values=X)["logits"], model(X)["logits"])


def test_arguments_that_are_no_tensors(tmp_path):
    class Switched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = convnet()

        def forward(self, x, factor=1.0, return_dict=True):
            return {"logits": factor * self.body(x)} if return_dict else factor * self.body(x)

    model = Switched().eval()
    scaled = (X[:1], torch.tensor(2.0))  # no batch of anything
    for inputs in ((X, 2.0), scaled, {"x": X, "return_dict": False}):
        program = torch.export.load(export_pt2(model, inputs, tmp_path / "model.pt2")).module()
        positional, named = (inputs, {}) if isinstance(inputs, tuple) else ((), inputs)
        expected, got = model(*positional, **named), program(*positional, **named)
        torch.testing.assert_close(got, expected)


def test_onnx_whose_outputs_are_not_all_finite(tmp_path):
    """Masked classes are compared as well; what is infinite on one side only is no small difference."""
    pytest.importorskip("onnxscript")

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = convnet()

        def forward(self, x):
            out = self.body(x)
            return torch.cat([out, torch.full_like(out[:, :1], -torch.inf)], 1)

    assert export_onnx(Masked().eval(), X, tmp_path / "model.onnx") <= 1e-4
    two, minus = torch.tensor([1.0, 2.0]), torch.tensor([1.0, -torch.inf])
    assert export._relative(minus, minus) == 0.0
    assert export._relative(two / 8, two / 4) == 0.25, "beside small outputs it is the difference"
    assert export._relative(minus, torch.tensor([1.5, -torch.inf])) == 0.5
    for one, other in ((two, minus), (minus, two), (minus, -minus), (two, two * torch.nan)):
        assert export._relative(one, other) == float("inf")


def test_what_onnxruntime_cannot_run_is_told(tmp_path):
    pytest.importorskip("onnxscript")
    with pytest.raises(ExportError, match="onnxruntime, cannot handle this Sequential"):
        export_onnx(convnet().eval().bfloat16(), X.bfloat16(), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_not_the_models_fault(tmp_path, monkeypatch):
    pytest.importorskip("onnxscript")

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("torch.onnx.export", full)
    with pytest.raises(OSError, match=r"No space left on device: .*model\.onnx"):
        export_onnx(convnet().eval(), X, tmp_path / "model.onnx")


@pytest.mark.parametrize("call", [lambda p: save_pruned(5, p), lambda p: load_pruned(5, p)])
def test_something_that_is_no_model(call, tmp_path):
    with pytest.raises(singe.OptionError, match=r"model must be an nn\.Module, got int"):
        call(tmp_path)


def branches(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x) if x.sum() > 0 else x


def does_not_fit(layer: nn.Module, x: Tensor) -> Tensor:
    return torch.bmm(x[None], layer(x)[None])


@pytest.mark.parametrize("forward", [branches, does_not_fit])
def test_a_model_that_cannot_be_captured(forward, tmp_path, capfd, monkeypatch):
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            return forward(self.layer, x)

    logged, handler = [], logging.Handler()
    monkeypatch.setattr(handler, "emit", logged.append)
    for name in ("torch", "torch._subclasses.fake_tensor"):  # the second keeps to itself
        monkeypatch.setattr(logging.getLogger(name), "handlers", [handler])
    with pytest.raises(ExportError, match=r"cannot capture this Own"):
        export_pt2(Own(), torch.ones(2, 4), tmp_path / "model.pt2")
    assert not logged
    assert capfd.readouterr() == ("", ""), (
        "torch prints the graph as far as it came, and logs errors"
    )


def test_two_threads_that_export_leave_standard_error_as_it_was():
    before, level = sys.stderr, logging.root.manager.disable
    inside, done = Event(), Event()

    def other() -> None:
        with export._quiet():
            inside.set()
            done.wait(10)

    thread = Thread(target=other)
    with export._quiet():
        thread.start()
        inside.wait(0.2)
    done.set()
    thread.join()
    assert sys.stderr is before
    assert logging.root.manager.disable == level


def test_onnx_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ExportError, match="pip install onnx onnxscript onnxruntime"):
        export_onnx(convnet(), X, tmp_path / "model.onnx")
