"""The pictures of a report, each from plain data. See :mod:`singe.report` for the data's form."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from singe.report.theme import Theme

ROW = 0.27  # inches per group in the tall pictures
KEPT, REMOVED = ("-", "-."), ("--", ":")  # told apart without colours, too
MANY = 40  # groups from which names are set small
LONGEST = 44  # letters of a group's name


def accuracy(content: dict[str, Any], theme: Theme) -> Any:
    """Metric against MACs: down by every removal, up by every fine-tuning."""
    before, rounds = content["before"], content["rounds"]
    figure, axes = _figure(7.2, 4.2)
    full = before["macs"]
    x, y = [100.0], [before.get("metric")]
    for done in rounds:
        share = 100 * done["macs"] / full
        for key in ("metric_pruned", "metric_finetuned"):
            x.append(share)
            y.append(done[key])
    points = [(a, 100 * b) for a, b in zip(x, y, strict=True) if b is not None]
    axes.plot(*zip(*points, strict=True), color=theme.accent, linewidth=1.2, zorder=1)
    shares = [100 * done["macs"] / full for done in rounds]
    for key, marker, face, label in (
        ("metric_pruned", "v", theme.page, "pruned, not yet fine-tuned"),
        ("metric_finetuned", "o", theme.kept, "fine-tuned"),
    ):
        values = [math.nan if done[key] is None else 100 * done[key] for done in rounds]
        edge = theme.removed if key == "metric_pruned" else theme.kept
        axes.plot(
            shares, values, marker, markersize=7, markerfacecolor=face, markeredgecolor=edge,
            markeredgewidth=1.6, linestyle="none", label=label, zorder=2,
        )  # fmt: skip
    if before.get("metric") is not None:
        axes.plot(100.0, 100 * before["metric"], "s", color=theme.ink, label="original", zorder=3)
    floor = content.get("accuracy_floor")
    if floor is not None:
        axes.axhline(100 * floor, color=theme.removed, linewidth=1, linestyle=":", label="floor")
    axes.invert_xaxis()
    axes.set(xlabel="MACs left (%)", ylabel="accuracy (%)")
    axes.grid()
    axes.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=4)
    return figure


def scores(content: dict[str, Any], theme: Theme) -> Any:
    """Every unit as a dot on its group's line, kept or removed, and the cut between them."""
    groups = content["groups"]
    figure, axes = _rows_figure(groups)
    positive = [v for g in groups.values() for v in g["scores"] if v > 0]
    negative = any(v < 0 for g in groups.values() for v in g["scores"])
    floor = min(positive, default=1.0)
    jitter = np.random.default_rng(0)
    dots: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
    cuts = []
    for row, group in enumerate(groups.values()):
        values = np.array(group["scores"])
        values = values if negative else np.maximum(values, floor)  # zeros at the left edge
        gone = np.zeros(len(values), dtype=bool)
        gone[group["removed"]] = True
        heights = row + jitter.uniform(-0.26, 0.26, len(values))
        for value, height, is_gone in zip(values, heights, gone, strict=True):
            dots[bool(is_gone)].append((value, height))
        cut = _cut(values, gone)
        if cut is not None:
            cuts.append((cut, row))
    for is_gone, color, label in ((False, theme.kept, "kept"), (True, theme.removed, "removed")):
        x, y = np.array(dots[is_gone]).reshape(-1, 2).T
        axes.scatter(x, y, s=9, color=color, alpha=0.6, linewidths=0, label=label)
    if cuts:
        x, y = np.array(cuts).T
        axes.vlines(x, y - 0.42, y + 0.42, color=theme.ink, linewidth=1.4, label="cut")
    if not negative:
        axes.set_xscale("log")
        _plain_numbers(axes.xaxis)
    axes.set_xlabel(f"score ({content['score_name']})" if content.get("score_name") else "score")
    _name_rows(axes, groups)
    axes.grid(axis="x")
    _legend_above(axes)
    return figure


