"""Triton's own road on a machine without a GPU: its launcher, specialisation and compiler, its PTX on ``machine.cpp``.

The compiler cannot share a process with the interpreter: ``Child`` runs functions of this package in a process of its
own. There a driver pretends that an sm_90 is at hand, and CPU tensors are its memory.
"""

from __future__ import annotations

import atexit
import functools
import importlib
import os
import pickle
import struct
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .harness import Result, buffer_ranges, extent
from .machine import CACHE, COUNTERS, Kernel, decoded

OUTPUTS = ("loss_ptr", "parts_ptr", "grad_ptr", "ticket_ptr", "partials_ptr", "counts_ptr")
FORMATS = {"i1": "b", "i8": "b", "i16": "h", "i32": "i", "i64": "q", "fp32": "f", "fp64": "d"}
Ranges = list[tuple[int, int, bool, str]]


class Pretended:
    """The launches of this process: kernels by their PTX, and what a launch may touch beside its arguments."""

    def __init__(self) -> None:
        self.seed, self.buffer = 0, Ranges()
        self.kernels: dict[str, Kernel] = {}
        self.changed: dict[int, Kernel] = {}  # by id of the kernel, what runs in its place
        self.launched: list[Kernel] = []
        self.counters: list[dict[str, int]] = []

    def kernel(self, text: str, name: str, shared: int) -> Kernel:
        if text not in self.kernels:
            self.kernels[text] = Kernel(decoded(text, name), shared)
        return self.kernels[text]

    def launch(self, kernel: Kernel, names: dict[str, str], arguments: dict[str, Any], grid: int, threads: int) -> None:
        packed, ranges = b"", list(self.buffer)
        for name, kind in names.items():
            value = arguments[name]
            if kind == "constexpr":
                continue
            if kind.startswith("*"):
                packed += b"\0" * (-len(packed) % 8) + struct.pack("<Q", value.data_ptr())
                if name in OUTPUTS or not (self.buffer and name in ("teacher_ptr", "slots_ptr")):
                    ranges.append((*extent(value), name in OUTPUTS, name.removesuffix("_ptr")))
            else:
                form = struct.Struct("<" + FORMATS[kind])
                packed += b"\0" * (-len(packed) % form.size) + form.pack(value)
        packed += b"\0" * (-len(packed) % 8) + bytes(16)  # scratch memory, of which the kernels have none
        self.launched.append(kernel)
        runs = self.changed.get(id(kernel), kernel)
        self.counters.append(runs.run(packed, ranges, blocks=grid, threads=threads, seed=self.seed))


PRETENDED = Pretended()


class _Launcher:
    def __init__(self, source: Any, metadata: Any) -> None:
        assert metadata.global_scratch_size == 0 and metadata.profile_scratch_size == 0
        self.signature = dict(source.signature)
        self.threads = metadata.num_warps * 32

    def __call__(self, x: int, y: int, z: int, stream: int, function: Any, *rest: Any) -> None:
        assert (y, z) == (1, 1)
        arguments = dict(zip(self.signature, rest[4:], strict=True))
        PRETENDED.launch(function, self.signature, arguments, x, self.threads)


class _Utils:
    def load_binary(self, name: str, code: bytes, shared: int, device: int) -> tuple[Any, Kernel, int, int, int]:
        return object(), PRETENDED.kernel(code.decode(), name, shared), 0, 0, 1024

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232448}


