"""``torch.ao.pruning``: scores as the mask rule of its structured sparsifier.

    sparsifier = torch_ao.sparsifier(scores, model, amount=0.5)
    sparsifier.prepare(model, torch_ao.config(scores, model))
    sparsifier.step()
    small = sparsifier.prune()          # torch.fx: conv - activation - conv, linear - activation - linear

The masks are right wherever ``prepare`` accepts a layer. What ``prune`` then makes smaller is the
library's affair: it knows a few patterns, none with a BatchNorm (fuse it first with
``torch.nn.utils.fusion.fuse_conv_bn_eval`` and score the fused model), and an AlexNet of torchvision's comes
out of torch 2.13 with its convolutions at full width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from singe.adapters import required
from singe.adapters.channel_scores import channel_scores
from singe.adapters.torch_prune import _check_amount
from singe.errors import ModelError
from singe.graph import unwrapped
from singe.scores import Scores

PRUNER = "torch.ao.pruning._experimental.pruner"


def config(scores: Scores, model: nn.Module) -> list[dict[str, str]]:
    """The layers with scores, as ``prepare`` wants them: ``[{"tensor_fqn": "0.weight"}, ...]``."""
    return [{"tensor_fqn": f"{name}.weight"} for name in channel_scores(scores, model)]


def sparsifier(scores: Scores, model: nn.Module, amount: float = 0.5) -> Any:
    """A ``BaseStructuredSparsifier`` that masks each layer's lowest share ``amount`` of output channels.

    A layer's own ``sparsity_level`` in the configuration goes before ``amount``.

    Args:
        scores: of this very model, before ``prepare`` parametrizes it.

    Raises:
        OptionError: this torch has no structured sparsifier, or ``amount`` is out of range.
        ScoresError: scores of another model.
    """
    _check_amount(amount)
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

    return ScoreSparsifier({"sparsity_level": amount})
