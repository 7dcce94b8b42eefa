"""``path/to/file.py:name``: a model's factory or a data loader of the user's, and what fails in one."""

from __future__ import annotations

import importlib.util
import re
import sys
import traceback
from pathlib import Path
from typing import Any

from singe.errors import ModelError

FOLDERS = set[
    Path
]()  # of the files that were run; an error that arises in one of them is its owner's
PACKAGE = Path(__file__).resolve().parents[1]
FRAME = re.compile(r'^ *File "(.+)", line (\d+), in (\S+)$', re.MULTILINE)


def call_from_file(spec: str) -> Any:
    """``path/to/file.py:name``: run the file, call ``name()`` without arguments.

    Raises:
        ModelError: no such file or name, or an error in the file's own code.
    """
    path, _, name = spec.rpartition(":")
    file = Path(path).resolve()
    if not file.is_file():
        raise ModelError(f"there is no file {path}")
    found = importlib.util.spec_from_file_location(f"_singe_user_{file.stem}", file)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules[found.name] = module  # dataclasses and torch.export look themselves up there
    folder = str(file.parent)
    sys.path.insert(0, folder)  # its neighbours, as when it is run as a script
    FOLDERS.add(file.parent)
    arguments, sys.argv = sys.argv, [str(file)]
    try:
        found.loader.exec_module(module)
        if not callable(getattr(module, name, None)):
            names = ", ".join(n for n, v in vars(module).items() if callable(v) and n[0] != "_")
            raise ModelError(f"{path} has no function {name!r}; it has: {names or 'none'}")
        return getattr(module, name)()
    except ModelError:
        raise
    except SystemExit as error:
        raise ModelError(
            f"{spec} ended the program (exit status {error.code}); put what runs it as a script under if "
            '__name__ == "__main__"'
        ) from error
    except Exception as error:
        raise ModelError(f"{spec} failed: {type(error).__name__}: {error}") from error
    finally:
        sys.argv = arguments
        sys.path.remove(folder)
        if folder not in sys.path:  # for what is imported later; last, so that it hides nothing
            sys.path.append(folder)


def in_users_file(error: BaseException) -> str | None:
    """Where an error arose: ``net.py:12, in forward``.

    None where no file that :func:`call_from_file` ran, and none in a folder of such a file, called what
    failed, or where code of this package ran in between: a hook of ours in a ``forward`` of theirs.
    """
    frames = [(f.filename, f.lineno, f.name) for f in traceback.extract_tb(error.__traceback__)]
    # What a loader's worker hands on has the worker's traceback in its text.
    frames += [(f, int(n), name) for f, n, name in FRAME.findall(str(error))]
    for file, line, name in reversed(frames):
        path = Path(file)
        if path.is_relative_to(PACKAGE):
            return None
        if "site-packages" not in path.parts and any(map(path.is_relative_to, FOLDERS)):
            return f"{file}:{line}, in {name}"
    return None
