"""What is compared on CIFAR-10: Torch-Pruning's importances and this package's, as one kind of scores.

Torch-Pruning's importances run with their own default options and as its examples feed them; each is
asked once, on the whole network. "patched" mends what is known to be wrong in its release 1.6.1.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
import torch_pruning as tp
from torch import Tensor, nn

import singe

Batches = list[tuple[Tensor, Tensor]]
Importance = Callable[[Any], Tensor | None]
Scorer = Callable[[nn.Module, Batches, int], singe.Scores]


def inner_layers(model: nn.Module) -> list[str]:
    """The padded shortcuts leave only what lies between the two convolutions of a block prunable."""
    return [n for n, _ in model.named_modules() if n.endswith("conv1") and "." in n]


def taylor(model: nn.Module, batches: Batches) -> Importance:
    """Gradients summed over the batches, as in Torch-Pruning's examples."""
    _sum_gradients(model, batches)
    return tp.importance.GroupTaylorImportance()


class TaylorWithNorms(tp.importance.GroupTaylorImportance):  # type: ignore[misc]
    """BatchNorm's weights count: its branch asks for GroupNorm's pruning function instead."""

    def __call__(self, group: Any) -> Tensor | None:
        functions = tp.pruner.importance.function
        with mock.patch.object(
            functions, "prune_groupnorm_out_channels", functions.prune_batchnorm_out_channels
        ):
            return super().__call__(group)


def taylor_patched(model: nn.Module, batches: Batches) -> Importance:
    _sum_gradients(model, batches)
    return TaylorWithNorms()


def _sum_gradients(model: nn.Module, batches: Batches) -> None:
    model.zero_grad()
    for x, y in batches:
        F.cross_entropy(model(x), y).backward()


class HessianOfAllSamples(tp.importance.GroupHessianImportance):  # type: ignore[misc]
    """Squared gradients of all samples: the original keeps the last sample only."""

    def accumulate_grad(self, model: nn.Module) -> None:
        for parameter in model.parameters():
            if parameter.grad is not None:
                squared = parameter.grad.detach() ** 2
                self._accu_grad[parameter] = self._accu_grad.get(parameter, 0.0) + squared
                self._counter[parameter] = self._counter.get(parameter, 0) + 1


def hessian(
    model: nn.Module, batches: Batches, kind: type = tp.importance.GroupHessianImportance
) -> Importance:
    """Squared gradients sample by sample, as in Torch-Pruning's examples."""
    found = kind()
    found.zero_grad()
    for x, y in batches:
        for loss in F.cross_entropy(model(x), y, reduction="none"):
            model.zero_grad()
            loss.backward(retain_graph=True)
            found.accumulate_grad(model)
    return found  # type: ignore[no-any-return]


def hessian_patched(model: nn.Module, batches: Batches) -> Importance:
    return hessian(model, batches, HessianOfAllSamples)


def pruner_of(model: nn.Module, example: Tensor, ranked: Importance, ratio: float) -> Any:
    """Torch-Pruning's own pruner over the inner layers, with global ranking."""
    inner = set(inner_layers(model))
    layers = (nn.Conv2d, nn.Linear)
    return tp.pruner.BasePruner(
        model, example, importance=ranked, global_pruning=True, pruning_ratio=ratio,
        ignored_layers=[m for n, m in model.named_modules() if isinstance(m, layers) and n not in inner],
    )  # fmt: skip


def table_of(model: nn.Module, example: Tensor, ranked: Importance) -> dict[str, Tensor | None]:
    """What an importance says of every group of the whole network, by root layer."""
    pruner = pruner_of(model, example, ranked, 0.5)
    groups = pruner.DG.get_all_groups(pruner.ignored_layers, pruner.root_module_types)
    names = {module: name for name, module in model.named_modules()}
    return {names[g[0].dep.target.module]: ranked(g) for g in groups}


def by_torch_pruning(make: Callable[[nn.Module, Batches], Importance]) -> Scorer:
    """Torch-Pruning's importance of every unit, as scores that :func:`singe.plan` takes."""

    def scores(model: nn.Module, batches: Batches, seed: int) -> singe.Scores:
        torch.manual_seed(seed)
        whole = copy.deepcopy(model)
        table = table_of(whole, batches[0][0][:1], make(whole, batches))
        like = _score(model, batches, criterion="random")
        values = {name: table[name] for name in like}
        assert all(value is not None for value in values.values())
        return singe.Scores(values, like.groups, like.meta | {"criterion": "torch-pruning"})  # type: ignore[arg-type]

    return scores


def by_singe(**options: Any) -> Scorer:
    return lambda model, batches, seed: _score(model, batches, seed=seed, **options)


def _score(model: nn.Module, batches: Batches, **options: Any) -> singe.Scores:
    return singe.score(model, batches, layers=inner_layers(model), progress=False, **options)


# What :func:`singe.compress` can score again between its rounds.
OWN: dict[str, dict[str, Any]] = {
    "random": {"criterion": "random"},
    "gradient at 1 (singe, taylor)": {"criterion": "taylor"},
    "Fisher at 1 (singe, taylor)": {"criterion": "taylor", "p": "fisher"},
    "SInGE, layer": {"path": "layer"},
    "SInGE, layer, Fisher": {"path": "layer", "p": "fisher"},
    "SInGE, network": {"path": "network"},
    "SInGE, network, outside": {"path": "network", "norm": "outside"},
    "SInGE, network, label-free": {"path": "network", "objective": "kl"},
}
SCORERS: dict[str, Scorer] = {
    "random": by_singe(**OWN["random"]),
    "L1": by_torch_pruning(lambda m, b: tp.importance.GroupMagnitudeImportance(p=1)),
    "L2": by_torch_pruning(lambda m, b: tp.importance.GroupMagnitudeImportance(p=2)),
    "BNScale": by_torch_pruning(lambda m, b: tp.importance.BNScaleImportance()),
    "FPGM": by_torch_pruning(lambda m, b: tp.importance.FPGMImportance()),
    "LAMP": by_torch_pruning(lambda m, b: tp.importance.LAMPImportance()),
    "Taylor": by_torch_pruning(taylor),
    "Taylor, patched": by_torch_pruning(taylor_patched),
    "Hessian": by_torch_pruning(hessian),
    "Hessian, patched": by_torch_pruning(hessian_patched),
    **{name: by_singe(**options) for name, options in OWN.items() if name != "random"},
}


def mean_is_one(scorer: Scorer) -> Scorer:
    """The scores of every group divided by their mean: Torch-Pruning's default normaliser."""

    def scores(model: nn.Module, batches: Batches, seed: int) -> singe.Scores:
        raw = scorer(model, batches, seed)
        return singe.Scores({name: v / v.mean() for name, v in raw.items()}, raw.groups, raw.meta)

    return scores


# Set beside the above: other ways for the integral and the norm to meet.
VARIANTS: dict[str, Scorer] = {
    "SInGE, layer, sum": by_singe(path="layer", p="sum"),
    "SInGE, layer, label-free": by_singe(path="layer", objective="kl"),
    "SInGE, layer, group mean 1": mean_is_one(by_singe(path="layer")),
    "ablation": by_singe(criterion="ablation"),
}
