"""Files that are written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError


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
