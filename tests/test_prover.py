"""The prover of the CUDA kernels over the kernels in the emulator: it passes them, and finds planted faults."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from builders import ROOT

from dlb_fast import _backends, _proof

HERE = Path(__file__).resolve().parent / "pretended_cuda" / "emulated"
CUDA, EMULATION = ROOT / "csrc" / "cuda", ROOT / "tests" / "emulation"
UNITS = [CUDA / f"kernels_{name}.cu" for name in ("f32", "bf16", "f16")]
UNITS += [CUDA / "prove.cpp", HERE / "launcher.cpp", EMULATION / "emulator.cpp"]
OBJECTS = ROOT.glob("build/ops-*/*.o")
TRUTH = sorted(path for path in OBJECTS if path.stem.startswith(("last_batch_cpu", "last_batch_rows", "isa")))
pytestmark = [
    pytest.mark.slow,  # compiles the kernels
    pytest.mark.skipif(shutil.which("g++") is None, reason="no g++"),
    pytest.mark.skipif(not TRUTH, reason="the CPU op was not compiled here"),
]
UUID = bytes(range(0xF0, 0x100)).hex()


@pytest.fixture(scope="module")
def library() -> Path:
    """Prover, emulated kernels and the CPU op; kept under build/ by the sources' hash."""
    sources = [*CUDA.iterdir(), *CUDA.parent.glob("*.h"), *HERE.iterdir(), *EMULATION.glob("*.*"), *TRUTH]
    texts = [path.read_bytes() for path in sorted(sources)]
    built = ROOT / "build" / "prover" / hashlib.sha256(repr(texts).encode()).hexdigest()[:20] / "prover.so"
    if built.exists():
        return built
    built.parent.mkdir(parents=True, exist_ok=True)
    flags = ["-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror"]
    flags += ["-Wno-unused-parameter", "-DDLB_EMULATE", f"-I{CUDA}", f"-I{EMULATION}", f"-I{HERE}"]
    with tempfile.TemporaryDirectory(dir=built.parent) as folder:

        def compile_one(unit: Path) -> str:
            out = f"{folder}/{unit.stem}.o"
            done = subprocess.run(["g++", *flags, "-x", "c++", "-c", unit, "-o", out], capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            return out

        with ThreadPoolExecutor(2) as pool:
            objects = [*pool.map(compile_one, UNITS)]
        subprocess.run(["g++", "-shared", *objects, *TRUTH, "-o", f"{folder}/prover.so"], check=True)
        os.replace(f"{folder}/prover.so", built)
    return built


def check(library: Path, monkeypatch: pytest.MonkeyPatch, uuid: str = UUID, **environment: str) -> _proof.Verdict:
    """The verdict as a user's process comes to it."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    command = [sys.executable, "-S", "-I", "-c", _proof.CUDA_CODE, str(library), uuid]
    return _proof._check("cuda", command, uuid)


def test_right_kernels_pass(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(_proof.PATIENCE, "cuda", 300.0)  # the emulator is no GPU
    found = check(library, monkeypatch)
    assert found.passed and found.said.startswith("72 cases"), found


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("gradient", "float32, C=10: gradient.* off by"),
        ("rows", "float32, C=10: stored rows wrong"),
        ("nan", "float32, C=10: gradient wrong"),
        ("count", "float32, C=10: ids and counts of rows wrong"),
        ("outside", "float32, C=10: memory outside of the arrays wrong"),
        ("crash", "SIGABRT in float32 C=10"),
        ("hang", "float32 C=10 did not return within 3 s"),
    ],
)
def test_a_planted_fault_is_found(fault: str, said: str, library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(_proof.PATIENCE, "cuda", 3.0 if fault == "hang" else 300.0)
    found = check(library, monkeypatch, DLB_EMULATE_FAULT=fault)
    with pytest.raises(AssertionError, match=said):
        assert found.passed is not False, found.said


@pytest.mark.parametrize(
    ("uuid", "environment", "said"),
    [
        (UUID, {"DLB_EMULATE_NO_MEMORY": "1"}, "memory for the check: out of memory"),
        ("00" * 16, {}, "no such GPU is visible"),
    ],
)
def test_what_it_cannot_decide(uuid, environment, said, library, monkeypatch):
    assert check(library, monkeypatch, uuid, **environment)[:2] == (None, said)


@pytest.mark.skipif(not _backends.KERNELS.exists(), reason="no CUDA kernels built here")
def test_the_library_tells_what_it_is_built_for_and_needs_no_torch(monkeypatch):
    archs, runtime = _backends.cuda_build()
    assert archs and runtime >= 12000
    if not torch.cuda.is_available():
        found = check(_backends.KERNELS, monkeypatch)
        assert found.passed is None and "looking for the GPU" in found.said
    linked = subprocess.run(["ldd", str(_backends.KERNELS)], capture_output=True, text=True, check=True).stdout
    assert "torch" not in linked and "cuda" not in linked.replace(str(_backends.KERNELS), "")
