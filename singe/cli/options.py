"""The options of the commands, grouped by subject; a command takes whole groups of them.

Options left at None take the library's own default.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
import typer

from singe.cli.config import read_config
from singe.cli.data import IMAGENET_MEAN, IMAGENET_STD, Reading
from singe.cli.models import PRETRAINED, SOURCES
from singe.criteria import CRITERIA, NORMS, PATHS, POWERS, choose
from singe.errors import OptionError
from singe.export import check_onnx
from singe.finetune import LR, WEIGHT_DECAY
from singe.latency import Timing
from singe.scoring import score


def _default(function: Callable[..., Any], name: str) -> str:
    value = inspect.signature(function).parameters[name].default
    return f" (default: {value})"


def _option(panel: str, text: str, *names: str, **more: Any) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=panel, **more)


_MODEL, _DATA, _SCORING, _BUDGET = "Model", "Data", "Scoring", "Budget"
_TUNING, _OUTPUT = "Fine-tuning", "Output"
AMP_DTYPES = ("bfloat16", "float16")


@dataclass
class ModelOptions:
    model: Annotated[str, typer.Argument(help=f"{SOURCES}. Of a file, the code is run.")]
    weights: Annotated[
        str | None,
        _option(_MODEL, "safetensors, a .pt state dict, a folder that an earlier run wrote, or "
                f"{PRETRAINED!r}: the library's own (downloads)."),
    ] = None  # fmt: skip
    num_classes: Annotated[
        int | None,
        _option(_MODEL, "Outputs of torchvision and timm models. (default: as the data)", min=1),
    ] = None
    device: Annotated[
        str | None, _option(_MODEL, "cpu, cuda, cuda:1, ... (default: cuda if there is one)")
    ] = None


@dataclass
class OptionalModelOptions(ModelOptions):
    """For commands that can do without a model."""

    model: Annotated[str | None, _option(_MODEL, f"{SOURCES}.")] = None  # type: ignore[assignment]


@dataclass
class DataOptions:
    data: Annotated[
        str | None,
        _option(_DATA, "Image folder (class sub-folders, also under train/ and test/ or val/), a "
                "tar of one, .npz, or file.py:loader."),
    ] = None  # fmt: skip
    image_size: Annotated[int, _option(_DATA, "Images become squares of this.", min=1)] = 224
    batch_size: Annotated[int, _option(_DATA, "Samples per batch.", min=1)] = 64
    calibration: Annotated[int, _option(_DATA, "Samples to score on.", min=1)] = 256
    held_out: Annotated[
        float,
        _option(_DATA, "Share for measuring accuracy, unless the data has a test or val part."),
    ] = 0.2
    evaluation: Annotated[
        int | None, _option(_DATA, "Held-out samples to use at most. (default: all)", min=1)
    ] = None
    mean: Annotated[str, _option(_DATA, "Per channel, for values in 0..1.")] = ",".join(
        map(str, IMAGENET_MEAN)
    )
    std: Annotated[str, _option(_DATA, "Per channel.")] = ",".join(map(str, IMAGENET_STD))
    augment: Annotated[bool, _option(_DATA, "Flip and shift training images at random.")] = True
    workers: Annotated[int, _option(_DATA, "Processes that decode images.", min=0)] = 0
    input_shape: Annotated[
        str | None,
        _option(_DATA, "Shape of one input where no data is given, e.g. 3,224,224."
                " (default: 3 x image size x image size)"),
    ] = None  # fmt: skip

    def reading(self, seed: int) -> Reading:
        mean, std = numbers("--mean", self.mean), numbers("--std", self.std)
        if not all(value > 0 for value in std):
            raise OptionError(f"--std {self.std}: images are divided by it, so it must be positive")
        return Reading(
            self.image_size, self.batch_size, self.calibration, self.held_out, self.evaluation,
            mean, std, self.augment, self.workers, seed,
        )  # fmt: skip


@dataclass
class SharedScoreOptions:
    """Of :func:`singe.score`, all but the criterion and its path."""

    quadrature: Annotated[
        str | None, _option(_SCORING, "Number of nodes, or a rule." + _default(score, "quadrature"))
    ] = None
    p: Annotated[
        str | None,
        _option(_SCORING, ", ".join(map(str, POWERS)) + ". (default: 1; where prune and compress score on"
                " the layer path: fisher)"),
    ] = None  # fmt: skip
    norm: Annotated[
        str | None, _option(_SCORING, ", ".join(NORMS) + "." + _default(score, "norm"))
    ] = None
    objective: Annotated[
        str | None,
        _option(_SCORING, "cross_entropy, or kl (needs no labels)." + _default(score, "objective")),
    ] = None
    layers: Annotated[
        list[str] | None, _option(_SCORING, "Only these layers. Repeat for several.", "--layer")
    ] = None
    ignore: Annotated[
        list[str] | None, _option(_SCORING, "Keep all of this layer. Repeat for several.")
    ] = None
    max_memory: Annotated[int | None, _option(_SCORING, "MiB for stacked activations.", min=1)] = (
        None
    )

    def arguments(self) -> dict[str, Any]:
        """What was chosen, as arguments of :func:`singe.score`."""
        given = {f.name: getattr(self, f.name) for f in fields(self)}
        given["p"] = _number_or_word(self.p)
        given["quadrature"] = _number_or_word(self.quadrature)
        given["max_memory"] = self.max_memory and self.max_memory * 2**20
        return {k: v for k, v in given.items() if v is not None and v != []}


@dataclass
class ScoreOptions(SharedScoreOptions):
    criterion: Annotated[
        str | None, _option(_SCORING, ", ".join(CRITERIA) + "." + _default(score, "criterion"))
    ] = None
    path: Annotated[
        str | None, _option(_SCORING, ", ".join(PATHS) + "." + _default(score, "path"))
    ] = None


@dataclass
class LongRunOptions:
    """Of :func:`singe.score`: precision, early decision, and a file to go on from."""

    autocast: Annotated[
        str | None, _option(_SCORING, "bfloat16 or float16: convolutions and linear layers in it.")
    ] = None
    compile: Annotated[
        bool | None, _option(_SCORING, "Run the passes through torch.compile: for large data.")
    ] = None
    tolerance: Annotated[
        float | None,
        _option(
            _SCORING, "Stop evaluating units whose side of --pruning-ratio is settled; 0 to 1."
        ),
    ] = None
    pruning_ratio: Annotated[
        float | None, _option(_SCORING, "With --tolerance: the share of units that is to go.")
    ] = None
    checkpoint: Annotated[
        Path | None, _option(_SCORING, "File that follows the run; a killed run goes on from it.")
    ] = None

    def arguments(self) -> dict[str, Any]:
        """What was chosen, as arguments of :func:`singe.score`."""
        given = {f.name: getattr(self, f.name) for f in fields(self)}
        if self.autocast is not None:
            choose("autocast", self.autocast, AMP_DTYPES)
            given["autocast"] = getattr(torch, self.autocast)
        return {k: v for k, v in given.items() if v is not None}


@dataclass
class BudgetOptions:
    TARGETS: ClassVar = ("macs", "params", "channels", "latency")
    OUTRANKS: ClassVar = dict.fromkeys(TARGETS, TARGETS)
    SHARES: ClassVar = ("min_keep", "max_keep")
    DECIDING: ClassVar = (*TARGETS, "ranking", "round_to", "max_pruning_ratio", *SHARES)
    macs: Annotated[
        float | None, _option(_BUDGET, "Keep this share (<= 1) or number of MACs per sample.")
    ] = None
    params: Annotated[float | None, _option(_BUDGET, "The same in parameters.")] = None
    channels: Annotated[float | None, _option(_BUDGET, "The same in prunable units.")] = None
    latency: Annotated[
        float | None, _option(_BUDGET, "The same in measured time: a share, or milliseconds (> 1).")
    ] = None
    ranking: Annotated[
        str | None, _option(_BUDGET, "cost, global, local or isomorphic. (default: cost)")
    ] = None
    round_to: Annotated[
        int | None, _option(_BUDGET, "Keep multiples of so many channels.", min=1)
    ] = None
    min_keep: Annotated[
        list[str] | None,
        _option(
            _BUDGET, "Least share to keep: 0.2 for all groups, layer1=0.5 for one. Repeatable."
        ),
    ] = None
    max_keep: Annotated[list[str] | None, _option(_BUDGET, "Greatest share to keep, likewise.")] = (
        None
    )
    max_pruning_ratio: Annotated[
        float | None, _option(_BUDGET, "No group loses more than this share. (default: 0.75)")
    ] = None
    timing_batch: Annotated[
        int, _option(_BUDGET, "Batch size that latency is measured with.", min=1)
    ] = Timing.batch_size
    timing_runs: Annotated[
        int, _option(_BUDGET, "Timed passes of each network; the median counts.", min=1)
    ] = Timing.runs
    timing_threads: Annotated[
        int | None,
        _option(_BUDGET, "CPU threads while timing. (default: as torch has them)", min=1),
    ] = None

    def timing(self) -> Timing:
        return Timing(self.timing_batch, self.timing_runs, threads=self.timing_threads)

    def target(self) -> dict[str, float]:
        """The targets that were given; the library checks that it is one."""
        return {k: getattr(self, k) for k in self.TARGETS if getattr(self, k) is not None}

    def arguments(self) -> dict[str, Any]:
        """What was chosen, as arguments of :func:`singe.plan` and :func:`singe.compress`."""
        given = {name: getattr(self, name) for name in self.DECIDING}
        found = {k: v for k, v in given.items() if v is not None and v != []}
        for name in self.SHARES:
            if name in found:
                found[name] = _shares(f"--{name.replace('_', '-')}", found[name])
        return found


@dataclass
class TuningOptions:
    OUTRANKS: ClassVar = {
        "order=layerwise": ("schedule",), "order=global": ("visit",), "distill=0.0": ("temperature",),
        "amp=False": ("amp_dtype",),
    }  # fmt: skip
    rounds: Annotated[int | None, _option(_TUNING, "Rounds of score, prune, fine-tune.", min=1)] = (
        None
    )
    finetune_steps: Annotated[int | None, _option(_TUNING, "Steps per round.", min=0)] = None
    final_steps: Annotated[int | None, _option(_TUNING, "Extra in the last round.", min=0)] = None
    warmup_steps: Annotated[
        int, _option(_TUNING, "Train so many steps before the first round: for a new head.", min=0)
    ] = 0
    schedule: Annotated[
        str | None, _option(_TUNING, "linear, cubic or geometric. (default: linear)")
    ] = None
    order: Annotated[str | None, _option(_TUNING, "global or layerwise. (default: global)")] = None
    visit: Annotated[
        str | None, _option(_TUNING, "Layerwise: forward or damage. (default: forward)")
    ] = None
    optimizer: Annotated[str, _option(_TUNING, "sgd or adamw.")] = "sgd"
    lr: Annotated[float, _option(_TUNING, "Learning rate; falls in a cosine every round.")] = LR
    weight_decay: Annotated[float, _option(_TUNING, "Of the optimizer.")] = WEIGHT_DECAY
    clip_grad_norm: Annotated[float | None, _option(_TUNING, "Clip gradients to this norm.")] = None
    amp: Annotated[bool, _option(_TUNING, "Fine-tune in mixed precision.")] = False
    amp_dtype: Annotated[
        str | None,
        _option(
            _TUNING, "With --amp: bfloat16, or float16 with scaled gradients. (default: bfloat16)"
        ),
    ] = None
    label_smoothing: Annotated[float | None, _option(_TUNING, "Of the cross-entropy.")] = None
    distill: Annotated[
        float | None, _option(_TUNING, "Weight of the original's logits in the loss, 0..1.")
    ] = None
    temperature: Annotated[float | None, _option(_TUNING, "Of the distillation.")] = None
    ema: Annotated[float | None, _option(_TUNING, "Decay of averaged weights.")] = None
    recalibrate: Annotated[
        bool, _option(_TUNING, "Re-estimate BatchNorm statistics after a removal.")
    ] = True
    accuracy_floor: Annotated[
        float | None,
        _option(_TUNING, "Stop, and go back to the last round that reached this (0..1)."),
    ] = None
    checkpoint_every: Annotated[
        int | None, _option(_TUNING, "Steps between checkpoints within a round.", min=1)
    ] = None
    resume: Annotated[bool, _option(_TUNING, "Go on where the run in --out stopped.")] = False

    def autocast(self) -> torch.dtype | None:
        """The dtype of mixed precision, or None without."""
        dtype = self.amp_dtype or AMP_DTYPES[0]
        choose("--amp-dtype", dtype, AMP_DTYPES)
        if self.amp_dtype and not self.amp:
            raise OptionError("--amp-dtype is of mixed precision: give --amp as well")
        return getattr(torch, dtype) if self.amp else None


@dataclass
class ExportOptions:
    out: Annotated[Path, _option(_OUTPUT, "Folder for everything that is written.")] = Path(
        "singe-out"
    )
    export: Annotated[
        str,
        _option(
            _OUTPUT,
            "Beside safetensors: pt2, onnx (needs onnxruntime), pt2,onnx for both, or none.",
        ),
    ] = "pt2"
    report: Annotated[bool, _option(_OUTPUT, "Write report.html.")] = True
    dry_run: Annotated[
        bool, _option(_OUTPUT, "Print the plan and its cost; change and write nothing.")
    ] = False

    def formats(self) -> tuple[str, ...]:
        found = tuple(f.strip() for f in self.export.split(",") if f.strip() != "none")
        found = tuple(dict.fromkeys(found))
        unknown = set(found) - {"pt2", "onnx"}
        if unknown:
            raise OptionError(
                f"--export {self.export!r} is not offered; choose pt2, onnx, pt2,onnx or none"
            )
        if "onnx" in found:
            check_onnx()  # now, not after an hour of training
        return found


@dataclass
class CommonOptions:
    config: Annotated[
        Path | None,
        _option(_OUTPUT, "TOML file with any of these options; the command line wins.",
                is_eager=True, callback=read_config),
    ] = None  # fmt: skip
    seed: Annotated[int, _option(_OUTPUT, "For every random choice.", min=0, max=2**63 - 1)] = 0
    as_json: Annotated[
        bool, _option(_OUTPUT, "Print JSON on standard output, nothing else.", "--json")
    ] = False
    quiet: Annotated[bool, _option(_OUTPUT, "No progress, no notices.", "--quiet", "-q")] = False


def numbers(option: str, text: str) -> tuple[float, ...]:
    """``"0.5,0.5"`` -> (0.5, 0.5)."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise OptionError(f"{option} {text!r} must be numbers with commas between") from None


def _number_or_word(text: str | None) -> int | str | None:
    return int(text) if text is not None and text.isascii() and text.isdigit() else text


def _shares(option: str, given: list[str]) -> float | dict[str, float]:
    named = {}
    for text in given:
        name, equals, share = text.rpartition("=")
        try:
            value = float(share)
        except ValueError:
            raise OptionError(f"{option} {text!r} must be a share, or layer=share") from None
        if not equals and len(given) == 1:
            return value
        if not equals or not name:
            raise OptionError(f"{option}: give one share for all groups, or layer=share for each")
        if name in named:
            raise OptionError(f"{option} names {name} twice")
        named[name] = value
    return named
