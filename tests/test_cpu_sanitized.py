"""The C++ CPU op under AddressSanitizer and UBSan on seeded random batches, and the proof that they would speak."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CSRC = ROOT / "csrc" / "cpu"
COMPILER = shutil.which("g++") or shutil.which("clang++")


def widest() -> str:
    """The compiler flags for the widest vectors that this machine runs: other lanes, other ends of rows."""
    words = Path("/proc/cpuinfo").read_text().split()
    if {"avx512f", "avx512bw", "avx512vl", "avx512dq"} <= set(words):
        return "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma"
    return "-mavx2 -mfma -mf16c" if "avx2" in words else ""


def build(folder: Path, rows: Path, vectors: str = "") -> Path:
    """The fuzz program with ``rows`` as its row kernels, and with vectors of those flags."""
    program = folder / "cpu_fuzz"
    flags = f"{vectors} -std=c++17 -O1 -g -fno-math-errno -fno-trapping-math -fopenmp-simd -DDLB_FAST_ISA=portable"
    sanitizers = "-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer"
    sources = [ROOT / "tests" / "sanitize" / "cpu_fuzz.cpp", CSRC / "last_batch_cpu.cpp", CSRC / "isa.cpp", rows]
    assert COMPILER is not None
    command = [COMPILER, *flags.split(), *sanitizers.split(), f"-I{CSRC}", *map(str, sources), "-o", str(program)]
    done = subprocess.run(command, capture_output=True, text=True)
    if "cannot find" in done.stderr and "san" in done.stderr:
        pytest.skip("this compiler has no sanitizer libraries")
    assert done.returncode == 0, done.stderr
    return program


def run(program: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}
    return subprocess.run([str(program), "600"], capture_output=True, text=True, env=environment)


@pytest.mark.slow
@pytest.mark.skipif(COMPILER is None or platform.system() != "Linux", reason="needs g++ or clang++ on Linux")
def test_the_widest_vectors_stay_within_their_rows(tmp_path):
    if not widest():
        pytest.skip("this machine has no wider vectors than the compiler takes by itself")
    done = run(build(tmp_path, CSRC / "last_batch_rows.cpp", widest()))
    assert done.stdout == "600 batches\n", done.stderr[-3000:]

    folder = tmp_path / "broken"
    shutil.copytree(CSRC.parent, folder)
    loops = folder / "cpu" / "row_loops.h"
    source = loops.read_text()
    broken = source.replace("store(at(n - lanes), out + n - lanes);", "store(at(n - n % lanes), out + n - n % lanes);")
    assert broken != source
    loops.write_text(broken)
    done = run(build(tmp_path, folder / "cpu" / "last_batch_rows.cpp", widest()))
    assert "heap-buffer-overflow" in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(COMPILER is None or platform.system() != "Linux", reason="needs g++ or clang++ on Linux")
def test_random_batches_are_clean_and_one_column_too_many_is_not(tmp_path):
    done = run(build(tmp_path, CSRC / "last_batch_rows.cpp"))
    assert done.stdout == "600 batches\n", done.stderr[-3000:]

    source = (CSRC / "last_batch_rows.cpp").read_text()
    broken = source.replace("for (int64_t c = 0; c < args.classes; ++c) store(to_acc(from[c]), to + c);",
                            "for (int64_t c = 0; c <= args.classes; ++c) store(to_acc(from[c]), to + c);")  # fmt: skip
    assert broken != source
    mutated = tmp_path / "rows.cpp"
    mutated.write_text(broken)
    done = run(build(tmp_path, mutated))
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr
