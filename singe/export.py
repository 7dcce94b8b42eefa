"""A pruned model as files: safetensors with its plan, ``torch.export`` and ONNX."""

from __future__ import annotations

import importlib.util
import io
import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from os import PathLike
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from singe.data import Batch, device_of, example_batch
from singe.errors import ExportError, ModelError
from singe.files import header_of, replacing
from singe.gates import registered
from singe.graph import NORMS, ROWS, expect_model, private_copy, unwrapped
from singe.latency import resized
from singe.memory import is_out_of_memory
from singe.plan import Plan
from singe.scores import fingerprint
from singe.slim import slim_of, take_slim
from singe.snapshot import Snapshot

FORMAT = "singe-pruned-1"
WEIGHTS, PLAN = "model.safetensors", "plan.json"
ONNX_MODULES = ("onnx", "onnxscript", "onnxruntime")
ONNX_TOLERANCE = 1e-4


def save_pruned(
    model: nn.Module, folder: str | PathLike[str], plan: Plan | None = None
) -> dict[str, Path]:
    """Write ``model.safetensors`` and, with a plan, ``plan.json`` into ``folder`` (made if missing).

    The weights' header holds the size of every layer, so :func:`load_pruned` needs no plan; the plan
    is there to read and to replay with :func:`singe.prune`.

    Args:
        model: pruned or not; tied weights are written once.
        folder: existing files of these names are replaced, each at once or not at all.
        plan: what was removed.

    Returns:
        What was written: ``{"weights": path, "plan": path}``.

    Raises:
        ModelError: ``model`` still has what ``plan`` removes, or state that is no tensor; or ``folder``
            cannot be made.
    """
    expect_model(model)
    inner = unwrapped(model)
    if extra := [k for k, t in inner.state_dict().items() if not isinstance(t, Tensor)]:
        raise ModelError(
            f"safetensors files hold tensors only, and {', '.join(extra)} (get_extra_state) is none; save "
            "that beside it, and call save_pruned on a model without"
        )
    if plan is not None:
        plan = plan if isinstance(plan, Plan) else Plan(plan)
        _require_carried_out(inner, plan)
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ModelError(
            f"save_pruned writes a folder, and {folder} cannot be one: {error.strerror}"
        ) from error
    header = {"format": FORMAT, "model": type(inner).__name__, "layers": _layers(inner)}
    written = {"weights": folder / WEIGHTS}
    with replacing(written["weights"]) as partial, _stored(inner, _cut_buffers(inner)):
        save_model(inner, str(partial), metadata={"singe": json.dumps(header)})
    if plan is not None:
        written["plan"] = folder / PLAN
        plan.save(written["plan"])
    return written


def _require_carried_out(model: nn.Module, plan: Plan) -> None:
    """As far as the plan knows the model that it was made for."""
    if plan.n_units and plan.meta.get("fingerprint") == fingerprint(model):
        raise ModelError(
            f"this {type(model).__name__} still has all that the plan removes; carry it out before saving "
            "both, singe.prune(model, plan, example_inputs)"
        )


def load_pruned(model: nn.Module, path: str | PathLike[str]) -> nn.Module:
    """Give a freshly built, unpruned ``model`` the sizes and weights that :func:`save_pruned` wrote.

    Nothing is traced and no data is needed. Layers that change size get new parameters: make
    optimizers afterwards.

    Args:
        model: of the class and arguments the saved one was built with, as many classes included (of one
            with more, the head becomes as narrow as the saved one); changed in place, on its device;
            ``requires_grad`` flags and modes are kept.
        path: the folder, or the safetensors file itself.

    Returns:
        ``model``.

    Raises:
        ModelError: another architecture, or no such file; the model is unchanged then.
    """
    expect_model(model)
    file, inner = _weights_of(path), unwrapped(model)
    header = _read_header(file)
    if header is None:
        raise ModelError(f"{file} is no model that save_pruned wrote ({FORMAT})")
    with Snapshot(model) as snapshot:
        try:
            with safe_open(str(file), framework="pt") as content:
                names = set(content.keys())
            _resize(inner, header["layers"], names)
            with _stored(inner, names):
                load_model(inner, str(file), device=str(device_of(inner)))
        except (RuntimeError, KeyError, SafetensorError) as error:
            raise ModelError(
                f"{file} holds a pruned {header.get('model')} that does not fit this "
                f"{type(inner).__name__}; build it with the arguments of the original "
                f"({' '.join(str(error).split())[:300]})"
            ) from error
        snapshot.discard()
    return model


