"""Where a run is, on disk: one safetensors file per checkpoint, its JSON in the header.

Nothing here needs pickle. A file is written beside the old ones and renamed, the newest two are kept, and
a digest of all that is in it tells a damaged file from a good one.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from singe.errors import CheckpointError
from singe.files import InUseError, alone_in, header_of, replacing
from singe.graph import unwrapped

FORMAT = "singe-checkpoint-9"
KEPT = 2
WRITTEN = ("checkpoint-*", "round-*", "report.json", "plan.json")


class Folder:
    """The checkpoints of one run.

    Args:
        path: made if it is not there.
        settings: what the run was asked to do, JSON-ready; another run's are refused.

    Raises:
        CheckpointError: the folder cannot be made.
    """

    def __init__(self, path: str | PathLike[str], settings: Mapping[str, Any]) -> None:
        self.path = Path(path)
        self.settings = json.loads(json.dumps(settings))  # as it will be read back
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"cannot make the folder {self.path}: {error}") from error
        self._alone = False

    @contextmanager
    def held(self) -> Iterator[None]:
        """Only this run works in the folder meanwhile, where the file system has locks.

        Raises:
            CheckpointError: another one does.
        """
        try:
            with alone_in(self.path) as self._alone:
                yield
        except InUseError as error:
            raise CheckpointError(
                f"{error}, or another thread of this one; wait for its end, or use another folder"
            ) from error
        finally:
            self._alone = False

    def files(self) -> list[Path]:
        """All checkpoints, the oldest first."""
        found = self.path.glob("checkpoint-*.safetensors")
        return sorted((path for path in found if _number(path) >= 0), key=_number)

    def save(self, state: Mapping[str, Any]) -> Path:
        """Write the next checkpoint; only then remove all but the newest two.

        Raises:
            CheckpointError: the disk is full or not writable; the older ones are untouched.
        """
        tensors: dict[str, Tensor] = {}
        content = pack(state, tensors)
        header = stamped(FORMAT, tensors, {"settings": self.settings, "state": content})
        last = max(map(_number, self.files()), default=0)
        path = self.path / f"checkpoint-{last + 1:06d}.safetensors"
        try:
            with replacing(path) as partial:
                partial.write_bytes(save(tensors, {"singe": header}))
        except (OSError, SafetensorError) as error:
            older = self.files()
            raise CheckpointError(
                f"cannot write the checkpoint {path}: {error}; "
                + (f"{older[-1].name} is intact" if older else "there is no older one")
                + ", make room and continue with resume=True"
            ) from error
        for old in self.files()[:-KEPT]:
            old.unlink(missing_ok=True)
        return path

    def write(self, name: str, text: str) -> None:
        """A file for readers beside the checkpoints; raises as :meth:`keep`."""

        def save(path: Path) -> None:
            with replacing(path) as partial:
                partial.write_text(text)

        self.keep(name, save)

    def keep(self, name: str, save: Callable[[Path], None]) -> None:
        """``save(path)`` a file beside the checkpoints.

        Raises:
            CheckpointError: the disk is full or not writable.
        """
        try:
            save(self.path / name)
        except OSError as error:
            raise CheckpointError(f"cannot write {self.path / name}: {error}") from error

    def newest(self) -> dict[str, Any] | None:
        """The newest state that can be read; None in an empty folder.

        A damaged file is named in a warning, and the one before it is used.

        Raises:
            CheckpointError: a checkpoint of another run, or none that can be read.
        """
        self._clear()
        problems: list[str] = []
        advice = "remove the folder to start again"
        for path in reversed(self.files()):
            try:
                content, tensors = read_stamped(path, FORMAT)
                settings, state = content["settings"], unpack(content["state"], tensors)
            except OtherVersionError as error:
                problems.append(f"{path.name} is of another version of singe ({error})")
                advice = "continue with that version, or remove the folder to start again"
                continue
            except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
                problems.append(f"{path.name} is damaged ({error})")
                continue
            self._require_same(path, settings)
            if problems:
                warnings.warn(
                    f"{'; '.join(problems)}; continuing from {path.name}", UserWarning, stacklevel=4
                )
            return state
        if problems:
            raise CheckpointError(
                f"no checkpoint in {self.path} can be read: {'; '.join(problems)}; {advice}"
            )
        return None

    def _clear(self) -> None:
        """Remove what a process that was killed was writing, where no other can be at it."""
        for name in WRITTEN if self._alone else ():
            for partial in self.path.glob(f".{name}.*.partial"):
                partial.unlink(missing_ok=True)

    def _require_same(self, path: Path, found: Mapping[str, Any]) -> None:
        different = [
            f"{key} was {found.get(key)!r} and is now {self.settings.get(key)!r}"
            for key in {**self.settings, **found}
            if found.get(key) != self.settings.get(key)
        ]
        if different:
            raise CheckpointError(
                f"{path} belongs to another run: {'; '.join(different)}. Continue with the same model "
                "and options, or use another folder"
            )


def _number(path: Path) -> int:
    digits = path.stem.split("-", 1)[1]
    return int(digits) if digits.isdigit() else -1


# ---------------------------------------------------------------------- files with format and digest


class OtherFormatError(ValueError):
    """A file of another kind."""


class OtherVersionError(ValueError):
    """A file of that kind, as an earlier or a later version writes them."""


def stamped(form: str, tensors: Mapping[str, Tensor], content: Mapping[str, Any]) -> str:
    """The header of a file: JSON ``content`` with the format and a digest of it and of the tensors."""
    stamp = {"format": form, "digest": digest(tensors, list(content.values()))}
    return json.dumps(stamp | dict(content))


def read_stamped(path: Path, form: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The content and the tensors of a file with a header of :func:`stamped`.

    Args:
        form: the format, its version behind the last hyphen.

    Raises:
        OtherFormatError, OtherVersionError: what they say.
        ValueError, KeyError, TypeError, OSError, SafetensorError: the file is damaged.
    """
    with safe_open(str(path), framework="pt") as file:
        header = header_of(file)
        found = header.pop("format", None)
        if found != form and str(found).startswith(form.rpartition("-")[0] + "-"):
            raise OtherVersionError(f"{found}, this version continues {form}")
        if found != form:
            raise OtherFormatError(f"it is no {form}")
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    if header.pop("digest") != digest(tensors, list(header.values())):
        raise ValueError("it does not match its digest")
    return header, tensors


