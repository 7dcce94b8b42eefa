"""A report: one file that needs nothing else, drawn for light and dark pages from plain data."""

from __future__ import annotations

import copy
import itertools
import json
import math
import os
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from singe.report import SECTIONS, plots, si, write_report
from singe.report.theme import DARK, LIGHT

ROUND = {
    "macs": 80.0, "params": 40, "units_removed": 3, "metric_pruned": 0.5, "metric_finetuned": 0.8,
    "finetune_loss": 0.31, "seconds_pruning": 2.0, "seconds_finetuning": 58.0,
}  # fmt: skip
CONTENT = {
    "title": "A <model> & more",
    "lead": "what was done",
    "notes": ["Stopped early: 1 < 2."],
    "before": {"macs": 100.0, "params": 50, "metric": 0.9},
    "after": {"macs": 60.0, "params": 30, "metric": 0.85},
    "rounds": [ROUND, {**ROUND, "macs": 60.0, "params": 30}],
    "accuracy_floor": 0.4,
    "groups": {
        "layer1.0.conv1": {"scores": [0.1, 0.0, 0.5, 0.7], "removed": [0, 1]},
        "layer2": {"scores": [0.2, 0.3], "removed": []},
    },
    "score_name": "singe, layer path",
    "criteria": {
        "names": ["singe", "taylor"], "share": 0.3, "spearman": [[1.0, -0.2], [-0.2, 1.0]],
        "overlap": [[1.0, 0.4], [0.4, 1.0]], "accuracy": {"singe": 0.7, "taylor": 0.6},
        "accuracy_title": "accuracy at macs 0.5",
    },
    "latency": {"before": 2.0, "after": 1.0, "batch_size": 1, "device": "cpu", "runs": 15,
                "before_quartiles": [1.5, 6.0], "after_quartiles": [0.9, 1.2], "ratio": 0.4,
                "ratio_quartiles": [0.25, 0.5]},
    "integrand": {
        "path": "layer", "criterion": "singe", "ylabel": "gradient variation",
        "units": [
            {"group": g, "unit": u, "removed": u < 2, "nodes": [0.1, 0.5, 1.0],
             "values": [0.1 + u, 0.2, 0.3]}
            for g in ("layer1.0.conv1", "layer2", "layer3") for u in range(4)
        ],
    },
    "settings": {"macs": 0.5},
    "versions": {"torch": "2.13"},
}  # fmt: skip


class Page(HTMLParser):
    """Tags that are open, addresses, and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "img", "source", "br"):
            self.open.append(tag)
        self.addresses += [v for k, v in attrs if k in ("src", "srcset", "href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The whole report, drawn once."""
    return write_report(tmp_path_factory.mktemp("report") / "new" / "folder", CONTENT)


def test_everything_is_in_one_file(written):
    path = written
    page = Page(path.read_text())
    assert not page.open
    assert len(page.addresses) == 2 * len(SECTIONS)  # light and dark of each
    assert all(a.startswith("data:image/png;base64,") for a in page.addresses)
    for words in ("A <model> & more", "Stopped early: 1 < 2.", "60 (60.0%)", "90.0% before",
                  "2 ms before, 2.50 x faster (quartiles 2.00 to 4.00)", "torch"):  # fmt: skip
        assert words in page.text
    names = {p.name for p in (path.parent / "pictures").iterdir()}
    assert names == {f"{s[0]}{e}.png" for s in SECTIONS for e in ("", "-dark")}
    assert json.loads((path.parent / "report.json").read_text()) == CONTENT


