"""Where commands write: looked at before the work, so that nobody waits for results that are lost."""

from __future__ import annotations

import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError, safe_open

from singe.cli.images import class_parents
from singe.errors import OptionError
from singe.export import PLAN, WEIGHTS
from singe.files import header_of
from singe.scores import Scores
from singe.weight_scores import WeightScores

EXPORTS = ("pt2", "onnx")  # model.KIND
REPORT = ("report.html", "report.json")
CHECKPOINT, WARMUP = "checkpoint", "warmup"  # of compress, in --out


def require_folder(out: Path, data: str | None = None) -> None:
    """See that ``--out`` can be made and written to, by trying; what was made for that goes again.

    Raises:
        OptionError: it cannot, or lies in the folder of the data, whose classes are its folders.
    """
    for folder in () if data is None or not Path(data).is_dir() else class_parents(Path(data)):
        if out.resolve().is_relative_to(folder.resolve()):
            raise OptionError(
                f"--out {out} lies in {folder}, where the report's pictures would be one more class; give a "
                "folder elsewhere"
            )
    made: list[Path] = []
    try:
        if out.is_file():
            raise OptionError(f"--out {out} is a file; give a folder")
        made = [path for path in (out, *out.parents) if not path.exists()]
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    except OSError as error:
        raise OptionError(
            f"--out {out}: this folder cannot be made or written to ({error.strerror}); give another"
        ) from error
    finally:
        for path in made:
            with suppress(OSError):
                path.rmdir()


def require_place(out: Path) -> None:
    """See that scores can be written to the file ``--out``, which replace nothing but scores.

    Raises:
        OptionError: it cannot.
    """
    if out.is_dir():
        raise OptionError(
            f"--out {out} is a folder; give a file, e.g. {out / 'scores.safetensors'}"
        )
    if out.exists() and not holds_scores(out):
        raise OptionError(f"--out {out} is there already and holds no scores; give another file")
    if not out.parent.is_dir():
        raise OptionError(
            f"--out {out}: there is no folder {out.parent}; make it, or give another file"
        )
    try:
        tempfile.TemporaryFile(dir=out.parent).close()
    except OSError as error:
        raise OptionError(
            f"--out {out}: {out.parent} cannot be written to ({error.strerror}); give another file"
        ) from error


def holds_scores(path: Path) -> bool:
    """Whether a file holds scores, of units or of weights."""
    try:
        with safe_open(str(path), framework="pt") as file:
            return header_of(file).get("format") in (Scores.FORMAT, WeightScores.FORMAT)
    except (SafetensorError, ValueError, OSError):
        return False


def holds_run(out: Path) -> bool:
    """Whether a run of compress keeps its checkpoints there, of the command or of Python."""
    places = (out, out / CHECKPOINT, out / WARMUP)
    return any(any(place.glob("checkpoint-*.safetensors")) for place in places)


def _files_of(weights: str) -> tuple[Path, Path]:
    """What ``--weights`` may be read from: a file, or one in a folder."""
    return Path(weights).resolve(), (Path(weights) / WEIGHTS).resolve()


def holds_result(out: Path) -> bool:
    """Whether a run keeps its checkpoints there, or a pruned model lies there."""
    return holds_run(out) or (out / PLAN).is_file()


def require_other(out: Path, weights: str | None) -> None:
    """See that a result does not replace the one that it starts from, whose plan would be lost.

    Raises:
        OptionError: ``--out`` is the folder of ``--weights``.
    """
    if weights is not None and (out / WEIGHTS).resolve() in _files_of(weights):
        raise OptionError(
            f"--out {out} is where --weights come from, and would be written over; give another"
        )


def remove_results(out: Path) -> None:
    """Take away an earlier result's exports and report: beside new weights they would be of another model.

    Only beside a plan: a folder without one holds no result of ours.
    """
    if not (out / PLAN).is_file():
        return
    shutil.rmtree(out / "pictures", ignore_errors=True)
    for name in (*(f"model.{kind}" for kind in EXPORTS), *REPORT):
        (out / name).unlink(missing_ok=True)
