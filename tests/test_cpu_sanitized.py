"""The C++ CPU ops under AddressSanitizer and UBSan on seeded random inputs, and the proof that they would speak."""

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


FLAGS = ["-std=c++17", "-O0", "-g1", "-fno-math-errno", "-fno-trapping-math", "-fopenmp-simd"]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize=null,object-size"]  # those two say less than the first
SANITIZERS += ["-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]


def widest() -> str:
    """The compiler flags for the widest vectors that this machine runs: other lanes, other ends of rows."""
    words = Path("/proc/cpuinfo").read_text().split()
    if {"avx512f", "avx512bw", "avx512vl", "avx512dq"} <= set(words):
        return "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma"
    return "-mavx2 -mfma -mf16c" if "avx2" in words else ""


def compiled(command: list[str]) -> None:
    assert COMPILER is not None
    done = subprocess.run([COMPILER, *FLAGS, *SANITIZERS, f"-I{CSRC}", *command], capture_output=True, text=True)
    if "cannot find" in done.stderr and "san" in done.stderr:
        pytest.skip("this compiler has no sanitizer libraries")
    assert done.returncode == 0, done.stderr


WIDEST = widest()


def build(folder: Path, vectors: str) -> Path:
    """The fuzz program with the row kernels in vectors of those flags."""
    program = folder / "cpu_fuzz"
    kernels = [CSRC / name for name in ("last_batch_cpu.cpp", "isa.cpp", "last_batch_rows.cpp")]
    sources = [ROOT / "tests" / "sanitize" / "cpu_fuzz.cpp", *kernels]
    compiled([*vectors.split(), "-DDLB_FAST_ISA=portable", *map(str, sources), "-o", str(program)])
    return program


def build_crops(folder: Path, around: Path) -> Path:
    """The fuzz program of the resize with ``around`` as what surrounds its kernels, for every instruction set."""
    program, x86 = folder / "crop_fuzz", platform.machine().lower() in ("x86_64", "amd64")
    sets = {"portable": "", **({"avx2": "-mavx2 -mfma", "avx512": "-mavx512f -mavx512bw -mavx512vl"} if x86 else {})}
    for name, flags in sets.items():
        source, target = str(CSRC / "resized_crop_rows.cpp"), str(folder / f"{name}.o")
        compiled([f"-DDLB_FAST_ISA={name}", *flags.split(), "-c", source, "-o", target])
    sources = [ROOT / "tests" / "sanitize" / "crop_fuzz.cpp", CSRC / "isa.cpp", around]
    objects = [str(folder / f"{name}.o") for name in sets]
    compiled([*(["-DDLB_FAST_X86"] if x86 else []), *map(str, sources), *objects, "-o", str(program)])
    return program


def run(program: Path, count: int = 600, too_short: str = "", isa: str = "") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0", "DLB_FAST_CPU_ISA": isa}
    return subprocess.run([str(program), str(count), too_short], capture_output=True, text=True, env=environment)


@pytest.mark.slow
@pytest.mark.skipif(COMPILER is None or platform.system() != "Linux", reason="needs g++ or clang++ on Linux")
@pytest.mark.parametrize("vectors", ["", WIDEST or "none"], ids=["portable", "widest"])
def test_random_batches_stay_within_their_rows(tmp_path, vectors):
    if vectors == "none":
        pytest.skip("this machine has no wider vectors than the compiler takes by itself")
    program = build(tmp_path, vectors)
    done = run(program)
    assert done.stdout == "600 batches\n", done.stderr[-3000:]
    for array in ("logits", "grad", "teacher", "stored", "dense", "weight"):
        assert "ERROR: AddressSanitizer" in run(program, 600, array).stderr, array


@pytest.mark.slow
@pytest.mark.skipif(COMPILER is None or platform.system() != "Linux", reason="needs g++ or clang++ on Linux")
def test_random_crops_are_clean_and_a_line_read_too_far_is_not(tmp_path):
    program = build_crops(tmp_path, CSRC / "resized_crop_cpu.cpp")
    for isa in ("portable", "avx2", "avx512"):
        done = run(program, 2000, isa=isa)
        assert done.stdout.endswith(" 2000 crops\n"), done.stderr[-3000:]
        vectors = not done.stdout.startswith("portable")

    source = (CSRC / "resized_crop_cpu.cpp").read_text()
    mutants = [("rounded_up(out_bytes, 32) + 32", "1", "use-after-poison")]
    if vectors:  # what they read beyond the last line
        mutants.append(("end - line < reach", "end - line < 0", "heap-buffer-overflow"))
    for number, (old, new, said) in enumerate(mutants):
        assert old in source, old
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "around.cpp").write_text(source.replace(old, new))
        done = run(build_crops(folder, folder / "around.cpp"), 2000)
        assert done.returncode != 0, (old, new)
        assert said in done.stderr, (old, new)
