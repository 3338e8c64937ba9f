"""Builds the emulated CUDA kernels with the host compiler and calls them with torch tensors.

The kernels are the files of ``csrc/cuda`` as they are: no nvcc, no GPU. Builds are cached by the sources' hash in the
machine's temporary folder. Test code: not part of the package.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from dlb_fast.buffer import HEADER

HERE = Path(__file__).resolve().parent
CUDA = HERE.parent.parent / "csrc" / "cuda"
OPTIONS = HERE.parent.parent / "dlb_fast" / "options.h"
DTYPES = {torch.float32: 0, torch.bfloat16: 2, torch.float16: 3}
KINDS = {"none": 0, "logits": 1, "probabilities": 2, "virtual": 3}
REDUCTIONS = {"mean": 0, "sum": 1, "none": 2}
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer")


def missing() -> str:
    """Why the emulator cannot be built here, or an empty string."""
    if shutil.which("g++") is None:
        return "no g++"
    return "" if importlib.util.find_spec("pybind11") else "no pybind11"


UNITS = {  # source: the files beside itself whose change recompiles it
    "csrc/cuda/kernels_f32.cu": "kernels",
    "csrc/cuda/kernels_bf16.cu": "kernels",
    "csrc/cuda/kernels_f16.cu": "kernels",
    "tests/emulation/entry.cpp": "kernels",
    "tests/emulation/emulator.cpp": "emulator",
    "tests/emulation/module.cpp": "entry",
}


def _sources() -> dict[str, str]:
    files = [*CUDA.glob("*.cuh"), *CUDA.glob("*.h"), *CUDA.glob("kernels_*.cu"), *CUDA.parent.glob("*.h")]
    files += [OPTIONS, *HERE.glob("*.h"), *HERE.glob("*.cpp")]
    return {str(file.relative_to(CUDA.parent.parent)): file.read_text() for file in sorted(files)}


def _digest(*parts: Any) -> str:
    return hashlib.sha256(repr((parts, sys.version, platform.machine())).encode()).hexdigest()[:20]


_ENTRY = ("csrc/cuda/plan.h", "csrc/cuda/workspaces.h", "csrc/last_batch.h", "dlb_fast/options.h")


def _inputs(unit: str, sources: dict[str, str]) -> list[tuple[str, str]]:
    names = {
        "kernels": [n for n in sources if n.endswith((".cuh", ".h"))],
        "emulator": ["tests/emulation/emulator.h", "tests/emulation/fiber.h"],
        "entry": ["tests/emulation/entry.h", "tests/emulation/emulator.h", *_ENTRY],
    }[UNITS[unit]]
    return [(name, sources[name]) for name in [unit, *names]]


def build(
    mutation: tuple[str, str, str] | None = None, *, float32_only: bool = False, flags: tuple[str, ...] = ("-O1",)
) -> Path:
    """Compile the emulator, from the sources or from a copy in which ``mutation`` = (file, old, new) was applied once.

    Objects and modules are cached by the hash of what went into them, so a mutation recompiles the kernels only.
    """
    sources = _sources()
    if mutation is not None:
        file, old, new = mutation
        key = f"csrc/cuda/{file}"
        assert sources[key].count(old) == 1, f"{key} must hold this text once: {old!r}"
        sources[key] = sources[key].replace(old, new)
    cache = Path(tempfile.gettempdir()) / f"dlb_fast_emulator_{os.getuid()}"
    cache.mkdir(exist_ok=True)
    flags = ("-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror", "-DDLB_EMULATE", *flags)
    flags += ("-DDLB_EMULATE_F32_ONLY",) if float32_only else ()
    units = [u for u in UNITS if not (float32_only and u.endswith(("_bf16.cu", "_f16.cu")))]
    objects = {unit: cache / f"{_digest(flags, _inputs(unit, sources))}.o" for unit in units}
    module = cache / _digest(*(path.name for path in objects.values())) / "dlb_fast_emulator.so"
    if module.exists():
        return module
    # Compiled aside and moved into place, so that parallel test workers never meet a half-written file.
    with tempfile.TemporaryDirectory(dir=cache) as folder, (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if module.exists():  # another worker has built it meanwhile
            return module
        work = Path(folder)
        for name, text in sources.items():
            (work / name).parent.mkdir(parents=True, exist_ok=True)
            (work / name).write_text(text)
        includes = [pybind11_include(), sysconfig.get_paths()["include"], work / "csrc/cuda", work / "tests/emulation"]

        def compile_one(unit: str) -> None:
            if not objects[unit].exists():
                target = work / objects[unit].name
                command = ["g++", *flags, *(f"-I{path}" for path in includes), "-x", "c++", "-c", str(work / unit)]
                done = subprocess.run([*command, "-o", str(target)], capture_output=True, text=True)
                assert done.returncode == 0, done.stderr
                os.replace(target, objects[unit])

        with ThreadPoolExecutor(2) as pool:
            list(pool.map(compile_one, units))
        linked = [str(path) for path in objects.values()]
        subprocess.run(["g++", "-shared", *flags, *linked, "-o", str(work / "module.so")], check=True)
        module.parent.mkdir(exist_ok=True)
        os.replace(work / "module.so", module)
    return module


def pybind11_include() -> str:
    import pybind11

    return pybind11.get_include()


def load(path: Path) -> ModuleType:
    """Import one of the built modules; several can be loaded side by side."""
    # pybind11 caches modules by their full name.
    spec = importlib.util.spec_from_file_location(f"{path.parent.name}.{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def teaching_generation(slots: Tensor, capacity: int, batch: int, ids: Tensor | None, num_old: int, again: int) -> int:
    """Which generation of a buffer must teach a batch, row by row in Python: no byte of it may be written."""
    latest = int(slots[0]) & 1
    count, *kept = slots[HEADER:].chunk(2)[latest].tolist()
    count = min(max(count, 0), capacity)
    if again < 0 and ids is not None:
        given, stored = ids.tolist(), kept[:count]
        fits = 0 < count <= batch and (num_old < 0 or batch - num_old == count)
        again = int(fits and given[batch - count :] == stored and (batch == count or given[:count] != stored))
    return 1 - latest if again > 0 else latest


@dataclass
class Result:
    loss: Tensor
    parts: Tensor
    grad: Tensor | None
    plan: dict[str, Any]


def _extent(tensor: Tensor) -> tuple[int, int]:
    """First byte and number of bytes a tensor can touch: what lies between its rows counts as its own."""
    if tensor.numel() == 0:
        return tensor.data_ptr(), 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), (last + 1) * tensor.element_size()


@dataclass
class Emulator:
    """The op's face over the emulated kernels. ``multiprocessors`` and ``largest_cluster`` describe the device."""

    module: Any
    multiprocessors: int = 4
    largest_cluster: int = 8
    seed: int = 0
    workspace: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.workspace = torch.zeros((self.module.workspace_bytes + 3) // 4, dtype=torch.int32)

    def _arguments(self, logits: Tensor, tensors: dict[str, Tensor | None], scalars: dict[str, Any]) -> dict[str, Any]:
        given: dict[str, Any] = {
            "batch": logits.shape[0], "classes": logits.shape[1], "dtype": DTYPES[logits.dtype],
            "logits": logits.data_ptr(), "logits_stride": logits.stride(0), **scalars,
        }  # fmt: skip
        for name, tensor in tensors.items():
            if tensor is not None:
                given[name] = tensor.data_ptr()
                if name in ("target", "target_b", "lam", "dense", "teacher"):
                    given[f"{name}_stride"] = tensor.stride(0) if tensor.dim() else 0
        return given

    def last_batch(
        self, logits: Tensor, target: Tensor | None = None, *, teacher: Tensor | None = None, kind: str | None = None,
        rows: Tensor | None = None, slots: Tensor | None = None, ids: Tensor | None = None, num_old: int = -1,
        again: int = 0,
        target_b: Tensor | None = None, lam: Tensor | None = None, weight: Tensor | None = None,
        kd_mask: Tensor | None = None, alpha: float | Tensor = 1.0, temperature: float | Tensor = 3.0,
        reduction: str = "mean", need_grad: bool = True, grad_offset: int = 0,
        plan_only: bool = False, **scalars: Any,
    ) -> Result:  # fmt: skip
        batch, classes = logits.shape
        kind = kind or ("logits" if teacher is not None or rows is not None else "none")
        dense = target.float() if target is not None and target.dim() == 2 else None
        label = target if dense is None else None
        loss = torch.full((batch,) if reduction == "none" else (), 777.0)
        parts = torch.full((6,), 777.0)
        grad = None
        if need_grad:  # `grad_offset` elements into an allocation, to have it misaligned
            grad = torch.full((batch * classes + grad_offset,), 777.0, dtype=logits.dtype)[grad_offset:].view(
                batch, classes
            )
        inputs: dict[str, Tensor | None] = {
            "target": label, "dense": dense, "teacher": teacher, "ids": ids, "target_b": target_b, "weight": weight,
            "kd_mask": kd_mask, "lam": torch.as_tensor(lam, dtype=torch.float32) if lam is not None else None,
            "alpha_ptr": alpha if isinstance(alpha, Tensor) else None,
            "temperature_ptr": temperature if isinstance(temperature, Tensor) else None,
        }  # fmt: skip
        outputs: dict[str, Tensor | None] = {
            "loss": loss,
            "parts": parts,
            "grad": grad,
            "rows": rows,
            "slots": slots,
        }
        held = teacher if teacher is not None else rows
        capacity = (slots.numel() - HEADER) // 4 if slots is not None else 0
        scalars |= {
            "kind": KINDS[kind], "num_old": num_old, "again": again, "reduction": REDUCTIONS[reduction],
            "teacher_dtype": DTYPES[held.dtype if held is not None else logits.dtype],
            "teacher_rows": teacher.shape[0] if teacher is not None else 0,
            "capacity": capacity, "rows_stride": rows[0].numel() if rows is not None else 0,
            "kd_mask_rows": kd_mask.shape[0] if kd_mask is not None else 0,
        }  # fmt: skip
        scalars |= {} if isinstance(alpha, Tensor) else {"alpha": alpha}
        scalars |= {} if isinstance(temperature, Tensor) else {"temperature": temperature}
        given = self._arguments(logits, inputs | outputs, scalars)
        if plan_only:
            return Result(loss, parts, grad, self.module.plan(given, self.multiprocessors, self.largest_cluster))
        ranges = [(*_extent(logits), False, "logits")]
        ranges += [(*_extent(t), False, name) for name, t in inputs.items() if t is not None]
        if rows is not None and slots is not None:
            del outputs["rows"], outputs["slots"]
            taught = teaching_generation(slots, capacity, batch, ids, num_old, again)
            ranges += [(*_extent(slots[:HEADER]), True, "header")]
            for generation, kept in enumerate(slots[HEADER:].chunk(2)):
                named = "generation that teaches" if generation == taught else "generation written"
                ranges += [(*_extent(rows[generation, :capacity]), generation != taught, f"rows of the {named}")]
                ranges += [(*_extent(kept), generation != taught, f"slots of the {named}")]
        ranges += [(*_extent(t), True, name) for name, t in outputs.items() if t is not None]
        ranges += [(self.workspace.data_ptr(), self.module.workspace_bytes, True, "workspace")]
        # An array must not be longer than it says: ranges that touch would hide a step over the end.
        plan = self.module.last_batch(
            given, ranges, self.workspace.data_ptr(), self.multiprocessors, self.largest_cluster, self.seed
        )
        assert self.workspace[:2].tolist() == [0, 0], "the tickets must be back at zero after every launch"
        return Result(loss, parts, grad, plan)

    def scale_grad(self, grad: Tensor, upstream: Tensor, grad_scale: float, blocks: int = 3) -> int:
        """Scales in place; returns the number of bytes stored."""
        scale = torch.tensor([grad_scale])
        ranges = [
            (*_extent(grad), True, "grad"),
            (*_extent(upstream), False, "upstream"),
            (*_extent(scale), False, "parts"),
        ]
        return self.module.scale_grad(
            grad.data_ptr(), DTYPES[grad.dtype], grad.numel(), grad.shape[1], upstream.data_ptr(),
            upstream.stride(0) if upstream.dim() else 0, scale.data_ptr(), ranges, blocks, self.seed,
        )  # fmt: skip


@functools.cache
def module() -> ModuleType:
    """The emulator built from the sources as they are; one per process."""
    return load(build())


def emulator(**device: int) -> Emulator:
    """A fresh device (a workspace of its own)."""
    return Emulator(module(), **device)
