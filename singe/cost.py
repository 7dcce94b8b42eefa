"""What a network costs, and what it will cost once units are gone.

MACs are counted as Torch-Pruning counts them (convolutions, linear layers, norms, activations and
pooling), so that targets mean the same as in its results. A closed formula predicts them for any number
of removed units; the count on the pruned network is the last word.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn

from singe.data import Batch
from singe.graph import NORMS, ROWS, Group, ModelGraph, private_copy


@torch.no_grad()
def count(model: nn.Module, batch: Batch) -> tuple[float, int]:
    """``(MACs per sample, parameters)`` of a model."""
    inputs = batch.kwargs if batch.kwargs else batch.args
    with contextlib.redirect_stdout(io.StringIO()):  # it prints for keyword inputs,
        macs, params = tp.utils.count_ops_and_params(private_copy(model), inputs)
    if batch.kwargs:  # and takes them for one sample
        macs /= batch.size
    return float(macs), int(params)


@dataclass
class _Layer:
    """``macs = positions * (per_pair * in * out + per_out * out)``, parameters likewise."""

    outputs: int
    inputs: int
    per_pair: float  # kernel elements / groups; 0 for norms and depthwise convolutions
    per_out: float
    params_per_out: float
    positions: int
    removed_outputs: int = 0
    removed_inputs: int = 0

    def macs(self) -> float:
        out, inp = self.outputs - self.removed_outputs, self.inputs - self.removed_inputs
        return self.positions * (self.per_pair * inp * out + self.per_out * out)

    def params(self) -> float:
        out, inp = self.outputs - self.removed_outputs, self.inputs - self.removed_inputs
        return self.per_pair * inp * out + self.params_per_out * out


class CostModel:
    """Predicts MACs and parameters from how many units every group loses.

    Args:
        model: the unpruned model; not changed.
        graph: its groups.
        batch: a small batch, run once to learn the layers' sizes.
    """

    def __init__(self, model: nn.Module, graph: ModelGraph, batch: Batch) -> None:
        self.macs, self.params = count(model, batch)
        self._groups = {g.name: g for g in graph.groups}
        self._folds = graph.folds
        self._layers = _measure(model, batch)
        self._fixed_macs = self.macs - sum(layer.macs() for layer in self._layers.values())
        self._fixed_params = self.params - sum(layer.params() for layer in self._layers.values())

    def __call__(self, removed: Mapping[str, int]) -> dict[str, float]:
        """``{"macs", "params", "channels"}`` once ``removed[group]`` units of each group are gone."""
        for layer in self._layers.values():
            layer.removed_outputs = layer.removed_inputs = 0
        for name, units in removed.items():
            self._remove(self._groups[name], units)
        layers = self._layers.values()
        total = sum(g.n_units for g in self._groups.values())
        return {
            "macs": self._fixed_macs + sum(layer.macs() for layer in layers),
            "params": self._fixed_params + sum(layer.params() for layer in layers),
            "channels": total - sum(removed.values()),
        }

    def _remove(self, group: Group, units: int) -> None:
        for member in group.members:
            if member.kind == "input":
                continue
            for name in (member.name, self._folds.get(member.name)):
                if name in self._layers:
                    self._layers[name].removed_outputs += units * member.channels.shape[1]
        for member in group.consumers:
            if member.name in self._layers:
                self._layers[member.name].removed_inputs += units * member.channels.shape[1]


def _measure(model: nn.Module, batch: Batch) -> dict[str, _Layer]:
    layers: dict[str, _Layer] = {}
    twin = private_copy(model)

    def hook(name: str) -> Callable[..., None]:
        def note(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            layer = _describe(module, out, batch.size)
            if name in layers:
                layer.positions += layers[name].positions  # called again: same parameters
            layers[name] = layer

        return note

    for name, module in twin.named_modules():
        if isinstance(module, (*ROWS, *NORMS)):
            module.register_forward_hook(hook(name))
    with torch.no_grad():
        batch.call(twin)
    return layers


def _describe(layer: nn.Module, out: Tensor, samples: int) -> _Layer:
    module: Any = layer
    if isinstance(layer, nn.Linear):
        positions = out.numel() // out.shape[-1] // samples
        bias = float(module.bias is not None)
        return _Layer(module.out_features, module.in_features, 1.0, bias, bias, positions)
    if isinstance(layer, ROWS):
        positions = out[0, 0].numel()
        kernel = module.weight[0, 0].numel()
        bias = float(module.bias is not None)
        if module.groups == module.out_channels > 1:  # depthwise: inputs leave with outputs
            width = module.in_channels // module.groups
            per_out = kernel * width
            return _Layer(module.out_channels, 0, 0.0, per_out + bias, per_out + bias, positions)
        per_pair = kernel / module.groups
        return _Layer(module.out_channels, module.in_channels, per_pair, bias, bias, positions)
    channels = out.shape[-1 if isinstance(layer, nn.LayerNorm) else 1]
    affine = module.weight is not None
    positions = out.numel() // channels // samples
    per_out = 2.0 if affine else 1.0
    if isinstance(layer, nn.GroupNorm):
        per_out = 0.0  # Torch-Pruning does not count it
    params = float(sum(p.numel() for p in module.parameters())) / channels
    return _Layer(channels, 0, 0.0, per_out, params, positions)
