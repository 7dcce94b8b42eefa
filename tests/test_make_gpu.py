"""What `make gpu` leaves behind, whatever fails: its first run on a GPU machine must not be wasted."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "benchmarks" / "gpu.sh"
KINDS = ("kernels", "targets", "suite", "peers", "growth", "compiled")
PYTHON = """#!/bin/bash
echo "$@" | head -n 1 >>"$CALLS"
[[ "$*" != *"$BROKEN"* ]] || exit 3
for name in kernels targets growth compiled; do
  if [[ "$*" == *"benchmarks.$name "* ]]; then
    echo '{}' >"$SINGE_RESULTS/$name-cuda.json"
    echo '{' >"$SINGE_RESULTS/$name-cuda.1.partial"
  fi
done
[[ "$*" != *side_by_side* ]] || echo '{}' >"$SINGE_RESULTS/cifar10-resnet56.json"
while [ $# -gt 0 ]; do
  [ "$1" != --flush ] || echo '{}' >"$2"
  shift
done
"""


@pytest.fixture
def bench(tmp_path: Path) -> Path:
    """A checkout with nothing but the script, and stubs of everything that it calls."""
    stubs = {
        "python3": PYTHON,
        "nvidia-smi": "#!/bin/sh\n",
        "nvcc": "#!/bin/sh\n",
        "compute-sanitizer": "#!/bin/sh\necho Device not supported\nexit 9\n",
    }
    (tmp_path / "bin").mkdir()
    for name, text in stubs.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "checkout" / "benchmarks" / "results").mkdir(parents=True)
    shutil.copy(SCRIPT, tmp_path / "checkout" / "benchmarks")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "targets-cuda.json").write_text("of the run before")
    return tmp_path


def run(bench: Path, broken: str, **more: str) -> tuple[int, set[str], str, list[str]]:
    """Exit status, the files that are left, the summary, and the calls of Python."""
    environment = os.environ | {
        "PATH": f"{bench / 'bin'}:{os.environ['PATH']}",
        "OUT": str(bench / "out"),
        "CALLS": str(bench / "calls"),
        "BROKEN": broken,
        "PYTHON": "python3",
        "TMPDIR": str(bench),
        **more,
    }
    done = subprocess.run(
        ["bash", bench / "checkout" / "benchmarks" / "gpu.sh"],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert not list(bench.glob("tmp.*")), "the working folder is removed"
    left = {str(p.relative_to(bench / "out")) for p in (bench / "out").rglob("*")}
    summary = (bench / "out" / "logs.txt").read_text()
    return done.returncode, left, summary, (bench / "calls").read_text().splitlines()


def test_at_most_eight_files_though_steps_fail(bench):
    status, left, summary, calls = run(bench, broken="benchmarks.targets")
    assert status == 1
    assert left == {f"{kind}-cuda.json" for kind in KINDS if kind != "targets"} | {
        "logs.txt",
        "logs.tar.gz",
    }
    assert "failed: sanitizer targets races" in summary
    assert "no result of targets" in summary
    assert "Device not supported" in summary, "the end of every log"
    with tarfile.open(bench / "out" / "logs.tar.gz") as archive:
        assert {"logs/build.log", "logs/tests.log", "logs/suite.log"} <= set(archive.getnames())
    order = ["setup.py", "-c", "-m gpu", "test_masked_forward", "kernels", "targets", "resnet50"]
    found = [next(i for i, call in enumerate(calls) if word in call and "m.cifar10" not in call)
             for word in order]  # fmt: skip
    assert found == sorted(found)
    results = bench / "checkout" / "benchmarks" / "results"
    assert {p.name for p in results.iterdir()} == {name for name in left if name.endswith(".json")}


@pytest.mark.parametrize(("broken", "step"), [("setup.py", "build"), ("singe.info", "check")])
def test_a_build_that_fails_ends_the_run(bench, broken, step):
    status, left, summary, calls = run(bench, broken)
    assert status == 1
    assert left == {"logs.txt", "logs.tar.gz"}
    assert "everything else would fail" in summary
    assert f"== {step}.log" in summary
    assert not any("pytest" in call or "benchmarks.kernels" in call for call in calls)


def test_some_steps_alone(bench):
    status, left, summary, calls = run(bench, broken="nothing", ONLY="growth compiled")
    assert status == 0, summary
    assert {name for name in left if name.endswith(".json")} == {
        "growth-cuda.json",
        "compiled-cuda.json",
    }
    assert any("setup.py" in call for call in calls)
    assert not any("pytest" in call or "benchmarks.kernels" in call for call in calls)


def test_forty_epochs_are_asked_for_by_name(bench):
    *_, calls = run(bench, broken="nothing")
    assert not any("side_by_side" in call for call in calls)
    status, left, summary, calls = run(bench, broken="nothing", ONLY="epochs")
    assert status == 0, summary
    assert "side_by_side" in calls[-1]
    assert {name for name in left if name.endswith(".json")} == {"cifar10-resnet56.json"}
    results = bench / "checkout" / "benchmarks" / "results"
    assert (results / "cifar10-resnet56.json").is_file()


def test_without_a_gpu_nothing_runs(bench):
    (bench / "bin" / "nvidia-smi").write_text("#!/bin/sh\necho no devices\nexit 1\n")
    (bench / "calls").touch()
    status, left, summary, calls = run(bench, "nothing")
    assert (status, calls) == (1, [])
    assert left == {"logs.txt", "logs.tar.gz"}
    assert "no usable NVIDIA GPU: no devices" in summary


def test_the_limits_up_to_the_targets_fit_into_the_budget():
    text = SCRIPT.read_text()
    budget = int(re.search(r"BUDGET:-(\d+)", text).group(1))
    steps = dict(re.findall(r"^ *step (\w+) (\d+) ", text, re.M))
    names = list(steps)
    important = names[: names.index("targets") + 1]
    assert important == [
        "wheels", "build", "check", "tests", "triton", "sanitizer", "kernels", "targets",
    ]  # fmt: skip
    assert sum(int(steps[name]) for name in important) <= budget


def pytest_says(*arguments: object, **environment: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *map(str, arguments)],
        cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


def test_a_gpu_that_is_required_is_not_skipped():
    status, said = pytest_says(
        "tests/test_gpu.py::test_compress_on_the_gpu",
        SINGE_REQUIRE_GPU="1",
        CUDA_VISIBLE_DEVICES="",
    )
    assert status == 4
    assert "SINGE_REQUIRE_GPU=1, but torch finds no CUDA device" in said


def test_cells_are_written_before_the_run_ends(tmp_path):
    """The second cell takes the process down, as a limit on its time would."""
    pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed")
    (tmp_path / "test_cells.py").write_text(
        "import os\n\n"
        "def test_one(benchmark):\n"
        "    benchmark.pedantic(int)\n"
        "    benchmark.extra_info['model'] = 'resnet0'\n\n"
        "def test_two(benchmark):\n"
        "    os._exit(9)\n"
    )
    path = tmp_path / "suite.json"
    arguments = ("-p", "benchmarks.conftest", "--rootdir", tmp_path, "--flush", path)
    status, said = pytest_says(*arguments, tmp_path / "test_cells.py")
    assert status == 9, said
    found = json.loads(path.read_text())
    assert [cell["extra_info"] for cell in found["benchmarks"]] == [{"model": "resnet0"}]
    assert found["environment"]["versions"]["torch"]
