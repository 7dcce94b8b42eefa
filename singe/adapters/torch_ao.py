"""``torch.ao.pruning``: scores as the mask rule of its sparsifiers.

Of channels, with its structured sparsifier:

    sparsifier = torch_ao.sparsifier(scores, model, amount=0.5)
    sparsifier.prepare(model, torch_ao.config(scores, model))
    sparsifier.step()
    small = sparsifier.prune()          # torch.fx: conv - activation - conv, linear - activation - linear

The masks are right wherever ``prepare`` accepts a layer. What ``prune`` then makes smaller is the
library's affair: it knows a few patterns, none with a BatchNorm (fuse it first with
``torch.nn.utils.fusion.fuse_conv_bn_eval`` and score the fused model). Torch 2.13 leaves a convolution with
a bias at full width where the next one pads its input (an AlexNet loses no channels): a bias that moves
on to the next layer would not reach into the padding. By default (``prune_bias``) none moves on, the masked
channels' biases go with them; so here such convolutions become smaller, too.

Of single weights, with its ``WeightNormSparsifier`` and scores of ``granularity="weight"``, here 2:4:

    sparsifier = torch_ao.weight_sparsifier(scores, model, 1.0, (1, 4), zeros_per_block=2)
    sparsifier.prepare(model, torch_ao.weight_config(scores, model, (1, 4)))
    sparsifier.step()
    sparsifier.squash_mask()            # the masks become part of the weights
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from singe.adapters import required
from singe.adapters.channel_scores import channel_scores
from singe.adapters.torch_prune import plain_amount
from singe.adapters.weight_tables import (
    by_inputs,
    cut_into_blocks,
    from_inputs,
    weight_tables,
)
from singe.conv1d import is_transposed
from singe.errors import ModelError
from singe.graph import unwrapped
from singe.scores import Scores
from singe.weight_scores import WeightScores

PRUNER = "torch.ao.pruning._experimental.pruner"


def config(scores: Scores, model: nn.Module) -> list[dict[str, str]]:
    """The layers with scores, as ``prepare`` wants them: ``[{"tensor_fqn": "0.weight"}, ...]``.

    But for ``Conv1D`` of transformers, whose outputs lie along the other dimension.
    """
    modules = unwrapped(model)
    return [
        {"tensor_fqn": f"{name}.weight"} for name in channel_scores(scores, model)
        if not is_transposed(modules.get_submodule(name))
    ]  # fmt: skip


def sparsifier(scores: Scores, model: nn.Module, amount: float = 0.5) -> Any:
    """A ``BaseStructuredSparsifier`` that masks each layer's lowest share ``amount`` of output channels.

    A layer's own ``sparsity_level`` in the configuration goes before ``amount``.

    Args:
        scores: of this very model, before ``prepare`` parametrizes it.

    Raises:
        OptionError: this torch has no structured sparsifier, or ``amount`` is out of range.
        ScoresError: scores of another model.
    """
    amount = plain_amount(amount)
    base = required(PRUNER, "torch").BaseStructuredSparsifier
    by_layer = channel_scores(scores, unwrapped(model))

    class ScoreSparsifier(base):  # type: ignore[misc,valid-type]
        def update_mask(
            self, module: nn.Module, tensor_name: str, tensor_fqn: str,
            sparsity_level: float = amount, **kwargs: Any,
        ) -> None:  # fmt: skip
            """Set the mask (True = keep) of one layer."""
            name = tensor_fqn.removesuffix(f".{tensor_name}")
            if name not in by_layer:
                raise ModelError(f"layer {name!r} has no scores; scored are {', '.join(by_layer)}")
            values = by_layer[name]
            mask = getattr(module.parametrizations, tensor_name)[0].mask
            lowest = values.argsort(stable=True)[: round(sparsity_level * len(values))]
            mask.data = torch.ones_like(mask.data).index_fill_(0, lowest.to(mask.device), False)

    sparsifier = ScoreSparsifier({"sparsity_level": amount})
    sparsifier.patterns = {
        pattern: _without_bias(convert) if pattern[0] is nn.Conv2d else convert
        for pattern, convert in sparsifier.patterns.items()
    }
    return sparsifier


def _without_bias(convert: Callable[..., None]) -> Callable[..., None]:
    """A conversion of the library's that sees no bias of a convolution whose masked biases just go."""

    def run(first: Any, *rest: Any) -> None:
        bias = getattr(first, "_bias", None)
        if bias is None or not first.prune_bias:
            convert(first, *rest)
            return
        mask = first.parametrizations.weight[0].mask
        del first._bias
        convert(first, *rest)
        first.bias = nn.Parameter(bias.detach()[mask])

    return run


def weight_config(
    scores: WeightScores, model: nn.Module, sparse_block_shape: tuple[int, int] = (1, 1)
) -> list[dict[str, str]]:
    """The layers with scores whose weights can be cut into such blocks, as ``prepare`` wants them."""
    height, width = sparse_block_shape
    tables = cut_into_blocks(weight_tables(scores, model), model, width, height)
    return [{"tensor_fqn": f"{name}.weight"} for name in tables]


def weight_sparsifier(
    scores: WeightScores,
    model: nn.Module,
    sparsity_level: float = 0.5,
    sparse_block_shape: tuple[int, int] = (1, 1),
    zeros_per_block: int | None = None,
) -> Any:
    """A ``WeightNormSparsifier`` that looks at scores in place of the weights.

    The other arguments are the library's own: of every layer's blocks the share ``sparsity_level`` with
    the lowest mean score gets ``zeros_per_block`` zeros (default: all of a block), at its lowest scores.
    ``1.0, (1, 4), 2`` is 2:4. Blocks are (outputs, inputs). The library knows matrices only; here the
    weight of a convolution counts as one, [C_out * k, C_in / groups].

    Args:
        scores: of this very model, before ``prepare`` parametrizes it.

    Raises:
        OptionError: this torch has no such sparsifier.
        ScoresError: scores of units, or of another model.
    """
    base = required("torch.ao.pruning", "torch").WeightNormSparsifier
    tables = weight_tables(scores, unwrapped(model))

    class WeightScoreSparsifier(base):  # type: ignore[misc,valid-type]
        def update_mask(
            self, module: nn.Module, tensor_name: str, tensor_fqn: str, **kwargs: Any
        ) -> None:
            """Set the mask (nonzero = keep) of one layer."""
            name = tensor_fqn.removesuffix(f".{tensor_name}")
            if name not in tables:
                raise ModelError(f"layer {name!r} has no scores; scored are {', '.join(tables)}")
            table = tables[name]
            self.norm_fn = lambda weight: by_inputs(table).to(weight.device)
            super().update_mask(module, tensor_name, tensor_fqn=tensor_fqn, **kwargs)
            mask = getattr(module.parametrizations, tensor_name)[0].mask
            if mask.shape != table.shape:
                mask.data = from_inputs(mask.data, table.shape)

    return WeightScoreSparsifier(sparsity_level, sparse_block_shape, zeros_per_block)
