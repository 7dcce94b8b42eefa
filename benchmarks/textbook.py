"""Naive scoring as a user would write it, on the user's own model, its norms as they are.

For every group (or unit), node and batch: scale the weights, run the network, differentiate, add up
``W * dL/dW``. Two strengths: ``loss.backward()`` (textbook), and ``torch.autograd.grad`` with respect
to the one layer, which spares the backward pass in front of it and all other weight gradients
(careful). Both give the score of ``criterion="singe"``, ``p=1``, ``norm="inside"``.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.record import seconds
from benchmarks.sampling import Plan, Step, extrapolate
from singe.graph import Group, ModelGraph
from singe.quadrature import Quadrature

Batch = tuple[Tensor, Tensor]
STRENGTHS = ("textbook", "careful")


class Producer:
    """A layer whose output channels are units, and the BatchNorm behind it, if it folds."""

    def __init__(self, row: nn.Module, norm: nn.Module | None) -> None:
        self.weight, self.row_bias = row.weight, row.bias
        self.mean = norm.running_mean if norm else None
        self.bias = norm.bias if norm else row.bias  # where the folded bias has its gradient
        # Scaling these by mu scales the channel behind the norm: scale * (mu W x - mu mean) + mu shift
        scaled = (row.weight, row.bias, self.mean, norm.bias if norm else None)
        self.scaled = [t for t in scaled if t is not None]
        with torch.no_grad():
            self.full = [t.clone() for t in self.scaled]
            self.folded_bias: Tensor | None = None if row.bias is None else row.bias.clone()
            if norm is not None:
                inner = (0.0 if row.bias is None else row.bias) - norm.running_mean
                scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
                self.folded_bias = scale * inner + norm.bias

    @property
    def leaves(self) -> list[Tensor]:
        """What is differentiated: the weight and the folded bias."""
        return [self.weight] if self.bias is None else [self.weight, self.bias]

    def variation(self, grads: Sequence[Tensor]) -> Tensor:
        """[C, K] ``W * grad``, the folded bias as last column."""
        parts = [(self.full[0] * grads[0]).flatten(1)]
        if self.folded_bias is not None:
            parts.append((self.folded_bias * grads[1])[:, None])
        return torch.cat(parts, 1)


class NaiveLoop:
    """The loop over units, nodes and batches.

    Args:
        graph: the groups; every unit must be one channel of its layers, each with at most a
            BatchNorm that folds.
        strength: ``"textbook"`` or ``"careful"``.

    Raises:
        ValueError: a group with other gates than rows of weights.
    """

    def __init__(self, model: nn.Module, graph: ModelGraph, strength: str) -> None:
        self.model = copy.deepcopy(model)
        self.careful = strength == "careful"
        self.groups = graph.groups
        self.producers = [self._producers(group, graph.folds) for group in graph.groups]

    def _producers(self, group: Group, folds: dict[str, str]) -> list[Producer]:
        find = self.model.get_submodule
        for member in group.members:
            whole = member.is_whole(find(member.name).weight.shape[0])
            if member.kind != "rows" or not whole:
                raise ValueError(f"{group.name}: {member.name} is no plain row of channels")
        names = [member.name for member in group.members]
        return [Producer(find(n), find(folds[n]) if n in folds else None) for n in names]

    @contextmanager
    def _scaled(self, groups: Sequence[int], unit: int | None, mu: float) -> Iterator[None]:
        chosen = slice(None) if unit is None else unit
        producers = [p for g in groups for p in self.producers[g]]
        with torch.no_grad():
            for producer in producers:
                for tensor in producer.scaled:
                    tensor[chosen] *= mu
        try:
            yield
        finally:
            with torch.no_grad():
                for producer in producers:
                    for tensor, full in zip(producer.scaled, producer.full, strict=True):
                        tensor[chosen] = full[chosen]

    def gradients(
        self, groups: Sequence[int], unit: int | None, mu: float, batches: Sequence[Batch]
    ) -> dict[int, list[Tensor]]:
        """Per group the ``W * grad`` [C, K] of its layers, of the mean loss over ``batches``."""
        images = sum(len(y) for _, y in batches)
        with self._scaled(groups, unit, mu):
            leaves = [t for g in groups for p in self.producers[g] for t in p.leaves]
            sums: list[Tensor] | None = None
            self.model.zero_grad()
            for x, y in batches:
                loss = F.cross_entropy(self.model(x), y, reduction="sum") / images
                if self.careful:
                    found = list(torch.autograd.grad(loss, leaves))
                    sums = (
                        found if sums is None else [a + b for a, b in zip(sums, found, strict=True)]
                    )
                else:
                    loss.backward()
        rest = iter(sums or [t.grad for t in leaves])
        return {
            g: [p.variation([next(rest) for _ in p.leaves]) for p in self.producers[g]]
            for g in groups
        }

    def scores(self, path: str, batches: Sequence[Batch], rule: Quadrature) -> dict[str, Tensor]:
        """All scores, float32 [U] per group: the whole run."""
        result = {g.name: torch.zeros(g.n_units) for g in self.groups}
        everything = range(len(self.groups))
        sets: list[tuple[Sequence[int], int | None]] = [(everything, None)]
        if path == "layer":
            sets = [([g], None) for g in everything]
        elif path == "neuron":
            sets = [([g], u) for g in everything for u in range(self.groups[g].n_units)]
        for groups, unit in sets:
            for mu, weight in zip(rule.nodes, rule.weights, strict=True):
                for g, parts in self.gradients(groups, unit, mu, batches).items():
                    value = weight * torch.cat(parts, 1).abs().sum(1).cpu()
                    chosen = slice(None) if unit is None else unit
                    result[self.groups[g].name][chosen] += value[chosen]
        return result

    def step(self, step: Step, batches: Sequence[Batch], rule: Quadrature) -> None:
        """One step of the run."""
        groups = range(len(self.groups)) if step.group is None else [step.group]
        parts = self.gradients(groups, step.unit, rule.nodes[step.node], [batches[step.batch]])
        for found in parts.values():
            torch.cat(found, 1).abs().sum(1)

    def seconds(self, plan: Plan, batches: Sequence[Batch], rule: Quadrature) -> float:
        """Time of the whole run, measured on the planned steps."""
        times = [
            (step.group, seconds(lambda step=step: self.step(step, batches, rule)))
            for step in plan.steps
        ]
        return extrapolate(times, plan.total)
