"""What ``singe demo`` shows: a table and a picture."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Group
from rich.table import Table

from singe.limits import MAX_PRUNING_RATIO

# Okabe and Ito's palette: told apart with every common colour blindness; the markers in print, too.
STYLES = (
    ("#7f7f7f", "x"), ("#E69F00", "s"), ("#009E73", "^"), ("#0072B2", "o"), ("#D55E00", "D"),
)  # fmt: skip


def summary_table(result: dict[str, Any]) -> Group:
    """What was measured, as a rich table with its legend."""
    settings = result["settings"]
    header = ("\ncriterion", "accuracy %\njust pruned", "accuracy %\nat the end", "\nMACs",
              "\nparams", "latency\nms", "scoring\nms")  # fmt: skip
    table = Table(*header, box=SIMPLE, pad_edge=False, collapse_padding=True)
    table.columns[0].no_wrap = True
    for column in table.columns[1:]:
        column.justify = "right"
    for name in dict.fromkeys(run["criterion"] for run in result["runs"]):
        scoring = _of(result, name, "seconds_scoring")
        macs = _mean(_of(result, name, "macs"))
        table.add_row(
            name,
            _percent(_of(result, name, "accuracy_pruned")),
            _percent(_of(result, name, "accuracy")),
            f"{macs / 1e6:.3f} M",
            f"{_mean(_of(result, name, 'params')) / 1e3:.1f} k",
            f"{statistics.median(_of(result, name, 'latency_ms')):.2f}",
            f"{1e3 * statistics.median(scoring):.0f}" if scoring else "",
            end_section=name == "unpruned",
        )
    seeds = settings["seeds"]
    spread = f"Mean ± standard deviation of {seeds} seeds. " if seeds > 1 else "One seed. "
    return Group(
        table,
        f"{spread}Accuracy on {result['held_out']} held-out 8x8 digits, {result['device']}. "
        f"Target: {settings['macs']:.0%} of the MACs. Everyone gets {settings['rounds']} rounds of "
        f"score, prune and {settings['finetune_steps']} training steps, the {settings['ranking']} "
        f"ranking (docs/pruning.md), and no layer loses more than {MAX_PRUNING_RATIO:.0%} of its "
        "channels. Just pruned: before a round's fine-tuning, mean of the rounds. At the end: after "
        "the last fine-tuning. Latency: median "
        f"warm CPU forward, batch {settings['latency_batch']}, one thread. Scoring: one call of "
        f"singe.score, {settings['calibration']} images, median. "
        f"Run time {result['seconds']:.0f} s.",
    )


def write_picture(result: dict[str, Any], directory: str | Path) -> Path:
    """Draw ``singe-demo.png`` in ``directory``: accuracy per round, and what every layer kept."""
    path = Path(directory) / "singe-demo.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    _draw(result, path)
    return path


def _draw(result: dict[str, Any], path: Path) -> None:
    """Accuracy per round against MACs left, and the channels every layer kept."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    runs: dict[str, list[dict[str, Any]]] = {}
    for run in result["runs"]:
        runs.setdefault(run["criterion"], []).append(run)
    criteria = [name for name in runs if name != "unpruned"]
    figure = Figure(figsize=(12.5, 4.6), layout="constrained", dpi=130)
    FigureCanvasAgg(figure)
    pruned, tuned, layers = figure.subplots(1, 3, width_ratios=(1, 1, 1.15))
    for name, style in zip(criteria, STYLES, strict=True):
        _accuracy(pruned, name, style, runs, "metric_pruned")
        _accuracy(tuned, name, style, runs, "metric_finetuned")
    pruned.set_title("Just pruned, before the round's fine-tuning")
    tuned.set_title("After the round's fine-tuning")
    for axes in (pruned, tuned):
        axes.set_xlabel("MACs left (%)")
        axes.set_ylabel("held-out accuracy (%)")
        axes.invert_xaxis()
        axes.grid(alpha=0.25)
    _channels(layers, result["channels"], {name: runs[name] for name in criteria})
    for axes in (pruned, tuned, layers):
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = pruned.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(criteria), frameon=False)
    seeds = result["settings"]["seeds"]
    how = f"mean of {seeds} seeds, bars: smallest to largest" if seeds > 1 else "one seed"
    figure.suptitle(f"8x8 digits, one small network; {how}", fontsize="medium", color="0.35")
    figure.savefig(path)


def _accuracy(
    axes: Any, name: str, style: tuple[str, str], runs: dict[str, list[dict[str, Any]]], key: str
) -> None:
    """One line: round by round, from the unpruned network on; bars span the seeds."""
    full = runs["unpruned"][0]["macs"]
    rounds = list(zip(*(run["rounds"] for run in runs[name]), strict=True))
    x = [100.0] + [100 * statistics.fmean(r["macs"] for r in same) / full for same in rounds]
    values = [[100 * run["accuracy"] for run in runs["unpruned"]]]
    values += [[100 * r[key] for r in same] for same in rounds]
    y = [statistics.fmean(v) for v in values]
    color, marker = style
    axes.plot(x, y, color=color, marker=marker, markersize=6, linewidth=1.8, label=name)
    shift = 0.35 * (list(runs).index(name) - len(runs) / 2)  # bars beside each other
    axes.vlines(
        [v + shift for v in x],
        [min(v) for v in values],
        [max(v) for v in values],
        color=color,
        alpha=0.3,
    )


def _channels(axes: Any, full: dict[str, int], runs: dict[str, list[dict[str, Any]]]) -> None:
    """Grouped bars: channels left per layer, in front of what the layer had."""
    width = 0.8 / len(runs)
    for index, (name, (color, _)) in enumerate(zip(runs, STYLES, strict=True)):
        kept = [statistics.fmean(run["kept"][layer] for run in runs[name]) for layer in full]
        offset = (index - (len(runs) - 1) / 2) * width
        axes.bar([i + offset for i in range(len(full))], kept, 0.9 * width, color=color)
    for position, channels in enumerate(full.values()):
        axes.hlines(channels, position - 0.42, position + 0.42, color="0.25", linewidth=1.2)
    axes.set_xticks(range(len(full)), [f"{name}\n(of {count})" for name, count in full.items()])
    axes.set_ylabel("channels kept at the end")
    axes.set_title("What is left of every layer (line: before)")


def _of(result: dict[str, Any], criterion: str, key: str) -> list[float]:
    """The values of all seeds; empty for what an unpruned network does not have."""
    return [run[key] for run in result["runs"] if run["criterion"] == criterion and key in run]


def _mean(values: list[float]) -> float:
    return statistics.fmean(values)


def _percent(values: list[float]) -> str:
    if not values:
        return ""
    spread = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * _mean(values):.1f}{spread}"