def digest(tensors: Mapping[str, Tensor], content: Any = None) -> str:
    """SHA-256 over names, shapes and values, and over what JSON ``content`` goes with them."""
    found = hashlib.sha256(b"" if content is None else json.dumps(content).encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def digest_of(model: nn.Module) -> str:
    """:func:`digest` of all parameters and buffers."""
    state = unwrapped(model).state_dict()  # with whatever ``get_extra_state`` gives
    return digest({name: value for name, value in state.items() if isinstance(value, Tensor)})


# ---------------------------------------------------------------------- containers <-> JSON + tensors


def pack(value: Any, tensors: dict[str, Tensor]) -> Any:
    """JSON for a tree of dicts, lists, tuples, numbers, strings and tensors.

    Tensors go to ``tensors``; what JSON would change (tuples, keys that are no strings) is tagged.

    Raises:
        CheckpointError: something else is in it.
    """
    if isinstance(value, np.generic):  # np.float64 is a float as well, and not JSON's
        value = value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor):
        key = f"t{len(tensors)}"
        tensors[key] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        return {"tensor": key, "strides": list(value.stride())}
    if isinstance(value, Mapping):
        return {"dict": [[pack(k, tensors), pack(v, tensors)] for k, v in value.items()]}
    if isinstance(value, tuple | list):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return {kind: [pack(v, tensors) for v in value]}
    raise CheckpointError(
        f"a checkpoint cannot hold a {type(value).__name__} (from the optimizer or scheduler); use "
        "ones whose state_dict() holds numbers and tensors"
    )


def unpack(content: Any, tensors: Mapping[str, Tensor]) -> Any:
    """What :func:`pack` was given; tensors have their old strides, which decide how kernels sum."""
    if not isinstance(content, dict):
        return content
    if "tensor" in content:
        return _with_strides(tensors[content["tensor"]], content["strides"])
    if "dict" in content:
        return {unpack(k, tensors): unpack(v, tensors) for k, v in content["dict"]}
    if "tuple" in content:
        return tuple(unpack(v, tensors) for v in content["tuple"])
    return [unpack(v, tensors) for v in content["list"]]


def _with_strides(tensor: Tensor, strides: list[int]) -> Tensor:
    if list(tensor.stride()) == strides or 0 in strides:
        return tensor.clone()
    return torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype).copy_(tensor)
