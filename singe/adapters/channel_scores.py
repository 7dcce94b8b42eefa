"""One vector ``[C]`` per layer: what most libraries mean by a channel importance.

MMRazor's ``L1MutableChannelUnit`` and ``GroupFisherChannelUnit.importance()``, TinyNeuralNetwork's
``metric_func``, TorchPruner's ``run(module)``, ModelOpt's score files and NNI's metrics are all views of
it. Nothing of those libraries is needed here.

    class SingeUnit(GroupFisherChannelUnit):          # MMRazor, registered with @MODELS.register_module()
        def importance(self):
            return by_layer[self.output_related[0].name]
"""

from __future__ import annotations

from os import PathLike
from pathlib import Path

import torch
from torch import Tensor, nn

from singe.errors import ModelError, OptionError, ScoresError
from singe.graph import unwrapped, width_of
from singe.scores import Scores, expect_scores, require_units


def channel_scores(scores: Scores, model: nn.Module, check: bool = True) -> dict[str, Tensor]:
    """Layer -> float32 [C_out]: the score of the unit that each output channel belongs to.

    Every layer of a group is there, coupled layers with the same numbers. Where several channels can
    only go together (grouped convolutions, GroupNorm, attention heads) each has its unit's score. A
    layer some of whose channels have no score is left out.

    Args:
        model: the model that was scored: it knows how many channels its layers have.
        check: False for a model whose parameters were renamed since, by masks or parametrizations.

    Raises:
        OptionError: no scores.
        ScoresError: scores of another model.
    """
    expect_scores(scores)
    require_units(scores)
    if check:
        scores.check(model)
    modules = dict(unwrapped(model).named_modules())
    found: dict[str, Tensor] = {}
    for group, values in scores.items():
        for name in dict.fromkeys((group, *scores.groups.get(group, ()))):
            if name not in modules:
                raise ScoresError(
                    f"this {type(model).__name__} has no layer {name!r}: another model?"
                )
            if not hasattr(modules[name], "weight"):
                continue  # nn.MultiheadAttention keeps several matrices
            units = scores.units_of(group, name, width_of(modules[name]))
            mine = units >= 0
            of_layer = found.setdefault(name, values.new_full(units.shape, torch.nan))
            of_layer[mine] = values[units[mine]]
    return {name: values for name, values in found.items() if not bool(values.isnan().any())}


def of_layer(by_layer: dict[str, Tensor], model: nn.Module, layer: str | nn.Module) -> Tensor:
    """The vector of one layer, given by name or as module.

    Raises:
        ModelError: it has no scores.
    """
    names = {module: name for name, module in unwrapped(model).named_modules()}
    name = names.get(layer, "?") if isinstance(layer, nn.Module) else layer
    if name not in by_layer:
        raise ModelError(f"layer {name!r} has no scores; scored are {', '.join(by_layer)}")
    return by_layer[name]


def save_activation_scores(scores: Scores, model: nn.Module, folder: str | PathLike[str]) -> Path:
    """Write ModelOpt's file of channel importances, ``rank_0.pth``: ``{layer: {"score": [C]}}``.

    Only tensors, dictionaries and strings: ``torch.load(..., weights_only=True)`` reads it.

    Raises:
        OptionError: ``folder`` is a file.
        ScoresError: scores of another model.
    """
    by_layer = channel_scores(scores, model)
    if not by_layer:
        raise ScoresError("there are no scores to write")
    path = Path(folder) / "rank_0.pth"
    if Path(folder).is_file():
        raise OptionError(f"{folder} is a file; give the folder that rank_0.pth goes to")
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({name: {"score": values.clone()} for name, values in by_layer.items()}, path)
    return path