def test_the_dark_pictures_are_the_dark_ones(written):
    assert written.read_text().count('media="(prefers-color-scheme: dark)"') == len(SECTIONS)
    for name, *_ in SECTIONS:
        for ending, theme in (("", LIGHT), ("-dark", DARK)):
            with Image.open(written.parent / "pictures" / f"{name}{ending}.png") as picture:
                pixels = np.asarray(picture.convert("RGB")).reshape(-1, 3)
            page = tuple(int(theme.page[i : i + 2], 16) for i in (1, 3, 5))
            ink = tuple(int(theme.ink[i : i + 2], 16) for i in (1, 3, 5))
            assert (pixels[0] == page).all()
            assert (pixels == page).all(1).mean() > 0.15
            assert (pixels == ink).all(1).any(), (name, theme.name)  # text in the theme's ink


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=lambda t: t.name)
def test_colours_can_be_read_on_their_page(theme):
    """Contrast as WCAG 2 defines it: 4.5 for text, 3 for graphics."""

    def luminance(colour):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))

    def contrast(a, b):
        low, high = sorted((luminance(a), luminance(b)))
        return (high + 0.05) / (low + 0.05)

    assert contrast(theme.ink, theme.page) >= 4.5
    for colour in (theme.kept, theme.removed, theme.accent, theme.faint):
        assert contrast(colour, theme.page) >= 3, colour


@pytest.mark.parametrize(
    ("parts", "title"),
    [(("settings",), "Settings"), (("criteria",), "Criteria compared"), (("latency",), "Latency"),
     (("integrand",), "Why these channels went")],
)  # fmt: skip
def test_only_what_is_there_is_shown(tmp_path, parts, title):
    content = {k: CONTENT[k] for k in ("title", *parts)}
    page = write_report(tmp_path, content).read_text()
    assert re.findall("<h2>(.*?)</h2>", page) == [title]


def test_without_any_metric_the_rounds_are_a_table(tmp_path):
    content = copy.deepcopy({k: CONTENT[k] for k in ("title", "before", "after", "rounds")})
    content["before"]["metric"] = content["after"]["metric"] = None
    for done in content["rounds"]:
        done |= {"metric_pruned": None, "metric_finetuned": None, "finetune_loss": None}
    page = Page(write_report(tmp_path, content).read_text())
    assert "units removed" in page.text
    assert not (tmp_path / "pictures" / "accuracy.png").exists()


def test_latency_is_drawn_with_its_spread_where_it_is_known():
    latency = dict(CONTENT["latency"])
    with LIGHT.applied():
        (axes,) = plots.latency({"latency": latency}, LIGHT).axes
        assert [list(line.get_xdata()) for line in axes.lines] == [[1.5, 6.0], [0.9, 1.2]]
        assert axes.get_xlim()[1] > 6
    for key in ("before_quartiles", "after_quartiles", "ratio", "ratio_quartiles"):
        del latency[key]
    with LIGHT.applied():
        (axes,) = plots.latency({"latency": latency}, LIGHT).axes
        assert axes.get_xlim() == (0, 2.5)


def test_odd_numbers_are_drawn():
    """Negative scores, groups that lose nothing or have one unit, many groups."""
    groups = {f"block{i}.conv": {"scores": [float(-i), 2.0 * i], "removed": [0]} for i in range(50)}
    groups["one"] = {"scores": [0.0], "removed": []}
    with LIGHT.applied():
        figure = plots.scores({"groups": groups, "score_name": "signed"}, LIGHT)
        (axes,) = figure.axes
        assert len(axes.get_yticks()) == 51
        assert axes.get_xscale() == "linear"
        assert sum(len(c.get_offsets()) for c in axes.collections[:2]) == 101
        assert figure.get_figheight() > 12


def test_scores_on_a_logarithmic_axis_have_plain_numbers():
    groups = {"a": {"scores": [1e-4, 3e-2, 2.0], "removed": [0]}}
    with LIGHT.applied():
        figure = plots.scores({"groups": groups}, LIGHT)
        figure.canvas.draw()
        (axes,) = figure.axes
        labels = [tick.get_text() for tick in axes.get_xticklabels()]
        assert {"0.001", "0.1"} <= set(labels)
        assert not any("$" in label for label in labels)


