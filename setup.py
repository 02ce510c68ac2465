"""Builds src/tqw/kernels/_cpu.so from cpu.c where there is a C compiler; without one the install goes on without it."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

FLAGS = ["-O3", "-std=gnu11", "-Wall", "-Wno-psabi", "-fPIC", "-shared", "-fvisibility=hidden", "-pthread"]


def compiler() -> list[str] | None:
    """$CC, or the first of cc, gcc, clang that exists."""
    candidates = [shlex.split(os.environ["CC"])] if os.environ.get("CC") else [["cc"], ["gcc"], ["clang"]]
    return next((command for command in candidates if shutil.which(command[0])), None)


class BuildLibrary(build_ext):
    """A plain shared library instead of a Python extension: no Python headers, one file for every version."""

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", "/") + ".so"

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        command = compiler()
        if command is None or sys.platform == "win32":
            self.warn("no C compiler: tqw will compute with torch on the CPU")
            return
        try:
            subprocess.run([*command, *FLAGS, *ext.sources, "-o", str(target), "-lm"], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            self.warn(f"cpu.c did not compile ({error}): tqw will compute with torch on the CPU")

    def copy_extensions_to_source(self) -> None:
        for ext in self.extensions:  # an editable install: straight into the source tree
            built = Path(self.build_lib, self.get_ext_filename(ext.name))
            if built.is_file():
                shutil.copy(built, Path("src", self.get_ext_filename(ext.name)))


class AnyPythonWheel(bdist_wheel):
    """py3-none-<platform>: the library knows neither Python nor torch."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[
        Extension(
            "tqw.kernels._cpu", ["src/tqw/kernels/cpu.c"], depends=["src/tqw/kernels/cpu_avx512.h"], optional=True
        )
    ],
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": AnyPythonWheel},
)
