"""Models and data by name: every source, and what is said about one that does not work."""

from __future__ import annotations

import io
import pickle
import shutil
import tarfile

import numpy as np
import pytest
import torch
from helpers import (
    one_thread,  # noqa: F401 - autouse
)
from helpers_trained import torchvision_models
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

import singe
from singe.cli.data import Data, Reading, Source
from singe.cli.images import Transform, decode, scan
from singe.cli.models import call_from_file, load_model
from singe.errors import DataError, ModelError, OptionError
from singe.export import save_pruned

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
"""


@pytest.fixture
def factory(tmp_path):
    (tmp_path / "neighbour.py").write_text("CLASSES = 4\n")
    (tmp_path / "net.py").write_text(FACTORY)
    return f"{tmp_path / 'net.py'}:make"


def write_images(folder, classes=("cat", "dog", "eel"), count=5, size=(20, 12)):
    for label, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for index in range(count):
            Image.new("RGB", size, (80 * label, index, 10)).save(folder / name / f"{index}.png")


# ---------------------------------------------------------------------- models


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


def test_old_weights_lack_the_counts_of_batches(tmp_path):
    model = load_model("torchvision:resnet18", None, 3)
    old = {k: v for k, v in model.state_dict().items() if not k.endswith("num_batches_tracked")}
    save_file(old, tmp_path / "old.safetensors")
    again = load_model("torchvision:resnet18", str(tmp_path / "old.safetensors"))
    assert torch.equal(again.fc.weight, model.fc.weight)


@pytest.mark.parametrize("asked", [5, 10, 12, None])
def test_a_pruned_model_keeps_its_classes_and_others_are_told(asked, tmp_path):
    model = load_model("torchvision:resnet18", None, 10)
    save_pruned(model, tmp_path / "pruned", singe.Plan({}))
    told: list[str] = []
    again = load_model("torchvision:resnet18", str(tmp_path / "pruned"), asked, told.append)
    assert torch.equal(again.fc.weight, model.fc.weight)
    assert [f"has 10 outputs, not {asked}" in line for line in told] == [True] * (asked in (5, 12))
    with pytest.raises(ModelError, match="does not fit"):
        load_model("torchvision:squeezenet1_0", str(tmp_path / "pruned"), asked)
    with pytest.raises(ModelError, match="does not fit"):
        load_model("torchvision:mobilenet_v2", str(tmp_path / "pruned"), asked)


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


# ---------------------------------------------------------------------- data

MODEL = nn.Conv2d(3, 2, 1)
SMALL = Reading(image_size=8, batch_size=4, calibration=6, augment=False)


def labels(batches):
    return torch.cat([y for _, y in batches]).tolist()


def test_an_image_folder_is_split_by_class(tmp_path):
    write_images(tmp_path)
    (tmp_path / "notes.txt").write_text("not an image")
    source = Source(str(tmp_path))
    assert source.classes == 3
    data = source.read(MODEL, SMALL)
    assert data.describe() == {"calibrate": 6, "train": 12, "evaluate": 3}
    assert sorted(labels(data.evaluate)) == [0, 1, 2]
    x, y = next(iter(data.evaluate))
    assert x.shape == (3, 3, 8, 8)
    # The picture's red tells its class, its green which one: nothing is in two parts.
    red = (x[:, 0].mean((1, 2)) * 0.229 + 0.485) * 255
    assert torch.allclose(red, 80.0 * y, atol=0.1)
    green = {part: greens(getattr(data, part)) for part in ("train", "evaluate", "calibrate")}
    assert not green["train"] & green["evaluate"]
    assert not green["calibrate"] & green["evaluate"]
    again = Source(str(tmp_path)).read(MODEL, SMALL)
    assert torch.equal(again.calibrate[0][0], data.calibrate[0][0])


def greens(batches):
    return {
        (int(label), round(float((g * 0.224 + 0.456) * 255)))
        for x, y in batches
        for g, label in zip(x[:, 1].mean((1, 2)), y, strict=True)
    }


@pytest.mark.parametrize("held_out", ["test", "val"])
def test_parts_of_their_own_and_a_wrapping_folder(tmp_path, held_out):
    root = tmp_path / "archive" / "pictures"
    write_images(root / "train", count=4)
    write_images(root / held_out, classes=("dog", "eel"), count=2)
    classes, train, others = scan(tmp_path)
    assert classes == ["cat", "dog", "eel"]
    assert len(train) == 12
    assert sorted({label for _, label in others}) == [1, 2]
    data = Source(str(tmp_path)).read(MODEL, Reading(image_size=8, evaluation=3))
    assert data.describe()["evaluate"] == 3


def test_parts_are_known_by_the_classes_in_them(tmp_path):
    """ImageNet's `test` has images without labels; a class may be called `train`."""
    write_images(tmp_path / "a" / "train")
    write_images(tmp_path / "a" / "val", count=2)
    (tmp_path / "a" / "test").mkdir()
    shutil.copy(next((tmp_path / "a" / "val" / "cat").iterdir()), tmp_path / "a" / "test")
    classes, train, held_out = scan(tmp_path / "a")
    assert (classes, len(train), len(held_out)) == (["cat", "dog", "eel"], 15, 6)
    write_images(tmp_path / "b", classes=("bus", "car", "train"))
    assert scan(tmp_path / "b")[0] == ["bus", "car", "train"]
    write_images(tmp_path / "c", classes=("train", "val"))  # without classes in them
    with pytest.raises(DataError, match="holds no image folder"):
        scan(tmp_path / "c")


