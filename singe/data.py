"""Calibration data: what a batch is, how it reaches the model, and what makes it unusable."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from inspect import isgeneratorfunction
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_map, tree_unflatten
from torch.utils.data import DataLoader, IterableDataset

from singe.errors import DataError, NonFiniteError, OptionError, first_line
from singe.memory import is_out_of_memory
from singe.seeding import random_state_kept

LABEL_KEYS = ("labels", "label", "targets", "target")


@dataclass(frozen=True)
class Batch:
    """One batch, split into what the model is called with and what the objective compares with.

    Attributes:
        args: positional inputs of the model.
        kwargs: keyword inputs of the model (from a dict batch).
        labels: the targets, or None.
        raw: the batch as it came (on the model's device); user objectives receive this.
        size: number of samples B, the first dimension of the first input tensor.
        index: position in the data, for messages.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    labels: Any
    raw: Any
    size: int
    index: int

    def call(self, model: nn.Module) -> Any:
        """The model's outputs for this batch."""
        args, kwargs = self.inputs()
        return model(*args, **kwargs)

    def inputs(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Copies of ``args`` and ``kwargs``: a model may normalise in place what it is given."""
        args, kwargs = tree_map(_own, (self.args, self.kwargs))
        return args, kwargs


def _own(value: Any) -> Any:
    """A copy of a tensor that can be written to; torch refuses that of expanded ones."""
    return value.clone() if isinstance(value, Tensor) and 0 not in value.stride() else value


def device_of(model: nn.Module) -> torch.device:
    """Device of the first parameter or buffer; the CPU for a model without any."""
    first = next(chain(model.parameters(), model.buffers()), None)
    return torch.device("cpu") if first is None else first.device


def find_device(name: str | None) -> torch.device:
    """The device of that name; CUDA where torch finds it, by default.

    Raises:
        OptionError: unknown, or not usable here.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device).cpu()  # "meta" holds no values
    except (RuntimeError, AssertionError) as error:
        raise OptionError(f"device {name!r} cannot be used: {first_line(error)}") from error
    return device


def to_device(value: Any, device: torch.device) -> Any:
    """Every tensor in a nested structure on ``device``, the rest as it is."""

    def move(t: Any) -> Any:
        if not isinstance(t, Tensor):
            return t
        return t.to(device).clone() if t.is_inference() else t.to(device)

    if isinstance(value, Mapping):  # tree_map knows dict, not every mapping
        value = dict(value)
    return tree_map(move, value)


def as_batch(raw: Any, index: int, device: torch.device) -> Batch:
    """Read ``(x, y)``, ``(x,)``, a dict, or ``x`` alone as a :class:`Batch`.

    Raises:
        DataError: no tensor in it, or no samples.
        NonFiniteError: NaN or infinity in a floating-point input; a second input may hold -inf.
    """
    raw = to_device(raw, device)
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    labels = None
    if isinstance(raw, Mapping):
        key = next((k for k in LABEL_KEYS if k in raw), None)
        labels = raw[key] if key is not None else None
        kwargs = {k: v for k, v in raw.items() if k != key}
    elif isinstance(raw, tuple | list):
        if not 1 <= len(raw) <= 2:
            raise DataError(
                f"batch {index} is a {type(raw).__name__} of {len(raw)} items; expected (inputs, "
                "labels), (inputs,), a dict of model arguments, or a tensor"
            )
        inputs = raw[0]
        labels = raw[1] if len(raw) == 2 else None
        args = tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,)
    else:
        args = (raw,)

    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    if not tensors or tensors[0].dim() == 0:
        arrays = any(
            hasattr(leaf, "__array__") for leaf in tree_leaves((args, kwargs)) if not tensors
        )
        raise DataError(
            f"batch {index} ({type(raw).__name__}) holds no input tensor with a batch dimension"
            + ("; make tensors of its arrays with torch.as_tensor" if arrays else "")
        )
    if tensors[0].shape[0] == 0:
        raise DataError(f"batch {index} has no samples (shape {tuple(tensors[0].shape)})")
    for position, tensor in enumerate(tensors):
        if not tensor.is_floating_point():
            continue
        usable = torch.isfinite(tensor)
        if position > 0:  # additive attention masks hold -inf
            usable |= tensor.isneginf()
        if not usable.all():
            bad = int((~usable).sum())
            raise NonFiniteError(
                f"batch {index} has {bad} NaN or infinite input values (shape "
                f"{tuple(tensor.shape)}); clean the data or drop this batch"
            )
    return Batch(args, kwargs, labels, raw, tensors[0].shape[0], index)


def check_reiterable(batches: Any, argument: str = "batches") -> None:
    """Refuse generators (they can be read only once) and a single bare batch.

    Raises:
        DataError: with what to pass instead.
    """
    if isinstance(batches, Tensor | Mapping) or (
        isinstance(batches, tuple) and batches and isinstance(batches[0], Tensor)
    ):
        raise DataError(
            f"{argument} looks like one single batch; pass a sequence of batches, e.g. [(x, y)]"
        )
    if not isinstance(batches, Iterable):
        raise DataError(
            f"{argument} must be re-iterable (a list or a DataLoader), got {type(batches).__name__}"
        )
    stream = batches.dataset if isinstance(batches, DataLoader) else None
    # A wrapper of a shuffling loader draws when it starts.
    with random_state_kept():
        once = iter(batches) is iter(batches) if stream is None else _streams_once(stream)
    if isinstance(batches, Iterator) or once:
        verb, kind = ("is", type(batches)) if stream is None else ("reads", type(stream))
        raise DataError(
            f"{argument} {verb} a one-shot iterator ({kind.__name__}): it can be read "
            "only once, and may be used up already; pass a list or a DataLoader of data that starts again"
        )