def layers(content: dict[str, Any], theme: Theme) -> Any:
    """Bars: what every group kept of its channels, as a share, with the numbers beside it."""
    groups = content["sizes"]
    figure, axes = _rows_figure(groups)
    units = np.array([group["units"] for group in groups.values()])
    left = np.array([group["kept"] for group in groups.values()])
    rows = np.arange(len(groups))
    kept = 100 * left / units
    axes.barh(rows, kept, 0.72, color=theme.kept, label="kept")
    axes.barh(rows, 100 - kept, 0.72, left=kept, color=theme.removed, alpha=0.55, label="removed")
    for row in rows:
        axes.text(101, row, f"{left[row]} of {units[row]}", va="center", fontsize="small")
    axes.set(xlim=(0, 116), xlabel="share of the group's units (%)", xticks=range(0, 101, 20))
    _name_rows(axes, groups)
    _legend_above(axes)
    return figure


def criteria(content: dict[str, Any], theme: Theme) -> Any:
    """Two tables of agreement between criteria and, where measured, accuracy at equal MACs."""
    found = content["criteria"]
    names, accuracies = found["names"], found.get("accuracy")
    panels = 2 + bool(accuracies)
    size = max(2.6, 0.62 * len(names) + 1.3)
    figure, axes = _figure(panels * size + 1.2, size + 0.5, panels)
    share = f"{found['share']:.0%}"
    titles = ("rank correlation (Spearman)", f"overlap of the lowest {share}")
    for panel, key, title in zip(axes, ("spearman", "overlap"), titles, strict=False):
        _table(panel, names, np.array(found[key]), title, theme, label_rows=key == "spearman")
    if accuracies:
        rows = range(len(names))
        values = [100 * accuracies[name] for name in names]
        axes[2].barh(rows, values, 0.6, color=theme.kept)
        for row, value in zip(rows, values, strict=True):
            axes[2].text(value, row, f" {value:.1f}", va="center", fontsize="small")
        axes[2].set_yticks(rows, [""] * len(names))
        axes[2].invert_yaxis()
        axes[2].set_xlim(0, 1.2 * max(*values, 1.0))
        axes[2].set(xlabel="accuracy (%)", title=found["accuracy_title"])
    return figure


def latency(content: dict[str, Any], theme: Theme) -> Any:
    """Bars: the median forward before and after, with a line from quartile to quartile."""
    found = content["latency"]
    figure, axes = _figure(7.2, 1.9)
    longest = 0.0
    for row, (key, color) in enumerate((("before", theme.accent), ("after", theme.kept))):
        low, high = found.get(f"{key}_quartiles", (found[key], found[key]))
        axes.barh(row, found[key], 0.6, color=color)
        axes.plot((low, high), (row, row), color=theme.ink, linewidth=1.7)
        axes.text(max(found[key], high), row, f"  {found[key]:.3g} ms", va="center")
        longest = max(longest, found[key], high)
    axes.set_yticks((0, 1), ("before", "after"))
    axes.invert_yaxis()
    axes.set_xlim(0, 1.25 * longest)
    axes.set_xlabel(f"milliseconds per forward, batch {found['batch_size']}, {found['device']}")
    return figure


