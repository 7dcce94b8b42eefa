"""The fused engine: every node of the path in one stacked pass, its prefix shared, and no gradient
computed that the criterion does not use."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from singe.adjoint import row_gradients, unit_row_gradients
from singe.criteria import Criterion
from singe.data import Batch, device_of
from singe.graph import Group, Member, ModelGraph
from singe.kernels.integral import Norm, accumulate
from singe.memory import free_memory, is_out_of_memory
from singe.network import Network, site_key
from singe.objectives import Objective
from singe.quadrature import Quadrature
from singe.result import Result, UnitSet, unit_sets
from singe.variants import LayoutRefused, VariantRunner, variant, zero_probes

MAX_VARIANTS = 64  # per pass; beyond that a pass only takes more memory
# On a CPU a larger pass is a slower one once it outgrows the caches: ResNet-20, layer path, 4 nodes,
# seconds with 4 / 2 / 1 variants per pass: 16 images (12 MB a variant) 0.62 / 0.72 / 0.72, 64 images
# 2.1 / 2.1 / 2.2, 256 images 14.3 / 10.1 / 8.9.
CPU_PASS_BYTES = 200 << 20
ACTIVATION_COPIES = 3  # forward, what backward keeps, and the gradient


@dataclass(frozen=True)
class Variant:
    """One setting of the gates: the units of ``units`` at ``mu``, all others at 1.

    Attributes:
        index: position of ``units`` among the unit sets of the run.
        node: index into the quadrature, or None for the end of the path, mu = 0.
    """

    units: UnitSet
    index: int
    node: int | None
    mu: float


class FusedEngine:
    """One scoring run; see :func:`singe.score` for the arguments.

    Args:
        max_memory: bytes the stacked activations of one pass may take; None: a quarter of what is
            free. On out-of-memory the pass is halved and repeated.
        on_pass: called with the number of variants after every finished pass.
    """

    def __init__(
        self,
        model: nn.Module,
        graph: ModelGraph,
        objective: Objective,
        criterion: Criterion,
        path: str,
        quadrature: Quadrature,
        p: int | str,
        norm: str,
        max_memory: int | None = None,
        on_pass: Callable[[int], None] = lambda variants: None,
    ) -> None:
        self.groups = graph.groups
        self.objective = objective
        self.criterion = criterion
        self.path = path
        self.quadrature = quadrature
        self.p = p
        self.max_memory = max_memory
        self.on_pass = on_pass
        self.device = device_of(model)
        self.network = Network(model, graph.groups, graph.folds)
        if self.device.type == "cpu" and all(p.dtype == torch.float32 for p in model.parameters()):
            # ResNet-20, 64 images: the stacked pass takes 0.88 of the time in this layout.
            self.network.set_channels_last(True)
        self.runner = VariantRunner(self.network)
        integrand = criterion.integrand
        # A sum over a unit's entries is the derivative along its gates: no weight gradient needed.
        self.gates_only = integrand == "derivative" or (integrand == "variation" and p == "sum")
        # norm="outside" sums the nodes before the norm, so one slot holds them all.
        self.nodes_in_one = norm == "outside" and integrand != "derivative"
        self.sums: dict[tuple[str, str], Tensor] = {}  # (group, site) -> [S or 1, U, k]
        self.end_losses: dict[int, float] = {}  # index of a unit set -> summed loss at mu = 0
        self.chunk = MAX_VARIANTS

    def run(self, batches: Iterable[Batch]) -> Result:
        """Score every unit; ``batches`` is read once."""
        jobs = self._jobs()
        full_loss, n_samples = 0.0, 0
        budget = self.max_memory or free_memory(self.device) // 4
        for batch in batches:
            reference = self._record(batch)
            full_loss += self._totals([reference], batch, reference).item()
            n_samples += batch.size
            self.chunk = min(self.chunk, self._variants_that_fit(budget))
            for job in jobs:
                self._run_job(job, batch, reference)
        return self._result(full_loss, n_samples)

    def variants_per_batch(self) -> int:
        """How many variants one batch takes: the unit of progress."""
        return sum(map(len, self._jobs()))

    # ------------------------------------------------------------------ what to run

    def _jobs(self) -> list[list[Variant]]:
        """Variants that gate the same layers, and so can share passes."""
        sets = list(enumerate(unit_sets(self.groups, self.path)))
        jobs: list[list[Variant]] = []
        stages: list[list[tuple[int | None, float]]] = []
        if self.criterion.integrand != "loss":
            stages.append(list(enumerate(self.quadrature.nodes)))
        if self.criterion.integrand in ("loss", "derivative"):
            stages.append([(None, 0.0)])
        for stage in stages:
            last: Group | None = None
            for index, units in sets:
                if units[0][0] is not last:
                    jobs.append([])
                    last = units[0][0]
                jobs[-1] += [Variant(units, index, node, mu) for node, mu in stage]
        return jobs

    def _run_job(self, job: list[Variant], batch: Batch, reference: Any) -> None:
        done = 0
        while done < len(job):
            variants = job[done : done + self.chunk]
            run = self._add_gradients if variants[0].node is not None else self._add_end_losses
            try:
                run(variants, batch, reference)
            except LayoutRefused:
                self._record(batch)
                continue
            except RuntimeError as error:
                if len(variants) == 1 or not is_out_of_memory(error):
                    raise
                self.chunk = len(variants) // 2
            else:
                done += len(variants)
                self.on_pass(len(variants))
                continue
            if self.device.type == "cuda":  # here the failed pass's tensors are gone
                torch.cuda.empty_cache()

    def _variants_that_fit(self, budget: int) -> int:
        per_variant = max(1, self.network.cache.bytes)
        fits = budget // (ACTIVATION_COPIES * per_variant)
        if self.device.type == "cpu":
            fits = min(fits, CPU_PASS_BYTES // per_variant)
        return max(1, fits)

    # ------------------------------------------------------------------ one pass

    def _record(self, batch: Batch) -> Any:
        """The plain pass: reference outputs, the prefix, and the shapes at the gates."""
        self.network.clear()
        with torch.no_grad(), self.network.recording():
            reference = self.network(batch)
        self.objective.check(reference, batch)
        return reference

    def _totals(self, outputs: Sequence[Any], batch: Batch, reference: Any) -> Tensor:
        """Summed loss of every variant, [V]."""
        needed = reference if self.objective.needs_reference else None
        totals = torch.stack([self.objective.total(out, batch, needed) for out in outputs])
        self.objective.require_finite(totals, batch)
        return totals

    def _gates(self, variants: Sequence[Variant]) -> dict[str, Tensor]:
        """[V, C] gates of every site that these variants touch."""
        gates: dict[str, Tensor] = {}
        for v, one in enumerate(variants):
            for group, units in one.units:
                for member in group.members:
                    key = site_key(member)
                    if key not in gates:
                        gates[key] = (
                            self.network.open_gate(key)
                            .expand(len(variants), self.network.sites[key].channels)
                            .clone()
                        )
                    gates[key][v, member.channels[units].flatten()] = one.mu
        return gates

    def _add_end_losses(self, variants: Sequence[Variant], batch: Batch, reference: Any) -> None:
        with torch.no_grad():
            outputs, _ = self.runner(batch, self._gates(variants), {})
            slices = [variant(outputs, v) for v in range(len(variants))]
            totals = self._totals(slices, batch, reference).tolist()
        for one, total in zip(variants, totals, strict=True):
            self.end_losses[one.index] = self.end_losses.get(one.index, 0.0) + total

    def _add_gradients(self, variants: Sequence[Variant], batch: Batch, reference: Any) -> None:
        gates = self._gates(variants)
        sites = self.network.sites
        probes = {
            key: zero_probes(sites[key].outputs, len(variants))
            for key in gates
            if sites[key].kind == "rows" and not self.gates_only
        }
        if self.criterion.integrand != "gradient":
            for key, gate in gates.items():
                gate.requires_grad_(key not in probes)
        with torch.enable_grad():
            outputs, inputs = self.runner(batch, gates, probes)
            slices = [variant(outputs, v) for v in range(len(variants))]
            loss = self._totals(slices, batch, reference).sum()
        derivable = [key for key, gate in gates.items() if gate.requires_grad]
        leaves = [gates[key] for key in derivable] + [t for ts in probes.values() for t in ts]
        found = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
        gate_grads = dict(zip(derivable, found, strict=False))
        rest = iter(found[len(derivable) :])
        adjoints = {key: [next(rest) for _ in ts] for key, ts in probes.items()}
        computed = []
        for group, _ in variants[0].units:
            for member in group.members:
                key = site_key(member)
                for x, adjoint in zip(inputs.get(key, ()), adjoints.get(key, ()), strict=True):
                    part = self._rows(group, member, variants, x.detach(), adjoint)
                    computed.append((group, key, part))
                if key in gate_grads:
                    part = self._of_units(group, member, variants, gate_grads[key].unsqueeze(2))
                    computed.append((group, key, part))
        # Added only now: running out of memory above must not leave half a pass in the sums.
        for group, key, part in computed:
            self._add_to_slots(group, key, variants, part)

    def _rows(
        self, group: Group, member: Member, variants: Sequence[Variant], x: Tensor, adjoint: Tensor
    ) -> Tensor:
        """Gradients of a layer's rows, by unit: [V, U, k], or [V, k] of one unit per variant."""
        module = self.network.sites[member.name].module
        if self.path == "neuron":
            channels = self._channels_per_variant(member, variants).to(self.device)
            return unit_row_gradients(module, x, adjoint, channels).flatten(1)
        return self._of_units(group, member, variants, row_gradients(module, x, adjoint))

    def _of_units(
        self, group: Group, member: Member, variants: Sequence[Variant], grad: Tensor
    ) -> Tensor:
        """[V, C, k] gradients of a module's channels, by unit as in :meth:`_rows`."""
        if self.path == "neuron":
            channels = self._channels_per_variant(member, variants)
            chosen = [g[c] for g, c in zip(grad, channels, strict=True)]  # [m, k] each
            return torch.stack(chosen).flatten(1)
        if not member.is_whole(grad.shape[1]):
            grad = grad[:, member.channels]  # [V, U, m, k]
        return grad.reshape(len(variants), group.n_units, -1)

    @staticmethod
    def _channels_per_variant(member: Member, variants: Sequence[Variant]) -> Tensor:
        """[V, m]: the channels of the one unit that each variant moves."""
        return member.channels[[one.units[0][1][0] for one in variants]]

    def _add_to_slots(
        self, group: Group, key: str, variants: Sequence[Variant], grad: Tensor
    ) -> None:
        """Add [V, U, k], or [V, k] of one unit per variant, weighted where nodes are summed."""
        sums = self.sums.get((group.name, key))
        if sums is None:
            slots = 1 if self.nodes_in_one else len(self.quadrature)
            like = self.network.open_gate(key)
            sums = like.new_zeros(slots, group.n_units, grad.shape[-1])
            self.sums[group.name, key] = sums
        for one, part in zip(variants, grad.to(sums.dtype), strict=True):
            assert one.node is not None
            slot = 0 if self.nodes_in_one else one.node
            weight = self.quadrature.weights[one.node] if self.nodes_in_one else 1.0
            target = sums[slot, one.units[0][1][0]] if self.path == "neuron" else sums[slot]
            target.add_(part, alpha=weight)

    # ------------------------------------------------------------------ what it amounts to

    def _result(self, full_loss: float, n_samples: int) -> Result:
        result = Result.empty(self.groups, n_samples)
        result.meta = {"variants_per_pass": self.chunk, "stacked": self.runner.stacked}
        damage = {i: (loss - full_loss) / n_samples for i, loss in self.end_losses.items()}
        if self.criterion.integrand == "loss":
            for index, units in enumerate(unit_sets(self.groups, self.path)):
                group, chosen = units[0]
                result.scores[group.name][chosen] = damage[index]
            return result
        for group in self.groups:
            result.scores[group.name] = self._reduce(group, n_samples).double().cpu()
        for index, units in enumerate(unit_sets(self.groups, self.path)):
            if index in damage:
                integral = sum(float(result.scores[g.name][u].sum()) for g, u in units)
                result.note_completeness(units, self.path, integral - damage[index])
        return result

    def _reduce(self, group: Group, n_samples: int) -> Tensor:
        """[U] scores from the summed gradients of a group."""
        keys = [site_key(m) for m in group.members if (group.name, site_key(m)) in self.sums]
        grad = torch.cat([self.sums.pop((group.name, key)) for key in keys], 2) / n_samples
        omega = grad.new_tensor([1.0] if self.nodes_in_one else self.quadrature.weights)
        if self.criterion.integrand == "derivative":
            return -(omega[:, None] * grad.sum(2)).sum(0)
        weight = None
        if self.criterion.integrand == "variation" and not self.gates_only:
            weight = torch.cat([self._weight(group, key) for key in keys], 1).to(grad.dtype)
        score = grad.new_zeros(group.n_units)
        accumulate(score, grad, weight, omega, cast(Norm, self.p))
        return score

    def _weight(self, group: Group, key: str) -> Tensor:
        """[U, k] of ``W_u``: rows with their bias, or 1 for a gate."""
        member = next(m for m in group.members if site_key(m) == key)
        site = self.network.sites[key]
        if site.kind != "rows":
            return self.network.open_gate(key).expand(member.channels.shape)
        return site.weight[member.channels.to(self.device)].flatten(1)
