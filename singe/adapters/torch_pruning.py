"""Torch-Pruning: scores as the ``importance`` of its pruners.

pruner = tp.pruner.BasePruner(
    model, example_inputs, global_pruning=True, pruning_ratio=0.5,
    importance=singe.adapters.torch_pruning.importance(scores),
)
removed = singe.adapters.torch_pruning.step(pruner)
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from singe.adapters.ranking import Normalizer, ranking
from singe.conv1d import is_transposed
from singe.criteria import choose
from singe.errors import BudgetError, OptionError, ScoresError, expect_callable
from singe.graph import unwrapped, width_of
from singe.limits import floor_of, plain_ratio
from singe.plain import plain_count
from singe.scores import Scores, ScoreTable, expect_scores, fingerprint, scores_for

REDUCTIONS = ("sum", "mean", "max", "prod", "first", "gate")
MISSING = ("skip", "error")


def importance(
    scores: Scores,
    model: nn.Module | None = None,
    *,
    rescore: Callable[[nn.Module], Scores] | None = None,
    group_reduction: str = "sum",
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
    threshold. So these are ranks; a pruner that regularizes by them while it trains wants others.

    Args:
        scores: what :func:`singe.score` returned for the very model that is pruned.
        model: only for forks of Torch-Pruning whose groups do not know their graph.
        rescore: called with the model once pruning has changed its shapes, as with
            ``iterative_steps > 1``; without it, scores of the former shapes are refused.
        group_reduction: how several scored groups that Torch-Pruning couples become one: ``sum``,
            ``mean``, ``max``, ``prod``, ``first`` or ``gate`` (the last). Torch-Pruning's own None, one row
            per layer, is nothing its pruners can rank.
        normalizer: Torch-Pruning's names, applied to each group; None (default) keeps groups
            commensurable, as a change of the loss is.
        max_pruning_ratio: no group loses more than this share of its units in one step. Below 1 it needs
            :func:`step`, which refuses a step that would remove more; ``pruner.step()`` is refused, since
            Torch-Pruning tells an importance nothing of how much it removes. (The pruner's own argument
            is checked between steps only, and caps ``pruning_ratio_dict``.)
        round_to: the pruner's ``round_to``: so many units of each group are kept at least; :func:`step`
            checks that, too.
        missing: groups without scores are left alone (``"skip"``; a warning names all but the output
            layer, with the reason), or refused (``"error"``).

    Raises:
        OptionError: no scores, or an argument value that is not offered; when called: a
            ``max_pruning_ratio`` without :func:`step`.
        ScoresError: scores that rank nothing; when called: scores of another model or of former
            shapes, a group without scores under ``missing="error"``.
    """
    return Importance(
        scores, model, rescore, group_reduction, normalizer, max_pruning_ratio, round_to, missing
    )


def step(pruner: Any) -> dict[str, list[int]]:
    """``pruner.step()``, which says what it removed, and removes nothing rather than too much.

    Returns:
        root layer -> its removed output channels, in the numbering they had before; of heads, whose root
        is the layer that reads them, ``"attn.proj:input"`` -> its removed input channels.

    Raises:
        BudgetError: a group would lose more than the importance's ``max_pruning_ratio`` or ``round_to``
            allow: nothing was removed, the pruner is as before. Or nothing was removed, of which
            Torch-Pruning says nothing.
        OptionError: the pruner's ``importance`` are the scores themselves.
    """
    scorer = pruner.importance
    if isinstance(scorer, ScoreTable):
        raise OptionError(
            "the pruner's importance are the scores themselves, which Torch-Pruning cannot call; give it "
            "importance=singe.adapters.torch_pruning.importance(scores)"
        )
    before = len(pruner.pruning_history())
    if isinstance(scorer, Importance):
        scorer._step(pruner)
    else:
        pruner.step()
    history = pruner.pruning_history()[before:]
    removed = {
        name if is_out else f"{name}:input": sorted(idxs) for name, is_out, idxs in history if idxs
    }
    if not removed:
        raise BudgetError(f"Torch-Pruning removed nothing: {_why_nothing(pruner)}")
    return removed


def _why_nothing(pruner: Any) -> str:
    """Why a step removed nothing, and what to do."""
    if pruner.current_step > pruner.iterative_steps:
        return (
            f"its step {pruner.iterative_steps} of iterative_steps={pruner.iterative_steps} was taken "
            "before; pruner.reset() starts again"
        )
    if pruner.pruning_ratio >= 1.0:
        return (
            f"pruning_ratio={pruner.pruning_ratio} asks for every channel, and it leaves a group whole "
            "that would lose all of them. Lower pruning_ratio; 0.5 removes half of the channels"
        )
    return (
        f"pruning_ratio={pruner.pruning_ratio} (or pruning_ratio_dict) takes none or all of the channels of "
        "every group that has scores and is not in ignored_layers, and a group that would lose all is left "
        "whole. Change it, lower round_to, or score more layers"
    )


