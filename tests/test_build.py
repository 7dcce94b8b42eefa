"""The compiled core: what it links, what it says of itself, and that it builds for users."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

from singe.kernels import native

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("csrc", "singe", "CMakeLists.txt", "MANIFEST.in", "LICENSE", "README.md")
SOURCES += ("pyproject.toml", "setup.py")

compiled = pytest.mark.skipif(native.core() is None, reason=native.cpu_problem())


def needs(tool: str):
    return pytest.mark.skipif(shutil.which(tool) is None, reason=f"{tool} is not on PATH")


def run(*command: object, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def path_without(tool: str, links: Path) -> str:
    """PATH, with a folder of links in place of every folder that has the tool."""
    folders = []
    for index, folder in enumerate(map(Path, os.environ["PATH"].split(os.pathsep))):
        folders.append(folder)
        if (folder / tool).exists():
            folders[-1] = links / str(index)
            folders[-1].mkdir(parents=True)
            for file in folder.iterdir():
                if file.name != tool:
                    (folders[-1] / file.name).symlink_to(file)
    return os.pathsep.join(map(str, folders))


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what a build needs, so that no build touches the real one."""
    target = tmp_path / "checkout"
    target.mkdir()
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            ignored = shutil.ignore_patterns("*.so", "__pycache__")
            shutil.copytree(source, target / name, ignore=ignored)
        else:
            shutil.copy(source, target)
    return target


# --- the core that is installed -------------------------------------------------------------------


@compiled
@needs("readelf")
def test_links_no_torch_and_no_cuda():
    path = native.core().__file__
    needed = set(re.findall(r"NEEDED.*\[(.*)\]", run("readelf", "-d", path, cwd=ROOT)))
    allowed = {"libgomp", "libomp", "libstdc++", "libgcc_s", "libc", "libm", "ld-linux"}
    allowed |= {"libpthread", "libdl", "librt"}  # apart from libc before glibc 2.34
    assert needed
    unexpected = [n for n in needed if re.split(r"\.so|-x86|-aarch", n)[0] not in allowed]
    assert unexpected == []


@compiled
@needs("readelf")
def test_exports_one_symbol():
    """Symbols of the static CUDA runtime must not meet those of torch's."""
    symbols = run("readelf", "--dyn-syms", "-W", native.core().__file__, cwd=ROOT)
    defined = re.findall(r"FUNC +GLOBAL +DEFAULT +\d+ (\S+)", symbols)
    assert defined == ["PyInit__core"]


@compiled
def test_build_info():
    info = native.core().build_info()
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", info["version"])
    assert info["compiler"]
    assert isinstance(info["openmp"], bool)
    assert info["cpu_isa"] in {"x86-64-v4", "x86-64-v3", "default"}
    assert info["cuda"] == bool(info["cuda_archs"]) == (info["cuda_version"] > 0)
    assert info["cuda"] == (info["cuda_note"] == "")


@compiled
def test_no_driver_is_no_error():
    core = native.core()
    if torch.cuda.is_available():
        assert core.cuda_device_count() == torch.cuda.device_count()
        assert core.cuda_driver_version() > 0
    if core.cuda_device_count() == 0:
        assert core.cuda_problem(0)
        with pytest.raises(RuntimeError, match="singe: "):
            core.accumulate_cuda(0, 0, 0, 0, 1, 1, 1, 0, 1, 0, 0)


@compiled
def test_codes_and_sizes_are_checked():
    core = native.core()
    with pytest.raises(RuntimeError, match="unknown dtype or norm"):
        core.accumulate_cpu(0, 0, 0, 0, 1, 0, 1, 9, 1, 1)
    with pytest.raises(RuntimeError, match="unknown dtype or norm"):
        core.accumulate_cpu(0, 0, 0, 0, 1, 0, 1, 0, 9, 1)
    with pytest.raises(ValueError, match="negative size"):
        core.accumulate_cpu(0, 0, 0, 0, -1, 0, 1, 0, 1, 1)


def test_imports_without_the_core(checkout):
    """The copy has no .so: the package works, and says what is missing."""
    code = (
        # An editable install's finder would supply the .so of the original checkout.
        "import sys\n"
        "sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]\n"
        "from singe.kernels import native, integral; import torch\n"
        "integral.accumulate(torch.zeros(2), torch.ones(1, 2, 3), None, torch.ones(1))\n"
        "print(native.status()['cpu'])"
    )
    assert "pip install ." in run(sys.executable, "-c", code, cwd=checkout)


# --- builds ---------------------------------------------------------------------------------------


