"""The PTX of csrc/cuda by nvcc, compiled once and kept under build/."""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import sys
from pathlib import Path

from .machine import REPO, cached, decoded, digest, run_compiler
from .program import Program, entries

CUDA = REPO / "csrc" / "cuda"
TORCH_FLAGS = [
    f"-D__CUDA_NO_{name}__"
    for name in ("HALF_OPERATORS", "HALF_CONVERSIONS", "BFLOAT16_CONVERSIONS", "HALF2_OPERATORS")
]
UNITS = ("kernels_f32", "kernels_bf16", "kernels_f16", "last_batch_cuda")


def nvcc() -> str | None:
    """nvcc: of $CUDA_HOME, on PATH, or in the wheels that `.ci/run` installs where neither is."""
    home = os.environ.get("CUDA_HOME")
    found = shutil.which(str(Path(home) / "bin" / "nvcc")) if home else None
    if found := found or shutil.which("nvcc"):
        return found
    package = importlib.util.find_spec("nvidia")
    for folder in (package.submodule_search_locations or []) if package else []:
        for bundled in sorted(Path(folder).glob("cu*/bin/nvcc")):
            return str(bundled)
    return None


def no_host() -> str:
    """Why the host code of csrc/cuda cannot be built here, or an empty string."""
    if shutil.which("g++") is None:
        return "no g++"
    if importlib.util.find_spec("pybind11") is None:
        return "no pybind11"
    return "a big-endian machine" if sys.byteorder != "little" else ""


def missing() -> str:
    """Why the kernels cannot be compiled and run here, or an empty string."""
    return no_host() or ("" if nvcc() else "no nvcc: on PATH, in $CUDA_HOME, or by `.ci/run nvcc`")


def source_key(unit: str, *more: object) -> str:
    """Of everything that a compilation of ``unit`` reads in this repository."""
    files = [*CUDA.glob("*.cuh"), *CUDA.glob("*.h"), *CUDA.parent.glob("*.h"), REPO / "dlb_fast" / "options.h"]
    texts = [path.read_text() for path in sorted(files)]
    compiler = str(nvcc())
    return digest((CUDA / f"{unit}.cu").read_text(), texts, compiler, os.path.getmtime(compiler), more)


@functools.cache
def module(unit: str, arch: int = 90) -> Path:
    """The PTX of a file of csrc/cuda."""

    def make(out: Path) -> None:
        command = [str(nvcc()), "-O3", "-std=c++17", *TORCH_FLAGS, "--ptx", f"-arch=compute_{arch}"]
        command += ["-Werror", "all-warnings", str(CUDA / f"{unit}.cu"), "-o", str(out)]
        run_compiler(command)

    return cached(f"{unit}_{arch}_{source_key(unit, TORCH_FLAGS)}.ptx", make)


@functools.cache
def cubin(unit: str, arch: int) -> Path:
    """ptxas' machine code of a file of csrc/cuda, from the same PTX."""
    source = module(unit, arch)
    command = [str(nvcc()), "-O3", "-cubin", f"-arch=sm_{arch}", str(source), "-o"]
    return cached(f"{source.stem}.cubin", lambda out: run_compiler([*command, str(out)]))


@functools.cache
def kernels(unit: str) -> tuple[str, ...]:
    """The names of the kernels of a file."""
    return tuple(entries(module(unit).read_text()))


@functools.cache
def program(unit: str, name: str) -> Program:
    """One kernel of a file, decoded."""
    return decoded(module(unit).read_text(), name)
