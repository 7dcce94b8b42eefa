"""docs/performance.md as it is made from the results of the benchmarks."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from helpers import (
    one_thread,  # noqa: F401 - autouse
)

from benchmarks import report
from benchmarks.floor import Pieces
from benchmarks.targets import Entry

ROOT = Path(__file__).resolve().parents[1]


ENVIRONMENT = {
    "date": "2020-02-03T04:05:06+00:00",
    "commit": "0123456789ab",
    "dirty": False,
    "command": "python -m something",
    "machine": {"cpu": "Abacus", "cores": 2, "gpu": None, "load_before": 0.5},
    "threads": 2,
    "versions": {"singe": "0.1.0", "torch": "2.0", "python": "3.11"},
}


def document(**results) -> dict:
    return {"environment": ENVIRONMENT, "results": results}


def spent(median: float, **more) -> dict:
    return {"median": median, "min": median, "all": [median], **more}


@pytest.fixture
def results(tmp_path: Path) -> Path:
    folder = tmp_path / "results"
    folder.mkdir()
    entries = [
        Entry("met", "it is fast", ">=", 3.0, 4.0),
        Entry("missed", "it is small", "<=", 1.0, 1.5),
        Entry("absent", "it is clever", ">=", 0.98, None, "not offered: no such option"),
        Entry("extra", "it is stricter", ">=", 0.85, 0.5, demanded=False),
    ]
    cell = {
        "model": "resnet0", "path": "layer", "nodes": 4, "images": 8, "units": 16,
        "seconds": {"fused": spent(0.5), "textbook": spent(2.0, extrapolated=True)},
        "ratios": {"textbook over fused": 4.0, "careful over fused": 2.0,
                   "ordinary over fused": 0.5, "naive engine over fused": 3.0},
        "share_of_floor": 0.9,
    }  # fmt: skip
    peer = {
        "model": "resnet0", "images": 8, "nodes": 4, "groups": ["a"],
        "seconds": {"singe layer path": spent(1.0), "Peer": spent(3.0)}, "over ours": {"Peer": 3.0},
        "sweep_seconds": {"singe layer path": 0.75},
    }  # fmt: skip
    points = [{"at": n, "seconds": 1.0 * n, "predicted": 0.9 * n, "path": "layer"} for n in (1, 2)]
    kernel = {
        "shape": [4, 8], "GB/s": {"ours": 7.0, "yardstick": 10.0}, "share": 0.7,
        "over ours": {"torch reference": 5.0},
    }  # fmt: skip
    files = {
        "targets-cpu": document(targets=[e.as_json() for e in entries]),
        "suite-cpu": {"environment": ENVIRONMENT, "benchmarks": [{"extra_info": cell}]},
        "peers-cpu": {"environment": ENVIRONMENT, "benchmarks": [{"extra_info": peer}]},
        "growth-cpu": document(axes={"nodes": points}),
        "kernels-cpu": document(settings={"device": "cpu"}, kernels={"integral": {"l": kernel}}),
    }
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def make_page(results: Path, tmp_path: Path, monkeypatch) -> str:
    docs = tmp_path / "docs"
    docs.mkdir(exist_ok=True)
    page = docs / "performance.md"
    page.write_text(f"by hand\n\n{report.BEGIN}\n\nold\n\n{report.END}\n\nafterwards\n")
    arguments = ["report", "--results", str(results), "--docs", str(docs)]
    monkeypatch.setattr(sys, "argv", arguments)
    report.main()
    return page.read_text()


def test_the_page_shows_failures_beside_successes(results, tmp_path, monkeypatch):
    page = make_page(results, tmp_path, monkeypatch)
    assert page.startswith("by hand")
    assert page.endswith("afterwards\n")
    assert "old" not in page
    assert "1 of 3 targets are met." in page
    assert "| it is fast | >= 3 | 4 | pass |" in page
    assert "| it is small | <= 1 | 1.5 | **fail** |" in page
    assert "| it is clever | >= 0.98 |  | **not measured** |" in page
    assert "- absent: not offered: no such option" in page
    assert "~4 x" in page, "extrapolated ratios are marked"
    assert "Abacus" in page
    assert "`0123456789ab`" in page
    assert "90 %" in page
    assert "| singe layer path | 1 s |  | 750 ms |" in page
    assert "| Peer | 3 s | 3 x |  |" in page
    assert "Target: 70 % of the triad (integral); met in 1 of 1 cases." in page
    pictures = {p.name for p in (tmp_path / "docs" / "img").glob("*.png")}
    assert pictures == {
        f"{n}-cpu.png" for n in ("targets", "speedup", "floor", "peers", "growth", "kernels")
    }
    assert all(f"img/{name}" in page for name in pictures)


def test_details_become_sections(results, tmp_path, monkeypatch):
    contest = {
        "model": "resnet0", "groups": ["a", "b"], "nodes": 4, "batches": 2, "floor_seconds": 3.0,
        "share_of_floor": 0.75, "seconds": {"fused": spent(4.0)},
        "floor_pieces": Pieces([3.0, 1.0], [6.0, 2.0], [0.5, 0.25], 4.0, 8.0).describe(),
    }  # fmt: skip
    error = {
        "errors": {"naive g": {"all": 0.17, "worst_group": 0.2},
                   "fused q": {"all": 0.03, "worst_group": 0.04}},
        "seconds": {"naive g": spent(80.0), "fused q": spent(2.0)},
        "naive": "naive g", "fused": "fused q", "model": "resnet0", "images": 8, "reference": "r",
    }  # fmt: skip
    run = {"budget": None, "peak_extra": 8 << 20, "chunks": 1}
    tight = {"budget": 2 << 20, "peak_extra": 3 << 20, "chunks": 4, "relative_difference": 1e-7}
    memory = {
        "model": "resnet0", "images": 8, "nodes": 4, "free": run,
        "budgeted": [tight | {"identical": False}],
    }  # fmt: skip
    entries = [
        Entry("layer-textbook", "a", ">=", 3.0, 4.0, detail={"contest": contest}),
        Entry("layer-floor-folded", "b", ">=", 0.85, 0.5, detail={"floor_seconds": 2.0}),
        Entry("equal-error", "c", ">=", 20.0, 40.0, detail=error),
        Entry("memory-peak", "d", "<=", 1.0, 1.5, detail=memory),
    ]
    content = document(targets=[e.as_json() for e in entries])
    (results / "targets-cpu.json").write_text(json.dumps(content))
    page = make_page(results, tmp_path, monkeypatch)
    assert "the floor is 3 s (2 groups x 4 nodes x 2 batches" in page
    assert "The sweep takes 4 s: 75 % of the floor's speed, and 50 % of that" in page
    assert "| naive g | 17 % | 20 % | 80 s |" in page
    assert "| none given | 8 MiB | 1 | reference |" in page
    assert "| 2 MiB | 3 MiB | 4 | off by 1.0e-07 |" in page
    assert (tmp_path / "docs" / "img" / "equal-error-cpu.png").stat().st_size > 1000


def test_missing_gpu_figures_are_admitted(results, tmp_path, monkeypatch):
    assert "GPU figures are outstanding" in make_page(results, tmp_path, monkeypatch)
    environment = json.loads(json.dumps(ENVIRONMENT))
    environment["machine"]["gpu"] = "Turbo 9"
    kernels = json.loads((results / "kernels-cpu.json").read_text()) | {"environment": environment}
    kernels["results"]["settings"]["device"] = "cuda"
    (results / "kernels-cuda.json").write_text(json.dumps(kernels))
    page = make_page(results, tmp_path, monkeypatch)
    assert "outstanding" not in page
    assert "Turbo 9" in page
    assert "No `targets-cuda.json` yet." in page


def test_the_committed_page_can_be_generated_into():
    page = (ROOT / "docs" / "performance.md").read_text()
    assert "new part" in report.splice(page, "new part")
    with pytest.raises(ValueError, match="no lines"):
        report.splice("nothing", "new part")
