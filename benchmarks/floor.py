"""The arithmetic floor: what a sweep must cost, from measured pieces of the same network.

For every group of one batch, measured on the user's own model:

- ``forward``: from the output of the group's first layer to the loss, gradients recorded. One forward
  pass with a clock at every group gives all of them.
- ``backward``: from the loss to the gradient at that output, inputs only (no parameter requires a
  gradient). The same: one backward pass, a clock at every group.
- ``weight``: the weight gradient of the group's own layers, measured layer by layer.

and once ``pass_forward``, a forward of everything without gradients, and ``pass_backward``, the
input-only backward of everything. Nothing of the engine is in it. Over batches the floors add up.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.models import Work
from benchmarks.record import seconds


@dataclass(frozen=True)
class Pieces:
    """Measured seconds of one batch; per group in the order of the groups."""

    forward: list[float]
    backward: list[float]
    weight: list[float]
    pass_forward: float
    pass_backward: float

    def describe(self) -> dict[str, Any]:
        """For the JSON, with the mean share sigma of the network that lies behind a group."""
        behind = [f + b for f, b in zip(self.forward, self.backward, strict=True)]
        whole = self.pass_forward + self.pass_backward
        return asdict(self) | {"sigma": statistics.mean(behind) / whole}


def layer_floor(pieces: Pieces, nodes: int) -> float:
    """Seconds per batch: the part behind the group at every node, its weight gradient, one forward."""
    parts = zip(pieces.forward, pieces.backward, pieces.weight, strict=True)
    return nodes * sum(f + b + w for f, b, w in parts) + pieces.pass_forward


def neuron_floor(pieces: Pieces, nodes: int, units: Sequence[int]) -> float:
    """As the layer path, once per unit; of the weight gradient only the unit's own row.

    A sweep can be below it: right behind the gate only one channel differs.
    """
    parts = zip(pieces.forward, pieces.backward, pieces.weight, units, strict=True)
    return nodes * sum(u * (f + b) + w for f, b, w, u in parts) + pieces.pass_forward


def network_floor(pieces: Pieces, nodes: int) -> float:
    """Forward, input-only backward, and the weight gradients of all groups, at every node."""
    return nodes * (pieces.pass_forward + pieces.pass_backward + sum(pieces.weight))


def floor(path: str, pieces: Pieces, nodes: int, units: Sequence[int]) -> float:
    """The floor of one batch on a path."""
    if path == "neuron":
        return neuron_floor(pieces, nodes, units)
    return layer_floor(pieces, nodes) if path == "layer" else network_floor(pieces, nodes)


def average(rounds: Sequence[Pieces]) -> Pieces:
    """Piece by piece the median of several measurements."""

    def median(values: Sequence[Any]) -> Any:
        if isinstance(values[0], list):
            return [statistics.median(column) for column in zip(*values, strict=True)]
        return statistics.median(values)

    columns: Mapping[str, list[Any]] = {key: [] for key in asdict(rounds[0])}
    for pieces in rounds:
        for key, value in asdict(pieces).items():
            columns[key].append(value)
    return Pieces(**{key: median(values) for key, values in columns.items()})


class Stopwatch:
    """Moments of the program on the CPU, of the stream on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"

    def now(self) -> Any:
        """A moment."""
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, start: Any, end: Any) -> float:
        """Seconds between two moments."""
        if not self.cuda:
            return end - start
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3


def measurer(work: Work) -> Callable[[], Pieces]:
    """A function that measures the pieces once, on the first batch; it is warm already."""
    graph = work.graph()
    model = copy.deepcopy(work.model).requires_grad_(False)
    x, y = work.batches[0]
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    watch = Stopwatch(x.device)
    names = [[m.name for m in g.rows] for g in graph.groups]
    calls = _calls(model, {n for group in names for n in group}, x)

    def once() -> Pieces:
        out_at: dict[str, Any] = {}
        grad_at: dict[str, Any] = {}

        def clock(name: str) -> Callable[..., None]:
            def note(module: Any, args: Any, out: Tensor) -> None:
                out_at[name] = watch.now()
                out.register_hook(lambda grad: grad_at.__setitem__(name, watch.now()))

            return note

        hooks = [
            model.get_submodule(name).register_forward_hook(clock(name))
            for group in names
            for name in group
        ]
        try:
            loss = F.cross_entropy(model(x), y)
            end = watch.now()
            loss.backward()
            done = watch.now()
        finally:
            for hook in hooks:
                hook.remove()
            x.grad = None
        with torch.no_grad():
            forward = seconds(lambda: F.cross_entropy(model(x), y))
        return Pieces(
            # Coupled layers: the pass starts behind the first of them and ends there.
            [max(watch.between(out_at[n], end) for n in group) for group in names],
            [max(watch.between(end, grad_at[n]) for n in group) for group in names],
            [sum(_weight_gradient(*calls[n]) for n in group) for group in names],
            forward,
            watch.between(end, done),
        )

    once()
    return once


def measure(work: Work, rounds: int = 5) -> Pieces:
    """The median of several measurements."""
    once = measurer(work)
    return average([once() for _ in range(rounds)])


def _calls(model: torch.nn.Module, names: set[str], x: Tensor) -> dict[str, tuple[Any, Tensor]]:
    """What the layers are called with."""
    calls: dict[str, tuple[Any, Tensor]] = {}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: calls.__setitem__(name, (module, args[0].detach()))
        )
        for name in names
    ]
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    return calls


def _weight_gradient(module: Any, x: Tensor) -> float:
    """Seconds of ``dL/dW`` alone, given the layer's input and the gradient at its output."""
    twin = copy.deepcopy(module)
    twin.weight.requires_grad_(True)
    with torch.enable_grad():
        out = twin(x)
    grad = torch.ones_like(out)
    return seconds(lambda: torch.autograd.grad(out, twin.weight, grad))
