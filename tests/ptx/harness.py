"""Calls the CUDA kernels with torch tensors, without a GPU: nvcc's PTX on ``machine.cpp``.

The plan and the kernel's arguments come from the host code of ``csrc/cuda`` itself. Test code: not part of the package.
"""

from __future__ import annotations

import functools
import importlib.util
import struct
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from dlb_fast.buffer import HEADER

from . import compilers
from .machine import HERE, REPO, Kernel, compiled

DTYPES = {torch.float32: 0, torch.bfloat16: 2, torch.float16: 3}
UNITS = {torch.float32: "kernels_f32", torch.bfloat16: "kernels_bf16", torch.float16: "kernels_f16"}
KINDS = {"none": 0, "logits": 1, "probabilities": 2, "virtual": 3}
REDUCTIONS = {"mean": 0, "sum": 1, "none": 2}
# Parts of the mangled names, by regime: the group, and the two-pass kernels' bounds.
RESIDENT = {
    "lanes": "NS0_9LaneGroupILi8EEE", "warp": "NS0_9LaneGroupILi32EEE",
    "block": "NS0_10BlockGroupI", "cluster": "NS0_12ClusterGroupE",
}  # fmt: skip
TWO_PASS = {
    ("two_pass_warp", True): "TeachE2ELb1ENS0_9LaneGroupI", ("two_pass_block", True): "TeachE2ELb1ENS0_10BlockGroupI",
    ("two_pass_block", False): "TeachE1ELb0ENS0_10BlockGroupI",
}  # fmt: skip
missing, no_host = compilers.missing, compilers.no_host


@functools.cache
def host() -> ModuleType:
    """The plan, the kernels' arguments and the workspaces, as csrc/cuda has them."""
    import pybind11

    cuda = REPO / "csrc" / "cuda"
    headers = [*cuda.glob("*.h"), *cuda.glob("*.cuh"), *cuda.parent.glob("*.h"), REPO / "dlb_fast" / "options.h"]
    folders = [pybind11.get_include(), sysconfig.get_paths()["include"], str(cuda), str(HERE.parent / "emulation")]
    flags = ("-O1", "-fvisibility=hidden", "-DDLB_EMULATE", *(f"-I{folder}" for folder in folders))
    path = compiled(HERE / "host.cpp", flags, *sorted(headers), *sorted((HERE.parent / "emulation").glob("*.h")))
    spec = importlib.util.spec_from_file_location("dlb_fast_host", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def kernel(unit: str, name: str) -> Kernel:
    """A kernel of csrc/cuda as nvcc compiled it."""
    return Kernel(compilers.program(unit, name))


def _named(unit: str, *parts: str) -> str:
    found = [name for name in compilers.kernels(unit) if all(part in name for part in parts)]
    assert len(found) == 1, (unit, parts, found)
    return found[0]


def kernel_name(plan: dict[str, Any], dtype: torch.dtype) -> tuple[str, str]:
    """File and mangled name of a plan's kernel, as ``device_args.cuh`` chooses it."""
    unit, regime = UNITS[dtype], plan["regime"]
    if regime in RESIDENT:
        return unit, _named(unit, "resident_kernel", f"Lb{int(plan['whole'])}E{RESIDENT[regime]}")
    return unit, _named(unit, TWO_PASS[regime, plan["general"]])


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


def extent(tensor: Tensor) -> tuple[int, int]:
    """First byte and number of bytes a tensor can touch: what lies between its rows counts as its own."""
    if tensor.numel() == 0:
        return tensor.data_ptr(), 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), (last + 1) * tensor.element_size()


