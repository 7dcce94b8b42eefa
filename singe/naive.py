"""The definition, as plain as a textbook: set the weights, run everything, ``loss.backward()``.

Slow on purpose. It is the oracle of the tests and the baseline of the benchmarks; the fused engine
must equal it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from singe.data import Batch
from singe.definition import Definition
from singe.graph import Group, Member, ModelGraph, unwrapped
from singe.network import Network, site_key
from singe.result import Result, UnitSet, unit_sets
from singe.rows import rows_of, weight_of
from singe.weight_scores import by_parameter, row_scales


class TextbookNetwork:
    """The network with its norms folded and weights of its own, so that they can be set.

    ``W_u`` of a unit are the rows of its layers with their folded biases; where a norm or an input
    has a gate instead, that gate is the weight, and it is 1.
    """

    def __init__(self, model: nn.Module, graph: ModelGraph) -> None:
        self.network = Network(model, graph.groups, graph.folds)
        module = self.network.module
        for submodule in module.modules():
            for name, parameter in list(submodule.named_parameters(recurse=False)):
                own = nn.Parameter(parameter.detach().clone(), requires_grad=True)
                setattr(submodule, name, own)
        for key, site in self.network.sites.items():
            if site.kind != "rows":
                site.gate = self.network.open_gate(key).repeat(site.channels).requires_grad_()
        self.full = {key: self._tensors(key) for key in self.network.sites}
        self.full = {k: [t.detach().clone() for t in v] for k, v in self.full.items()}

    def _tensors(self, key: str) -> list[Tensor]:
        site = self.network.sites[key]
        if site.kind != "rows":
            return [site.gate] if site.gate is not None else []
        return [t for t in (site.module.weight, site.module.bias) if isinstance(t, Tensor)]

    @torch.no_grad()
    def set_scale(self, units: UnitSet, mu: float) -> None:
        """Every weight of these units to ``mu * W_u``."""
        for group, chosen in units:
            for member in group.members:
                channels = member.channels[chosen].flatten()
                key = site_key(member)
                module = self.network.sites[key].module
                for tensor, full in zip(self._tensors(key), self.full[key], strict=True):
                    if tensor.dim() == 1:
                        tensor[channels] = mu * full[channels]
                        continue
                    rows = rows_of(module, tensor).clone()
                    rows[channels] = mu * rows_of(module, full)[channels]
                    tensor.copy_(weight_of(module, rows))

    def zero_grad(self) -> None:
        for parameter in self.network.module.parameters():
            parameter.grad = None
        for site in self.network.sites.values():
            if site.gate is not None:
                site.gate.grad = None

    def weight_entries(self, member: Member) -> tuple[Tensor, Tensor]:
        """The rows of a layer's folded weight and their gradient, after ``backward``."""
        weight, full = self._tensors(member.name)[0], self.full[member.name][0]
        grad = torch.zeros_like(full) if weight.grad is None else weight.grad
        module = self.network.sites[member.name].module
        return rows_of(module, full), rows_of(module, grad)

    def entries(self, group: Group, with_gates: bool) -> tuple[Tensor, Tensor]:
        """``(W_u, grad_u)``, each [U, K], of all units of a group, after ``backward``."""
        weights, grads = [], []
        for member in group.members:
            if member.kind != "rows" and not with_gates:
                continue
            key = site_key(member)
            for tensor, full in zip(self._tensors(key), self.full[key], strict=True):
                grad = tensor.grad if tensor.grad is not None else torch.zeros_like(tensor)
                weights.append(_of_units(full, member))
                grads.append(_of_units(grad, member))
        return torch.cat(weights, 1), torch.cat(grads, 1)


def _of_units(tensor: Tensor, member: Member) -> Tensor:
    """[C, ...] of a module -> [U, m * ...] of the group's units."""
    return tensor[member.channels].flatten(1)


