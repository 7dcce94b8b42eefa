"""What every command starts with: the model, its data, and inputs to trace it with."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from singe.cli.data import Data, Source
from singe.cli.models import load_model
from singe.cli.options import DataOptions, ModelOptions, numbers
from singe.cli.output import Voice
from singe.data import (
    as_batch,
    device_of,
    example_batch,
    find_device,
    first_samples,
    input_shapes,
    to_device,
)
from singe.errors import DataError, ModelError, OptionError, first_line
from singe.memory import is_out_of_memory

LIBRARIES = ("torchvision", "timm")  # they build a head for the data's classes
UNTOLD = ("config", "as_json", "quiet", "resume")  # how a command was run, not what it made


@dataclass
class Inputs:
    """What a command works on.

    Attributes:
        model: on its device, in evaluation mode.
        data: None where no ``--data`` was given.
        example: a few inputs on the same device, as ``example_inputs`` of the library.
    """

    model: nn.Module
    data: Data | None
    example: Any

    def require_data(self, why: str) -> Data:
        if self.data is None:
            raise OptionError(f"{why} needs data: give --data")
        return self.data


def load_inputs(model: ModelOptions, data: DataOptions, seed: int, voice: Voice) -> Inputs:
    """Load what the options name.

    Args:
        model, data: the options.
        seed: also for the weights of a model that is given none.
        voice: says what the user should know.
    """
    device = find_device(model.device)
    voice.step("reading the data" if data.data else "no data given")
    source = None if data.data is None else Source(data.data)
    classes = model.num_classes
    if classes is None and source is not None and model.model.split(":")[0] in LIBRARIES:
        classes = source.classes
    torch.manual_seed(seed)
    voice.step(f"loading {model.model}")
    network = load_model(model.model, model.weights, classes, voice.notice).to(device)
    found = None if source is None else source.read(network, data.reading(seed))
    example = _zeros(data) if found is None else _inputs(found)
    inputs = Inputs(network, found, to_device(example, device))
    _require_runs(inputs)
    if idle := changed(data, but=_applied(data, inputs)):
        voice.notice(f"{', '.join(idle)}: no say in {data.data or 'inputs without data'}")
    return inputs


def changed(group: Any, but: Collection[str] = ()) -> list[str]:
    """The options of a group that are not at their defaults, but for those of some fields."""
    found = []
    for field in fields(group):
        value = getattr(group, field.name)
        if field.name not in but and value != field.default:
            found.append(f"--{'no-' if value is False else ''}{field.name.replace('_', '-')}")
    return found


def given(inputs: Inputs | None, *groups: Any) -> dict[str, Any]:
    """All options that were set and had a say, for the report's settings."""
    found = {}
    for group in groups:
        names = [f.name for f in fields(group) if f.name not in UNTOLD]
        if isinstance(group, DataOptions):
            applied = _applied(group, inputs)
            names = [name for name in names if name in applied]
        for name in names:
            value = getattr(group, name)
            if value is not None and value != []:
                found[name] = value if isinstance(value, int | float | str) else str(value)
    return found


def _applied(data: DataOptions, inputs: Inputs | None) -> set[str]:
    """The options that had a say in what the model was run on."""
    if inputs is None:
        return set()
    if inputs.data is not None:
        return {"data", *inputs.data.options}
    return {"image_size" if data.input_shape is None else "input_shape"}


@torch.no_grad()
def _require_runs(inputs: Inputs) -> None:
    """Run the example through the model: an image of the wrong size is better told here.

    Raises:
        ModelError: it fails; the message says what shape was tried, and what sets it.
    """
    batch = example_batch(inputs.example, device_of(inputs.model))
    try:
        batch.call(inputs.model)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        shapes = " and ".join(" x ".join(map(str, shape)) for shape in input_shapes(batch))
        hint = "--input-shape sets their shape"
        if inputs.data is not None:
            sized = "image_size" in inputs.data.options
            hint = "--image-size sets their size" if sized else "as --data has them"
        raise ModelError(
            f"{type(inputs.model).__name__} does not run on inputs of {shapes}: "
            f"{first_line(error) or type(error).__name__} ({hint})"
        ) from error


def _inputs(data: Data) -> Any:
    """The first inputs of the first batch, without labels."""
    raw = next(iter(data.calibrate), None)
    if raw is None:
        raise DataError("the data is empty: it gave no batch")
    batch = first_samples(as_batch(raw, 0, torch.device("cpu")), 2)
    return batch.kwargs or batch.args


def _zeros(data: DataOptions) -> Tensor:
    text = data.input_shape or f"3,{data.image_size},{data.image_size}"
    found = numbers("--input-shape", text)
    if not all(n >= 1 and n.is_integer() for n in found):
        raise OptionError(f"--input-shape {text!r} must be whole numbers from 1")
    shape = [int(n) for n in found]
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, *shape, generator=generator)
