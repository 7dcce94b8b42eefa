"""What a network costs, and what it will cost once units are gone.

MACs are counted by Torch-Pruning's formulas (of convolutions, linear layers, norms, activations and
pooling), so that targets mean the same as in its results; they are called from here, since its own count
prints, and knows a layer's inputs by their position only. The exceptions: attention modules that it
counts as a whole, once heads are gone (:mod:`singe.attention_cost`); torchvision's Swin, whose projections
it does not see; transposed convolutions, recurrent layers and subclasses of the layers it knows
(:mod:`singe.layer_cost`). A closed formula predicts them for any number of removed units; the count on the
pruned network is the last word.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from singe.attention_cost import Tokens, counted_whole, products, sizes_of, watched
from singe.attention_cost import macs as attention_macs
from singe.conv1d import with_linears
from singe.data import Batch
from singe.errors import ModelError, SingeError, first_line
from singe.graph import NORMS, ROWS, Group, ModelGraph, private_copy
from singe.heads import Heads, tables_of
from singe.layer_cost import counted_calls, is_counted, layers_of, tensors
from singe.memory import is_out_of_memory
from singe.modes import eager
from singe.removal import Removals, remove_units
from singe.slim import open_attention


@torch.no_grad()
def count(model: nn.Module, batch: Batch) -> tuple[float, int]:
    """``(MACs per sample, parameters)`` of a model."""
    twin = _countable(model)
    modules, places = dict(twin.named_modules()), Counter(layers_of(twin))
    whole = {name: module for name, module in modules.items() if counted_whole(module)}
    layers = {n: m for n, m in modules.items() if m in places and n not in whole}
    with eager(), counted_calls(twin, layers, batch.size) as found, watched(twin, whole) as seen:
        batch.call(twin)
    found |= {name: attention_macs(module, seen[name]) for name, module in whole.items()}
    # Torch-Pruning counts what stands in two places (one ReLU, handed to all blocks) in both, with all calls.
    macs = sum(
        n * (places[modules[name]] if is_counted(modules[name]) else 1) for name, n in found.items()
    )
    return macs / batch.size, sum(p.numel() for p in twin.parameters())


def count_without(model: nn.Module, batch: Batch, removals: Removals) -> tuple[float, int]:
    """:func:`count` of a model once it has lost these units; it is changed.

    Raises:
        ModelError: it does not run without them.
    """
    try:
        remove_units(model, batch, removals)
        return count(model, batch)
    except RuntimeError as error:
        if isinstance(error, SingeError) or is_out_of_memory(error):
            raise
        names = ", ".join(group.name for group, _ in removals)
        raise ModelError(
            f"{type(model).__name__} does not run without the units that go ({first_line(error)}); name the "
            f"layer behind that in `ignore`; it is one of {names}"
        ) from error


def _countable(model: nn.Module) -> nn.Module:
    """A private copy whose linear layers are all modules that are called."""
    twin = with_linears(private_copy(model))
    for module in twin.modules():
        if not isinstance(module, nn.MultiheadAttention):
            open_attention(module)
    return twin


@dataclass
class _Layer:
    """``macs = positions * (per_pair * in * out + per_out * out)``, parameters likewise."""

    outputs: int
    inputs: int
    per_pair: float  # kernel elements / groups; 0 for norms and depthwise convolutions
    per_out: float
    params_per_out: float
    positions: float
    seconds_per_mac: float = 0.0

    def macs(self, gone_outputs: int, gone_inputs: int) -> float:
        out, inp = self.outputs - gone_outputs, self.inputs - gone_inputs
        return self.positions * (self.per_pair * inp * out + self.per_out * out)

    def params(self, gone_outputs: int, gone_inputs: int) -> float:
        out, inp = self.outputs - gone_outputs, self.inputs - gone_inputs
        return self.per_pair * inp * out + self.params_per_out * out


class CostModel:
    """Predicts MACs, parameters and time from how many units every group loses.

    The prediction is exact for parameters; for MACs it leaves out activations and pooling (they are
    taken as constant). Time is that of each layer, measured once, in proportion to its MACs.

    Args:
        model: the unpruned model; not changed.
        graph: its groups.
        batch: a small batch, run once to learn the layers' sizes.
        seconds: layer name -> measured time of the unpruned layer; without it time is not predicted.
    """

    def __init__(
        self,
        model: nn.Module,
        graph: ModelGraph,
        batch: Batch,
        seconds: Mapping[str, float] | None = None,
    ) -> None:
        self.macs, self.params = count(model, batch)
        self.units = {g.name: g.n_units for g in graph.groups}
        heads = [group.heads for group in graph.groups if group.heads is not None]
        self._layers = _measure(model, batch, heads)
        for name, layer in self._layers.items():
            full = layer.macs(0, 0)
            layer.seconds_per_mac = (seconds or {}).get(name, 0.0) / full if full else 0.0
        self._touched = {g.name: self._per_unit(g, graph.folds) for g in graph.groups}
        full_layers = self._layers.values()
        self._fixed = {
            "macs": self.macs - sum(layer.macs(0, 0) for layer in full_layers),
            "params": self.params - sum(layer.params(0, 0) for layer in full_layers),
            "latency": 0.0,
        }

    def __call__(self, removed: Mapping[str, int]) -> dict[str, float]:
        """``{"macs", "params", "channels", "latency"}`` once so many units of each group are gone.

        ``channels`` are units of the groups; ``latency`` is in seconds, of the measured layers only.
        """
        state = CostState(self)
        for name, units in removed.items():
            state.remove(name, units)
        return {kind: state.total(kind) for kind in ("macs", "params", "channels", "latency")}

    def _per_unit(self, group: Group, folds: Mapping[str, str]) -> dict[str, tuple[int, int]]:
        """Layer -> (output channels, input channels) that one unit of the group takes from it."""
        outputs: Counter[str] = Counter()
        inputs: Counter[str] = Counter()
        if group.heads is not None:
            outputs[products_of(group.heads)] += 1
            for layer, entries in group.heads.entries(self._layers).items():
                outputs[layer] += entries
            for layer, rows in group.heads.rows.items():
                outputs[layer] += rows.shape[1]
        for member in group.members:
            if member.kind == "input" or group.heads is not None:
                continue
            for name in (member.name, folds.get(member.name)):
                if name in self._layers:
                    outputs[name] += member.channels.shape[1]
        for member in group.consumers:
            if member.name in self._layers:
                inputs[member.name] += member.channels.shape[1]
        return {name: (outputs[name], inputs[name]) for name in {*outputs, *inputs}}


class CostState:
    """How many channels are gone from every layer, and what one more unit would save right now."""

    def __init__(self, cost: CostModel) -> None:
        self._cost = cost
        self._gone = {name: [0, 0] for name in cost._layers}
        self._left = sum(cost.units.values())

    def remove(self, group: str, units: int) -> None:
        """Take units of a group away; a negative number puts them back."""
        for name, (outputs, inputs) in self._cost._touched[group].items():
            self._gone[name][0] += units * outputs
            self._gone[name][1] += units * inputs
        self._left -= units

    def total(self, kind: str) -> float:
        """Cost of the network as it is by now."""
        if kind == "channels":
            return self._left
        return self._cost._fixed[kind] + sum(self._of(name, kind, 0, 0) for name in self._gone)

    def saving(self, group: str, units: int, kind: str) -> float:
        """What removing so many more units of a group saves, its neighbours as they are by now."""
        if kind == "channels":
            return units
        return sum(
            self._of(name, kind, 0, 0) - self._of(name, kind, units * outputs, units * inputs)
            for name, (outputs, inputs) in self._cost._touched[group].items()
        )

    def _of(self, name: str, kind: str, outputs: int, inputs: int) -> float:
        layer, (out, inp) = self._cost._layers[name], self._gone[name]
        if kind == "params":
            return layer.params(out + outputs, inp + inputs)
        macs = layer.macs(out + outputs, inp + inputs)
        return macs * layer.seconds_per_mac if kind == "latency" else macs


def products_of(heads: Heads) -> str:
    """The name under which the products of an attention module's heads count as one more layer."""
    return f"{heads.module}:heads"