def buffer_ranges(
    rows: Tensor, slots: Tensor, batch: int, ids: Tensor | None, num_old: int, again: int
) -> list[tuple[int, int, bool, str]]:
    """A buffer's memory: the generation that teaches may not be written."""
    capacity = (slots.numel() - HEADER) // 4
    taught = teaching_generation(slots, capacity, batch, ids, num_old, again)
    ranges = [(*extent(slots[:HEADER]), True, "header")]
    for generation, kept in enumerate(slots[HEADER:].chunk(2)):
        named = "generation that teaches" if generation == taught else "generation written"
        ranges += [(*extent(rows[generation, :capacity]), generation != taught, f"rows of the {named}")]
        ranges += [(*extent(kept), generation != taught, f"slots of the {named}")]
    return ranges


@dataclass
class Emulator:
    """The op's face over the kernels. ``multiprocessors`` and ``largest_cluster`` describe the device.

    ``kernel`` gives the kernel of a file and name: another one than nvcc's where a test has changed it.
    """

    multiprocessors: int = 4
    largest_cluster: int = 8
    seed: int = 0
    card: int | None = None
    kernel: Callable[[str, str], Kernel] = kernel
    workspace: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.workspace = torch.zeros((host().workspace_bytes + 3) // 4, dtype=torch.int32)

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
            return Result(loss, parts, grad, host().plan(given, self.multiprocessors, self.largest_cluster))
        ranges = [(*extent(logits), False, "logits")]
        ranges += [(*extent(t), False, name) for name, t in inputs.items() if t is not None]
        if rows is not None and slots is not None:
            del outputs["rows"], outputs["slots"]
            ranges += buffer_ranges(rows, slots, batch, ids, num_old, again)
        ranges += [(*extent(t), True, name) for name, t in outputs.items() if t is not None]
        workspace = self.workspace.data_ptr()
        ranges += [(workspace, host().workspace_bytes, True, "workspace")]
        plan, arguments = host().launch(given, workspace, self.multiprocessors, self.largest_cluster)
        if plan["count_blocks"]:
            count = self.kernel("last_batch_cuda", _named("last_batch_cuda", "count_kernel"))
            shape = {"blocks": plan["count_blocks"], "threads": 256}
            counted = count.run(arguments, ranges, **shape, seed=self.seed, card=self.card)["touched"]
        shape = {"blocks": plan["blocks"], "threads": plan["threads"], "cluster": plan["cluster"]}
        main = self.kernel(*kernel_name(plan, logits.dtype))
        # A kernel that waits for the launch before it may have begun while that one ran.
        overlaps = plan["count_blocks"] and any("griddepcontrol.wait" in i.text for i in main.program.code)
        # An array must not be longer than it says: ranges that touch would hide a step over the end.
        plan |= main.run(arguments, ranges, **shape, seed=self.seed, card=self.card, before=counted if overlaps else ())
        assert self.workspace[:2].tolist() == [0, 0], "the tickets must be back at zero after every launch"
        return Result(loss, parts, grad, plan)

    def scale_grad(self, grad: Tensor, upstream: Tensor, grad_scale: float, blocks: int = 3) -> int:
        """Scales in place; returns the number of bytes stored."""
        scale = torch.tensor([grad_scale])
        ranges = [
            (*extent(grad), True, "grad"),
            (*extent(upstream), False, "upstream"),
            (*extent(scale), False, "parts"),
        ]
        name = {
            torch.float32: "scale_kernelIf",
            torch.bfloat16: "scale_kernelINS0_4Bf16E",
            torch.float16: "scale_kernelINS0_3F16E",
        }
        arguments = struct.pack(
            "<6q", grad.data_ptr(), grad.numel(), grad.shape[1], upstream.data_ptr(), scale.data_ptr(),
            upstream.stride(0) if upstream.dim() else 0,
        )  # fmt: skip
        kernel = self.kernel("last_batch_cuda", _named("last_batch_cuda", name[grad.dtype]))
        return kernel.run(arguments, ranges, blocks=blocks, threads=256, seed=self.seed)["bytes_stored"]


def emulator(**device: int) -> Emulator:
    """A fresh device (a workspace of its own)."""
    return Emulator(**device)
