"""From sums over samples to one number per unit or weight, and to its standard error."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor

from singe.definition import Definition
from singe.graph import Group, Member
from singe.kernels.integral import Norm, accumulate
from singe.network import Network, site_key
from singe.sums import Sums


class Reduction:
    """The last step of a run.

    Args:
        sets: per group [U], see :func:`singe.sums.set_of_units`.
        row_scales: layer -> [C], by which folding has multiplied the rows of its weight.
    """

    def __init__(
        self,
        network: Network,
        definition: Definition,
        sets: dict[str, Tensor],
        row_scales: Mapping[str, Tensor],
    ) -> None:
        self.network = network
        self.integrand = definition.criterion.integrand
        # With ``norm="outside"`` the sums hold the weighted sum over the nodes already.
        self.omega = [1.0] if definition.nodes_in_one else list(definition.quadrature.weights)
        self.p = definition.p
        self.sets = sets
        self.gates_only = definition.gates_only  # the sums hold derivatives along gates
        self.each_sample = definition.each_sample  # their squares, rather
        self.row_scales = row_scales

    def scores(self, sums: Sums, group: Group) -> Tensor:
        """Float64 [U] on the CPU, from all data."""
        return self._scores(sums, group)(None)

    def latest(self, sums: Sums, group: Group) -> Tensor:
        """Float64 [U]: the score from all folds but the first."""
        return self._scores(sums, group)(0)

    def stderr(self, sums: Sums, group: Group) -> Tensor:
        """Float64 [U]: standard error of the scores over the choice of calibration samples.

        Delete-a-group jackknife for folds of unequal size (Busing, Meijer & van der Leeden 1999): with
        ``theta`` the score, ``theta_f`` the score without fold f, ``h_f`` all samples over those of the
        fold, and pseudo-values ``t_f = h_f theta - (h_f - 1) theta_f`` around their mean ``t``,
        ``var = 1/G sum_f (t_f - t)^2 / (h_f - 1)``, where ``t = G theta - sum_f (1 - 1/h_f) theta_f``.
        For criteria that are means over samples and folds of equal size it is the standard error of
        batch means. Every unit has seen every fold, of which there are two or more.
        """
        return self._jackknife(sums, group, self._scores(sums, group))

    def weights(self, sums: Sums, group: Group, member: Member) -> Tensor:
        """Float64 [U, m, *row] on the CPU: a score for every weight of a layer's rows, no biases."""
        return self._weights(sums, group, member)(None)

    def weights_stderr(self, sums: Sums, group: Group, member: Member) -> Tensor:
        """Float64 [U, m, *row]: their standard errors, as in :meth:`stderr`."""
        return self._jackknife(sums, group, self._weights(sums, group, member))

    def _jackknife(
        self, sums: Sums, group: Group, estimate: Callable[[int | None], Tensor]
    ) -> Tensor:
        """Of ``estimate(fold left out)`` [U, ...]; see :meth:`stderr`."""
        used = sums.used_folds()
        theta = estimate(None)
        without = torch.stack([estimate(f) for f in used])
        samples = sums.samples[:, self.sets[group.name]][used]  # [G, U]
        samples = samples.view(*samples.shape, *[1] * (theta.dim() - 1))
        ratio = samples.sum(0) / samples  # h
        jackknife = len(used) * theta - ((1 - 1 / ratio) * without).sum(0)
        pseudo = ratio * theta - (ratio - 1) * without
        squares = (pseudo - jackknife).square() / (ratio - 1)
        return (squares.sum(0) / len(used)).sqrt()

    def damage(self, sums: Sums) -> Tensor:
        """Float64 [N]: mean loss with each set of units gated off, minus the network's own."""
        return (sums.end_loss - sums.base_loss).sum(0) / sums.samples.sum(0)

    def _scores(self, sums: Sums, group: Group) -> Callable[[int | None], Tensor]:
        """The scores as a function of the fold that is left out."""
        if self.integrand == "loss":
            sets = self.sets[group.name]
            damage = sums.end_loss[:, sets] - sums.base_loss[:, sets]
            return lambda left_out: (
                _without(_total(damage), damage, left_out) / self._samples(sums, group, left_out)
            )
        keys = [site_key(m) for m in group.members]
        keys = [key for key in keys if (group.name, key) in sums.gradients]
        sites = [sums.gradients[group.name, key] for key in keys]
        totals = [_total(gradients) for gradients in sites]
        weight = None
        if self.integrand == "variation" and not self.gates_only:
            own = [self._weight(group, key) for key in keys]
            weight = _side_by_side(own, 1).to(totals[0])
        omega = totals[0].new_tensor(self.omega)
        norm = "sum" if self.each_sample else self.p

        def estimate(left_out: int | None) -> Tensor:
            samples = self._samples(sums, group, left_out)
            parts = [_without(t, g, left_out) for t, g in zip(totals, sites, strict=True)]
            grad = _side_by_side(parts, 2)  # [S, U, K]
            if self.integrand == "derivative":
                return -(omega[:, None] * grad.sum(2)).sum(0).double().cpu() / samples
            if self.each_sample:  # K is 1; a sum of squares is no smaller than one of its folds
                grad = (grad / samples.to(grad)[:, None]).sqrt()
            score = grad.new_zeros(group.n_units)
            accumulate(score, grad, weight, omega, cast(Norm, norm))
            # Norms take a factor out: dividing all gradients would be a copy of them.
            return score.double().cpu() / (1.0 if self.each_sample else samples)

        return estimate

    def _weights(self, sums: Sums, group: Group, member: Member) -> Callable[[int | None], Tensor]:
        """The scores as a function of the fold that is left out."""
        site = self.network.sites[member.name]
        shape = (*member.channels.shape, *site.full[0].shape[1:])  # [U, m, *row]
        sums_of_layer = sums.gradients.get((group.name, member.name))
        if sums_of_layer is None:  # never called
            return lambda left_out: torch.zeros(shape, dtype=torch.float64, device="cpu")
        total = _total(sums_of_layer)  # [S, U, m * K]
        channels = member.channels.to(total.device)
        factor = site.weight[channels].to(total)  # [U, m, K]
        if self.integrand == "gradient":  # of the user's weight, not of the folded one
            scale = self.row_scales.get(member.name, torch.ones(site.channels, device="cpu"))
            factor = scale.to(total)[channels, None].expand_as(factor)
        size = site.full[0][0].numel()  # without the bias, the last column

        def estimate(left_out: int | None) -> Tensor:
            grad = _without(total, sums_of_layer, left_out)
            samples = self._samples(sums, group, left_out).to(grad)
            score = torch.zeros_like(factor, dtype=torch.float64)
            for omega, node in zip(self.omega, grad, strict=True):
                score += omega * (factor * (node / samples[:, None]).view_as(factor)).abs()
            return score[..., :size].reshape(shape).cpu()

        return estimate

    def _samples(self, sums: Sums, group: Group, left_out: int | None) -> Tensor:
        """[U] samples that each unit has seen, 1 where there are none: 0 / 1."""
        each = sums.samples[:, self.sets[group.name]]
        samples = _without(_total(each), each, left_out)
        return torch.where(samples > 0, samples, 1.0)

    def _weight(self, group: Group, key: str) -> Tensor:
        """[U, k] of ``W_u``: rows with their bias, or 1 for a gate."""
        member = next(m for m in group.members if site_key(m) == key)
        site = self.network.sites[key]
        if site.kind != "rows":
            return self.network.open_gate(key).expand(member.channels.shape)
        return site.weight[member.channels.to(site.weight.device)].flatten(1)


def _total(values: Tensor) -> Tensor:
    """Sum over the folds, the first dimension."""
    return values[0] if len(values) == 1 else values.sum(0)


def _side_by_side(parts: Sequence[Tensor], dim: int) -> Tensor:
    """``torch.cat`` that copies nothing where there is one part."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)


def _without(total: Tensor, values: Tensor, fold: int | None) -> Tensor:
    return total if fold is None else total - values[fold]