def naive_scores(
    model: nn.Module,
    graph: ModelGraph,
    batches: Iterable[Batch],
    definition: Definition,
) -> Result:
    """Scores of every unit of every group, or of every weight of their rows, by the definition.

    Args:
        batches: read once and kept.

    Returns:
        Scores [U] per group, and for ``signed`` its distance from the true loss change; for weights
        a tensor per parameter.
    """
    batches = list(batches)
    objective, integrand = definition.objective, definition.criterion.integrand
    textbook = TextbookNetwork(model, graph)
    network = textbook.network
    references: list[Any] = []
    with torch.no_grad():
        for batch in batches:
            references.append(network(batch))
            objective.check(references[-1], batch)
    n_samples = sum(batch.size for batch in batches)

    def mean_loss(backward: bool) -> float:
        total = 0.0
        for batch, reference in zip(batches, references, strict=True):
            loss = objective.total(network(batch), batch, reference)
            objective.require_finite(loss, batch)
            if backward:
                (loss / n_samples).backward()
            total += loss.item()
        return total / n_samples

    def loss_at(units: UnitSet, mu: float) -> float:
        textbook.set_scale(units, mu)
        with torch.no_grad():
            loss = mean_loss(backward=False)
        textbook.set_scale(units, 1.0)
        return loss

    def backward_at(units: UnitSet, mu: float) -> None:
        textbook.set_scale(units, mu)
        textbook.zero_grad()
        mean_loss(backward=True)
        textbook.set_scale(units, 1.0)

    def variations_at(units: UnitSet, mu: float) -> dict[str, Tensor]:
        """[U, K]: weight times gradient, or the gradient alone."""
        backward_at(units, mu)
        found = {}
        for group, _ in units:
            weight, grad = textbook.entries(group, with_gates=integrand != "gradient")
            found[group.name] = (grad if integrand == "gradient" else weight * grad).double()
        return found

    def root_mean_squares_at(units: UnitSet, mu: float) -> dict[str, Tensor]:
        """[U, 1]: over the samples, of the derivative of each one's loss along every gate."""
        nothing = torch.zeros((), dtype=torch.float64, device="cpu")
        squares = {group.name: nothing.repeat(group.n_units, 1) for group, _ in units}
        textbook.set_scale(units, mu)
        for batch, reference in zip(batches, references, strict=True):
            losses = objective.of_each_sample(network(batch), batch, reference, "p='fisher'")
            objective.require_finite(losses, batch)
            for loss in losses:
                textbook.zero_grad()
                loss.backward(retain_graph=True)
                for group, _ in units:
                    weight, grad = textbook.entries(group, with_gates=True)
                    derivative = (weight * grad).double().sum(1, keepdim=True)
                    squares[group.name] += derivative.square().cpu()
        textbook.set_scale(units, 1.0)
        return {name: (total / n_samples).sqrt() for name, total in squares.items()}

    result = Result.empty(graph.groups, n_samples)
    full_loss = loss_at([], 1.0)
    if definition.granularity == "weight":
        return _weight_scores(model, textbook, graph, backward_at, definition, n_samples)
    for units in unit_sets(graph.groups, definition.path):
        if integrand == "loss":
            (group, chosen), *_ = units
            result.scores[group.name][chosen] = loss_at(units, 0.0) - full_loss
            continue
        integrands: dict[str, list[Tensor]] = {group.name: [] for group, _ in units}
        integrand_at = root_mean_squares_at if definition.each_sample else variations_at
        for mu in definition.quadrature.nodes:
            for name, values in integrand_at(units, mu).items():
                integrands[name].append(values)
        omega = torch.tensor(definition.quadrature.weights, dtype=torch.float64, device="cpu")
        signed_sum = 0.0
        for group, chosen in units:
            values = torch.stack(integrands[group.name])[:, chosen].cpu()  # [S, U', K]
            if integrand == "derivative":
                score = -(omega[:, None] * values.sum(2)).sum(0)
                signed_sum += score.sum().item()
            elif definition.norm == "outside":
                score = _norm((omega[:, None, None] * values).sum(0), definition.p)
            else:
                score = (omega[:, None] * _norm(values, definition.p)).sum(0)
            result.scores[group.name][chosen] = score
        if integrand == "derivative":
            error = signed_sum - (loss_at(units, 0.0) - full_loss)
            result.note_completeness(units, definition.path, error)
    return result


def _weight_scores(
    model: nn.Module,
    textbook: TextbookNetwork,
    graph: ModelGraph,
    backward_at: Callable[[UnitSet, float], None],
    definition: Definition,
    n_samples: int,
) -> Result:
    """Of every weight ``sum_s omega_s |D_k(mu_s)|`` (inside) or ``|sum_s omega_s D_k(mu_s)|``.

    ``D_k`` is weight times gradient, the same before and after folding; or, for criteria of the
    gradient alone, the gradient with respect to the weight before folding.
    """
    scores: dict[tuple[str, str], Tensor] = {}
    scales = row_scales(textbook.network.module, graph.folds)
    rule = definition.quadrature
    for units in unit_sets(graph.groups, definition.path):
        for mu, omega in zip(rule.nodes, rule.weights, strict=True):
            backward_at(units, mu)
            for group, chosen in units:
                for member in group.rows:
                    weight, grad = textbook.weight_entries(member)
                    value = (weight * grad).double()
                    if definition.criterion.integrand == "gradient":
                        scale = scales.get(member.name, grad.new_ones(len(grad))).to(grad.device)
                        value = grad.double() * scale.view(-1, *[1] * (grad.dim() - 1))
                    rows = member.channels[chosen].flatten()
                    total = scores.setdefault((group.name, member.name), torch.zeros_like(value))
                    inside = definition.norm == "inside"
                    total[rows] += omega * (value.abs() if inside else value)[rows]
    result = Result.empty((), n_samples)
    result.scores = by_parameter(
        unwrapped(model),
        graph.groups,
        lambda group, member: scores[group.name, member.name][member.channels].abs().cpu(),
    )
    return result


def _norm(values: Tensor, p: int | str) -> Tensor:
    """The p-norm over the last dimension; ``"sum"`` is the absolute value of the plain sum.

    For ``"fisher"`` one number is left there already.
    """
    if p in ("sum", "fisher"):
        return values.sum(-1).abs()
    return torch.linalg.vector_norm(values, ord=float(p), dim=-1)
