"""Models by name: ``torchvision:NAME``, ``timm:NAME``, ``hf:FOLDER``, ``path/to/file.py:factory``."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from singe.cli.users_files import call_from_file
from singe.errors import ModelError, OptionError
from singe.export import load_pruned, saved_sizes
from singe.gates import BATCH_NORMS

PRETRAINED = "pretrained"
SOURCES = "torchvision:NAME, timm:NAME, hf:FOLDER or path/to/file.py:factory"
State = dict[str, Tensor]

_operators: list[torch.library.Library] = []  # a Library undoes itself when it is collected


def load_model(
    spec: str,
    weights: str | None = None,
    num_classes: int | None = None,
    notify: Callable[[str], None] = lambda line: None,
) -> nn.Module:
    """The model that ``spec`` names, in evaluation mode on the CPU.

    Args:
        spec: where it comes from. Of ``file.py:factory`` the code is run.
        weights: a ``.safetensors`` file, a ``.pt`` state dict (read with ``weights_only=True``), a
            folder or file of :func:`singe.save_pruned`, or ``"pretrained"`` for the library's own
            (which it downloads).
        num_classes: outputs of torchvision and timm models; default as the weights have them, or
            the library's default. Weights with another number of outputs give all but the last layer.
        notify: called with a sentence about anything the user should know.

    Raises:
        ModelError: unknown, not importable, or weights that do not fit.
        OptionError: a spec or an option that is not offered.
    """
    source, _, name = spec.partition(":")
    if source in ("torchvision", "timm"):
        model = _from_library(source, name, weights, num_classes, notify)
    elif num_classes is not None:
        raise OptionError("--num-classes is for torchvision and timm models; the factory decides")
    elif source == "hf":
        model = _from_folder(Path(name))
        model = _with_weights(model, weights)
    elif spec.rpartition(":")[0].endswith(".py"):
        model = call_from_file(spec)
        if not isinstance(model, nn.Module):
            raise ModelError(f"{spec} returned a {type(model).__name__}, not a torch.nn.Module")
        model = _with_weights(model, weights)
    else:
        raise OptionError(f"the model {spec!r} must be {SOURCES}")
    return model.eval()


def import_torchvision() -> ModuleType:
    """``torchvision``, also where its compiled operators do not load beside this torch.

    Its Python side then fails on ``nms`` and ``qnms``, which no classifier needs: they are declared.

    Raises:
        ModelError: it is not installed, or fails otherwise.
    """
    try:
        return _import("torchvision")
    except RuntimeError:
        for name in [n for n in sys.modules if n.split(".")[0] == "torchvision"]:
            del sys.modules[name]
    library = torch.library.Library("torchvision", "FRAGMENT")
    _operators.append(library)
    for name in ("nms", "qnms"):
        with contextlib.suppress(RuntimeError):  # declared already
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return _import("torchvision")


def _import(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ModelError(f"{name} does not import ({error}): pip install {name}") from error


def _from_library(
    source: str,
    name: str,
    weights: str | None,
    num_classes: int | None,
    notify: Callable[[str], None],
) -> nn.Module:
    vision = import_torchvision()  # timm imports it too
    library = vision.models if source == "torchvision" else _import("timm")
    known = library.is_model(name) if source == "timm" else name in library.list_models()
    if not known:
        import difflib

        near = difflib.get_close_matches(name, library.list_models(), n=3)
        hint = f"; did you mean {', '.join(near)}?" if near else ""
        raise ModelError(f"{source} has no model {name!r}{hint}")

    def build(classes: int | None, **options: Any) -> nn.Module:
        options |= {} if classes is None else {"num_classes": classes}
        if source == "torchvision":
            if "weights_backbone" in inspect.signature(library.get_model_builder(name)).parameters:
                options["weights_backbone"] = None  # or it is downloaded
            return library.get_model(name, weights=None, **options)
        return library.create_model(name, pretrained=False, **options)

    if weights is None:
        return build(num_classes)
    if weights != PRETRAINED:
        saved = saved_sizes(weights)
        if saved is not None:
            model = build(num_classes)
            layer, size = _head(model) or ("", "")
            classes = saved.get(layer, {}).get(size)
            if classes and classes != _outputs(model):
                model = build(classes)  # only an original as wide can be cut to it
                if num_classes is not None:
                    notify(
                        f"the pruned model in {weights} has {classes} outputs, not {num_classes}; labels "
                        "are taken for the numbers of its outputs"
                    )
            return load_pruned(model, weights)
        state = read_state(Path(weights))
    else:
        # The library's own way: some of its files need their names mended, some models a setting.
        if source == "torchvision":
            whole = library.get_model(name, weights="DEFAULT", progress=False)
        else:
            whole = library.create_model(name, pretrained=True)
        if num_classes in (None, _outputs(whole)):
            return whole
        state = whole.state_dict()
    if weights == PRETRAINED and hasattr(whole, "transform_input"):
        # The second heads of GoogLeNet and Inception v3 are not among the weights, or as wide as before.
        model = build(num_classes, aux_logits=False)
        state = OrderedDict((k, v) for k, v in state.items() if k in model.state_dict())
        model.transform_input = whole.transform_input
    else:
        model = build(num_classes)
    head = _other_head(model, state)
    if head is not None and num_classes is None:
        model = build(len(state[f"{head}.weight"]))
        head = _other_head(model, state)
    if head is not None:
        notify(
            f"{head} is new and untrained: the weights have {len(state[f'{head}.weight'])} "
            f"classes, not {num_classes}; --warmup-steps trains it before pruning"
        )
        state = OrderedDict((k, v) for k, v in state.items() if not k.startswith(f"{head}."))
    return _load(model, state, weights, but=head)


def _head(model: nn.Module) -> tuple[str, str] | None:
    """The head of most classifiers, and what holds its width: the last linear layer, or convolution."""
    for kind, size in ((nn.Linear, "out_features"), (nn.Conv2d, "out_channels")):
        if names := [name for name, m in model.named_modules() if isinstance(m, kind)]:
            return names[-1], size
    return None


def _outputs(model: nn.Module) -> int | None:
    head = _head(model)
    return getattr(model.get_submodule(head[0]), head[1]) if head else None


def _from_folder(folder: Path) -> nn.Module:
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} is no local folder of a transformers model (no config.json)")
    import_torchvision()
    library = _import("transformers")
    library.utils.logging.disable_progress_bar()
    try:
        return library.AutoModelForImageClassification.from_pretrained(
            folder, local_files_only=True, use_safetensors=True
        )
    except (OSError, ValueError) as error:
        raise ModelError(f"transformers cannot load {folder}: {error}") from error


def _with_weights(model: nn.Module, weights: str | None) -> nn.Module:
    if weights is None:
        return model
    if weights == PRETRAINED:
        raise OptionError(f"--weights {PRETRAINED} is for torchvision and timm models; give a file")
    if saved_sizes(weights) is not None:
        return load_pruned(model, weights)
    return _load(model, read_state(Path(weights)), weights)


def read_state(path: Path) -> State:
    """A state dict from safetensors or from torch's format; wrappers around it are taken off.

    Raises:
        ModelError: unreadable, or holding something else.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError, RuntimeError, ValueError, EOFError, KeyError) as error:
        raise ModelError(f"cannot read weights from {path}: {_line(error)}") from error
    except Exception as error:  # pickle.UnpicklingError, and what a damaged archive raises
        raise ModelError(
            f"{path} holds more than tensors, which would run code when read ({_line(error)}); "
            "save model.state_dict() instead"
        ) from error
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not all(isinstance(v, Tensor) for v in content.values()):
        raise ModelError(f"{path} is no state dict (names and tensors)")
    if content and all(name.startswith("module.") for name in content):  # from DataParallel
        content = {name[len("module.") :]: value for name, value in content.items()}
    return content


