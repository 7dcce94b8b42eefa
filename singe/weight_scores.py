"""Scores of single weights: parameter name -> one number per entry."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from os import PathLike

import torch
from torch import Tensor, nn

from singe.graph import Group, Member
from singe.network import batch_norm_affine
from singe.rows import rows_of, weight_of
from singe.scores import ScoreTable, reading


class WeightScores(ScoreTable):
    """Parameter name (``"layer1.0.conv1.weight"``) -> float32 CPU tensor in its shape, higher = keep.

    Attributes:
        meta: as in :class:`singe.Scores`; ``rejected`` names layers without scores, with the reason.
        stderr: standard errors in the same mapping, or None where they were not computed.
    """

    FORMAT = "singe-weight-scores-1"
    ENTRY = "parameter"

    def __repr__(self) -> str:
        weights = sum(t.numel() for t in self._values.values())
        return (
            f"WeightScores({self.meta.get('criterion', '?')}, {len(self)} parameters, {weights} "
            f"weights, {self.meta.get('samples')} samples)"
        )

    def save(self, path: str | PathLike[str]) -> None:
        """Write a safetensors file; everything but the tensors goes into its metadata as JSON.

        An existing file is replaced at once or not at all.
        """
        self._write(path, {"parameters": list(self)}, {})

    @classmethod
    def load(cls, path: str | PathLike[str], model: nn.Module | None = None) -> WeightScores:
        """Read what :meth:`save` wrote; with ``model``, check that they belong to it.

        Raises:
            ScoresError: not such a file, damaged, or the scores of another model.
        """
        with reading(path):
            header, parts = cls._read(path)
            values = {name: parts["score"][name] for name in header["parameters"]}
            meta = dict(header["meta"])
        scores = cls(values, meta, parts["stderr"] or None)
        if model is not None:
            scores.check(model)
        return scores


def by_parameter(
    model: nn.Module, groups: Sequence[Group], of_rows: Callable[[Group, Member], Tensor]
) -> dict[str, Tensor]:
    """What is known of the rows of groups, put into the shapes of the parameters they come from.

    Args:
        model: the user's.
        of_rows: float64 [U, m, *row] of one layer's m rows per unit of a group.

    Returns:
        Parameter name -> float64 tensor on the CPU, in the order of the model. A parameter of which
        some rows are in none of the groups is left out.
    """
    found: dict[str, Tensor] = {}
    covered: dict[str, Tensor] = {}
    for group in groups:
        for member in group.rows:
            name, values = member.name, of_rows(group, member)
            if name not in found:
                weight = model.get_submodule(name).weight
                assert isinstance(weight, Tensor)
                shape = rows_of(model.get_submodule(name), weight).shape
                found[name] = torch.zeros(shape, dtype=torch.float64, device="cpu")
                covered[name] = torch.zeros(len(found[name]), dtype=torch.bool, device="cpu")
            found[name][member.channels] = values
            covered[name][member.channels.flatten()] = True
    return {
        f"{name}.weight": weight_of(module, found[name]).contiguous()
        for name, module in model.named_modules()
        if name in found and bool(covered[name].all())
    }


def row_scales(model: nn.Module, folds: Mapping[str, str]) -> dict[str, Tensor]:
    """Layer -> float64 [C]: what a folded BatchNorm multiplies the rows of its weight with."""
    return {row: batch_norm_affine(model.get_submodule(norm))[0] for row, norm in folds.items()}
