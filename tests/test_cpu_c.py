"""cpu.c compiled with the address and undefined-behaviour sanitizers, against the slow equation in C (cpu_cases.c)."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

TESTS = Path(__file__).parent
KERNELS = TESTS.parent / "src" / "tqw" / "kernels"


def test_sanitizers_find_nothing_and_every_case_is_within_its_bound(tmp_path):
    compiler = next(name for name in ("gcc", "clang", "cc") if shutil.which(name))
    program = tmp_path / "cases"
    flags = [
        "-O1",
        "-g",
        "-std=gnu11",
        "-fsanitize=address,undefined",
        "-fno-sanitize-recover=undefined",
        "-pthread",
        "-w",
    ]
    sources = ["-I", str(KERNELS), str(TESTS / "cpu_cases.c"), "-o", str(program), "-lm"]
    subprocess.run([compiler, *flags, *sources], check=True)
    result = subprocess.run([program], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert " 0 failures" in result.stdout