def integrand(content: dict[str, Any], theme: Theme) -> Any:
    """The gradient variation along the path; the score is the area under the line."""
    by_group: dict[str, list[dict[str, Any]]] = {}
    for unit in content["integrand"]["units"]:
        by_group.setdefault(unit["group"], []).append(unit)
    columns = min(2, len(by_group))
    lines = math.ceil(len(by_group) / columns)
    figure, axes = _figure(4.6 * columns, 3.1 * lines, columns, lines)
    for panel, (name, units) in zip(np.ravel(axes), by_group.items(), strict=False):
        seen = {True: 0, False: 0}
        for unit in units:
            gone = unit["removed"]
            color, styles = (theme.removed, REMOVED) if gone else (theme.kept, KEPT)
            style = styles[seen[gone] % len(styles)]
            seen[gone] += 1
            area = _area(unit["nodes"], unit["values"])
            fate = "removed" if gone else "kept"
            panel.plot(
                unit["nodes"], unit["values"], linestyle=style, color=color, linewidth=1.7,
                label=f"unit {unit['unit']}, {fate}, area {area:.2g}",
            )  # fmt: skip
        panel.legend(fontsize="small")
        panel.set(title=name, xlim=(0, 1.0))
        panel.set_ylim(bottom=0)
        panel.grid()
        panel.set_xlabel("gate (1: the network, 0: removed)")
        panel.invert_xaxis()  # the path starts at the network
    for panel in np.ravel(axes)[len(by_group) :]:
        panel.set_visible(False)
    figure.supylabel(content["integrand"]["ylabel"], fontsize="medium")
    return figure


def _area(nodes: Sequence[float], values: Sequence[float]) -> float:
    """Under the drawn line (np.trapezoid needs NumPy 2)."""
    return float(np.dot(np.diff(nodes), np.add(values[1:], values[:-1]) / 2))


def _figure(width: float, height: float, columns: int = 1, rows: int = 1) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", dpi=110)
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns)


def _plain_numbers(axis: Any) -> None:
    """For a logarithmic axis; matplotlib's own are TeX."""
    from matplotlib.ticker import LogFormatter

    class Between(LogFormatter):
        """Numbers between powers of ten, where there is hardly one of these."""

        def __call__(self, x: float, pos: Any = None) -> str:
            return f"{x:g}" if super().__call__(x, pos) else ""

    axis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_minor_formatter(Between(minor_thresholds=(1, 0.3)))


def _rows_figure(groups: dict[str, Any]) -> tuple[Any, Any]:
    return _figure(8.4, 1.2 + ROW * len(groups))


def _name_rows(axes: Any, groups: dict[str, Any]) -> None:
    axes.set_yticks(range(len(groups)), list(map(_short, groups)))
    axes.tick_params(axis="y", length=0, labelsize="x-small" if len(groups) > MANY else "small")
    axes.set_ylim(len(groups) - 0.4, -0.6)  # the first layer on top
    axes.spines["left"].set_visible(False)


def _short(name: str) -> str:
    """A long name without its middle, so that the bars keep their room."""
    return name if len(name) <= LONGEST else f"{name[: LONGEST // 2]}…{name[-LONGEST // 2 + 1 :]}"


def _legend_above(axes: Any) -> None:
    axes.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=3, markerscale=2)


def _cut(values: np.ndarray, gone: np.ndarray) -> float | None:
    """Between the highest removed and the lowest kept; None where rounds left no clean cut."""
    if not gone.any() or gone.all():
        return None
    highest, lowest = values[gone].max(), values[~gone].min()
    if highest > lowest:
        return None
    return float(np.sqrt(highest * lowest) if highest > 0 else (highest + lowest) / 2)


def _table(
    axes: Any, names: Sequence[str], values: np.ndarray, title: str, theme: Theme, label_rows: bool
) -> None:
    import matplotlib

    ramp = matplotlib.colormaps[theme.ramp]
    axes.imshow(values, cmap=ramp, vmin=-0.1, vmax=1.15, aspect="auto")
    for i, j in np.ndindex(values.shape):
        red, green, blue, _ = ramp((values[i, j] + 0.1) / 1.25)
        bright = 0.3 * red + 0.59 * green + 0.11 * blue > 0.55
        axes.text(j, i, f"{values[i, j]:.2f}", ha="center", va="center", fontsize="small",
                  color="#101418" if bright else "#ffffff")  # fmt: skip
    axes.set_xticks(range(len(names)), names, rotation=35, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(names)), names if label_rows else [""] * len(names))
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title(title)