def export_pt2(model: nn.Module, example_inputs: Any, path: str | PathLike[str]) -> Path:
    """Write a ``torch.export`` program; ``torch.export.load`` needs neither this package nor the class.

    The batch size stays free where the model allows it. The example inputs are left out of the file:
    they are the only part that torch would pickle.

    Args:
        model: exported in evaluation mode; not changed.
        example_inputs: a tensor, a tuple of arguments or a dict, as for :func:`singe.prune`.
        path: usually ``*.pt2``.

    Raises:
        ExportError: ``torch.export`` cannot capture this model.
    """
    program = _capture(model, _two_samples(model, example_inputs))
    program._example_inputs = None  # the property refuses None in torch 2.6
    with replacing(path) as partial:
        renamed = partial.with_suffix(".pt2")  # torch warns about any other
        try:
            with _quiet():
                torch.export.save(program, renamed)
            renamed.replace(partial)
        finally:
            renamed.unlink(missing_ok=True)
    return Path(path)


def export_onnx(
    model: nn.Module,
    example_inputs: Any,
    path: str | PathLike[str],
    tolerance: float = ONNX_TOLERANCE,
) -> float:
    """Write an ONNX file and run it: onnxruntime's outputs must equal the model's.

    Args:
        model: exported in evaluation mode; not changed.
        example_inputs: a tensor, a tuple of arguments or a dict; also what is compared on.
        path: written only if the check passes.
        tolerance: largest difference allowed, relative to the largest output (at least 1).

    Returns:
        The largest difference found, in the same measure.

    Raises:
        ExportError: the ``export`` extra is missing, the model cannot be captured, or the outputs
            differ by more than ``tolerance``.
    """
    check_onnx()
    batch = _two_samples(model, example_inputs)
    program = _capture(model, batch)
    with replacing(path) as partial:
        try:
            with _quiet():
                torch.onnx.export(program, f=partial, external_data=False, verbose=False)
            difference = _compare(partial, private_copy(model).eval(), batch)
        except Exception as error:  # onnxruntime's have types of their own
            if isinstance(error, OSError) or is_out_of_memory(error):
                raise
            raise ExportError(
                f"ONNX, or onnxruntime, cannot handle this {type(unwrapped(model)).__name__}: "
                f"{' '.join(str(error).split())[:300]}"
            ) from error
        if not difference <= tolerance:
            raise ExportError(
                f"onnxruntime's outputs are off by {difference:.3g} (allowed: {tolerance:g}); "
                f"{path} was not written"
            )
    return difference


def check_onnx() -> None:
    """Raise ExportError unless everything that ONNX needs is installed."""
    missing = [name for name in ONNX_MODULES if importlib.util.find_spec(name) is None]
    if missing:
        raise ExportError(f"ONNX needs {', '.join(missing)}: pip install {' '.join(missing)}")


