"""The command line: exit codes, streams, and `singe info` where parts are missing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from singe import cli, info
from singe.errors import BudgetError

ROOT = Path(__file__).resolve().parent.parent

# Makes `import triton` and `import singe._core` fail as if they were not installed.
BLOCKED = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton" or name == "singe._core":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocker())
from singe.cli import main
main()
"""


def singe(*words: str, code: str | None = None, **environment: str) -> tuple[int, str, str]:
    start = ["-m", "singe"] if code is None else ["-c", code]
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SINGE_", "TRITON_"))}
    done = subprocess.run(
        [sys.executable, *start, *words],
        env=kept | {"NO_COLOR": "1", "COLUMNS": "100"} | environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout, done.stderr


def run_main(monkeypatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["singe", *words])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return int(stop.value.code or 0)


def test_help_and_version(monkeypatch, capsys):
    assert run_main(monkeypatch, "--help") == 0
    said = capsys.readouterr().out
    assert "demo" in said
    assert "info" in said
    assert run_main(monkeypatch, "--version") == 0
    assert capsys.readouterr().out.startswith("singe ")


def test_an_unknown_command_is_a_usage_error(monkeypatch, capsys):
    assert run_main(monkeypatch, "prun") == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "prun" in captured.err


def test_errors_are_one_line(monkeypatch, capsys):
    def fail() -> dict[str, object]:
        raise BudgetError("macs=0.01 cannot be met;\n  see [1]")

    monkeypatch.setattr(info, "collect", fail)
    assert run_main(monkeypatch, "info") == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "error: macs=0.01 cannot be met; see [1]\n"


def test_interrupt_exits_with_130(monkeypatch):
    def interrupt() -> dict[str, object]:
        raise KeyboardInterrupt

    monkeypatch.setattr(info, "collect", interrupt)
    assert run_main(monkeypatch, "info") == 130


def test_an_unknown_device(monkeypatch, capsys, tmp_path):
    assert run_main(monkeypatch, "demo", "--device", "abacus", "--out", str(tmp_path)) == 2
    assert capsys.readouterr().err.startswith("error: device 'abacus' cannot be used")


@pytest.mark.parametrize(
    ("module", "name"), [("sklearn", "scikit-learn"), ("matplotlib", "matplotlib")]
)
def test_demo_says_what_to_install(monkeypatch, capsys, tmp_path, module, name):
    monkeypatch.setitem(sys.modules, module, None)
    assert run_main(monkeypatch, "demo", "--out", str(tmp_path)) == 2
    assert f"pip install {name}" in capsys.readouterr().err


def test_info_names_an_implementation_for_every_device():
    found = info.collect()
    assert json.loads(json.dumps(found)) == found
    assert found["devices"][0]["device"] == "cpu"
    for device in found["devices"]:
        assert set(device["kernels"]) == {"integral", "masked_forward"}
    assert info.render(found).row_count >= 8


def test_info_without_triton_and_core():
    code, out, err = singe("info", "--json", code=BLOCKED)
    assert code == 0, err
    found = json.loads(out)
    assert not found["triton"]["usable"]
    assert "pip install triton" in found["triton"]["reason"]
    assert not found["native"]["cpu"]["usable"]
    for device in found["devices"]:
        assert device["kernels"] == {"integral": "torch", "masked_forward": "torch"}

    code, out, err = singe("info", code=BLOCKED)
    assert code == 0, err
    assert "not usable: singe._core was not built" in " ".join(out.split())


def test_info_without_what_draws_and_decodes():
    code, out, err = singe("info", code="import sys; sys.modules |= "
                           "dict.fromkeys(['PIL', 'matplotlib', 'onnx', 'sklearn'])\n"
                           "from singe.cli import main; main()")  # fmt: skip
    assert code == 0, err
    assert "torch CUDA" in out


def test_info_reports_impossible_wishes():
    code, out, err = singe(
        "info", "--json", code=BLOCKED, SINGE_INTEGRAL="native", SINGE_KERNELS="triton"
    )
    assert code == 0, err
    found = json.loads(out)
    assert found["environment"] == {"SINGE_INTEGRAL": "native", "SINGE_KERNELS": "triton"}
    for implementation in found["devices"][0]["kernels"].values():
        assert implementation.startswith("error: ")