@needs("nvcc")
@pytest.mark.parametrize("arch", ["80", "90"])
def test_cuda_kernels_compile_without_spills(tmp_path, arch):
    said = run(
        *("nvcc", "-std=c++17", "-O3", f"-arch=sm_{arch}", "-Xptxas", "-v", "-cubin"),
        *("-DSINGE_WITH_CUDA", f'-DSINGE_CUDA_ARCHS="{arch}"', "-o", tmp_path / "out.cubin"),
        ROOT / "csrc" / "integral_cuda.cu",
        cwd=tmp_path,
    )
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", said)]
    spills = [int(n) for n in re.findall(r"(\d+) bytes spill", said)]
    assert len(registers) == 4 * 3 * 2, said  # dtypes, norms, packed or not
    assert max(registers) <= 80  # 3 blocks of 256 threads per SM
    assert max(spills) == 0


@pytest.mark.slow
@needs("cmake")
def test_sdist_then_wheel_then_wheel_again(checkout, tmp_path):
    """With build isolation, as users do it. The second build finds the first one's leftovers."""
    pip = (sys.executable, "-m", "pip")
    # Without a ninja of its own pip puts one into the isolated environment, and then deletes that.
    path = path_without("ninja", tmp_path / "bin")
    settings = {"SINGE_CUDA": "OFF", "CMAKE_BUILD_TYPE": "Debug"}  # half the time
    broken = tmp_path / "broken" / "ninja"  # as the script of a ninja whose environment is gone
    broken.parent.mkdir()
    broken.write_text("#!/no/such/python\n")
    broken.chmod(0o755)
    probe = subprocess.run(
        [*pip, "download", "-q", "--no-deps", "-d", tmp_path / "probe", "ninja", "pybind11"],
        capture_output=True,
    )
    if probe.returncode:
        pytest.skip("no package index within reach to fetch the build requirements from")

    run(sys.executable, "setup.py", "-q", "sdist", "-d", tmp_path, cwd=checkout)
    sdist = next(tmp_path.glob("singe-*.tar.gz"))
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[-1] for name in archive.getnames()}
        archive.extractall(tmp_path / "sdist", filter="data")
    assert {"CMakeLists.txt", "setup.py", "singe/_core.pyi", "singe/py.typed"} <= names
    assert {f"csrc/{p.name}" for p in (ROOT / "csrc").iterdir()} <= names
    assert not [name for name in names if name.endswith(".so")]

    unpacked = next((tmp_path / "sdist").iterdir())
    for attempt, settings["PATH"] in (("first", path), ("second", f"{broken.parent}:{path}")):
        wheels = tmp_path / attempt
        run(*pip, "wheel", "-q", "--no-deps", "-w", wheels, ".", cwd=unpacked, **settings)
        with zipfile.ZipFile(next(wheels.glob("*.whl"))) as wheel:
            core = [n for n in wheel.namelist() if re.fullmatch(r"singe/_core\..*\.so", n)]
            assert len(core) == 1
            assert "singe/kernels/integral.py" in wheel.namelist()
            assert not [n for n in wheel.namelist() if n.startswith(("csrc", "tests"))]


@pytest.mark.slow
@needs("cmake")
@needs("ninja")
@pytest.mark.parametrize("mode", ["AUTO", "ON"])
def test_a_broken_nvcc(checkout, tmp_path, mode):
    pytest.importorskip("pybind11", reason="configures without build isolation")
    (tmp_path / "nvcc").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "nvcc").chmod(0o755)
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=checkout,
        env=os.environ
        | {"SINGE_CUDA": mode, "CUDACXX": str(tmp_path / "nvcc"), "CMAKE_BUILD_TYPE": "Debug"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    said = " ".join(done.stdout.split())
    if mode == "ON":
        assert done.returncode != 0
        assert "SINGE_CUDA=ON, but nvcc found but unable to compile" in said
    else:
        assert done.returncode == 0, done.stdout
        assert "built WITHOUT CUDA kernels: nvcc found but unable to compile" in said


@pytest.mark.slow
@needs("cmake")
@needs("ninja")
@needs("nvcc")
def test_an_nvcc_that_is_too_old(checkout):
    pytest.importorskip("pybind11", reason="configures without build isolation")
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=checkout,
        env=os.environ | {"SINGE_CUDA": "ON", "SINGE_CUDA_ARCHS": "80-real;999"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode != 0
    assert "SINGE_CUDA=ON, but this nvcc does not know sm_999" in " ".join(done.stdout.split())