def _layers(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Per module its sizes: integers such as ``out_channels`` or ``num_heads``, and shapes of its tensors."""
    found = {}
    for name, module in model.named_modules():
        tensors = dict(_tensors(module))
        sizes = {k: v for k, v in vars(module).items() if not k.startswith("_") and _is_size(v)}
        if tensors or sizes or isinstance(module, (*ROWS, *NORMS)):
            shapes = {k: list(t.shape) for k, t in tensors.items()}
            found[name] = {"type": type(module).__name__, "sizes": sizes, "shapes": shapes}
    return found


def _is_size(value: Any) -> bool:
    """Plain ones only: a NamedTuple or an IntEnum is the user's, and JSON would make another thing of it."""
    if type(value) in (tuple, torch.Size):
        return all(map(_is_size, value))
    return type(value) is int


def _from_json(size: Any) -> Any:
    return tuple(map(_from_json, size)) if isinstance(size, list) else size


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in (*module._parameters.items(), *module._buffers.items()):
        if tensor is not None:
            yield name, tensor


def saved_sizes(path: str | PathLike[str]) -> dict[str, dict[str, Any]] | None:
    """``out_features`` and the like of every layer of a saved model; None of a file that is none.

    Raises:
        ModelError: unreadable.
    """
    file = _weights_of(path)
    header = _read_header(file) if file.suffix == ".safetensors" else None
    return header and {name: layer["sizes"] for name, layer in header["layers"].items()}


def _weights_of(path: str | PathLike[str]) -> Path:
    return Path(path) / WEIGHTS if Path(path).is_dir() else Path(path)


def _read_header(file: Path) -> dict[str, Any] | None:
    """None where something else wrote the file."""
    try:
        with safe_open(str(file), framework="pt") as content:
            header = header_of(content)
    except ValueError:
        return None
    except (OSError, SafetensorError) as error:
        raise ModelError(f"cannot read weights from {file}: {error}") from error
    return header if header.get("format") == FORMAT and "layers" in header else None


def _cut_buffers(model: nn.Module) -> set[str]:
    """Buffers of registered layers: they are cut with the channels, also those outside ``state_dict()``."""
    layers = [(name, m) for name, m in model.named_modules() if registered(m) is not None]
    return {_full_name(name, key) for name, m in layers for key, _ in m.named_buffers()}


def _full_name(module: str, key: str) -> str:
    return f"{module}.{key}" if module else key


@contextmanager
def _stored(model: nn.Module, names: set[str]) -> Iterator[None]:
    """Buffers of these names are part of ``state_dict()`` in here, whatever they were registered as."""
    changed = []
    for name, module in model.named_modules():
        hidden = module._non_persistent_buffers_set
        shown = {key for key in hidden if _full_name(name, key) in names}
        hidden -= shown
        changed.append((hidden, shown))
    try:
        yield
    finally:
        for hidden, shown in changed:
            hidden |= shown


def _resize(model: nn.Module, layers: dict[str, dict[str, Any]], stored: set[str]) -> None:
    modules = dict(model.named_modules())
    replaced: dict[int, Tensor] = {}  # tied parameters stay tied
    for name, layer in layers.items():
        module = modules[name]
        slim = slim_of(module)
        if slim is not None and slim.__name__ == layer["type"]:
            take_slim(module)
        if type(module).__name__ != layer["type"]:
            raise KeyError(f"{name} is a {type(module).__name__}, not a {layer['type']}")
        for key, size in layer["sizes"].items():
            value, own = _from_json(size), vars(module).get(key)
            if not (isinstance(own, int | tuple) and own == value):
                setattr(module, key, value)
        for key, tensor in list(_tensors(module)):
            shape = layer["shapes"].get(key)
            if shape is None or list(tensor.shape) == shape:
                continue
            full_name = _full_name(name, key)
            if any(new > old for new, old in zip(shape, tensor.shape, strict=False)):
                raise KeyError(f"{full_name} is larger there, which pruning does not make it")
            if key in module._non_persistent_buffers_set and full_name not in stored:
                raise KeyError(f"{full_name} has another size, and the file does not hold it")
            new = replaced.get(id(tensor))
            if new is None:
                new = torch.empty(shape, dtype=tensor.dtype, device=tensor.device)
                if isinstance(tensor, nn.Parameter):
                    new = nn.Parameter(new, requires_grad=tensor.requires_grad)
                replaced[id(tensor)] = new
            setattr(module, key, new)


def _two_samples(model: nn.Module, example_inputs: Any) -> Batch:
    """Two samples: from one alone the capture would take the batch size for a constant."""
    return resized(example_batch(example_inputs, device_of(model)), 2)


def _capture(model: nn.Module, batch: Batch) -> torch.export.ExportedProgram:
    def free(leaf: Any) -> dict[int, Any] | None:
        return {0: torch.export.Dim.AUTO} if isinstance(leaf, Tensor) and leaf.dim() else None

    shapes: Any = tree_map(free, (batch.args, batch.kwargs))
    twin = private_copy(model).eval()
    twin.requires_grad_(False)
    try:
        with _quiet(), torch.no_grad():
            # Without keyword inputs torch wants the positional shapes alone.
            return torch.export.export(
                twin, batch.args, batch.kwargs,
                dynamic_shapes=shapes[1] if batch.kwargs else shapes[0],
            )  # fmt: skip
    except Exception as error:  # whatever the model's own code does under the capture
        raise ExportError(
            f"torch.export cannot capture this {type(unwrapped(model)).__name__}: "
            f"{' '.join(str(error).split())[:300]}"
        ) from error


@torch.no_grad()
def _compare(file: Path, model: nn.Module, batch: Batch) -> float:
    import onnxruntime

    # From bytes: onnxruntime takes the temporary name's ending for a format of its own.
    runner = onnxruntime.InferenceSession(file.read_bytes(), providers=["CPUExecutionProvider"])
    inputs = [t for t in tree_leaves((batch.args, batch.kwargs)) if isinstance(t, Tensor)]
    names = [i.name for i in runner.get_inputs()]
    got = runner.run(None, {n: t.cpu().numpy() for n, t in zip(names, inputs, strict=True)})
    expected = [t for t in tree_leaves(batch.call(model)) if isinstance(t, Tensor)]
    return max(
        (_relative(t.detach().cpu().double(), torch.from_numpy(a).double())
         for t, a in zip(expected, got, strict=True)),
        default=0.0,
    )  # fmt: skip


def _relative(mine: Tensor, theirs: Tensor) -> float:
    """Largest difference beside the largest value, at least 1; infinite where one has -inf or NaN alone."""
    finite = mine.isfinite()
    if not torch.equal(finite, theirs.isfinite()) or not torch.equal(
        mine[~finite].nan_to_num(), theirs[~finite].nan_to_num()
    ):
        return float("inf")
    mine, theirs = mine[finite], theirs[finite]
    if not mine.numel():
        return 0.0
    return float((mine - theirs).abs().max() / mine.abs().max().clamp(min=1.0))


_silence = Lock()  # what it changes is the process's: two threads would each put back the other's


@contextmanager
def _quiet() -> Iterator[None]:
    """torch's exporters warn about their own internals, and print and log what they cannot handle.

    What they fail at is raised as well.
    """
    with _silence, warnings.catch_warnings(), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        level = logging.root.manager.disable
        logging.disable(max(level, logging.ERROR))
        try:
            yield
        finally:
            logging.disable(level)
