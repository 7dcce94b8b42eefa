"""Neuron path: behind the gate of one unit only one channel differs, so the layer that reads it gets
a one-channel update of what it gave before, in place of all channels again.

    consumer(x_v) = consumer(x) + W[:, u] * (act(mu_v y_u + probe_v) - act(y_u))

This is exact where nothing but a pointwise activation lies between the unit's layer and its only
consumer. Which activation it is, is found by trial: the one whose result equals the consumer's input
to the last bit, in passes with the gates nearly closed (all that is curved far out looks like a ReLU)
and at -1 (both signs are seen: a ReLU ends in a kink at 0), and again in the recorded pass of every batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from singe.data import Batch
from singe.graph import Group
from singe.network import Network

Activation = Callable[[Tensor], Tensor]
ACTIVATIONS: dict[str, Activation] = {
    "identity": lambda x: x,
    "relu": F.relu,
    "relu6": F.relu6,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "hardswish": F.hardswish,
    "tanh": torch.tanh,
}
TRIALS = (0.5, 0.05, 0.005, -1.0)  # gates


@dataclass
class Recorded:
    """One call of a layer in the recorded pass.

    The output is a copy: ``out += x`` may follow.
    """

    input: Tensor
    version: int  # of the input at the call
    output: Tensor


class ChannelUpdates:
    """The groups of a network for which this holds, batch by batch."""

    def __init__(self, network: Network, groups: Sequence[Group]) -> None:
        self.network = network
        self._calls: dict[str, list[Recorded]] = {}
        self._is_trial = False
        self._candidates: dict[str, list[Activation]] | None = None  # per group, after the trial
        self._activations: dict[str, Activation | None] = {}
        self._consumers: dict[str, str] = {}  # group -> its consumer
        for group in groups:
            if (consumer := self._sole_consumer(group)) is not None:
                self._consumers[group.name] = consumer
        for name in {*self._consumers, *self._consumers.values()}:
            self._wrap(name, network.module.get_submodule(name))

    def _sole_consumer(self, group: Group) -> str | None:
        if len(group.members) != 1 or group.members[0].kind != "rows" or len(group.consumers) != 1:
            return None
        member, consumer = group.members[0], group.consumers[0]
        module: Any = self.network.module.get_submodule(consumer.name)
        whole = member.channels.shape[1] == consumer.channels.shape[1] == 1
        if member.name != group.name or not whole or not member.is_whole(group.n_units):
            return None
        if not isinstance(module, nn.Linear):
            plain = module.groups == 1 and module.padding_mode == "zeros"
            if not plain or isinstance(module.padding, str):
                return None
        return consumer.name

    def _wrap(self, name: str, module: Any) -> None:
        forward = module.forward

        def watched(input: Tensor) -> Tensor:
            if name in self.network.overrides:
                cache = self.network.cache
                cache.passed_over(module, cache.calls(module) + 1)
                return self.network.overrides[name]
            output = forward(input)
            if self.network.is_recording or self._is_trial:
                call = Recorded(input, input._version, output.clone())
                self._calls.setdefault(name, []).append(call)
            return output

        module.forward = watched

    def forget(self) -> None:
        """Let go of the recorded batch."""
        self._calls, self._activations = {}, {}

    @property
    def needs_trial(self) -> bool:
        return self._candidates is None and bool(self._consumers)

    @torch.no_grad()
    def try_out(self, batch: Batch) -> None:
        """Find the activations, once per run: all that fit in every trial."""
        candidates = {name: list(ACTIVATIONS.values()) for name in self._consumers}
        self._is_trial = True
        for value in TRIALS:
            self.forget()
            self.network.clear()
            for name in self._consumers:
                site = self.network.sites[name]
                site.gate = self.network.open_gate(name).repeat(site.channels) * value
            self.network(batch)
            for name, known in candidates.items():
                candidates[name] = self._fitting(name, known)
        self._is_trial = False
        self.network.clear()
        self.forget()
        self._candidates = candidates

    def activation(self, group: Group) -> Activation | None:
        """What lies between the group's layer and its consumer in the recorded batch, if known."""
        if group.name not in self._activations:
            self._activations[group.name] = self._find_activation(group)
        return self._activations[group.name]

    def _find_activation(self, group: Group) -> Activation | None:
        known = (self._candidates or {}).get(group.name, [])
        return next(iter(self._fitting(group.name, known)), None)

    def _fitting(self, name: str, activations: Sequence[Activation]) -> list[Activation]:
        """Those that explain the calls seen last."""
        produced = self._calls.get(name, [])
        read = self._calls.get(self._consumers[name], []) if activations else []
        if len(produced) != 1 or len(read) != 1:
            return []
        y, x = produced[0].output, read[0].input
        overwritten = any(c.input._version != c.version for c in (*produced, *read))
        if overwritten or y.shape != x.shape or y.dtype != x.dtype:
            return []
        return [act for act in activations if torch.equal(act(y), x)]

    def updated(
        self,
        group: Group,
        units: Sequence[int],
        mu: Tensor,
        probe: Tensor | None,
    ) -> tuple[str, Tensor]:
        """The consumer and its outputs for V variants, differentiable in ``mu`` and ``probe``.

        Args:
            units: the unit of every variant; equal ones stand together.
            mu: [V], its gate.
            probe: [V, B, 1, *X] (conv) or [V, B, *, 1] (linear), added behind the gate, or None.

        Returns:
            The consumer's name, and [V, B, ...] in the dtype of its layer.
        """
        activation = self.activation(group)
        assert activation is not None
        consumer = self._consumers[group.name]
        module: Any = self.network.module.get_submodule(consumer)
        produced, read = self._calls[group.name][0], self._calls[consumer][0]
        dim = -1 if isinstance(module, nn.Linear) else 1
        parts, start = [], 0
        for unit, same in groupby(units):
            stop = start + len(list(same))
            y = produced.output.narrow(dim, unit, 1)
            z = mu[start:stop].view(-1, *[1] * y.dim()) * y
            if probe is not None:
                z = z + probe[start:stop]
            change = activation(z) - read.input.narrow(dim, unit, 1)
            parts.append(_applied(module, change.to(module.weight.dtype), unit))
            start = stop
        added = parts[0] if len(parts) == 1 else torch.cat(parts)
        return consumer, (read.output + added).to(module.weight.dtype)

    def probe(self, group: Group, variants: int) -> Tensor:
        """Zeros for one channel of the group's layer, [V, B, 1, *X], without memory of their own."""
        produced = self._calls[group.name][0].output
        linear = isinstance(self.network.module.get_submodule(group.name), nn.Linear)
        one = produced.narrow(-1 if linear else 1, 0, 1)
        return one.new_zeros(()).expand(variants, *one.shape).requires_grad_()

    def input_of(self, group: Group) -> Tensor:
        """What the group's layer was called with."""
        return self._calls[group.name][0].input


def _applied(module: Any, change: Tensor, unit: int) -> Tensor:
    """What a change [V, B, 1, *X] of one input channel adds to the layer's output."""
    weight = module.weight.narrow(1, unit, 1)
    if isinstance(module, nn.Linear):
        return change * weight[:, 0]
    flat = change.flatten(0, 1)
    no_output_padding = [0] * (flat.dim() - 2)
    added = torch.convolution(
        flat,
        weight,
        None,
        module.stride,
        module.padding,
        module.dilation,
        False,
        no_output_padding,
        1,
    )
    return added.unflatten(0, change.shape[:2])
