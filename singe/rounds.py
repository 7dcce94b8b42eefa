"""What a run is cut into, and what is written down of each round."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from singe.budget import RANKINGS
from singe.criteria import choose
from singe.errors import OptionError
from singe.latency import Timing, timing_of
from singe.limits import MAX_PRUNING_RATIO, Share, plain_ratio, plain_share, target_of
from singe.plain import plain_count, plain_number
from singe.plan import Plan

SCHEDULES = ("linear", "cubic", "geometric")
Schedule = str | Callable[[float], float]


@dataclass(frozen=True)
class Pruning:
    """What shall go, and in which order; see :func:`singe.compress`.

    Attributes:
        kind: what the target is in: ``"macs"``, ``"params"``, ``"channels"`` or ``"latency"``.
        target: a share of the model's (<= 1) or a number.
    """

    kind: str
    target: float
    rounds: int | None
    schedule: Schedule
    order: str
    visit: str
    ranking: str
    round_to: int
    min_keep: Share | None
    max_keep: Share | None
    max_pruning_ratio: float
    timing: Timing


def pruning_of(
    *,
    macs: float | None = None,
    params: float | None = None,
    channels: float | None = None,
    latency: float | None = None,
    rounds: int | None = None,
    schedule: Schedule = "linear",
    order: str = "global",
    visit: str = "forward",
    ranking: str = "cost",
    round_to: int = 1,
    min_keep: Share | None = None,
    max_keep: Share | None = None,
    max_pruning_ratio: float = MAX_PRUNING_RATIO,
    timing: Timing | None = None,
) -> Pruning:
    """What :func:`singe.compress` was asked to take away.

    Raises:
        OptionError: a value that is not offered, or one that would not have a say.
    """
    choose("order", order, ("global", "layerwise"))
    choose("visit", visit, ("forward", "damage"))
    choose("ranking", ranking, RANKINGS)
    if not callable(schedule):
        choose("schedule", schedule, SCHEDULES)
    if order == "layerwise" and schedule != "linear":
        raise OptionError(
            "schedule shares the budget out over the rounds of order='global'; layerwise, a first scoring "
            "settles what each group loses"
        )
    if order == "global" and visit != "forward":
        raise OptionError("visit is the order of the groups under order='layerwise'; give that too")
    kind, target = target_of(macs=macs, params=params, channels=channels, latency=latency)
    return Pruning(
        kind, target, None if rounds is None else plain_count("rounds", rounds, 1), schedule, order,
        visit, ranking, plain_count("round_to", round_to, 1), plain_share(min_keep, "min_keep"),
        plain_share(max_keep, "max_keep"), plain_ratio(max_pruning_ratio), timing_of(timing, kind),
    )  # fmt: skip


@dataclass
class Round:
    """One round of the loop. Metrics are what ``evaluate`` gave, or None.

    ``metric_pruned`` is taken after the BatchNorms were recalibrated, before any training; ``kept``
    holds the units that are left of every group.
    """

    macs: float
    params: int
    units_removed: int
    metric_pruned: float | None
    metric_finetuned: float | None
    finetune_loss: float | None
    seconds_pruning: float
    seconds_finetuning: float
    steps: int = 0
    kept: dict[str, int] = field(default_factory=dict)


@dataclass
class CompressReport:
    """What the loop did, round by round. MACs are per sample, as Torch-Pruning counts them.

    Attributes:
        plan: all that went, in unit indices of the original model: ``singe.prune`` with it gives a
            fresh copy the final shapes.
        stopped: why the run ended before its last round, or None.
        abandoned: the round that was rolled back, if one was.
    """

    macs_before: float
    params_before: int
    metric_before: float | None
    rounds: list[Round] = field(default_factory=list)
    plan: Plan = field(default_factory=lambda: Plan({}))
    stopped: str | None = None
    abandoned: Round | None = None

    @property
    def macs_after(self) -> float:
        return self.rounds[-1].macs if self.rounds else self.macs_before

    @property
    def params_after(self) -> int:
        return self.rounds[-1].params if self.rounds else self.params_before

    @property
    def metric_after(self) -> float | None:
        return self.rounds[-1].metric_finetuned if self.rounds else self.metric_before

    def to_dict(self) -> dict[str, Any]:
        """Plain data. JSON has no NaN: where a metric or a loss is none, ``report.json`` has null."""
        return {
            "macs_before": self.macs_before,
            "params_before": self.params_before,
            "metric_before": self.metric_before,
            "macs_after": self.macs_after,
            "params_after": self.params_after,
            "metric_after": self.metric_after,
            "rounds": [asdict(r) for r in self.rounds],
            "plan": {"remove": dict(self.plan), "meta": self.plan.meta},
            "stopped": self.stopped,
            "abandoned": None if self.abandoned is None else asdict(self.abandoned),
        }

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> CompressReport:
        """The report that :meth:`to_dict` or ``report.json`` holds."""
        abandoned = content["abandoned"]
        return cls(
            content["macs_before"],
            content["params_before"],
            content["metric_before"],
            [Round(**r) for r in content["rounds"]],
            Plan(content["plan"]["remove"], content["plan"]["meta"]),
            content["stopped"],
            None if abandoned is None else Round(**abandoned),
        )


def target_after(schedule: Schedule, done: float, full: float, last: float) -> float:
    """What may be left of ``full`` once a share ``done`` of the rounds is over; ``last`` at the end.

    ``"linear"`` takes equal steps, ``"geometric"`` equal factors, ``"cubic"`` much at first and ever
    less (Zhu & Gupta, arXiv 1710.01878). A callable maps the share of the rounds to the share of
    the way.

    Raises:
        OptionError: a callable left [0, 1].
    """
    if done >= 1.0:
        return last  # exactly: a rounding below it may be out of reach
    if schedule == "geometric":
        return full * (last / full) ** done
    if callable(schedule):
        way = plain_number(f"schedule({done:g})", schedule(done), "[0, 1]")
    else:
        way = done if schedule == "linear" else 1.0 - (1.0 - done) ** 3
    return full + (last - full) * way


def portions(names: Sequence[str], rounds: int | None) -> list[list[str]]:
    """Groups in visiting order, cut into as many rounds, or one round each."""
    count = len(names) if rounds is None else min(rounds, len(names))
    bounds = [i * len(names) // count for i in range(count + 1)] if count else [0]
    return [list(names[a:b]) for a, b in itertools.pairwise(bounds)]


def describe(done: Round, report: CompressReport) -> str:
    """A round in one line."""
    text = (
        f"{done.units_removed} units, {done.macs / report.macs_before:.1%} MACs, "
        f"{done.params / report.params_before:.1%} parameters"
    )
    if done.metric_finetuned is None:
        return text
    return f"{text}, metric {_number(done.metric_pruned)} -> {done.metric_finetuned:.4f}"


def minutes_left(last: Round, training: float, rounds: int, steps: int, final_steps: int) -> str:
    """How long ``rounds`` more of so many steps will take at the last one's pace; empty after the end.

    Args:
        training: seconds of the last round that grow with its steps.
    """
    if rounds == 0:
        return ""
    per_step = training / max(1, last.steps)
    rest = last.seconds_pruning + last.seconds_finetuning - training
    seconds = rounds * (rest + steps * per_step) + final_steps * per_step
    return f"; about {seconds / 60:.1f} minutes left"


def network_after(rounds: int) -> str:
    """What comes back where a run ends with its last good round."""
    return f"the network after round {rounds}" if rounds else "the unpruned model"


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.4f}"
