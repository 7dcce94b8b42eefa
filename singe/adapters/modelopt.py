"""NVIDIA ModelOpt: scores as the order in which FastNAS sorts channels.

    model = mtn.convert(model, [("fastnas", config)], registry=mtp.pruning.PruneModeRegistry)
    modelopt.use(model, scores)
    pruned, _ = mtn.search(model, {"flops": "60%"}, example_inputs, config={"score_func": evaluate, ...})

FastNAS decides the width of every layer by its own search and asks an importance only which channels of
a layer go first: scores rank within groups here. For its score files see
:func:`singe.adapters.channel_scores.save_activation_scores`.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from singe.adapters import required
from singe.errors import ModelError, expect
from singe.scores import Scores


def use(converted: nn.Module, scores: Scores) -> dict[str, str]:
    """Replace the importance of every searchable width that has scores.

    Args:
        converted: what ``mtn.convert`` made of the model that was scored; its layers keep their names.
        scores: from before the conversion.

    Returns:
        name of the searchable width (``layer1.0.conv1.out_channels``) -> group whose scores it got.

    Raises:
        OptionError: ModelOpt is not installed, or no scores.
        ModelError: none of its widths has scores.
    """
    expect("scores", scores, Scores, "what singe.score returned")
    named_hparams = required("modelopt.torch.opt.utils", "nvidia-modelopt").named_hparams
    group_of = {layer: name for name, layers in scores.groups.items() for layer in layers}
    group_of |= {name: name for name in scores}
    used, seen = {}, []
    for name, hparam in named_hparams(converted, configurable=True):
        layer, _, width = name.rpartition(".")
        seen.append(name)
        if width not in ("out_channels", "out_features", "num_features") or layer not in group_of:
            continue
        units = scores.units_of(group_of[layer], layer, hparam.max)
        if len(units) != hparam.max or bool((units < 0).any()):
            continue
        hparam._importance_estimators = [_estimator(scores[group_of[layer]], units)]
        used[name] = group_of[layer]
    if not used:
        raise ModelError(
            f"none of ModelOpt's widths has scores: it searches {', '.join(seen[:5]) or 'nothing'}, "
            f"scored are {', '.join(list(scores)[:5])}"
        )
    return used


def _estimator(values: Tensor, units: Tensor) -> Callable[[], Tensor]:
    # Ranks, because FastNAS divides by the largest: signed scores would turn over.
    ranks = values.argsort(stable=True).argsort().float() + 1
    return lambda: ranks[units]