def _measure(model: nn.Module, batch: Batch, heads: Sequence[Heads]) -> dict[str, _Layer]:
    layers: dict[str, _Layer] = {}
    twin = _countable(model)

    def hook(name: str) -> Callable[..., None]:
        def note(module: nn.Module, args: Any, out: Any) -> None:
            out = next(tensors(out), None)  # a subclass may return what it likes
            if out is None:
                return
            layer = _describe(module, out, batch.size)
            if name in layers:
                layer.positions += layers[name].positions  # called again: same parameters
            layers[name] = layer

        return note

    for name, module in twin.named_modules():
        if isinstance(module, (*ROWS, *NORMS)):
            module.register_forward_hook(hook(name))
    whole = {one.module: twin.get_submodule(one.module) for one in heads}
    whole = {name: module for name, module in whole.items() if counted_whole(module)}
    with torch.no_grad(), eager(), watched(twin, whole) as seen:
        batch.call(twin)
    for one in heads:
        module = twin.get_submodule(one.module)
        in_layers = {f"{name}.weight" for name in one.entries(layers)}
        tables = tables_of(module, one.attention)
        entries = [t.numel() for n, t in tables.items() if f"{one.module}.{n}" not in in_layers]
        tokens = seen.get(one.module, Tokens())
        macs = products(module, tokens) / batch.size if one.module in whole else 0.0
        layers[products_of(one)] = _Layer(
            one.n_units, 0, 0.0, macs / one.n_units, sum(entries) / one.n_units, 1
        )
        if isinstance(module, nn.MultiheadAttention):  # calls none of its layers
            size, bias = sizes_of(module), float(sizes_of(module).bias)
            read = (tokens.queries + 2 * tokens.keys) / 3 / batch.size
            written = tokens.queries / batch.size
            layers[one.value] = _Layer(3 * size.width, size.inputs, 1.0, bias, bias, read)
            layers[one.proj] = _Layer(size.outputs, size.width, 1.0, 1.0, 1.0, written)
    return layers


