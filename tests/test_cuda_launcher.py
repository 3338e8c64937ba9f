"""The CUDA launcher as nvcc compiles it, above a runtime that pretends: what it asks a device, launches and says."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
CUDA = HERE.parent / "csrc" / "cuda"
NVCC = shutil.which("nvcc")
pytestmark = [pytest.mark.skipif(NVCC is None, reason="no nvcc on PATH"), pytest.mark.slow]
F32, BF16, F16 = 0, 2, 3


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("launcher") / "launcher.so"
    sources = [str(CUDA / "last_batch_cuda.cu"), str(HERE / "pretended_cuda" / "runtime.cpp")]
    command = [str(NVCC), "-std=c++17", "-O1", "-arch=sm_90", "-Xcompiler", "-fPIC", "-cudart", "none", "-shared"]
    done = subprocess.run([*command, f"-I{CUDA}", *sources, "-o", str(out)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def pretend(
    library: Path, *, major=9, ptx=90, fits=16, fault=0, dtype=F32, classes=100_000, rows=2, driver=13000, calls=1
) -> list[str]:
    """What happened in the first calls of a process: a device is asked once."""
    code = "import ctypes, sys; f = ctypes.CDLL(sys.argv[1]).pretend; f.restype = ctypes.c_char_p; "
    code += "wide = ctypes.c_int64; n = list(map(int, sys.argv[2:])); "
    code += "print(f(*n[:5], wide(n[5]), wide(n[6]), *n[7:]).decode())"
    given = map(str, (library, major, ptx, fits, fault, dtype, classes, rows, driver, calls))
    done = subprocess.run([sys.executable, "-S", "-c", code, *given], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


@pytest.mark.parametrize(("batch", "classes"), [(2, 10), (4096, 1000), (4097, 1000), (2, 100_000), (4097, 100_000)])
def test_a_call_is_one_launch_and_waits_for_nothing(library: Path, batch: int, classes: int) -> None:
    """Above 4096 rows their labels are counted in a launch of its own. The first call makes the counters' memory."""
    code = "import ctypes, sys; f = ctypes.CDLL(sys.argv[1]).count; f.restype = ctypes.c_char_p; "
    code += "print(f(ctypes.c_int64(int(sys.argv[2])), ctypes.c_int64(int(sys.argv[3]))).decode())"
    given = map(str, (library, batch, classes))
    done = subprocess.run([sys.executable, "-S", "-c", code, *given], capture_output=True, text=True, check=True)
    launches = 1 if batch <= 4096 else 2
    assert [list(map(int, line.split())) for line in done.stdout.splitlines() if line] == [
        [launches, 1, 1], [launches, 0, 0],  # a loss: launches, allocations, waits
        [1, 0, 0], [1, 0, 0],  # a factor of its gradient
    ]  # fmt: skip


@pytest.mark.parametrize(("dtype", "name"), [(F32, "f32"), (BF16, "bf16"), (F16, "f16")])
def test_only_kernels_of_the_calls_dtype_are_touched(library: Path, dtype: int, name: str) -> None:
    said = pretend(library, dtype=dtype)
    assert said == [name, "fits 16", name, "fits 8", "cluster 8 of 512", "fine"]


@pytest.mark.parametrize(
    ("fits", "asked", "launched"),
    [(8, [16, 8], 8), (4, [16, 8, 4], 0), (2, [16, 8, 4, 2], 0), (1, [16, 8, 4, 2], 0)],
)
def test_clusters_are_those_that_find_room(library: Path, fits: int, asked: list[int], launched: int) -> None:
    said = pretend(library, fits=fits)  # 100 000 columns: eight blocks, or none and a row is read twice
    of_the_launch = [8] if launched else []
    assert [line for line in said if line.startswith("fits")] == [f"fits {size}" for size in asked + of_the_launch]
    assert said[-1] == "fine" and any(line.startswith("cluster") for line in said) == bool(launched)
    if fits in (2, 4):
        said = pretend(library, fits=fits, classes=fits * 512 * 32)
        assert f"cluster {fits} of 512" in said


@pytest.mark.parametrize(("major", "ptx"), [(8, 80), (9, 80)])
def test_no_clusters_without_code_for_them(library: Path, major: int, ptx: int) -> None:
    """On a new card PTX of an old one is compiled: its cluster kernels are a trap."""
    said = pretend(library, major=major, ptx=ptx)
    assert not [line for line in said if line.startswith(("fits", "cluster"))] and said[-1] == "fine"


@pytest.mark.parametrize("classes", [10, 100_000])
def test_a_fault_of_an_earlier_kernel_is_not_called_ours(library: Path, classes: int) -> None:
    said = pretend(library, fault=1, classes=classes)[-1]
    assert said.startswith("CUDA error: an illegal memory access") and "CUDA_LAUNCH_BLOCKING=1" in said
    assert "perhaps the fault of an earlier kernel" in said


def test_a_grid_is_the_blocks_that_the_device_holds(library: Path) -> None:
    """Asked for once; a small batch has a block for each of its pairs."""
    said = pretend(library, classes=1000, rows=4000, calls=3)
    assert said.count("room for 128") == 1 and said.count("500 blocks of 128") == 3
    assert "528 blocks of 128" in pretend(library, classes=3000, rows=4096)
    assert "132 blocks of 512" in pretend(library, classes=16384, rows=4096)
    assert "5 blocks of 512" in pretend(library, classes=16384, rows=9)


def test_a_batch_counted_first_begins_while_its_count_ends(library: Path) -> None:
    """Where the kernel has the code that waits: a kernel of an older GPU's PTX would read counts of the last batch."""
    early = "528 blocks of 128, early"
    assert pretend(library, classes=1000, rows=8192)[-3:] == ["small launch", early, "fine"]
    assert "cluster 8 of 256, early" in pretend(library, classes=40_000, rows=8192)
    for given in ({"major": 8, "ptx": 80}, {"ptx": 80}, {"driver": 12020}, {"rows": 4096}):
        assert "early" not in "".join(pretend(library, **({"classes": 1000, "rows": 8192} | given)))