@pytest.mark.parametrize("span", [2.2, 4, 11, 30])
def test_a_short_logarithmic_axis_has_plain_numbers_that_do_not_overlap(span):
    groups = {"a": {"scores": [2e-4, 2e-4 * span], "removed": [0]}}
    with LIGHT.applied():
        figure = plots.scores({"groups": groups}, LIGHT)
        figure.canvas.draw()
        (axes,) = figure.axes
        told = [t for t in axes.get_xticklabels(which="both") if t.get_text()]
        low, high = axes.get_xlim()
        shown = [t for t in told if low <= t.get_position()[0] <= high]
        assert len(shown) >= 1
        assert all(t.get_text() == f"{t.get_position()[0]:g}" for t in told)
        boxes = sorted((t.get_window_extent() for t in shown), key=lambda box: box.x0)
        assert all(a.x1 < b.x0 for a, b in itertools.pairwise(boxes)), [t.get_text() for t in shown]


@pytest.mark.parametrize("is_score", [True, False])
def test_an_area_is_called_the_score_where_it_is(is_score, tmp_path):
    shown = CONTENT["integrand"] | {"is_score": is_score}
    content = {"title": "T", "integrand": shown, "score_name": "signed, neuron path"}
    text = Page(write_report(tmp_path, content).read_text()).text
    assert ("A unit's score is the area under its line" in text) is is_score
    assert ("the scores that decided are signed, neuron path" in text) is not is_score


def test_labels_stay_in_the_picture():
    long = "a" * 60 + ".conv"
    with LIGHT.applied():
        bars = plots.layers({"sizes": {long: {"units": 8, "kept": 5}}}, LIGHT)
        label = "RMS derivative (p=fisher, network path)"
        lines = plots.integrand({"integrand": CONTENT["integrand"] | {"ylabel": label}}, LIGHT)
        for figure in (bars, lines):
            figure.canvas.draw()
    (name,) = (tick.get_text() for tick in bars.axes[0].get_yticklabels())
    assert len(name) <= plots.LONGEST
    assert name.startswith("aaa")
    assert name.endswith(".conv")
    (said,) = (text for text in lines.texts if text.get_text() == label)
    box = said.get_window_extent()
    assert 0 <= box.y0 < box.y1 <= lines.bbox.height


def test_what_is_no_number_is_null_in_the_data(tmp_path):
    content = copy.deepcopy({k: CONTENT[k] for k in ("title", "before", "after", "rounds")})
    content["after"]["metric"] = math.nan
    del content["before"]["metric"]
    write_report(tmp_path, content)
    assert json.loads((tmp_path / "report.json").read_text())["after"]["metric"] is None


def test_a_name_that_is_no_text_is_written_all_the_same(tmp_path):
    name = os.fsdecode(b"d\xff.npz")
    content = {k: CONTENT[k] for k in ("title", "before", "after")} | {"settings": {"data": name}}
    path = write_report(tmp_path, content)
    assert r"d\udcff.npz" in Page(path.read_text(encoding="utf-8")).text
    assert json.loads((tmp_path / "report.json").read_text())["settings"]["data"] == name


def test_a_slower_network_is_called_slower(tmp_path):
    latency = {"before": 2.0, "after": 2.5, "batch_size": 1, "device": "cpu", "runs": 3}
    content = {k: CONTENT[k] for k in ("title", "before", "after")} | {"latency": latency}
    assert "2 ms before, 1.25 x slower" in Page(write_report(tmp_path, content).read_text()).text


def test_numbers_are_short():
    assert [si(v) for v in (0.5, 12, 1234, 148_670_000, 4.1e9, 2e12)] == [
        "0.5", "12", "1.23 k", "149 M", "4.1 G", "2 T",
    ]  # fmt: skip
    # What rounds up to a thousand has the next prefix.
    assert [si(v) for v in (999.4, 999.7, 999_700, -999.6e6)] == ["999", "1 k", "1 M", "-1 G"]