@pytest.mark.parametrize("name", ["x.npz", "x.tar.xz", "x.tar.gz", "x.tar"])
def test_damaged_files_are_named(tmp_path, monkeypatch, name):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / name
    if name == "x.npz":
        draw = np.random.default_rng(0)
        np.savez(path, x=draw.integers(0, 256, (20, 8, 8, 3), np.uint8), y=np.arange(20) % 2)
    else:
        write_images(tmp_path / "images", size=(64, 64))
        with tarfile.open(path, "w:" + name.partition("tar")[2].lstrip(".")) as tar:
            tar.add(tmp_path / "images", "images")
    whole = path.read_bytes()
    middle = len(whole) // 2
    overwritten = whole[:middle] + bytes(99) + whole[middle + 99 :]
    for damaged in (whole[: len(whole) // 3], overwritten)[: 1 if name == "x.tar" else 2]:
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=name):
            Source(str(path))


def test_channels_and_mean_must_fit(tmp_path):
    np.savez(tmp_path / "x.npz", x=np.zeros((8, 4, 6, 6), np.uint8), y=np.arange(8) % 2)
    with pytest.raises(DataError, match="has 4 channels, --mean has 3"):
        Source(str(tmp_path / "x.npz")).read(nn.Conv2d(4, 2, 3), Reading())


def test_data_without_a_length_is_described(tmp_path):
    class Endless(IterableDataset):
        def __iter__(self):
            return iter([(torch.zeros(3), 0)])

    assert Data(DataLoader(Endless()), [(torch.zeros(2, 3), torch.zeros(2))], None).describe() == {
        "calibrate": 2
    }


def test_a_tar_is_unpacked_once(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_images(tmp_path / "pictures")
    archive = tmp_path / "pictures.tar.xz"
    with tarfile.open(archive, "w:xz") as tar:
        tar.add(tmp_path / "pictures", "pictures")
    for _ in range(2):
        assert Source(str(archive)).read(MODEL, SMALL).describe()["train"] == 12
    (unpacked,) = (tmp_path / "cache" / "singe").iterdir()
    marker = unpacked / "pictures" / "cat" / "0.png"
    marker.unlink()
    assert Source(str(archive)).read(MODEL, SMALL).describe()["train"] == 11


def test_a_tar_cannot_leave_its_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    archive = tmp_path / "evil.tar"
    with tarfile.open(archive, "w") as tar:
        member = tarfile.TarInfo("../../outside.png")
        member.size = 3
        tar.addfile(member, io.BytesIO(b"abc"))
    with pytest.raises(DataError, match="cannot unpack"):
        Source(str(archive))
    assert not list(tmp_path.rglob("outside.png"))
    archive.write_bytes(b"no tar at all")
    with pytest.raises(DataError, match="cannot unpack"):
        Source(str(archive))
    assert not list((tmp_path / "cache" / "singe").iterdir())


def test_a_grey_model_gets_grey_images(tmp_path):
    write_images(tmp_path)
    data = Source(str(tmp_path)).read(nn.Conv2d(1, 2, 3), SMALL)
    assert data.calibrate[0][0].shape == (4, 1, 8, 8)


def test_decoding_keeps_the_middle(tmp_path):
    wide = np.zeros((10, 30, 3), dtype=np.uint8)
    wide[:, 10:20] = 255
    Image.fromarray(wide).save(tmp_path / "wide.png")
    assert decode(tmp_path / "wide.png", 10, "RGB").float().mean() == 255
    assert decode(tmp_path / "wide.png", 4, "L").shape == (1, 4, 4)
    (tmp_path / "cut.png").write_bytes((tmp_path / "wide.png").read_bytes()[:60])
    with pytest.raises(DataError, match=r"cut\.png"):
        decode(tmp_path / "cut.png", 10, "RGB")


def test_augmentation_is_seeded_and_keeps_shapes():
    image = torch.randint(0, 256, (3, 9, 9), dtype=torch.uint8)
    transform = Transform((0.0,) * 3, (1.0,) * 3, augment=True)

    def draw(seed):
        torch.manual_seed(seed)
        return torch.stack([transform(image) for _ in range(4)])

    assert torch.equal(draw(0), draw(0))
    assert not torch.equal(draw(0), draw(1))
    assert draw(0).shape == (4, 3, 9, 9)
    plain = Transform((0.5,) * 3, (0.25,) * 3, augment=False)
    assert torch.allclose(plain(image), (image / 255 - 0.5) / 0.25)


@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
def test_npz_images(tmp_path, layout):
    x = np.arange(5 * 4 * 4 * 3, dtype=np.uint8).reshape(5, 4, 4, 3)
    expected = torch.from_numpy(x).permute(0, 3, 1, 2).float() / 255
    stored = x if layout == "NHWC" else x.transpose(0, 3, 1, 2)
    y = np.array([[0], [2], [1], [0], [1]])
    np.savez(tmp_path / "d.npz", x_train=stored, y_train=y, x_test=stored[:2], y_test=y[:2])
    source = Source(str(tmp_path / "d.npz"))
    assert source.classes == 3
    how = Reading(mean=(0.0,) * 3, std=(1.0,) * 3, augment=False)
    data = source.read(MODEL, how)
    ((x_test, y_test),) = data.evaluate
    assert torch.equal(x_test, expected[:2])
    assert y_test.tolist() == [0, 2]
    assert len(data.train.dataset) == 5


def test_npz_features_stay_as_they_are(tmp_path):
    x = np.linspace(-3, 3, 40).reshape(10, 4)
    np.savez(tmp_path / "d.npz", x=x, y=np.arange(10) % 2)
    data = Source(str(tmp_path / "d.npz")).read(nn.Linear(4, 2), Reading())
    seen = torch.cat([b for b, _ in (*data.train, *data.evaluate)])
    assert torch.allclose(seen.sort(0).values, torch.from_numpy(x).float())


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": np.zeros(3)}, "expected x and y"),
        ({"x": np.zeros((3, 2)), "y": np.zeros(2, int)}, "one integer label per sample"),
        ({"x": np.zeros((3, 2)), "y": np.zeros(3)}, "one integer label per sample"),
        ({"x": np.zeros((2, 2)), "y": np.array([object(), 1])}, "cannot read"),
    ],
)
def test_npz_in_another_form(tmp_path, arrays, message):
    np.savez(tmp_path / "d.npz", **arrays)
    with pytest.raises(DataError, match=message):
        Source(str(tmp_path / "d.npz"))


