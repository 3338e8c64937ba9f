"""The Triton kernels compiled ahead of time, without a GPU: no stack, bounded registers, 16-byte accesses.

The compiler needs no device, but it cannot share a process with the interpreter: everything is compiled by one
subprocess (this file as a script), which prints one JSON line per kernel, and the test reads those. What is seen here
is the machine code, never its speed.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
BASE = {"roll": True, "ids": True, "kind": 1, "target": "labels", "counting": 1}
EVERYTHING = {**BASE, "target": "pair", "weight": True, "smooth": True, "mask": True}
# name: (C, dtype, targets, options). Regimes: several pairs per warp, one pair held, long rows; aligned and not.
KERNELS: dict[str, tuple[int, str, tuple[str, ...], dict[str, Any]]] = {
    "pairs-10": (10, "fp32", ("sm_90",), BASE),
    "pairs-100": (100, "fp32", ("sm_100",), BASE),
    "resident-1000": (1000, "bf16", ("sm_80", "sm_90", "sm_100", "gfx942"), BASE),
    "resident-1000-f16": (1000, "fp16", ("sm_90",), EVERYTHING),
    "resident-1001": (1001, "bf16", ("sm_90",), BASE),
    "resident-8192": (8192, "bf16", ("sm_100", "gfx942"), BASE),
    "resident-8192-f32": (8192, "fp32", ("sm_90",), BASE),
    "long-32000": (32000, "bf16", ("sm_80", "sm_90"), BASE),
    "long-32000-f32": (32000, "fp32", ("sm_100",), BASE),
    "long-21841": (21841, "bf16", ("sm_80", "sm_100"), BASE),
    "long-dense": (128256, "bf16", ("sm_90",), {**BASE, "target": "dense", "kind": 2, "roll": False, "ids": False}),
    "virtual": (1000, "bf16", ("sm_90",), {"kind": 3, "target": "labels", "share": True, "counting": 2}),
    "double": (1000, "fp64", ("sm_90",), BASE),
}
# Disassembly costs as much as compiling: a kernel of each regime is read in SASS, of the others the PTX.
READ_IN_SASS = ("pairs-10", "resident-1000", "long-32000")
BITS = {"fp32": 32, "bf16": 16, "fp16": 16, "fp64": 64}


def _main_source(classes: int, dtype: str, warp: int, o: dict[str, Any]) -> tuple[Any, dict[str, int]]:
    """What the launcher would hand to the compiler, from the same tiling."""
    import triton.language as tl
    from triton.compiler import ASTSource

    from dlb_fast.kernels import launch
    from dlb_fast.kernels.last_batch_kernel import last_batch_kernel as kernel

    size = BITS[dtype] // 8
    tiles = launch.tiling(classes, size, classes * size % 16 == 0, warp)
    compute = "fp64" if dtype == "fp64" else "fp32"
    kind, target = o["kind"], o["target"]
    roll, dense, pair = o.get("roll", False), target == "dense", target == "pair"
    i64 = "i64"
    pointers = {
        "logits_ptr": dtype, "teacher_ptr": dtype if kind in (1, 2) else None, "slots_ptr": i64 if roll else None,
        "ids_ptr": i64 if o.get("ids") else None, "target_ptr": compute if dense else i64,
        "target_b_ptr": i64 if pair else None, "lam_ptr": compute if pair else None,
        "weight_ptr": compute if o.get("weight") else None, "mask_ptr": "u8" if o.get("mask") else None,
        "alpha_ptr": compute, "tau_ptr": None, "loss_ptr": compute, "parts_ptr": compute, "grad_ptr": dtype,
        "ticket_ptr": "i32", "partials_ptr": compute, "counts_ptr": compute,
    }  # fmt: skip
    fixed = {
        "COMPUTE": tl.float64 if compute == "fp64" else tl.float32, "CLASSES": classes, "ROWS": tiles.rows,
        "BLOCK": tiles.block, "TILES": tiles.tiles, "VECTOR": tiles.vector, "AXIS": tiles.axis,
        "LOGITS_STRIDE": classes, "TEACHER_STRIDE": classes, "DENSE_STRIDE": classes, "KIND": kind, "UPDATE": roll,
        "HAS_CE": True, "DENSE": dense, "PAIR": pair, "LAM_ROWS": False, "HAS_WEIGHT": bool(o.get("weight")),
        "SMOOTH": bool(o.get("smooth")), "HAS_IDS": bool(o.get("ids")),
        "HAS_MASK": bool(o.get("mask")), "BY_LABEL": bool(o.get("share")), "MEAN": True, "ROW_LOSS": False,
        "NEED_GRAD": o.get("grad", True), "COUNTING": o["counting"],
    }  # fmt: skip
    signature, constants, attributes = {}, {}, {}
    unaligned = set(kernel.do_not_specialize_on_alignment)
    for i, parameter in enumerate(kernel.params):
        name = parameter.name
        if name in pointers and pointers[name] is not None:
            signature[name] = f"*{pointers[name]}"
            if name not in unaligned and (name != "target_ptr" or dense):
                attributes[(i,)] = [["tt.divisibility", 16]]
        elif name in pointers or name in fixed:
            signature[name] = "constexpr"
            constants[(i,)] = fixed.get(name)
        else:
            signature[name] = parameter.annotation_type or "i32"
    options = {"num_warps": tiles.warps, **launch.register_limit(tiles, pair, size, warp == 32)}
    return ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes), options


def _small_sources() -> dict[str, Any]:
    import triton.language as tl
    from triton.compiler import ASTSource

    from dlb_fast.kernels.counting import count_kernel
    from dlb_fast.kernels.scale_kernel import scale_kernel

    fixed = {
        "COMPUTE": tl.float32, "CLASSES": 1000, "UPDATE": True, "LABELS": True, "PAIR": False, "HAS_WEIGHT": True,
        "HAS_IDS": True, "HAS_MASK": True, "BY_LABEL": False, "target_b_ptr": None,
    }  # fmt: skip
    types = {"counts_ptr": "*fp32", "weight_ptr": "*fp32", "mask_ptr": "*u8"}
    types.update(dict.fromkeys(("slots_ptr", "ids_ptr", "target_ptr"), "*i64"))
    names = count_kernel.arg_names
    signature = {n: "constexpr" if n in fixed else types.get(n, "i32") for n in names}
    count = ASTSource(count_kernel, signature, {(names.index(n),): v for n, v in fixed.items()})
    fixed = {"CLASSES": 1000, "BLOCK": 2048, "PER_ROW": False, "UPSTREAM_STRIDE": 0}
    types = {"grad_ptr": "*bf16", "upstream_ptr": "*fp32", "parts_ptr": "*fp32"}
    names = scale_kernel.arg_names
    signature = {n: "constexpr" if n in fixed else types.get(n, "i32") for n in names}
    aligned = {(0,): [["tt.divisibility", 16]]}
    scale = ASTSource(scale_kernel, signature, {(names.index(n),): v for n, v in fixed.items()}, aligned)
    return {"count": count, "scale": scale}


def _machine_code(compiled: Any, sass: bool) -> dict[str, Any]:
    """Registers, stack, local accesses and 16-byte accesses of a compiled kernel."""
    if "cubin" not in compiled.asm:
        text = compiled.asm["amdgcn"]
        number = {key: int(re.search(rf"\.{key}:\s+(\d+)", text)[1]) for key in  # type: ignore[index]
                  ("vgpr_count", "vgpr_spill_count", "private_segment_fixed_size")}  # fmt: skip
        return {
            "registers": number["vgpr_count"], "stack": number["private_segment_fixed_size"],
            "local": number["vgpr_spill_count"], "loads": len(re.findall(r"load_dwordx4", text)),
            "stores": len(re.findall(r"store_dwordx4", text)),
        }  # fmt: skip
    import triton.backends.nvidia as nvidia

    tool = str(Path(nvidia.__file__).parent / "bin" / "cuobjdump")

    def dump(option: str) -> str:
        return subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = dump("--dump-resource-usage")
        code = dump("-sass") if sass else compiled.asm["ptx"]
    loads = r"\bLDG\.E\.[\w.]*128" if sass else r"\bld\.global[\w.:]*\.(?:v4\.b32|v2\.b64)"
    stores = r"\bSTG\.E\.[\w.]*128" if sass else r"\bst\.global[\w.:]*\.(?:v4\.b32|v2\.b64)"
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]), "stack": int(re.search(r"STACK:(\d+)", usage)[1]),  # type: ignore[index]
        "local": len(re.findall(r"\b(?:LDL|STL)\b|\b(?:ld|st)\.local\b", code)),
        "loads": len(re.findall(loads, code)), "stores": len(re.findall(stores, code)),
    }  # fmt: skip


def compile_all() -> None:
    """The subprocess: one JSON line per kernel and target; a failure is a line too."""
    import triton
    from triton.backends.compiler import GPUTarget

    def report(name: str, target: str, source: Any, options: dict[str, int]) -> None:
        line: dict[str, Any] = {"name": name, "target": target, "warps": options["num_warps"]}
        try:
            compiled = triton.compile(source, target=GPUTarget(*TARGETS[target]), options=options)
            line.update(_machine_code(compiled, target == "sm_90" and name in READ_IN_SASS))
        except Exception as error:
            line["error"] = f"{type(error).__name__}: {error}"[-1500:]
        print(json.dumps(line), flush=True)

    for name, (classes, dtype, targets, options) in KERNELS.items():
        for target in targets:
            if target == "gfx942" and "amd" not in triton.backends.backends:
                continue
            report(name, target, *_main_source(classes, dtype, TARGETS[target][2], options))
    for name, source in _small_sources().items():
        report(name, "sm_90", source, {"num_warps": 4})


def _complaints(line: dict[str, Any]) -> list[str]:
    """What is wrong with the machine code of one kernel."""
    name, target = line["name"], line["target"]
    if "error" in line:
        return [line["error"]]
    classes, dtype, _, _ = KERNELS.get(name, (1000, "bf16", (), {}))
    aligned = classes * BITS[dtype] // 8 % 16 == 0 and name != "count"
    wrong = []
    if line["stack"] or line["local"]:
        wrong.append(f"spills: {line['stack']} bytes of stack, {line['local']} accesses")
    if target == "gfx942":
        if line["warps"] > 16 or line["registers"] > 256:
            wrong.append(f"{line['warps']} warps of 64 threads with {line['registers']} registers")
    else:
        limit = 128 if aligned and dtype != "fp64" else 168
        if line["registers"] > limit:
            wrong.append(f"{line['registers']} registers, expected at most {limit}")
        if line["registers"] * line["warps"] * 32 > 65536:
            wrong.append("no program fits into the 65536 registers of a multiprocessor")
    if aligned and not line["loads"]:
        wrong.append("no 16-byte load")
    if aligned and not line["stores"]:
        wrong.append("no 16-byte store")
    return wrong


@pytest.mark.slow
def test_machine_code():
    """One test, so that the compiler runs once however the tests are spread over processes."""
    pytest.importorskip("triton", reason="triton is not installed")
    with tempfile.TemporaryDirectory() as cache:
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        environment["PYTHONPATH"] = str(Path(__file__).parents[1])
        environment["TRITON_CACHE_DIR"] = cache
        command = [sys.executable, __file__]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    expected = {(name, target) for name, spec in KERNELS.items() for target in spec[2] if target != "gfx942"}
    assert expected < {(line["name"], line["target"]) for line in lines}
    wrong = [f"{line['name']} on {line['target']}: {c}" for line in lines for c in _complaints(line)]
    assert not wrong, "\n".join(wrong)


if __name__ == "__main__":
    compile_all()
