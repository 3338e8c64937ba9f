"""The loader's Triton kernels compiled ahead of time, without a GPU: what the interpreter accepts need not compile.

As in `test_triton_compile`, the compiler runs in a process of its own (this file as a script).
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


def compile_all() -> None:
    from triton import compile as build
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from dlb_fast.data.device_augment import BOX_START, COLUMNS
    from dlb_fast.data.device_kernel import cut_kernel
    from dlb_fast.data.finish_kernel import finish_kernel

    pointers = {
        "source": "*u8", "before": "*u8", "own": "*u8", "table": "*i64", "boxes": "*i64", "scale": "*fp32",
        "bias": "*fp32", "fill": "*fp32", "blank": "*fp32",
    }  # fmt: skip
    cut = {"SIZE": 224, "HOLE": 8, "C": 3, "FIELDS": len(COLUMNS), "BOX": BOX_START, "BLOCK": 256}
    cases = [(finish_kernel, {"HEIGHT": 32, "WIDTH": 32, "C": 3, "MODE": m, "BLOCK": 512}, "*fp16") for m in range(3)]
    cases += [(cut_kernel, {**cut, "INTEGER": False, "ERASE": m}, "*bf16") for m in (-1, 0, 1, 2)]
    cases += [(cut_kernel, {**cut, "INTEGER": True, "ERASE": -1}, "*u8")]
    for kernel, fixed, out in cases:
        kinds = {name: pointers.get(name, "i32") for name in kernel.arg_names}
        kinds |= {"out": out, **dict.fromkeys(fixed, "constexpr")}
        source = ASTSource(fn=kernel, signature=kinds, constexprs=fixed)
        print(build(source, target=GPUTarget("cuda", 90, 32)).metadata.name)


def test_the_kernels_compile(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(Path(__file__).parents[1]), "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, __file__]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["finish_kernel"] * 3 + ["cut_kernel"] * 5


if __name__ == "__main__":
    compile_all()
