"""Models by name: every source, and what is said about one that does not work."""

from __future__ import annotations

import pickle
import sys

import pytest
import torch
from helpers import (
    one_thread,  # noqa: F401 - autouse
)
from helpers_trained import torchvision_models
from safetensors.torch import save_file
from torch import nn

import singe
from singe.cli.models import load_model
from singe.errors import ModelError, OptionError
from singe.export import load_pruned, save_pruned

FACTORY = """
from torch import nn
import neighbour

def make():
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(6, neighbour.CLASSES))

def broken():
    raise ZeroDivisionError("oops")

def number():
    return 3

def named():
    return nn.ModuleDict({"module": nn.Linear(2, 3), "head": nn.Linear(3, neighbour.CLASSES)})
"""


@pytest.fixture
def factory(tmp_path):
    (tmp_path / "neighbour.py").write_text("CLASSES = 4\n")
    (tmp_path / "net.py").write_text(FACTORY)
    return f"{tmp_path / 'net.py'}:make"


def test_a_factory_finds_its_neighbours_and_its_weights(factory, tmp_path):
    model = load_model(factory)
    assert not model.training
    assert model[4].out_features == 4
    state = {k: torch.full_like(v, 0.5) for k, v in model.state_dict().items()}
    save_file(state, tmp_path / "w.safetensors")
    torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}}, tmp_path / "w.pt")
    for name in ("w.safetensors", "w.pt"):
        loaded = load_model(factory, str(tmp_path / name))
        assert all((v == 0.5).all() for v in loaded.state_dict().values())


def test_a_file_of_the_users_hides_nothing_from_later_imports(factory, monkeypatch):
    """Its folder comes last then: what it imports later is found, what others import is not its own."""
    before = list(sys.path)
    load_model(factory)
    with pytest.raises(ModelError):
        load_model(factory.replace(":make", ":broken"))
    assert sys.path == [*before, factory.rpartition("/")[0]]
    monkeypatch.setattr(sys, "path", before)


def test_a_layer_called_module_is_no_wrapper(factory, tmp_path):
    named = factory.replace(":make", ":named")
    state = {k: torch.full_like(v, 0.5) for k, v in load_model(named).state_dict().items()}
    torch.save(state, tmp_path / "w.pt")
    loaded = load_model(named, str(tmp_path / "w.pt")).state_dict()
    assert all(torch.equal(loaded[k], v) for k, v in state.items())


def test_a_pruned_model_goes_on(factory, tmp_path):
    model = load_model(factory)
    plan = singe.Plan({"0": [1, 4]})
    singe.prune(model, plan, torch.randn(2, 3, 8, 8))
    save_pruned(model, tmp_path / "run", plan)
    again = load_model(factory, str(tmp_path / "run"))
    assert again[0].out_channels == 4
    x = torch.randn(1, 3, 8, 8)
    assert torch.equal(again(x), model(x))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_weights_that_would_run_code_are_refused(factory, tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("ran",))

    path = tmp_path / "evil.pt"
    path.write_bytes(pickle.dumps({"w": Evil()}))
    with pytest.raises(ModelError):
        load_model(factory, str(path))
    torch.save({"w": Evil()}, path)
    with pytest.raises(ModelError, match="would run code"):
        load_model(factory, str(path))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("w.safetensors", b"junk", "cannot read weights"),
        ("w.pt", b"", "cannot read weights"),
        ("missing.pt", None, "cannot read weights"),
        ("missing.safetensors", None, "cannot read weights"),
    ],
)
def test_unreadable_weights(factory, tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelError, match=message):
        load_model(factory, str(tmp_path / name))


def test_weights_of_another_model(factory, tmp_path):
    save_file(nn.Linear(2, 3).state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(ModelError, match=r"does not fit.*missing"):
        load_model(factory, str(tmp_path / "w.safetensors"))
    torch.save([1, 2], tmp_path / "w.pt")
    with pytest.raises(ModelError, match="no state dict"):
        load_model(factory, str(tmp_path / "w.pt"))


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("resnet18", OptionError, "must be torchvision:NAME"),
        ("nowhere/net.py:make", ModelError, "no file"),
        ("hf:nowhere", ModelError, "no local folder"),
    ],
)
def test_a_wrong_name(name, error, message):
    with pytest.raises(error, match=message):
        load_model(name)


@pytest.mark.parametrize(
    ("function", "message"),
    [("mak", "no function 'mak'; it has: .*make"), ("broken", "ZeroDivisionError: oops"),
     ("number", "returned a int")],
)  # fmt: skip
def test_a_wrong_function(factory, function, message):
    with pytest.raises(ModelError, match=message):
        load_model(factory.replace(":make", f":{function}"))


def test_torchvision_by_name_and_head(tmp_path):
    torchvision_models()
    model = load_model("torchvision:resnet18", num_classes=3)
    assert model.fc.out_features == 3
    path = tmp_path / "w.safetensors"
    save_file(model.state_dict(), path)
    same = load_model("torchvision:resnet18", str(path))  # the weights say how many
    assert all(torch.equal(v, same.state_dict()[k]) for k, v in model.state_dict().items())
    said: list[str] = []
    other = load_model("torchvision:resnet18", str(path), num_classes=5, notify=said.append)
    assert other.fc.out_features == 5
    assert torch.equal(other.conv1.weight, model.conv1.weight)
    assert "fc is new and untrained" in said[0]
    with pytest.raises(ModelError, match="did you mean resnet18"):
        load_model("torchvision:resnet81")