def install() -> None:
    """Let every Triton launch of this process go to the machine."""
    from triton.backends.compiler import GPUTarget
    from triton.backends.driver import DriverBase
    from triton.backends.nvidia.compiler import CUDABackend
    from triton.runtime.driver import driver

    class Driver(DriverBase):
        launcher_cls, utils = _Launcher, _Utils()

        def is_active(self) -> bool:  # type: ignore[override]
            return True

        def map_python_to_cpp_type(self, ty: str) -> str:
            return ty

        def get_current_target(self) -> Any:
            return GPUTarget("cuda", 90, 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

        def get_active_torch_device(self) -> Any:
            return torch.device("cpu")

        def get_benchmarker(self) -> Any:
            raise NotImplementedError

    stages = CUDABackend.add_stages

    def without_ptxas(self: Any, found: dict[str, Any], *rest: Any) -> None:
        stages(self, found, *rest)
        found["cubin"] = lambda text, metadata: text.encode()

    CUDABackend.add_stages = without_ptxas
    driver.set_active(Driver())


class TritonDevice:
    """The face of ``harness.Emulator`` over ``dlb_fast.kernels``; as there, a fresh device has a workspace of its own.

    A mutant may have left a ticket behind, for which the next launch would be blamed.
    """

    def __init__(self, seed: int = 0) -> None:
        from dlb_fast.kernels import launch

        self.seed = seed
        launch._workspaces.clear()

    def last_batch(
        self, logits: Tensor, target: Tensor | None = None, *, teacher: Tensor | None = None, kind: str | None = None,
        rows: Tensor | None = None, slots: Tensor | None = None, ids: Tensor | None = None, num_old: int = -1,
        again: int = 0, need_grad: bool = True, alpha: float | Tensor = 1.0, temperature: float | Tensor = 3.0,
        **options: Any,
    ) -> Result:  # fmt: skip
        from conftest import op_options

        from dlb_fast._options import TEACHER_KIND
        from dlb_fast.kernels import last_batch_triton as triton_kernels
        from dlb_fast.kernels import launch

        PRETENDED.seed, PRETENDED.counters = self.seed, []
        PRETENDED.buffer = (
            [] if rows is None or slots is None else buffer_ranges(rows, slots, len(logits), ids, num_old, again)
        )
        for name, value in (("alpha_t", alpha), ("temperature_t", temperature)):
            if isinstance(value, Tensor):
                options[name] = value
        alpha, temperature = (1.0 if isinstance(value, Tensor) else value for value in (alpha, temperature))
        given = op_options(target, alpha=alpha, temperature=temperature, need_grad=need_grad, **options)
        if rows is not None:
            loss, parts, grad = triton_kernels.last_batch_update(logits, rows, slots, ids, num_old, again, *given)
        else:
            kind = kind or ("logits" if teacher is not None else "none")
            loss, parts, grad = triton_kernels.last_batch(logits, teacher, TEACHER_KIND[kind], *given)
        tickets = [space.ticket.tolist() for space in launch._workspaces.values()]
        assert all(ticket == [0, 0] for ticket in tickets), "the tickets must be back at zero after every launch"
        moved = {key: sum(one[key] for one in PRETENDED.counters) for key in COUNTERS}
        return Result(loss, parts, grad if need_grad else None, moved)

    def scale_grad(self, grad: Tensor, upstream: Tensor, grad_scale: float) -> int:
        """Scales in place; returns the number of bytes stored."""
        from dlb_fast.kernels import last_batch_triton as triton_kernels

        PRETENDED.seed, PRETENDED.counters, PRETENDED.buffer = self.seed, [], []
        triton_kernels.scale_grad_(grad, upstream, torch.tensor([0, 0, 0, 0, grad_scale, 0]))
        return PRETENDED.counters[0]["bytes_stored"]


@contextmanager
def instead(kernel: Kernel, other: Kernel) -> Iterator[None]:
    """Launch ``other`` wherever ``kernel`` is launched."""
    PRETENDED.changed = {id(kernel): other}
    try:
        yield
    finally:
        PRETENDED.changed = {}


class Child:
    """A process in which Triton compiles; it calls functions by module and name."""

    def __init__(self) -> None:
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        environment["TRITON_CACHE_DIR"] = str(CACHE / "triton")
        environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
        environment["OMP_NUM_THREADS"] = "1"
        command = [sys.executable, "-c", "from ptx import triton_device; triton_device.serve()"]
        self.process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        atexit.register(self.process.kill)

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """The function's result; its exception as an AssertionError with the traceback."""
        assert self.process.stdin is not None and self.process.stdout is not None
        pickle.dump((function.__module__, function.__qualname__, arguments), self.process.stdin)
        self.process.stdin.flush()
        right, result = pickle.load(self.process.stdout)
        assert right, result
        return result


@functools.cache
def child() -> Child:
    """One per test process: it keeps what it has compiled."""
    return Child()


def serve() -> None:
    """Answer calls from stdin until it is closed."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what anybody prints must not come between the answers
    # As in the tests' own process, which does without the switch that the driver replaces.
    os.environ["TRITON_INTERPRET"] = "0"
    torch.set_num_threads(1)
    install()
    while True:
        try:
            module, name, arguments = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            answer: Any = (True, getattr(importlib.import_module(module), name)(*arguments))
        except BaseException:
            answer = (False, traceback.format_exc())
        pickle.dump(answer, answers)
        answers.flush()
