"""``write_report``: what a run did, as one HTML file and its pictures.

The content is plain data (it is also written as JSON), each part optional but ``title``:

- ``title``, ``settings``, ``versions``: text and flat mappings.
- ``before``: ``{"macs", "params", "metric"}`` and ``rounds``: as ``CompressReport.to_dict()["rounds"]``.
- ``groups``: group name -> ``{"scores": [...], "removed": [unit, ...]}``; ``score_name``.
- ``sizes``: group name -> ``{"units", "kept"}``, where there are no scores.
- ``criteria``: what :func:`singe.comparison.compare` returns.
- ``latency``: ``{"before": ms, "after": ms, "batch_size", "device", "runs"}``, medians; beside them
  ``ratio``, the median of after / before run by run, and ``before_quartiles``, ``after_quartiles``,
  ``ratio_quartiles``: ``[first, third]``.
- ``integrand``: what :func:`singe.integrand.along_the_path` returns.
- ``notes``: sentences to show on top.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from torch.utils._pytree import tree_map

from singe.files import replacing
from singe.plain import finite
from singe.report import page, plots
from singe.report.theme import THEMES, Theme

HTML, JSON, PICTURES = "report.html", "report.json", "pictures"


def write_report(folder: str | PathLike[str], content: Mapping[str, Any]) -> Path:
    """Write ``report.html`` (self-contained), ``report.json`` and ``pictures/*.png`` into ``folder``.

    Args:
        folder: made if missing; files of these names are replaced.
        content: see the module's description; JSON-ready.

    Returns:
        Path of the HTML file.
    """
    content, given = dict(content), content
    if content.get("groups"):
        content.setdefault("sizes", {n: _size(group) for n, group in content["groups"].items()})
    folder = Path(folder)
    (folder / PICTURES).mkdir(parents=True, exist_ok=True)
    body = [*map(page.paragraph, content.get("notes", ()))]
    if _has_cost(content):
        body.append(page.cards(_headline(content)))
    for name, title, needed, text in SECTIONS:
        if not all(content.get(key) for key in needed):
            continue
        parts = [page.paragraph(text)]
        if name == "integrand":
            parts.append(page.paragraph(_meaning(content)))
        if name != "accuracy" or _has_metric(content):
            light, dark = (_draw(name, content, theme) for theme in THEMES)
            for ending, png in (("", light), ("-dark", dark)):
                (folder / PICTURES / f"{name}{ending}.png").write_bytes(png)
            parts.append(page.picture(light, dark, title))
        if name == "accuracy":
            parts.append(_rounds_table(content))
        body.append(page.section(title, *parts))
    for key in ("settings", "versions"):
        if content.get(key):
            body.append(page.section(key.capitalize(), page.facts(content[key])))
    text = page.page(content["title"], content.get("lead", ""), body)
    data = json.dumps(tree_map(finite, dict(given)), indent=1, allow_nan=False) + "\n"
    for file, written in ((HTML, text), (JSON, data)):
        with replacing(folder / file) as partial:
            # The name of a file need not be text: Python keeps its odd bytes as what UTF-8 refuses.
            partial.write_text(written, encoding="utf-8", errors="backslashreplace")
    return folder / HTML


# name of the picture and its plot, heading, parts of the content that it needs, what it shows
SECTIONS = (
    ("accuracy", "Accuracy against MACs", ("before", "rounds"),
     "Every round takes channels out (down) and fine-tunes what is left (up)."),
    ("layers", "What is left of every group", ("sizes",),
     "A group is a layer with everything that is coupled to it; its units go together."),
    ("scores", "Scores, and where the cut went", ("groups",),
     "One dot per unit, from the first scoring. A line marks the cut of a group whose removed units "
     "all lie below its kept ones; later rounds score again, so their choices may cross it."),
    ("integrand", "Why these channels went", ("integrand",),
     "The gradient variation of single units while the gates close. Units are numbered as in the plan; "
     "per group the lowest and the middle one of those that went, the middle and the highest of those that "
     "stayed."),
    ("criteria", "Criteria compared", ("criteria",),
     "All on the same calibration data and units. Overlap: the share of the lowest units that two "
     "criteria have in common; the share itself would be expected by chance."),
    ("latency", "Latency", ("latency",),
     "Warm forwards in evaluation mode, the two networks in turn, medians. Lines end at the quartiles."),
)  # fmt: skip


def _size(group: Mapping[str, Any]) -> dict[str, int]:
    return {"units": len(group["scores"]), "kept": len(group["scores"]) - len(group["removed"])}


def _draw(name: str, content: dict[str, Any], theme: Theme) -> bytes:
    buffer = io.BytesIO()
    with theme.applied():
        figure = getattr(plots, name)(content, theme)
        figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _meaning(content: Mapping[str, Any]) -> str:
    """What a line of the integrand has to do with the score."""
    shown = content["integrand"]
    if shown.get("is_score"):
        return (
            "A unit's score is the area under its line: a line that stays low means the loss hardly "
            "notices the way to removal. One gradient at the network (left edge) would miss what comes later."
        )
    return (
        f"For comparison, {shown['criterion']} along the {shown['path']} path: the scores that decided are "
        f"{content.get('score_name', 'others')}."
    )


def _has_cost(content: Mapping[str, Any]) -> bool:
    return bool(content.get("before")) and bool(content.get("after"))


def _has_metric(content: Mapping[str, Any]) -> bool:
    return any(done.get("metric_finetuned") is not None for done in content["rounds"])


def _headline(content: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    before, after = content["before"], content["after"]
    values = {}
    for key, label in (("macs", "MACs"), ("params", "parameters")):
        saving = f"{si(before[key])} before"
        values[label] = (f"{si(after[key])} ({after[key] / before[key]:.1%})", saving)
    if after.get("metric") is not None:
        was = before.get("metric")
        remark = "" if was is None else f"{was:.1%} before"
        values["accuracy"] = (f"{after['metric']:.1%}", remark)
    if content.get("latency"):
        values["latency"] = _latency_card(content["latency"])
    return values


def _latency_card(latency: Mapping[str, Any]) -> tuple[str, str]:
    was, now = latency["before"], latency["after"]
    ratio = latency.get("ratio", now / was)
    speed = f"{1 / ratio:.2f} x faster" if ratio <= 1 else f"{ratio:.2f} x slower"
    remark = f"{was:.3g} ms before, {speed}"
    if "ratio_quartiles" in latency:
        low, high = latency["ratio_quartiles"]
        remark += f" (quartiles {1 / high:.2f} to {1 / low:.2f})"
    return f"{now:.3g} ms", remark


def _rounds_table(content: Mapping[str, Any]) -> str:
    full = content["before"]
    header = ("round", "units removed", "MACs", "parameters", "pruned %", "fine-tuned %",
              "loss", "minutes")  # fmt: skip
    rows = [
        (
            index,
            done["units_removed"],
            f"{done['macs'] / full['macs']:.1%}",
            f"{done['params'] / full['params']:.1%}",
            _percent(done["metric_pruned"]),
            _percent(done["metric_finetuned"]),
            "-" if done["finetune_loss"] is None else f"{done['finetune_loss']:.3f}",
            f"{(done['seconds_pruning'] + done['seconds_finetuning']) / 60:.1f}",
        )
        for index, done in enumerate(content["rounds"], 1)
    ]
    return page.table(header, rows)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def si(value: float) -> str:
    """Three digits and a unit prefix: ``148670000 -> "149 M"``, ``999700 -> "1 M"``."""
    rounded = float(f"{value:.3g}")
    for size, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(rounded) >= size:
            return f"{rounded / size:.3g} {prefix}"
    return f"{rounded:.3g}"