def _counts_of(pruner: Any) -> Callable[[], None]:
    """Puts back what a pruner counts, steps and heads, before it removes anything."""
    taken = pruner.current_step
    tables = [
        getattr(pruner, name, {}) for name in ("num_heads", "out_channel_groups")
    ]  # not in forks
    before = [dict(table) for table in tables]

    def put_back() -> None:
        pruner.current_step = taken
        for table, content in zip(tables, before, strict=True):
            table.update(content)

    return put_back


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
        group_reduction: str,
        normalizer: Normalizer,
        max_pruning_ratio: float,
        round_to: int | None,
        missing: str,
    ) -> None:
        expect_scores(scores)
        expect_callable(
            "rescore", rescore, "called with the pruned model, which returns its scores"
        )
        choose("group_reduction", group_reduction, REDUCTIONS)
        choose("missing", missing, MISSING)
        max_pruning_ratio = plain_ratio(max_pruning_ratio)
        self.model, self.rescore, self.missing = model, rescore, missing
        self.group_reduction, self.normalizer = group_reduction, normalizer
        self.max_pruning_ratio = max_pruning_ratio
        self.round_to = plain_count("round_to", 1 if round_to is None else round_to, 1)
        self.skipped: dict[str, str] = {}
        self._in_step = False
        self._seen: str | None = None  # fingerprint of the model that the scores were found to fit
        self._use(scores)

    def _use(self, scores: Scores) -> None:
        floors = {n: floor_of(len(values), self.max_pruning_ratio) for n, values in scores.items()}
        self._keep = {name: max(floor, self.round_to) for name, floor in floors.items()}
        self.scores = scores
        self._heads: dict[str, int] = scores.meta.get("heads", {})
        self.table = ranking(scores, normalizer=self.normalizer, keep=self._keep)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.scores!r})"

    def __call__(self, group: Any, ch_groups: int = 1, **kwargs: Any) -> Tensor | None:
        """Importance [n] of the n root channels of a group, or None: leave it alone.

        Args:
            group: of ``DependencyGraph.get_all_groups``, or a part of one.
            ch_groups: forks before 1.3 pass it: averaged over that many blocks, then repeated.
            kwargs: what else forks pass (``consecutive_groups``) needs nothing done here.
        """
        if self.max_pruning_ratio < 1.0 and not self._in_step:
            raise OptionError(
                f"max_pruning_ratio={self.max_pruning_ratio} holds in singe.adapters.torch_pruning."
                "step(pruner) only, which looks at what Torch-Pruning would remove; call it in place of "
                "pruner.step() (pruner.reset() first)"
            )
        model = self._model_of(group)
        self._refuse_stale(model)
        names = {module: name for name, module in unwrapped(model).named_modules()}
        if through := _transposed_in(group, names):
            self._note_missing(
                names.get(group[0][0].target.module, "?"),
                0,
                f"Torch-Pruning cuts {through}, a Conv1D, along the wrong dimension; use singe.prune",
            )
            return None
        roots = list(group[0][1])
        position = {index: i for i, index in enumerate(roots)}
        parts = []
        for name, item in self._scored(group, names):
            if name in self._heads and (why := self._why_no_heads(name, group)) is not None:
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

    def _step(self, pruner: Any) -> None:
        """``pruner.step()``, if every group keeps what it must."""
        self._in_step = True
        put_back, removed = _counts_of(pruner), len(pruner.pruning_history())
        try:
            if self.max_pruning_ratio < 1.0 or self.round_to > 1:
                ahead = list(pruner.step(interactive=True))
                put_back()
                self._check_floors(pruner, ahead)
            pruner.step()
        except BaseException:
            if len(pruner.pruning_history()) == removed:
                put_back()  # the step can be tried again
            raise
        finally:
            self._in_step = False

    def _check_floors(self, pruner: Any, ahead: Sequence[Any]) -> None:
        """Raise BudgetError if the groups that the next step would remove are too much of one.

        The ranking alone cannot prevent it: once all units that may go are used up, Torch-Pruning goes
        on with those that may not, and within a layer it takes its share in any case.
        """
        names = {module: name for name, module in unwrapped(pruner.model).named_modules()}
        modules = {name: module for module, name in names.items()}
        removed: dict[str, set[int]] = {}
        for group in ahead:
            for name, item in self._scored(group, names):
                removed.setdefault(name, set()).update(item[1])
        for name, channels in removed.items():
            of_group = self._units_of(name, modules[name]) >= 0
            units = len(self.table[name])
            share = int(of_group[list(channels)].sum()) / int(of_group.sum())
            allowed = max(units - self._keep[name], 0)
            if round(share * units, 6) > allowed:
                raise BudgetError(self._too_much(name, share * units, allowed))

    def _too_much(self, name: str, lost: float, allowed: int) -> str:
        sizes = {group: len(values) for group, values in self.table.items()}
        most = sum(max(units - self._keep[group], 0) for group, units in sizes.items())
        limit, change = f"max_pruning_ratio={self.max_pruning_ratio}", "raise max_pruning_ratio"
        if self._keep[name] > floor_of(sizes[name], self.max_pruning_ratio):
            limit, change = f"round_to={self.round_to}", "lower round_to"
        return (
            f"Torch-Pruning would remove {lost:g} of the {sizes[name]} units of {name!r}, and {limit} "
            f"allows {allowed}; nothing was removed. Lower the pruner's pruning_ratio (of all scored "
            f"units {most / sum(sizes.values()):.3f} may go, and Torch-Pruning rounds up), or {change}"
        )

    def _scored(self, group: Any, names: Mapping[nn.Module, str]) -> Iterator[tuple[str, Any]]:
        """The items of a group that remove output channels of a layer with scores, by its name."""
        for item in group:
            module = item[0].target.module
            name = names.get(module)
            if name is None or name not in self.table or not _is_out(item[0].handler):
                continue
            if name in self._heads and isinstance(module, nn.MultiheadAttention):
                continue  # here it stands for the channels it is fed
            yield name, item

    def _units_of(self, name: str, layer: nn.Module) -> Tensor:
        """The unit of each channel of a layer, -1 where it has no score."""
        return self.scores.units_of(name, name, width_of(layer))

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
        """Score again where the shapes are others by now; raise where that cannot be done.

        Of scores made by hand the first model they meet is theirs.
        """
        now = fingerprint(model)
        if now == self._seen:
            return
        theirs = self.scores.meta.get("fingerprint") or self._seen
        changed = theirs not in (None, now)
        if changed and self.rescore is not None:
            with torch.enable_grad():  # pruners call under no_grad
                scores = self.rescore(model)
            expect_scores(scores, "what rescore returns")
            self._use(scores)
        try:
            scores_for(self.scores, model)
            if changed and self.rescore is None:  # made by hand, where nothing else tells
                raise ScoresError("these are scores of the model before it was pruned")
        except ScoresError as error:
            if not changed or self.rescore is not None:
                raise
            raise ScoresError(
                f"{error}. With iterative_steps > 1 pass importance(scores, rescore=lambda "
                "model: singe.score(model, batches))"
            ) from None
        self._seen = now

    def _part(self, name: str, item: Any, position: Mapping[int, int]) -> tuple[Tensor, Tensor]:
        """[n] scores that one layer gives the root channels, and [n] which of them it gives any."""
        table = self.table[name]
        idxs = torch.as_tensor(list(item[1]), device="cpu")
        root_idxs: Sequence[int] = getattr(item, "root_idxs", None) or list(position)
        places = torch.tensor([position.get(r, -1) for r in root_idxs], device="cpu")
        units = self._units_of(name, item[0].target.module)[idxs]
        known = (places >= 0) & (units >= 0)
        values = torch.zeros(len(position), dtype=table.dtype, device="cpu")
        count = torch.zeros(len(position), dtype=table.dtype, device="cpu")
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
            case _:
                return parts[-1]

    def _note_missing(self, root: str, parts: int, why: str = "") -> None:
        why = why or self.scores.meta.get("rejected", {}).get(
            root, "it was not among the scored layers"
        )
        if parts:
            why = "only some of its channels have scores"
        if self.missing == "error":
            raise ScoresError(f"the group of {root!r} has no scores: {why}")
        if root not in self.skipped and "reach the model's output" not in why:
            warnings.warn(
                f"Torch-Pruning leaves the group of {root!r} alone, it has no scores: {why}",
                stacklevel=3,
            )
        self.skipped[root] = why


def _transposed_in(group: Any, names: Mapping[nn.Module, str]) -> str | None:
    """A layer with a weight [C_in, C_out] whose parameters a group cuts as if they were torch's."""
    owners = {
        parameter: name
        for module, name in names.items()
        if is_transposed(module)
        for parameter in module.parameters()
    }
    return next((owners[m] for m in (item[0].target.module for item in group) if m in owners), None)


def _is_out(handler: Any) -> bool:
    """Whether a pruning function removes output channels (of a depthwise convolution: both)."""
    return getattr(handler, "__name__", "").endswith("out_channels")