def _describe(layer: nn.Module, out: Tensor, samples: int) -> _Layer:
    module: Any = layer
    if isinstance(layer, nn.Linear):
        positions = out.numel() / out.shape[-1] / samples
        bias = float(module.bias is not None)
        once = bias / (positions or 1)  # per sample, not per position: so Torch-Pruning counts it
        return _Layer(module.out_features, module.in_features, 1.0, once, bias, positions)
    if isinstance(layer, ROWS):
        positions = out.numel() / module.out_channels / samples  # frames of a clip, in the batch
        kernel = module.weight[0, 0].numel()
        bias = float(module.bias is not None)
        if module.groups == module.out_channels > 1:  # depthwise: inputs leave with outputs
            width = module.in_channels // module.groups
            per_out = kernel * width
            return _Layer(module.out_channels, 0, 0.0, per_out + bias, per_out + bias, positions)
        per_pair = kernel / module.groups
        return _Layer(module.out_channels, module.in_channels, per_pair, bias, bias, positions)
    # A LayerNorm may be one of images (timm's LayerNorm2d), with the channels in dimension 1.
    channels = module.normalized_shape[-1] if isinstance(layer, nn.LayerNorm) else out.shape[1]
    affine = module.weight is not None
    positions = out.numel() // channels // samples
    per_out = 2.0 if affine else 1.0
    if isinstance(layer, nn.GroupNorm):
        per_out = 0.0  # Torch-Pruning does not count it
    params = float(sum(p.numel() for p in module.parameters())) / channels
    return _Layer(channels, 0, 0.0, per_out, params, positions)
