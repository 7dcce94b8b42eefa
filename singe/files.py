"""Files that are written whole or not at all, and folders that one process at a time works in."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

try:
    import fcntl
except ImportError:  # not on every system
    fcntl = None  # type: ignore[assignment]

_locks: set[int] = set()  # descriptors of the folders that this process works in


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path beside ``path`` that takes its place once everything has been written.

    It is on the disk before it does: a power cut leaves the old file or the new one.

    Raises:
        OSError: it cannot be written; the message names it.
    """
    final = Path(os.path.realpath(path))  # the target of a link, not the link
    if final.exists() and not final.is_file():
        raise OSError(f"cannot write {final}: a folder or a device has that name")
    if not final.parent.is_dir():
        raise FileNotFoundError(
            f"there is no folder {str(final.parent)!r} to write {final.name} to"
        )
    partial = final.with_name(f".{final.name}.{os.getpid()}.partial")
    try:
        yield partial
        partial.chmod(_ordinary_mode())  # safetensors lets nobody else read what it writes
        _to_disk(partial)
        os.replace(partial, final)
        with suppress(OSError):  # not every file system syncs folders
            _to_disk(final.parent)
    except SafetensorError as error:  # its own word for a full disk
        raise OSError(f"cannot write {final}: {error}") from error
    except OSError as error:
        if error.filename is None and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(final)) from error
        raise
    finally:
        partial.unlink(missing_ok=True)


def header_of(file: Any) -> dict[str, Any]:
    """What a file of ours, opened with ``safe_open``, says of itself; nothing where it is another's.

    Raises:
        ValueError: it is damaged.
    """
    header = json.loads((file.metadata() or {}).get("singe", "null"))
    return header if isinstance(header, dict) else {}


def _ordinary_mode() -> int:
    """What ``open`` would give a new file; the mask can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


def _to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class InUseError(OSError):
    """Another process, or another thread of this one, works in the folder."""


@contextmanager
def alone_in(folder: Path) -> Iterator[bool]:
    """Nobody else who asks for it can work in ``folder`` meanwhile; the system knows when a process dies.

    Gives whether that is so: not every file system has locks (NFS has none on folders).

    Raises:
        InUseError: somebody else does.
    """
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:  # one that may be written to and not be read
        yield False
        return
    _locks.add(handle)
    try:
        yield _locked(handle, folder)
    finally:
        if handle in _locks:  # not in a fork
            _locks.remove(handle)
            os.close(handle)


def _locked(handle: int, folder: Path) -> bool:
    if fcntl is None:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise InUseError(f"another process is working in {folder}") from error
    except OSError:
        return False
    return True


def _let_go() -> None:
    """A fork shares its parent's locks: a worker that outlives a process that was killed would keep them."""
    while _locks:
        os.close(_locks.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)