def test_torchvisions_own_weights(monkeypatch):
    """Taken the library's way, which mends old names and sets what the weights expect."""
    published = torchvision_models().get_model("resnet18")
    monkeypatch.setattr(
        "torchvision.models._api.load_state_dict_from_url", lambda *_, **__: published.state_dict()
    )
    whole = load_model("torchvision:resnet18", "pretrained")
    assert all(torch.equal(t, whole.state_dict()[n]) for n, t in published.state_dict().items())
    told: list[str] = []
    other = load_model("torchvision:resnet18", "pretrained", 5, told.append)
    assert other.fc.out_features == 5
    assert torch.equal(other.conv1.weight, published.conv1.weight)
    assert "fc is new and untrained" in told[0]


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_torchvisions_own_weights_of_networks_with_auxiliary_heads(name, monkeypatch):
    """Those heads are not among the weights, or as wide as before: they are left out."""
    published = torchvision_models().get_model(name, init_weights=False)
    monkeypatch.setattr(
        "torchvision.models._api.load_state_dict_from_url", lambda *_, **__: published.state_dict()
    )
    model = load_model(f"torchvision:{name}", "pretrained", 5)
    assert model.fc.out_features == 5
    assert model.transform_input
    assert not model.aux_logits
    first = next(iter(model.state_dict()))
    assert torch.equal(model.state_dict()[first], published.state_dict()[first])


@pytest.mark.parametrize(
    ("name", "head"), [("mnasnet0_5", "classifier.1"), ("squeezenet1_1", "classifier.1")]
)
def test_heads_of_other_kinds_and_states_without_a_version(tmp_path, name, head):
    """MNASNet asks its state for a version, which safetensors do not keep; SqueezeNet's head is 1x1."""
    published = torchvision_models().get_model(name, num_classes=7)
    save_file(published.state_dict(), tmp_path / "w.safetensors")
    assert len(load_model(f"torchvision:{name}", str(tmp_path / "w.safetensors")).state_dict())
    other = load_model(f"torchvision:{name}", str(tmp_path / "w.safetensors"), 5)
    assert len(other.get_submodule(head).weight) == 5


def test_a_head_that_reads_another_width_is_another_model(tmp_path):
    state = load_model("torchvision:resnet18", None, 3).state_dict()
    save_file(state | {"fc.weight": torch.zeros(3, 256)}, tmp_path / "w.safetensors")
    with pytest.raises(ModelError, match="does not fit this ResNet"):
        load_model("torchvision:resnet18", str(tmp_path / "w.safetensors"))


def test_old_weights_lack_the_counts_of_batches(tmp_path):
    model = load_model("torchvision:resnet18", None, 3)
    old = {k: v for k, v in model.state_dict().items() if not k.endswith("num_batches_tracked")}
    save_file(old, tmp_path / "old.safetensors")
    again = load_model("torchvision:resnet18", str(tmp_path / "old.safetensors"))
    assert torch.equal(again.fc.weight, model.fc.weight)


@pytest.mark.parametrize("asked", [5, 10, 12, None])
@pytest.mark.parametrize(
    ("name", "head"), [("resnet18", "fc"), ("squeezenet1_1", "classifier.1")], ids=["linear", "1x1"]
)
def test_a_pruned_model_keeps_its_classes_and_others_are_told(name, head, asked, tmp_path):
    model = load_model(f"torchvision:{name}", None, 10)
    save_pruned(model, tmp_path / "pruned", singe.Plan({}))
    told: list[str] = []
    again = load_model(f"torchvision:{name}", str(tmp_path / "pruned"), asked, told.append)
    assert torch.equal(again.get_submodule(head).weight, model.get_submodule(head).weight)
    assert [f"has 10 outputs, not {asked}; labels are" in line for line in told] == (
        [True] * (asked in (5, 12))
    )
    for other in ("shufflenet_v2_x0_5", "mobilenet_v2"):
        with pytest.raises(ModelError, match="does not fit"):
            load_model(f"torchvision:{other}", str(tmp_path / "pruned"), asked)


def test_metadata_of_others_is_no_pruned_model(tmp_path):
    model = load_model("torchvision:resnet18", None, 3)
    for name, said in (
        ("word", "hello"),
        ("list", "[1]"),
        ("version", '{"format": "singe-pruned-1"}'),
    ):
        save_file(model.state_dict(), tmp_path / f"{name}.safetensors", {"singe": said})
        again = load_model("torchvision:resnet18", str(tmp_path / f"{name}.safetensors"))
        assert torch.equal(again.fc.weight, model.fc.weight)
        with pytest.raises(ModelError, match="no model that save_pruned wrote"):
            load_pruned(model, tmp_path / f"{name}.safetensors")


def test_timm_by_name():
    torchvision_models()
    pytest.importorskip("timm")
    for name in ("resnet10t", "resnet10t.c3_in1k"):  # as timm writes it, with the weights' tag
        assert load_model(f"timm:{name}", num_classes=3).get_classifier().out_features == 3
    with pytest.raises(ModelError, match="did you mean"):
        load_model("timm:resnet51x")


def test_transformers_from_a_folder(tmp_path):
    torchvision_models()
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic", num_labels=3
    )
    saved = transformers.ResNetForImageClassification(config).eval()
    saved.save_pretrained(tmp_path)
    model = load_model(f"hf:{tmp_path}")
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(model(x).logits, saved(x).logits)
