"""Hands the compiled core to CMake; everything else is in pyproject.toml and CMakeLists.txt.

Environment: SINGE_CUDA=AUTO|ON|OFF, SINGE_CUDA_ARCHS (as CMAKE_CUDA_ARCHITECTURES),
CMAKE_BUILD_PARALLEL_LEVEL. torch is not needed here, so build isolation works.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def missing_tools() -> list[str]:
    """What pip has to fetch: ninja, and cmake unless it knows `--fresh` (3.24)."""
    tools = [] if version_of("ninja") else ["ninja"]
    return tools if version_of("cmake") >= (3, 24) else [*tools, "cmake>=3.24"]


def version_of(tool: str) -> tuple[int, ...]:
    """Empty if it does not run: ninja's own wheels up to 1.11 have scripts that fail in pip's environment."""
    try:
        said = subprocess.run(
            [shutil.which(tool) or tool, "--version"], capture_output=True, text=True
        )
    except OSError:  # not there, or a script whose interpreter is gone
        return ()
    found = re.search(r"(\d+)\.(\d+)", said.stdout)
    return tuple(map(int, found.groups())) if found else ()


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        import pybind11  # a build requirement: absent while pip only asks what to fetch

        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = Path(self.build_temp).resolve() / "cmake"
        options = {
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": target,
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "SINGE_VERSION": self.distribution.get_version(),
        }
        options |= {k: v for k in ("SINGE_CUDA", "SINGE_CUDA_ARCHS") if (v := os.environ.get(k))}
        # --fresh: a cache of an earlier build points to that build's deleted ninja and pybind11.
        command = ["cmake", "--fresh", "-G", "Ninja", "-S", str(ROOT), "-B", str(build)]
        subprocess.run([*command, *(f"-D{k}={v}" for k, v in options.items())], check=True)
        subprocess.run(["cmake", "--build", str(build)], check=True)


setup(
    ext_modules=[Extension("singe._core", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
    setup_requires=missing_tools(),
)