def test_folders_in_another_form(tmp_path):
    with pytest.raises(DataError, match="no data at"):
        Source(str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match="holds no image folder"):
        Source(str(tmp_path))
    write_images(tmp_path / "train", classes=("cat", "dog"))
    write_images(tmp_path / "test", classes=("cat", "owl"))
    with pytest.raises(DataError, match=r"classes that .* lacks: owl"):
        Source(str(tmp_path))


LOADER = """
import torch
X, Y = torch.zeros(4, 2), torch.tensor([0, 1, 0, 1])
def pair(): return [(X, Y)] * 3, [(X, Y)]
def parts(): return {"calibrate": [(X, Y)]}
def batches(): return [(X, Y)] * 5
def once(): return iter([(X, Y)])
def odd(): return {"training": [(X, Y)]}
def nothing(): return {"evaluate": [(X, Y)]}
def none(): [(X, Y)]
"""


@pytest.mark.parametrize(
    ("name", "train", "calibrate", "evaluate"),
    [("pair", 3, 2, 1), ("parts", None, 1, None), ("batches", 5, 2, None)],
)
def test_a_loader_of_the_user(tmp_path, name, train, calibrate, evaluate):
    (tmp_path / "my_data.py").write_text(LOADER)
    data = Source(f"{tmp_path / 'my_data.py'}:{name}").read(MODEL, Reading(calibration=6))
    sizes = [None if p is None else len(p) for p in (data.train, data.calibrate, data.evaluate)]
    assert sizes == [train, calibrate, evaluate]
    assert isinstance(data, Data)


@pytest.mark.parametrize(
    ("name", "message"),
    [("once", "one-shot"), ("odd", "the loader gave training"), ("nothing", "neither")],
)
def test_a_loader_in_another_form(tmp_path, name, message):
    (tmp_path / "my_data.py").write_text(LOADER)
    source = Source(f"{tmp_path / 'my_data.py'}:{name}")
    with pytest.raises(DataError, match=message):
        source.read(MODEL, Reading())


def test_a_loader_that_forgot_to_return(tmp_path):
    (tmp_path / "my_data.py").write_text(LOADER)
    with pytest.raises(DataError, match=r"my_data\.py:none returned None; expected \(train, eval"):
        Source(f"{tmp_path / 'my_data.py'}:none")


def test_a_file_may_look_itself_up(tmp_path):
    (tmp_path / "late.py").write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "@dataclass\nclass Box:\n    value: int = 3\ndef make(): return Box().value\n"
    )
    assert call_from_file(f"{tmp_path / 'late.py'}:make") == 3
