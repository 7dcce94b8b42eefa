"""The pictures of ``docs/performance.md``; drawn from results, nothing is measured here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

# Okabe and Ito's palette: told apart with every common colour blindness.
BLUE, ORANGE, GREEN, RED, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#7f7f7f"
STYLES = {  # who in the matrix -> colour and marker
    "textbook over fused": (BLUE, "o", "textbook / fused"),
    "careful over fused": (ORANGE, "s", "careful / fused"),
    "naive engine over fused": (GREY, "x", 'engine="naive" / fused'),
    "textbook over fused, bf16": (RED, "D", "textbook / fused bf16"),
}
ALONE = "share of the kernel alone"  # without the call from Python
# Kernels that are to reach this share of the yardstick.
KERNEL_TARGET = {"cpu": 0.7, "cuda": 0.8}
KERNELS_HELD_TO_IT = {
    "cpu": ("integral",),
    "cuda": ("integral", "masked forward", "masked backward"),
}


def new(
    width: float, height: float, columns: int = 1, ratios: Sequence[float] = (1,)
) -> tuple[Figure, list[Axes]]:
    """A figure without upper and right frames; its axes row by row, ``ratios`` the rows' heights."""
    figure = Figure(figsize=(width, height), layout="constrained", dpi=120)
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(len(ratios), columns, squeeze=False, height_ratios=ratios).flat)
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)
    return figure, axes


def cell_name(cell: dict[str, Any]) -> str:
    """A row's label in the pictures of the matrix."""
    return f"{cell['model']}, {cell['path']}, {cell['nodes']}"


def targets(document: dict[str, Any]) -> Figure:
    """Every target as a bar: right of the line it is met."""
    entries = document["results"]["targets"][::-1]
    figure, (axes,) = new(9, 0.42 * len(entries) + 1.2)
    for row, entry in enumerate(entries):
        label = f"{entry['value']:.3g} (target {entry['relation']} {entry['target']:g})" if entry[
            "value"
        ] is not None else "not measured"  # fmt: skip
        reach = _reach(entry)
        color = BLUE if entry["pass"] else RED
        axes.barh(
            row, reach - 1, left=1, color=color, height=0.6, hatch="" if entry["pass"] else "//"
        )
        axes.annotate(label, (max(reach, 1), row), (5, 0), textcoords="offset points", va="center",
                      fontsize="small")  # fmt: skip
    axes.axvline(1, color="0.2")
    axes.set_xscale("log")
    axes.set_xlim(min(0.3, *map(_reach, entries)) / 1.1, 5 * max(1.0, *map(_reach, entries)))
    _plain_ticks(axes)
    axes.set_yticks(range(len(entries)), [entry["id"] for entry in entries])
    axes.set_xlabel("measured relative to the target; right of the line: met")
    return figure


def _reach(entry: dict[str, Any]) -> float:
    """How far a target is met: 1 is just so; nothing measured is 1 without a bar."""
    if entry["value"] is None:
        return 1.0
    value = max(entry["value"], 1e-12)
    ratio = value / entry["target"] if entry["relation"] == ">=" else entry["target"] / value
    return min(ratio, 10.0)  # beyond that a longer bar says nothing more


def speedups(document: dict[str, Any]) -> Figure:
    """The matrix: how many times longer the naive loops take."""
    rows = [b["extra_info"] for b in document["benchmarks"] if b["extra_info"]][::-1]
    figure, (axes,) = new(9, 0.3 * len(rows) + 1.5)
    for key, (color, marker, label) in STYLES.items():
        points = [(c["ratios"][key], i) for i, c in enumerate(rows) if key in c["ratios"]]
        if points:
            x, y = zip(*points, strict=True)
            axes.scatter(x, y, c=color, marker=marker, label=label, zorder=3)
    axes.axvline(1, color="0.2")
    axes.set_xscale("log")
    _plain_ticks(axes)
    axes.set_yticks(range(len(rows)), [cell_name(c) for c in rows])
    axes.grid(axis="x", alpha=0.3)
    axes.set_xlabel("times longer than fused; right of the line fused is faster")
    axes.set_title("model, path, nodes", loc="left", fontsize="small", color="0.35")
    figure.legend(
        *axes.get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False
    )
    return figure


def floors(document: dict[str, Any]) -> Figure:
    """The matrix: how close to the arithmetic floor."""
    rows = [b["extra_info"] for b in document["benchmarks"] if b["extra_info"]][::-1]
    figure, (axes,) = new(9, 0.3 * len(rows) + 1.0)
    colors = {"layer": BLUE, "network": GREEN, "neuron": ORANGE}
    for index, cell in enumerate(rows):
        axes.barh(index, 100 * cell["share_of_floor"], color=colors[cell["path"]], height=0.65)
    axes.axvline(100, color="0.2")
    axes.set_yticks(range(len(rows)), [cell_name(c) for c in rows])
    axes.set_xlabel("floor over measured time, %; the line is the floor")
    return figure


def equal_error(document: dict[str, Any]) -> Figure | None:
    """Error against time of the schedules."""
    entries = document["results"]["targets"]
    entry = next((e for e in entries if e["id"] == "equal-error" and e["detail"]), None)
    if entry is None:
        return None
    found = entry["detail"]
    figure, (axes,) = new(6.5, 4)
    for name, error in found["errors"].items():
        x, y = found["seconds"][name]["median"], 100 * error["all"]
        naive = name == found["naive"]
        axes.scatter(x, y, c=RED if naive else BLUE, marker="X" if naive else "o", s=60, zorder=3)
        axes.annotate(name.removeprefix("fused "), (x, y), (6, 6), textcoords="offset points",
                      fontsize="small", ha="right" if naive else "left")  # fmt: skip
    axes.axhline(
        100 * found["errors"][found["naive"]]["all"], color=RED, linewidth=0.8, linestyle=":"
    )
    axes.set_xscale("log")
    axes.set_yscale("log")
    _plain_ticks(axes)
    _plain_ticks(axes, "y")
    axes.set_xlabel("seconds of the sweep")
    axes.set_ylabel("error of the integral, %")
    axes.grid(alpha=0.3)
    return figure