def _streams_once(dataset: Any) -> bool:
    """Whether a loader's stream hands out one iterator again and again; as far as asking does no harm."""
    if not isinstance(dataset, IterableDataset) or isgeneratorfunction(type(dataset).__iter__):
        return False
    try:
        first = iter(dataset)
        return first is not dataset and first is iter(dataset)
    except Exception:  # it may want to be in a worker
        return False


def cannot_run(model: nn.Module, batch: Batch, error: Exception, use: str = "") -> DataError:
    """What to raise where a model does not run on a batch of data for some ``use``."""
    inputs = ", ".join(
        f"{list(t.shape)} {str(t.dtype).removeprefix('torch.')}"
        for t in tree_leaves((batch.args, batch.kwargs))
        if isinstance(t, Tensor)
    )
    own = next((str(p.dtype).removeprefix("torch.") for p in model.parameters()), "none")
    return DataError(
        f"the model does not run on {use}{use and ' '}batch {batch.index}, inputs {inputs} (its own "
        f"parameters: {own}): {first_line(error)}"
    )


def outputs_on(model: nn.Module, batch: Batch, use: str) -> Any:
    """The model's outputs for a batch of data for some ``use``.

    Raises:
        DataError: a plain RuntimeError, as torch raises where shapes or types do not fit.
    """
    try:
        return batch.call(model)
    except RuntimeError as error:
        if type(error) is not RuntimeError or is_out_of_memory(error):
            raise
        raise cannot_run(model, batch, error, use) from error


def read_batches(
    batches: Iterable[Any], device: torch.device, use: str = "calibration"
) -> Iterator[Batch]:
    """All batches in order, each checked, on ``device``; ``use`` is for messages.

    Raises:
        DataError: no batch at all, or a malformed one.
        NonFiniteError: NaN or infinity in an input.
    """
    empty = True
    for index, raw in enumerate(batches):
        empty = False
        yield as_batch(raw, index, device)
    if empty:
        raise DataError(
            f"the {use} data is empty: it gave no batch; pass at least one (or was it read before, and does "
            "not start again?)"
        )


def first_batch(batches: Iterable[Any], device: torch.device) -> Batch:
    """The first batch, for tracing."""
    return next(read_batches(batches, device))


def head(value: Any, count: int, size: int) -> Any:
    """The first ``count`` of ``size`` samples of every tensor that has so many, in a nested structure."""
    return tree_map(lambda t: t[:count] if has_samples(t, size) else t, value)


def in_channels_last(batch: Batch) -> Batch:
    """The same batch with the model's four-dimensional inputs stored channels-last."""

    def lay_out(t: Any) -> Any:
        is_image = isinstance(t, Tensor) and t.dim() == 4
        return t.contiguous(memory_format=torch.channels_last) if is_image else t

    args, kwargs = tree_map(lay_out, batch.args), tree_map(lay_out, batch.kwargs)
    return replace(batch, args=args, kwargs=kwargs)


def first_samples(batch: Batch, count: int) -> Batch:
    """The first ``count`` samples of a batch's inputs."""
    size = min(count, batch.size)
    args, kwargs = (head(inputs, size, batch.size) for inputs in (batch.args, batch.kwargs))
    return replace(batch, args=args, kwargs=kwargs, size=size)


def shapes_of(batch: Batch) -> list[Any]:
    """Shape and dtype of every input tensor of the model, and the other inputs as they are."""
    leaves = tree_leaves((batch.args, batch.kwargs))
    return [(t.shape, t.dtype) if isinstance(t, Tensor) else t for t in leaves]


def input_shapes(batch: Batch) -> list[list[int]]:
    """Shape of one sample of every input tensor of the model."""
    leaves = tree_leaves((batch.args, batch.kwargs))
    return [list(t.shape[1:]) for t in leaves if isinstance(t, Tensor) and t.dim()]


def by_sample(batch: Batch) -> tuple[list[Tensor | None], TreeSpec] | None:
    """The tensors of a batch and the structure they stand in, if each has one entry per sample."""
    leaves, spec = tree_flatten(batch.raw)
    if all(t is None or has_samples(t, batch.size) for t in leaves):
        return leaves, spec
    return None


def has_samples(value: Any, size: int) -> bool:
    """Whether ``value`` is a tensor with one entry for each of ``size`` samples."""
    return isinstance(value, Tensor) and value.dim() > 0 and len(value) == size


def cut(batch: Batch, *sizes: int) -> list[Batch] | None:
    """The samples in order in batches of these sizes, or None if they cannot be taken apart."""
    found = by_sample(batch)
    if found is None:
        return None
    leaves, spec = found
    device = next(t.device for t in leaves if t is not None)
    split = [[None] * len(sizes) if t is None else t.split(list(sizes)) for t in leaves]
    return [
        as_batch(tree_unflatten(list(part), spec), batch.index, device)
        for part in zip(*split, strict=True)
    ]


def example_batch(example_inputs: Any, device: torch.device) -> Batch:
    """A batch from ``example_inputs`` as Torch-Pruning takes them: a tensor, a tuple of positional
    arguments, or a dict of keyword arguments.

    Raises:
        DataError: no tensor in it.
    """
    if isinstance(example_inputs, Batch):
        return example_inputs
    is_sequence = isinstance(example_inputs, tuple | list)
    try:
        return as_batch((tuple(example_inputs),) if is_sequence else example_inputs, 0, device)
    except DataError as error:
        raise DataError(
            f"example_inputs must hold an input of the model with a batch dimension, as a tensor, a "
            f"tuple of arguments or a dict ({error})"
        ) from error
