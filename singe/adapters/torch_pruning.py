"""Torch-Pruning: scores as the ``importance`` of any of its pruners.

pruner = tp.pruner.BasePruner(
    model, example_inputs, global_pruning=True, pruning_ratio=0.5,
    importance=singe.adapters.torch_pruning.importance(scores),
)
removed = singe.adapters.torch_pruning.step(pruner)
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from singe.adapters.ranking import Normalizer, ranking
from singe.criteria import choose
from singe.errors import BudgetError, OptionError, ScoresError
from singe.graph import unwrapped
from singe.limits import check_ratio, floor_of
from singe.scores import Scores, fingerprint

REDUCTIONS = ("sum", "mean", "max", "prod", "first", "gate", None)
MISSING = ("skip", "error")


def importance(
    scores: Scores,
    model: nn.Module | None = None,
    *,
    rescore: Callable[[nn.Module], Scores] | None = None,
    group_reduction: str | None = "sum",
    normalizer: Normalizer = None,
    max_pruning_ratio: float = 1.0,
    round_to: int | None = None,
    missing: str = "skip",
) -> Importance:
    """An importance for Torch-Pruning's pruners: higher = keep.

    Scores are those of whole units. Torch-Pruning averages over the blocks of a grouped convolution or
    GroupNorm; their channels get the unit's score each, so the average is the unit's score again. Ties
    are broken (:func:`singe.adapters.ranking.ranking`), and the best unit of every group ranks above
    everything: Torch-Pruning leaves a group whole, silently, if all its units fall below the global
    threshold.

    Args:
        scores: what :func:`singe.score` returned for the very model that is pruned.
        model: only for forks of Torch-Pruning whose groups do not know their graph.
        rescore: called with the model once pruning has changed its shapes, as with
            ``iterative_steps > 1``; without it, scores of the former shapes are refused.
        group_reduction: how several scored groups that Torch-Pruning couples become one: ``sum``,
            ``mean``, ``max``, ``prod``, ``first``, ``gate`` (the last), or None (stacked, 2-D).
        normalizer: Torch-Pruning's names, applied to each group; None (default) keeps groups
            commensurable, as a change of the loss is.
        max_pruning_ratio: no group loses more than this share of its units in one step. (The pruner's
            own argument is checked between steps only.)
        round_to: the pruner's ``round_to``: so many units of each group are kept at least.
        missing: groups without scores are left alone (``"skip"``; a warning names all but the output
            layer, with the reason), or refused (``"error"``).

    Raises:
        OptionError: an argument value that is not offered.
        ScoresError: scores that rank nothing; when called: scores of another model or of former
            shapes, a group without scores under ``missing="error"``.
    """
    return Importance(
        scores, model, rescore, group_reduction, normalizer, max_pruning_ratio, round_to, missing
    )


def step(pruner: Any) -> dict[str, list[int]]:
    """``pruner.step()``, which says what it removed.

    Returns:
        root layer -> its removed channels, in the numbering they had before.

    Raises:
        BudgetError: nothing was removed. Torch-Pruning says nothing of that.
    """
    history = pruner.pruning_history()
    before = len(history)
    pruner.step()
    removed = {name: sorted(idxs) for name, _, idxs in history[before:] if idxs}
    if not removed:
        raise BudgetError(
            "Torch-Pruning removed nothing: every group is without scores, in ignored_layers, or "
            "would lose all its channels. Raise pruning_ratio, lower round_to, or score more layers"
        )
    return removed


class Importance:
    """What :func:`importance` returns; call it with a group of Torch-Pruning.

    Attributes:
        scores: those in use; replaced by what ``rescore`` returns.
        skipped: root layer -> why it was left alone.
    """

    def __init__(
        self,
        scores: Scores,
        model: nn.Module | None,
        rescore: Callable[[nn.Module], Scores] | None,
        group_reduction: str | None,
        normalizer: Normalizer,
        max_pruning_ratio: float,
        round_to: int | None,
        missing: str,
    ) -> None:
        choose("group_reduction", group_reduction, REDUCTIONS)
        choose("missing", missing, MISSING)
        check_ratio(max_pruning_ratio)
        if round_to is not None and round_to < 1:
            raise OptionError(f"round_to must be a positive number of channels, got {round_to!r}")
        self.model, self.rescore, self.missing = model, rescore, missing
        self.group_reduction, self.normalizer = group_reduction, normalizer
        self.max_pruning_ratio, self.round_to = max_pruning_ratio, round_to or 1
        self.skipped: dict[str, str] = {}
        self._use(scores)

    def _use(self, scores: Scores) -> None:
        floors = {n: floor_of(len(values), self.max_pruning_ratio) for n, values in scores.items()}
        keep = {name: max(floor, self.round_to) for name, floor in floors.items()}
        self.scores = scores
        self._heads: dict[str, int] = scores.meta.get("heads", {})
        self.table = ranking(scores, normalizer=self.normalizer, keep=keep)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.scores!r})"

    def __call__(self, group: Any, ch_groups: int = 1, **kwargs: Any) -> Tensor | None:
        """Importance [n] of the n root channels of a group, or None: leave it alone.

        Args:
            group: of ``DependencyGraph.get_all_groups``, or a part of one.
            ch_groups: forks before 1.3 pass it: averaged over that many blocks, then repeated.
            kwargs: what else forks pass (``consecutive_groups``) needs nothing done here.
        """
        model = self._model_of(group)
        self._refuse_stale(model)
        names = {module: name for name, module in unwrapped(model).named_modules()}
        roots = list(group[0][1])
        position = {index: i for i, index in enumerate(roots)}
        parts = []
        for item in group:
            name = names.get(item[0].target.module)
            if name not in self.table or not _is_out(item[0].handler):
                continue
            if name in self._heads:
                if isinstance(item[0].target.module, nn.MultiheadAttention):
                    continue  # here it stands for the channels it is fed
                if (why := self._why_no_heads(name, group)) is not None:
                    self._note_missing(names.get(group[0][0].target.module, "?"), 0, why)
                    return None
            parts.append(self._part(name, item, position))
        if not parts or not bool(torch.stack([seen for _, seen in parts]).any(0).all()):
            self._note_missing(names.get(group[0][0].target.module, "?"), len(parts))
            return None
        reduced = self._reduce([values for values, _ in parts])
        if ch_groups > 1:
            reduced = reduced.view(ch_groups, -1).mean(0).repeat(ch_groups)
        return reduced

    def _why_no_heads(self, name: str, group: Any) -> str | None:
        """Why Torch-Pruning cannot be trusted with the heads of a layer, or None."""
        if self._heads[name] > 1:
            return (
                "its units are key/value heads with all their query heads, which Torch-Pruning cannot "
                "remove together; use singe.prune"
            )
        if _is_out(group[0][0].handler):  # with num_heads it asks for the reading layer's columns
            return (
                "its units are whole heads; give the pruner num_heads={layer: heads}, "
                "prune_num_heads=True, prune_head_dims=False and head_pruning_ratio"
            )
        return None

    def _model_of(self, group: Any) -> nn.Module:
        graph = getattr(group, "_DG", None)
        model = self.model if graph is None else graph.model
        if model is None:
            raise OptionError(
                "this group does not know its model (an old fork of Torch-Pruning?); pass it: "
                "importance(scores, model)"
            )
        return model

    def _refuse_stale(self, model: nn.Module) -> None:
        if fingerprint(model) == self.scores.meta.get("fingerprint"):
            return
        if self.rescore is None:
            try:
                self.scores.check(model)
            except ScoresError as error:
                raise ScoresError(
                    f"{error}. With iterative_steps > 1 pass importance(scores, rescore=lambda "
                    "model: singe.score(model, batches))"
                ) from None
        else:
            with torch.enable_grad():  # pruners call under no_grad
                scores = self.rescore(model)
            scores.check(model)
            self._use(scores)

    def _part(self, name: str, item: Any, position: Mapping[int, int]) -> tuple[Tensor, Tensor]:
        """[n] scores that one layer gives the root channels, and [n] which of them it gives any."""
        table = self.table[name]
        idxs = torch.as_tensor(list(item[1]))
        root_idxs: Sequence[int] = getattr(item, "root_idxs", None) or list(position)
        places = torch.tensor([position.get(r, -1) for r in root_idxs])
        channels = int(idxs.max()) + 1
        units = self.scores.units_of(name, name, channels + -channels % len(table))[idxs]
        known = (places >= 0) & (units >= 0)
        values = torch.zeros(len(position), dtype=table.dtype)
        count = torch.zeros(len(position), dtype=table.dtype)
        values.index_add_(0, places[known], table[units[known]])
        count.index_add_(0, places[known], torch.ones_like(table[units[known]]))
        # A head's q, k and v rows stand at one place: its score counts once.
        return values / count.clamp(min=1), count > 0

    def _reduce(self, parts: list[Tensor]) -> Tensor:
        stacked = torch.stack(parts)
        match self.group_reduction:
            case "sum":
                return stacked.sum(0)
            case "mean":
                return stacked.mean(0)
            case "max":
                return stacked.amax(0)
            case "prod":
                return stacked.prod(0)
            case "first":
                return parts[0]
            case "gate":
                return parts[-1]
            case _:
                return stacked

    def _note_missing(self, root: str, parts: int, why: str = "") -> None:
        why = why or self.scores.meta.get("rejected", {}).get(
            root, "it was not among the scored layers"
        )
        if parts:
            why = "only some of its channels have scores"
        if self.missing == "error":
            raise ScoresError(f"the group of {root!r} has no scores: {why}")
        if root not in self.skipped and "output" not in why:
            warnings.warn(
                f"Torch-Pruning leaves the group of {root!r} alone, it has no scores: {why}",
                stacklevel=3,
            )
        self.skipped[root] = why


def _is_out(handler: Any) -> bool:
    """Whether a pruning function removes output channels (of a depthwise convolution: both)."""
    return getattr(handler, "__name__", "").endswith("out_channels")