def peers(document: dict[str, Any]) -> Figure:
    """Seconds to scores, one panel per model."""
    found = [b["extra_info"] for b in document["benchmarks"] if b["extra_info"]]
    figure, panels = new(10, 3.2, len(found))
    for axes, cell in zip(panels, found, strict=True):
        order = sorted(cell["seconds"], key=lambda n: -cell["seconds"][n]["median"])
        spent = [cell["seconds"][name]["median"] for name in order]
        colors = [BLUE if name.startswith("singe") else GREY for name in order]
        axes.scatter(spent, range(len(order)), c=colors, s=50, zorder=3)
        for row, value in enumerate(spent):
            axes.annotate(
                f"{value:.2g} s", (value, row), (8, 0), textcoords="offset points", va="center",
                fontsize="small",
            )  # fmt: skip
        axes.grid(axis="x", alpha=0.3)
        axes.set_yticks(range(len(order)), order)
        axes.set_xscale("log")
        axes.set_xlim(min(spent) / 3, 4 * max(spent))
        _plain_ticks(axes)
        axes.set_xlabel("seconds to scores")
        axes.set_title(f"{cell['model']}, {cell['images']} images, {cell['nodes']} nodes or steps",
                       fontsize="medium")  # fmt: skip
    return figure


def growth(document: dict[str, Any]) -> Figure:
    """Measured beside predicted, one panel per axis."""
    found = document["results"]["axes"]
    figure, panels = new(3.2 * len(found), 3.4, len(found))
    for axes, (axis, points) in zip(panels, found.items(), strict=True):
        x = [p["at"] for p in points]
        axes.plot(
            x, [p["predicted"] for p in points], "--", color=GREY, label="predicted by the floor"
        )
        axes.plot(x, [p["seconds"] for p in points], "o-", color=BLUE, label="measured")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(x, [str(v) for v in x])
        _plain_ticks(axes, "y")
        axes.set_xlabel(axis)
        axes.set_title(f"{points[0]['path']} path", fontsize="medium")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("seconds")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=2,
                  frameon=False)  # fmt: skip
    return figure


def kernels(document: dict[str, Any]) -> Figure:
    """Share of the yardstick at every layer size."""
    device = document["results"]["settings"]["device"]
    found = document["results"]["kernels"]
    figure, (axes,) = new(8, 3.4)
    layers = list(next(iter(found.values())))
    width = 0.8 / len(found)
    looks = [(BLUE, 1.0), (GREEN, 1.0), (ORANGE, 1.0), (GREEN, 0.5), (ORANGE, 0.5)]
    for index, (kernel, (color, alpha)) in enumerate(zip(found, looks[: len(found)], strict=True)):
        x = [i + (index - (len(found) - 1) / 2) * width for i in range(len(layers))]
        cells = [found[kernel][layer] for layer in layers]
        shares = [100 * cell.get(ALONE, cell["share"]) for cell in cells]
        axes.bar(x, shares, 0.9 * width, color=color, alpha=alpha, label=kernel)
    goal = ", ".join(KERNELS_HELD_TO_IT[device])
    axes.axhline(100 * KERNEL_TARGET[device], color="0.2", ls=":", label=f"target ({goal})")
    axes.set_xticks(range(len(layers)), [f"ResNet-50\n{layer}" for layer in layers])
    axes.set_ylabel(f"% of the {'copy' if device == 'cuda' else 'triad'}")
    figure.legend(
        *axes.get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False
    )
    return figure


def _plain_ticks(axes: Axes, which: str = "x") -> None:
    """1, 2, 5, 10 in place of powers of ten on a logarithmic axis."""
    axis = axes.xaxis if which == "x" else axes.yaxis
    low, high = axes.get_xlim() if which == "x" else axes.get_ylim()
    decades = [m * 10.0**e for e in range(-5, 6) for m in (1, 2, 5)]
    ticks = [t for t in decades if low <= t <= high]
    axis.set_ticks(ticks, [f"{t:g}" for t in ticks])
    axis.set_ticks([], minor=True)


# Section of the page -> kind of result, file name, alternative text, how to draw.
PICTURES: dict[str, tuple[str, str, str, Callable[[dict[str, Any]], Figure | None]]] = {
    "targets": ("targets", "targets", "Targets and measured values", targets),
    "suite": ("suite", "speedup", "How many times longer naive scoring takes", speedups),
    "floor of suite": ("suite", "floor", "Share of the arithmetic floor", floors),
    "Time at equal integral error": ("targets", "equal-error", "Error against time", equal_error),
    "peers": ("peers", "peers", "Seconds to scores, singe and peers", peers),
    "growth": ("growth", "growth", "Measured and predicted growth", growth),
    "kernels": ("kernels", "kernels", "Share of memory bandwidth", kernels),
}


def draw(documents: dict[str, dict[str, Any]], device: str, folder: Path) -> dict[str, str]:
    """Draw what there are results for; Markdown images by section of the page."""
    drawn = {}
    for section, (kind, name, title, build) in PICTURES.items():
        figure = build(documents[kind]) if kind in documents else None
        if figure is None:
            continue
        folder.mkdir(parents=True, exist_ok=True)
        figure.savefig(folder / f"{name}-{device}.png")
        drawn[section] = f"![{title}](img/{name}-{device}.png)"
    return drawn
