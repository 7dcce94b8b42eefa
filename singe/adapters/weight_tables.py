"""Scores of single weights by layer, and N:M masks of them: what the adapters for weights share."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from singe.errors import OptionError, ScoresError
from singe.graph import unwrapped
from singe.plain import plain_count
from singe.rows import TRANSPOSED
from singe.weight_scores import WeightScores


def weight_tables(scores: WeightScores, model: nn.Module) -> dict[str, Tensor]:
    """Layer -> scores in the shape of its weight, on the weight's device.

    Args:
        model: the model that was scored; its weights may be masked or parametrized since.

    Raises:
        ScoresError: scores of units, or of another model.
    """
    if not isinstance(scores, WeightScores):
        raise ScoresError(
            f"these are {type(scores).__name__}; use singe.score(..., granularity='weight')"
        )
    modules = dict(unwrapped(model).named_modules())
    found = {}
    for name, values in scores.items():
        layer = name.removesuffix(".weight")
        weight = getattr(modules.get(layer), "weight", None)
        if not isinstance(weight, Tensor) or weight.shape != values.shape:
            has = "no such layer" if weight is None else f"a weight of {list(weight.shape)} there"
            raise ScoresError(
                f"{name!r} has scores of shape {list(values.shape)}, this {type(model).__name__} has "
                f"{has}: another model? Score it again"
            )
        found[layer] = values.to(weight.device)
    return found


def cut_into_blocks(
    tables: dict[str, Tensor], model: nn.Module, width: int, height: int = 1
) -> dict[str, Tensor]:
    """The tables :func:`by_inputs` can cut into blocks of so many inputs and rows.

    Transposed convolutions are left out: dimension 1 of their weight is not the inputs'.
    """
    found = {}
    for name, table in tables.items():
        rows, inputs = by_inputs(table).shape
        is_transposed = isinstance(unwrapped(model).get_submodule(name), TRANSPOSED)
        if not is_transposed and rows % height == 0 and inputs % width == 0:
            found[name] = table
    return found


def by_inputs(table: Tensor) -> Tensor:
    """[C_out, C_in, *k] -> [C_out * k, C_in]: the inputs of a row side by side at every position."""
    return table.movedim(1, -1).flatten(0, -2)


def from_inputs(rows: Tensor, shape: torch.Size) -> Tensor:
    """What :func:`by_inputs` made [C_out * k, C_in], in the shape of the weight again."""
    return rows.reshape(shape[0], *shape[2:], shape[1]).movedim(-1, 1).contiguous()


def check_n_of_m(n: int, m: int) -> None:
    """Raise OptionError unless they are whole numbers, 0 < n < m."""
    n, m = plain_count("n", n), plain_count("m", m)
    if not 0 < n < m:
        raise OptionError(f"n of m needs 0 < n < m, got {n} of {m}")


def n_of_m_mask(table: Tensor, n: int = 2, m: int = 4) -> Tensor:
    """1 for the n highest of every m neighbouring inputs, 0 for the others, in the shape of ``table``.

    As NVIDIA's sparse tensor cores define it, blocks lie along the input dimension (1 of a weight
    [C_out, C_in / groups, *k]). Of equal scores the earlier inputs stay.

    Raises:
        OptionError: not 0 < n < m, or inputs that cannot be cut into blocks of m.
    """
    check_n_of_m(n, m)
    if table.shape[1] % m:
        raise OptionError(f"{table.shape[1]} inputs cannot be cut into blocks of {m}")
    blocks = by_inputs(table).unflatten(1, (-1, m))
    highest = blocks.argsort(dim=2, descending=True, stable=True)[..., :n]
    mask = torch.zeros_like(blocks).scatter_(2, highest, 1.0)
    return from_inputs(mask.flatten(1), table.shape)
