"""What nvcc makes of the CUDA kernels, without a GPU: registers, stack, spills, and the width of the memory accesses.

Each element type is compiled for one architecture, and bfloat16 for all of them: setup.py compiles the rest. torch's
-D__CUDA_NO_* flags are on, as they are when torch itself builds an extension. Of sm_90 it is the PTX that
`test_ptx.py` executes.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from ptx import compilers
from ptx.compilers import TORCH_FLAGS

CUDA = Path(__file__).resolve().parent.parent / "csrc" / "cuda"
BUILDS = [("kernels_bf16", 80), ("kernels_bf16", 90), ("kernels_bf16", 100), ("kernels_f32", 90), ("kernels_f16", 90)]
IDS = [f"{unit}-sm_{arch}" for unit, arch in BUILDS]
# Part of the mangled name -> registers a thread may use, so that 512 threads (768 of the plain streamed kernel) fit.
REGIMES = {
    "resident_kernel.*LaneGroupILi8E": 128,
    "resident_kernel.*LaneGroupILi32E": 128,
    "resident_kernel.*BlockGroupILi512E": 128,
    "resident_kernel.*ClusterGroup": 128,
    "two_pass_kernel.*BlockGroupILi256ELi3E": 85,
    "two_pass_kernel.*BlockGroupILi256ELi2E": 128,
    "two_pass_kernel.*LaneGroupILi32E": 128,
}


def tool(name: str) -> str | None:
    """A CUDA binary tool: on PATH, or the one in Triton's wheel."""
    if found := shutil.which(name):
        return found
    try:
        import triton
    except Exception:
        return None
    bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return str(bundled) if bundled.exists() else None


NVCC, CUOBJDUMP = compilers.nvcc(), tool("cuobjdump")
pytestmark = [
    pytest.mark.skipif(NVCC is None, reason="no nvcc: on PATH, in $CUDA_HOME, or by `.ci/run nvcc`"),
    pytest.mark.skipif(CUOBJDUMP is None, reason="no cuobjdump on PATH or in Triton's wheel"),
    pytest.mark.slow,
]


@pytest.fixture(scope="module")
def cubins() -> dict[tuple[str, int], Path]:
    with ThreadPoolExecutor(2) as pool:
        built = list(pool.map(lambda build: compilers.cubin(*build), BUILDS))
    return dict(zip(BUILDS, built, strict=True))


def dumped(flag: str, path: Path) -> str:
    return subprocess.run([str(CUOBJDUMP), flag, str(path)], capture_output=True, text=True, check=True).stdout


def instructions(path: Path) -> dict[str, list[str]]:
    """Function name -> its opcodes."""
    code: dict[str, list[str]] = {}
    name = ""
    for line in dumped("-sass", path).splitlines():
        if found := re.search(r"Function : (\S+)", line):
            name = found.group(1)
            code[name] = []
        elif found := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", line):
            code[name].append(found.group(1))
    return code


@pytest.mark.parametrize("build", BUILDS, ids=IDS)
def test_no_stack_and_bounded_registers(build: tuple[str, int], cubins: dict[tuple[str, int], Path]) -> None:
    usage = re.findall(
        r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)",
        dumped("--dump-resource-usage", cubins[build]),
    )
    seen = set()
    for name, registers, stack, shared, local in usage:
        regimes = [pattern for pattern in REGIMES if re.search(pattern, name)]
        assert len(regimes) == 1, name
        seen.add(regimes[0])
        assert (int(stack), int(local)) == (0, 0), f"{name}: registers spill, or an array is indexed at run time"
        assert int(registers) <= REGIMES[regimes[0]], name
        assert int(shared) <= 24 * 1024, name
    assert seen == set(REGIMES)


@pytest.mark.parametrize("build", BUILDS, ids=IDS)
def test_rows_move_in_16_byte_accesses(build: tuple[str, int], cubins: dict[tuple[str, int], Path]) -> None:
    for name, opcodes in instructions(cubins[build]).items():
        if "ClusterGroup" in name and build[1] < 90:
            continue  # never launched there
        wide = {kind: [o for o in opcodes if o.startswith(kind) and ".128" in o] for kind in ("LDG", "STG")}
        packets = 8 if "f32" in build[0] else 4  # per thread and array at 32 columns
        if "resident_kernel" in name and "Li32ELb" in name:
            # The logits of two code paths and the teacher; two gradients.
            assert len(wide["LDG"]) >= packets * 3, name
            assert len(wide["STG"]) >= packets * 2, name
        if "resident_kernel" in name and "ELb1E" in name and "f32" not in build[0]:
            # No edges: what moves in single elements is the label's logit and flags of rows.
            assert len([o for o in opcodes if o.startswith(("LDG.E.U16", "STG.E.U16"))]) <= 4, name
        assert len(wide["LDG"]) >= 1 and len(wide["STG"]) >= 1, name
        assert not [o for o in opcodes if o.startswith(("LDL", "STL"))], name
        # All addresses are known to be global or shared; a cluster's stores into other blocks have this opcode.
        generic = [o for o in opcodes if o.startswith(("LD.", "ST."))]
        assert not [o for o in generic if o != "ST.E" or "ClusterGroup" not in name], name
        assert any(o.startswith("MUFU.EX2") for o in opcodes), name


def test_clusters_use_distributed_shared_memory(cubins: dict[tuple[str, int], Path]) -> None:
    for name, opcodes in instructions(cubins["kernels_bf16", 90]).items():
        assert ("ClusterGroup" in name) == any(o.startswith("UCGABAR") for o in opcodes), name


def test_the_launcher_compiles_with_torch_flags_and_ptx() -> None:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "launcher.o"
        command = [str(NVCC), "-O1", "-std=c++17", "-Xcompiler", "-fPIC,-Wall", *TORCH_FLAGS]
        command += ["-gencode", "arch=compute_100,code=[sm_100,compute_100]", "-Werror", "all-warnings"]
        done = subprocess.run(
            [*command, "-c", str(CUDA / "last_batch_cuda.cu"), "-o", str(out)], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert "compute_100" in dumped("--list-ptx", out) or "sm_100" in dumped("--list-ptx", out)


def test_kernels_wait_for_the_launch_that_counts(cubins: dict[tuple[str, int], Path]) -> None:
    """By griddepcontrol.wait, before they read what count_kernel left; in a plain launch it does nothing."""
    for build in (("kernels_bf16", 80), ("kernels_bf16", 90)):
        for name, opcodes in instructions(cubins[build]).items():
            assert ("ACQBULK" in opcodes) == (build[1] >= 90), name
