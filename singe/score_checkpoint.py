"""The state of a scoring run, saved between batches: a run that was killed goes on where it was."""

from __future__ import annotations

import hashlib
import json
import time
import warnings
from collections.abc import Mapping
from contextlib import suppress
from os import PathLike
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from singe import checkpoint
from singe.data import Batch
from singe.errors import CheckpointError
from singe.files import replacing
from singe.graph import unwrapped

FORMAT = "singe-run-3"
SHARE_OF_TIME = 0.05  # at most this goes into saving; the first batch is always saved


class Resumable(Protocol):
    """What can be saved: tensors, and a header of JSON values."""

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]: ...

    def load_state(self, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None: ...


def digest_of(value: Any) -> str:
    """SHA-256 of a nested structure: tensors by dtype, shape and bytes, the rest as it prints."""
    found = hashlib.sha256()
    for leaf in tree_leaves(value):
        if not isinstance(leaf, Tensor) or leaf.is_nested or leaf.layout != torch.strided:
            found.update(repr(leaf).encode())
        else:
            found.update(f"{leaf.dtype}{tuple(leaf.shape)}".encode())
            values = leaf.detach().cpu().resolve_conj().resolve_neg()
            plain = values.contiguous().reshape(-1).view(torch.uint8)
            found.update(plain.numpy().data)
    return found.hexdigest()


def digest_of_model(model: nn.Module) -> str:
    """SHA-256 of how a model prints, and of the names and values of its parameters and buffers."""
    described = repr(unwrapped(model)) + checkpoint.digest_of(model)
    return hashlib.sha256(described.encode()).hexdigest()


class ScoreCheckpoint:
    """A file that follows a run.

    Args:
        path: written after a batch, whole or not at all; removed when the run is complete.
        signature: everything that decides the result apart from the data; JSON values. Functions are
            known by name only.

    Raises:
        CheckpointError: the file there belongs to another run or is damaged, or there can be none.
    """

    def __init__(self, path: str | PathLike[str], signature: Mapping[str, Any]) -> None:
        self.path = Path(path)
        self.signature = json.loads(json.dumps(signature))
        self.digests: list[str] = []  # of the batches seen so far
        self.resumed = 0  # how many of them are in the file that was found
        self._position = 0
        self._tensors: dict[str, Tensor] = {}
        self._header: dict[str, Any] = {}
        self._saved_at, self._cost = float("-inf"), 0.0
        if self.path.is_dir() or not self.path.parent.is_dir():
            what = "is a folder" if self.path.is_dir() else "is in a folder that does not exist"
            raise CheckpointError(
                f"the checkpoint {self.path} {what}; name a file in an existing one"
            )
        if self.path.exists():
            self._read()

    def _read(self) -> None:
        try:
            content, self._tensors = checkpoint.read_stamped(self.path, FORMAT)
            signature, self._header = content["signature"], content["run"]
            self.digests = content["digests"]
        except checkpoint.OtherVersionError as error:
            raise CheckpointError(
                f"{self.path} is of another version of singe ({error}); continue with that version, or "
                "remove the file to start again"
            ) from error
        except checkpoint.OtherFormatError as error:
            raise CheckpointError(
                f"{self.path} is no checkpoint of a scoring run ({FORMAT}); choose another file for it"
            ) from error
        except (SafetensorError, ValueError, KeyError, TypeError, OSError) as error:
            raise CheckpointError(
                f"cannot read the checkpoint {self.path}: {error}; remove it to start again"
            ) from error
        self.resumed = len(self.digests)
        differing = [
            f"{key} was {signature.get(key)!r}, is {value!r}"
            for key, value in self.signature.items()
            if signature.get(key) != value
        ]
        if differing:
            raise CheckpointError(
                f"the checkpoint {self.path} belongs to another run: {'; '.join(differing)}. "
                "Remove it to start again, or choose another file"
            )

    def skips(self, batch: Batch, run: Resumable) -> bool:
        """Whether this batch, the next in order, is in the saved state already.

        ``run`` gets its state back with the last such batch.

        Raises:
            CheckpointError: it is not the batch that was there when the state was saved.
        """
        digest = digest_of(batch.raw)
        position, self._position = self._position, self._position + 1
        if position >= self.resumed:
            self.digests.append(digest)
            return False
        if digest != self.digests[position]:
            raise CheckpointError(
                f"batch {position} is not the one that {self.path} was made with; resume with the "
                "same batches in the same order (no shuffling), or remove the file to start again"
            )
        if position == self.resumed - 1:
            run.load_state(self._tensors, self._header)
            self._tensors = {}
        return True

    def save(self, run: Resumable) -> None:
        """Write the state, unless saving has taken too much of the time lately.

        A full disk is a warning: the file that was there stays, and the run goes on.
        """
        start = time.monotonic()
        if (start - self._saved_at) * SHARE_OF_TIME < self._cost:
            return
        tensors, header = run.state()
        named = {k: t.detach().cpu().contiguous() for k, t in tensors.items()}
        text = checkpoint.stamped(
            FORMAT, named, {"signature": self.signature, "digests": self.digests, "run": header}
        )
        try:
            with replacing(self.path) as partial:
                save_file(named, partial, metadata={"singe": text})
        except (OSError, SafetensorError) as error:
            warnings.warn(
                f"cannot write the checkpoint {self.path} ({error}); scoring goes on without",
                stacklevel=2,
            )
        self._saved_at = time.monotonic()
        self._cost = self._saved_at - start

    def finished(self) -> None:
        """The run is complete: its state is of no more use.

        Raises:
            CheckpointError: there were fewer batches than the state holds.
        """
        if self._position < self.resumed:
            raise CheckpointError(
                f"the data has {self._position} batches, but {self.path} was made with "
                f"{self.resumed} already; resume with the same data, or remove the file to start again"
            )
        with suppress(OSError):  # a disk that went read-only has a warning by now
            self.path.unlink(missing_ok=True)
