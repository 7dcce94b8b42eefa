"""The passes over one batch: a plain one that is recorded, then variants whose gradients are summed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from singe.adjoint import channels_of, row_gradients, unit_row_gradients
from singe.channel_update import ChannelUpdates
from singe.data import Batch, cannot_run, shapes_of
from singe.definition import Definition
from singe.errors import SingeError
from singe.graph import Group, Member
from singe.layout import differentiate
from singe.memory import is_out_of_memory
from singe.network import Network, site_key
from singe.passes import Variant, for_each_sample, gates_of, runs_of_groups
from singe.sample_gates import SampleGates
from singe.sums import Sums
from singe.variants import VariantRunner, variant, zero_probes

# [V] of [U, m, k]; [V, m, k] where every variant moves one unit.
ByUnit = Tensor | list[Tensor]
# What lies side by side in the sums of a group's site, from these variants.
Computed = tuple[Group, str, Sequence[Variant], list[ByUnit]]


class Sweep:
    """Runs variants of a network and adds what they give to the sums.

    Args:
        updates: one-channel updates, on the neuron path.
        compile: run the variants through ``torch.compile``.
    """

    def __init__(
        self,
        network: Network,
        updates: ChannelUpdates | None,
        definition: Definition,
        sums: Sums,
        device: torch.device,
        compile: bool = False,
    ) -> None:
        self.network = network
        self.updates = updates
        self.objective = definition.objective
        self.integrand = definition.criterion.integrand
        self.one_by_one = definition.path == "neuron"
        self.quadrature = definition.quadrature
        self.gates_only = definition.gates_only
        self.each_sample = definition.each_sample
        self.nodes_in_one = definition.nodes_in_one
        self.sums = sums
        self.device = device
        self.runner = VariantRunner(network, self.record, compile, definition.path == "network")
        self.sample_gates = SampleGates(network, self.record, self.losses)
        self.recorded_shapes: list[Any] = []  # of the inputs of the last recorded batch

    def add(self, variants: Sequence[Variant], batch: Batch, reference: Any, fold: int) -> None:
        """One pass of neighbouring variants of a job; ``reference`` is None if none was recorded."""
        if variants[0].node is None:
            self._add_end_losses(variants, batch, reference, fold)
        elif self._updates_of(variants) is not None:
            self._add_channel_gradients(variants, batch, reference, fold)
        elif self.each_sample:
            self._add_squares(variants, batch, reference, fold)
        else:
            self._add_gradients(variants, batch, reference, fold)

    def record(self, batch: Batch) -> Any:
        """The plain pass: reference outputs, the prefix, and the shapes at the gates."""
        try:
            reference = self._recorded(batch)
        except RuntimeError as error:
            if isinstance(error, SingeError) or is_out_of_memory(error):
                raise
            if not self.network.channels_last:
                if type(error) is RuntimeError:  # torch's own; a model may raise what it likes
                    raise cannot_run(self.network.module, batch, error) from error
                raise
            self.network.set_channels_last(False)  # ``x.view(len(x), -1)``, for one
            return self.record(batch)
        self.objective.check(reference, batch)
        self.recorded_shapes = shapes_of(batch)
        return reference

    def _recorded(self, batch: Batch) -> Any:
        self.network.clear()
        self.recorded_shapes = []  # until it succeeds
        if self.updates is not None:
            self.updates.forget()
        with torch.no_grad(), self.network.recording():
            return self.network(batch)

    def total(self, outputs: Any, batch: Batch, reference: Any) -> Tensor:
        needed = reference if self.objective.needs_reference else None
        return self.objective.total(outputs, batch, needed)

    def losses(self, outputs: Any, count: int, batch: Batch, reference: Any) -> Tensor:
        """Loss of every sample of every variant, [V, B]."""
        needed = reference if self.objective.needs_reference else None
        return self._of_variants(
            lambda one: self.objective.of_each_sample(one, batch, needed, "p='fisher'"),
            outputs, count, batch,
        )  # fmt: skip

    def _totals(self, outputs: Any, count: int, batch: Batch, reference: Any) -> Tensor:
        """Summed loss of every variant, [V]."""
        return self._of_variants(
            lambda one: self.total(one, batch, reference), outputs, count, batch
        )

    def _of_variants(
        self, loss: Callable[[Any], Tensor], outputs: Any, count: int, batch: Batch
    ) -> Tensor:
        """``loss`` of the outputs of every variant, [V, ...]."""
        if self.objective.stacks and isinstance(outputs, Tensor):
            losses = torch.vmap(loss)(outputs)
        else:
            losses = torch.stack([loss(variant(outputs, v)) for v in range(count)])
        self.objective.require_finite(losses, batch)
        return losses

    def _add_end_losses(
        self, variants: Sequence[Variant], batch: Batch, reference: Any, fold: int
    ) -> None:
        with torch.no_grad():
            if self._updates_of(variants) is None:
                outputs, _ = self.runner(batch, gates_of(self.network, variants), {})
            else:
                outputs = self._run_update(variants, batch, self._mus(variants), None)
            totals = self._totals(outputs, len(variants), batch, reference)
        indices = torch.tensor([one.index for one in variants], device="cpu")
        self.sums.end_loss[fold].index_add_(0, indices, totals.double().cpu())

    def _add_gradients(
        self, variants: Sequence[Variant], batch: Batch, reference: Any, fold: int
    ) -> None:
        gates = gates_of(self.network, variants)
        sites = self.network.sites
        probes = {
            key: zero_probes(sites[key].outputs, len(variants))
            for key in gates
            if sites[key].kind == "rows" and not self.gates_only
        }
        if self.integrand != "gradient":
            for key, gate in gates.items():
                gate.requires_grad_(key not in probes)
        with torch.enable_grad():
            outputs, inputs = self.runner(batch, gates, probes)
            if reference is None:
                self.objective.check(variant(outputs, 0), batch)
            loss = self._totals(outputs, len(variants), batch, reference).sum()
        derivable = [key for key, gate in gates.items() if gate.requires_grad]
        leaves = [gates[key] for key in derivable] + [t for ts in probes.values() for t in ts]
        found = differentiate(loss, leaves, self.network.channels_last)
        gate_grads = dict(zip(derivable, found, strict=False))
        rest = iter(found[len(derivable) :])
        adjoints = {key: [next(rest) for _ in ts] for key, ts in probes.items()}
        computed: list[Computed] = []
        for units, where in runs_of_groups(variants):
            run = variants[where]
            for group, _ in units:
                for member in group.members:
                    key = site_key(member)
                    for x, adjoint in zip(inputs.get(key, ()), adjoints.get(key, ()), strict=True):
                        rows = self._rows(group, member, run, x.detach()[where], adjoint[where])
                        computed.append((group, key, run, rows))
                    if key in gate_grads:
                        grad = gate_grads[key][where].unsqueeze(2)
                        own = self._of_units(group, member, run, grad)
                        computed.append((group, key, run, [own]))
        self._add_all(computed, fold)

    def _add_squares(
        self, variants: Sequence[Variant], batch: Batch, reference: Any, fold: int
    ) -> None:
        """:meth:`_add_gradients` where the derivatives of single samples are squared."""
        own = self.sample_gates(batch, reference)
        gates = gates_of(self.network, variants)
        if own:
            gates = for_each_sample(gates, batch.size)
        leaves = [gate.requires_grad_() for gate in gates.values()]
        with torch.enable_grad():
            outputs, _ = self.runner(batch, gates, {})
            if reference is None:
                self.objective.check(variant(outputs, 0), batch)
            losses = self.losses(outputs, len(variants), batch, reference)  # [V, B]
        found = [
            differentiate(loss, leaves, self.network.channels_last, keep_graph=not own)
            for loss in ([losses.sum()] if own else losses.sum(0))
        ]
        of_sites = found[0] if own else [torch.stack(each, 1) for each in zip(*found, strict=True)]
        grads = dict(zip(gates, of_sites, strict=True))  # [V, B, C]
        computed: list[Computed] = [
            (
                group,
                site_key(group.members[0]),
                variants[where],
                [self._squares(group, variants[where], where, grads)],
            )
            for units, where in runs_of_groups(variants)
            for group, _ in units
        ]
        self._add_all(computed, fold)

    def _updates_of(self, variants: Sequence[Variant]) -> ChannelUpdates | None:
        """One-channel updates, if these variants can do with them."""
        group = variants[0].units[0][0]
        same = variants[-1].units[0][0] is group
        if not same or self.updates is None or self.updates.activation(group) is None:
            return None
        return self.updates

    def _mus(self, variants: Sequence[Variant]) -> Tensor:
        return self.network.open_gate(variants[0].units[0][0].name).new_tensor(
            [one.mu for one in variants]
        )

    def _run_update(
        self, variants: Sequence[Variant], batch: Batch, mu: Tensor, probe: Tensor | None
    ) -> Any:
        assert self.updates is not None
        group, units = variants[0].units[0][0], [one.unit for one in variants]
        name, output = self.updates.updated(group, units, mu, probe)
        return self.runner(batch, {}, {}, {name: output})[0]

    def _add_channel_gradients(
        self, variants: Sequence[Variant], batch: Batch, reference: Any, fold: int
    ) -> None:
        """:meth:`_add_gradients` of the neuron path, where one channel is all that moves."""
        assert self.updates is not None
        group, mu = variants[0].units[0][0], self._mus(variants)
        member = group.members[0]
        probe = None if self.gates_only else self.updates.probe(group, len(variants))
        with torch.enable_grad():
            leaf = mu.requires_grad_() if probe is None else probe
            outputs = self._run_update(variants, batch, mu, probe)
            loss = self._totals(outputs, len(variants), batch, reference).sum()
        (grad,) = differentiate(loss, [leaf], self.network.channels_last)
        if probe is None:
            part = grad[:, None, None]
        else:
            module = self.network.sites[member.name].module
            x = self.updates.input_of(group).to(module.weight.dtype)
            x = x.expand(len(variants), *x.shape)
            channels = self._channels_per_variant(member, variants).to(self.device)
            part = unit_row_gradients(module, x, grad.to(x.dtype), channels)
        self._add_all([(group, member.name, variants, [part])], fold)

    def _rows(
        self, group: Group, member: Member, variants: Sequence[Variant], x: Tensor, adjoint: Tensor
    ) -> list[ByUnit]:
        """Gradients of a layer's rows, weights and bias."""
        module = self.network.sites[member.name].module
        x = x.to(adjoint.dtype)
        if self.one_by_one:
            channels = self._channels_per_variant(member, variants).to(self.device)
            own = channels_of(module, adjoint, channels)
            return [unit_row_gradients(module, x, own, channels)]
        pieces = row_gradients(module, x, adjoint)
        return [self._of_units(group, member, variants, piece) for piece in pieces]

    def _squares(
        self,
        group: Group,
        variants: Sequence[Variant],
        where: slice,
        grads: Mapping[str, Tensor],
    ) -> Tensor:
        """Squared derivatives along the gates of single samples, summed over these.

        Args:
            where: these variants among those of ``grads``.
            grads: [V, B, C] per site.

        Returns:
            For every variant [U, 1, 1], or [1, 1] of its one unit.
        """
        of_samples = []  # [V, U, B] or [V, B]
        for member in group.members:
            grad = grads[site_key(member)][where]
            by_unit = self._of_units(group, member, variants, grad.transpose(1, 2))
            of_samples.append(torch.stack(list(by_unit)).sum(-2))
        return torch.stack(of_samples).sum(0).square().sum(-1, keepdim=True).unsqueeze(-1)

    def _of_units(
        self,
        group: Group,
        member: Member,
        variants: Sequence[Variant],
        grads: Tensor | list[Tensor],
    ) -> ByUnit:
        """[C, k] of a module's channels, for every variant, by unit."""
        if self.one_by_one:
            channels = self._channels_per_variant(member, variants).to(grads[0].device)
            return torch.stack([grad[own] for grad, own in zip(grads, channels, strict=True)])
        if member.is_whole(len(grads[0])):
            return [grad.unflatten(0, (group.n_units, -1)) for grad in grads]
        return [grad[member.channels] for grad in grads]

    @staticmethod
    def _channels_per_variant(member: Member, variants: Sequence[Variant]) -> Tensor:
        """[V, m]: the channels of the one unit that each variant moves."""
        return member.channels[[one.unit for one in variants]]

    def _add_all(self, computed: Sequence[Computed], fold: int) -> None:
        """What one pass gives, each into the sums of its group and site.

        All memory is taken before anything is added: a pass that runs out of it leaves no half of itself.
        """
        slots = [self._slot(group, key, pieces) for group, key, _, pieces in computed]
        if self.one_by_one and not self.nodes_in_one:  # every variant has a place of its own
            rows = [
                self._places(sums, variants, pieces)
                for (_, _, variants, pieces), sums in zip(computed, slots, strict=True)
            ]
            for sums, (places, values) in zip(slots, rows, strict=True):
                self._add_rows(sums[fold], places, values)
            return
        for (_, _, variants, pieces), sums in zip(computed, slots, strict=True):
            self._add_to(sums[fold], variants, pieces)

    @staticmethod
    def _places(
        sums: Tensor, variants: Sequence[Variant], pieces: list[ByUnit]
    ) -> tuple[Tensor, Tensor]:
        """Row [V] of every variant, S and U of [F, S, U, m * K] sums as one, and what to add [V, m * K]."""
        (piece,) = pieces
        assert isinstance(piece, Tensor)
        units = sums.shape[2]
        rows = [(one.node or 0) * units + one.unit for one in variants]
        return torch.tensor(rows, device=sums.device), piece.flatten(1).to(sums.dtype)

    @staticmethod
    def _add_rows(sums: Tensor, places: Tensor, values: Tensor) -> None:
        """Add to [S, U, m * K]; no row is there twice."""
        sums.flatten(0, 1).index_add_(0, places, values)

    def _slot(self, group: Group, key: str, pieces: list[ByUnit]) -> Tensor:
        slots = 1 if self.nodes_in_one else len(self.quadrature)
        entries = sum(piece[0].shape[-2] * piece[0].shape[-1] for piece in pieces)
        shape = (slots, group.n_units, entries)
        return self.sums.slot((group.name, key), shape, self.network.open_gate(key))

    def _add_to(self, sums: Tensor, variants: Sequence[Variant], pieces: list[ByUnit]) -> None:
        """Add to [S, U, m * K], weighted where nodes are summed; into views, which takes no memory."""
        widths = [piece[0].shape[-1] for piece in pieces]
        places = sums.unflatten(-1, (-1, sum(widths))).split(widths, -1)  # [S, U, m, k] each
        for index, one in enumerate(variants):
            assert one.node is not None
            slot = 0 if self.nodes_in_one else one.node
            weight = self.quadrature.weights[one.node] if self.nodes_in_one else 1.0
            for place, piece in zip(places, pieces, strict=True):
                target = place[slot, one.unit] if self.one_by_one else place[slot]
                target.add_(piece[index], alpha=weight)
