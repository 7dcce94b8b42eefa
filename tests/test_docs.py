"""What the documentation and the examples show does run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


ADAPTERS_USED = """
print("removed", sum(map(len, removed.values())), "of", sum(map(len, scores.values())))
print("masked", sum(map(len, masked_units.values())), "of", sum(map(len, scores.values())))
taught = nn.Sequential(
    nn.Linear(6, 8), RMSNorm(8), nn.Linear(8, 12), MyAttention(12, 4), nn.Flatten(), nn.Linear(60, 3)
)
tokens = [(torch.randn(4, 5, 6), torch.randint(3, (4,)))]
print("taught", {name: len(units) for name, units in singe.score(taught, tokens).items()})
"""


def run(folder: Path, *arguments: str | Path) -> str:
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=folder, capture_output=True, text=True,
        check=False, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def python_blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.S)


@pytest.mark.parametrize(
    ("page", "program"),
    [
        ("performance.md", ["-m", "benchmarks.report"]),
        ("cifar10.md", ["examples/cifar10/finetuned_report.py"]),
    ],
)
def test_generated_pages_are_as_new_as_their_results(page, program, tmp_path):
    pytest.importorskip("matplotlib", reason="the programs draw as well")
    text = (ROOT / "docs" / page).read_text()
    (tmp_path / page).write_text(text)
    run(ROOT, *program, "--docs", tmp_path)
    assert (tmp_path / page).read_text() == text


@pytest.mark.slow
def test_the_page_on_pruning(tmp_path):
    pytest.importorskip("sklearn", reason="the data is scikit-learn's digits")
    blocks = python_blocks("docs/pruning.md")
    assert len(blocks) == 5
    (tmp_path / "page.py").write_text("\n".join(blocks))
    text = run(tmp_path, "page.py")
    assert "ranking 'cost'" in text
    assert (tmp_path / "run" / "report.json").exists()


def test_the_page_on_adapters(tmp_path):
    """Every block but the one that needs timm's weights; the layers it registers are found."""
    blocks = [block for block in python_blocks("docs/adapters.md") if "import timm" not in block]
    assert len(blocks) == 9
    (tmp_path / "page.py").write_text("\n".join([*blocks, ADAPTERS_USED]))
    text = run(tmp_path, "page.py")
    assert "removed 40 of 80" in text
    assert "masked 40 of 80" in text
    assert "taught {'0': 8, '2': 12, '3.everything': 4}" in text


@pytest.mark.slow
def test_the_readme(tmp_path):
    pytest.importorskip("sklearn", reason="the data is scikit-learn's digits")
    program, *_ = python_blocks("README.md")
    (tmp_path / "readme.py").write_text(program)
    before, after = map(float, run(tmp_path, "readme.py").splitlines()[-1].split(" -> "))
    assert min(before, after) > 0.95
    assert (tmp_path / "pruned" / "plan.json").exists()


def test_the_example_with_a_plain_loop(tmp_path):
    pytest.importorskip("sklearn", reason="the data is scikit-learn's digits")
    script = ROOT / "examples" / "training" / "plain_torch.py"
    first = run(tmp_path, script, "--steps", "25", "--folder", "run")
    assert "accuracy" in first
    assert len(list((tmp_path / "run").glob("checkpoint-*"))) == 2
    assert run(tmp_path, script, "--steps", "25", "--folder", "run") == first


@pytest.mark.skipif(find_spec("lightning") is None, reason="Lightning is not installed")
def test_the_example_with_lightning(tmp_path):
    pytest.importorskip("sklearn", reason="the data is scikit-learn's digits")
    script = ROOT / "examples" / "training" / "lightning_trainer.py"
    # Lightning imports torchvision, which needs help beside a torch without CUDA.
    program = (
        "import runpy, sys; from singe.cli.models import import_torchvision; import_torchvision(); "
        f"sys.path.insert(0, {str(script.parent)!r}); sys.argv = ['', '--steps', '10']; "
        f"runpy.run_path({str(script)!r}, run_name='__main__')"
    )
    assert "accuracy" in run(tmp_path, "-c", program)
