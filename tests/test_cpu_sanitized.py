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


def build(folder: Path, rows: Path) -> Path:
    """The fuzz program with ``rows`` as its row kernels, for the portable instruction set."""
    program = folder / "cpu_fuzz"
    flags = "-std=c++17 -O1 -g -fno-math-errno -fno-trapping-math -fopenmp-simd -DDLB_FAST_ISA=portable"
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