def _other_head(model: nn.Module, state: State) -> str | None:
    """The one linear layer or convolution whose number of outputs differs; None where more does."""
    own = model.state_dict()
    layers = {
        k.rpartition(".")[0] for k, v in state.items() if k in own and own[k].shape != v.shape
    }
    if len(layers) != 1:
        return None
    (name,) = layers
    weight, other = state.get(f"{name}.weight"), own.get(f"{name}.weight")
    same = weight is not None and other is not None and weight.shape[1:] == other.shape[1:]
    return name if same and isinstance(model.get_submodule(name), nn.Linear | nn.Conv2d) else None


def _load(model: nn.Module, state: State, path: str, but: str | None = None) -> nn.Module:
    # Safetensors keep no versions of modules; without one MNASNet takes the state for an old layout.
    if not hasattr(state, "_metadata"):
        state = OrderedDict(state)
        state._metadata = {  # type: ignore[attr-defined]
            name: version
            for name, version in model.state_dict()._metadata.items()  # type: ignore[attr-defined]
            # Without a version torch adds the `num_batches_tracked` that old files lack.
            if not isinstance(model.get_submodule(name), BATCH_NORMS)
        }
    try:
        missing, unknown = model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise ModelError(
            f"{path} does not fit this {type(model).__name__}: {_line(error)}"
        ) from None
    missing = [name for name in missing if but is None or not name.startswith(f"{but}.")]
    if missing or unknown:
        raise ModelError(
            f"{path} does not fit this {type(model).__name__}: "
            f"missing {missing[:3] or 'nothing'}, unknown {unknown[:3] or 'nothing'}"
        )
    return model


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
