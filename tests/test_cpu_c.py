"""cpu.c compiled with the address and undefined-behaviour sanitizers, against the slow equation in C (cpu_cases.c)."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
KERNELS = TESTS.parent / "src" / "tqw" / "kernels"


SANITIZERS = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")


# AVX-VNNI's one instruction also has an encoding for machines with AVX-512, few of which have the other.
@pytest.mark.parametrize("flags", [SANITIZERS, ("-O2", "-DTQW_EVEX")], ids=["sanitizers", "AVX-VNNI as AVX-512VL"])
def test_every_case_is_within_its_bound_and_sanitizers_find_nothing(tmp_path, flags):
    compiler = next(name for name in ("gcc", "clang", "cc") if shutil.which(name))
    program = tmp_path / "cases"
    sources = ["-I", str(KERNELS), str(TESTS / "cpu_cases.c"), "-o", str(program), "-lm"]
    subprocess.run([compiler, *flags, "-std=gnu11", "-pthread", "-w", *sources], check=True)
    result = subprocess.run([program], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert " 0 failures" in result.stdout
