"""Builds ``machine.cpp`` and runs decoded programs on tensors' memory."""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import os
import pickle
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from . import program as ptx
from .program import Program

HERE = Path(__file__).resolve().parent
REPO = HERE.parent.parent
CACHE = REPO / "build" / "ptx"
FLAGS = ("-std=c++17", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror")
# What the tests' speed asks for. Contracted products and sums would round less often than the instructions say.
MACHINE = ("-O2", "-march=native", "-ffp-contract=off", "-fno-strict-aliasing", "-fvisibility=default")


def digest(*parts: Any) -> str:
    """Of everything that a cached file was made of."""
    return hashlib.sha256(repr((parts, sys.version, platform.machine())).encode()).hexdigest()[:20]


def cached(name: str, make: Callable[[Path], None]) -> Path:
    """The file ``name`` of the cache; made aside, once, whichever test process asks first."""
    CACHE.mkdir(parents=True, exist_ok=True)
    path = CACHE / name
    if path.exists():
        return path
    with (CACHE / f"{path.stem}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            with tempfile.TemporaryDirectory(dir=CACHE) as folder:
                make(Path(folder) / name)
                os.replace(Path(folder) / name, path)
    return path


def run_compiler(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, " ".join(command) + "\n" + done.stdout + done.stderr


def compiled(source: Path, flags: Sequence[str], *inputs: Path) -> Path:
    """A shared library of one C++ source."""
    texts = [path.read_text() for path in (source, *inputs)]
    name = f"{digest(flags, texts, _processor())}.so"
    return cached(name, lambda out: run_compiler(["g++", *FLAGS, *flags, str(source), "-o", str(out)]))


def _processor() -> str:
    """What -march=native stands for here."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def decoded(text: str, name: str) -> Program:
    """The kernel ``name`` of a PTX module; decoded once and kept."""

    def make(out: Path) -> None:
        out.write_bytes(pickle.dumps(ptx.decode(text, name, ptx.entries(text)[name])))

    key = digest(text, name, Path(ptx.__file__).read_text())
    return pickle.loads(cached(f"{key}.pickle", make).read_bytes())


class _Constant(ctypes.Structure):
    _fields_ = (("value", ctypes.c_uint64), ("width", ctypes.c_int32), ("row", ctypes.c_int32))


class _Program(ctypes.Structure):
    _fields_ = (
        ("code", ctypes.c_char_p),
        *((n, ctypes.c_int32) for n in ("length", "register_bytes", "constant_bytes", "shared_bytes")),
        ("parameter_bytes", ctypes.c_int32),
        ("constants", ctypes.c_int32),
        ("constant", ctypes.POINTER(_Constant)),
    )


class _Range(ctypes.Structure):
    _fields_ = (
        ("begin", ctypes.c_size_t),
        ("bytes", ctypes.c_size_t),
        ("writable", ctypes.c_int32),
        ("name", ctypes.c_char_p),
        ("before", ctypes.c_int32),
        ("touched", ctypes.c_int32),
    )


class _Launch(ctypes.Structure):
    _fields_ = (
        *((n, ctypes.c_int32) for n in ("blocks", "threads", "cluster", "ranges")),
        ("seed", ctypes.c_uint64),
        ("card", ctypes.c_uint64),
        ("steps", ctypes.c_uint64),
        ("parameters", ctypes.c_char_p),
        ("range", ctypes.POINTER(_Range)),
        ("executed", ctypes.c_void_p),
        ("issued", ctypes.c_void_p),
        ("mutant", ctypes.c_int32),
        ("noise", ctypes.c_int32),
        ("original", ctypes.c_char_p),
        ("orders", ctypes.c_void_p),
    )


COUNTERS = ("loads16", "stores16", "loads", "stores", "bytes_loaded", "bytes_stored", "prefetched")
COUNTERS += ("steps", "infected", "digest")


class _Counters(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_uint64) for name in COUNTERS)


@functools.cache
def _library() -> tuple[Any, dict[str, int]]:
    library = ctypes.CDLL(str(compiled(HERE / "machine.cpp", MACHINE)))
    library.ptx_operation.restype = ctypes.c_char_p
    operations: dict[str, int] = {}
    while (name := library.ptx_operation(len(operations))) is not None:
        operations[name.decode()] = len(operations)
    return library, operations


class Fault(RuntimeError):
    """What the machine found wrong with a launch."""


class Kernel:
    """A program as the machine takes it. ``shared_bytes``: of dynamic shared memory.

    ``launches``, where it is a list, gets what each launch has counted. A ``mutant`` (a place, and what stood there)
    has its differences counted too; ``noise`` has its results replaced where they differ; ``orders``, of four bytes per
    instruction, counts for each barrier the pairs of accesses that it orders in place of a lost one.
    """

    def __init__(self, program: Program, shared_bytes: int = 0) -> None:
        self.program, self._library = program, _library()[0]
        self.executed = bytearray(len(program.code))
        self.issued = (ctypes.c_uint64 * len(program.code))()
        self.launches: list[dict[str, int]] | None = None
        self.mutant: tuple[int, ptx.Instruction] | None = None
        self.noise, self.orders = False, bytearray()
        self.steps = 2**40  # after which a launch has hung
        code = ptx.packed(program.code, _library()[1])
        constants = (_Constant * max(len(program.constants), 1))(*program.constants)
        self._raw = _Program(
            code, len(program.code), program.register_bytes, program.constant_bytes,
            shared_bytes if program.dynamic_shared else program.shared_bytes, program.parameter_bytes,
            len(program.constants), constants,
        )  # fmt: skip

    def changed(self, changes: dict[int, ptx.Instruction], program: Program | None = None) -> Kernel:
        """The same kernel (or ``program``, the same with other constants) with other instructions in some places."""
        code = list((program or self.program).code)
        for index, instruction in changes.items():
            code[index] = instruction
        kernel = Kernel(replace(program or self.program, code=code), self._raw.shared_bytes)
        kernel.launches = []
        first = min(changes)
        kernel.mutant = first, self.program.code[first]
        return kernel

    def run(
        self, parameters: bytes, ranges: Sequence[tuple[int, int, bool, str]], *, blocks: int, threads: int,
        cluster: int = 1, seed: int = 0, card: int | None = None, before: Sequence[int] = (),
    ) -> dict[str, Any]:  # fmt: skip
        """One launch over memory (address, bytes, writable, name); what it moved and touched, or ``Fault``.

        ``seed`` draws the order of threads and atomics, ``card`` how the approximate instructions err. ``before``: what
        an earlier launch, which may be under way still, has touched: per range 1 read, 2 written.
        """
        if len(parameters) != self.program.parameter_bytes:
            raise ValueError(f"{len(parameters)} bytes of parameters, expected {self.program.parameter_bytes}")
        memory = (_Range * max(len(ranges), 1))(*[(a, n, w, name.encode()) for a, n, w, name in ranges])
        for one, flags in zip(memory, before, strict=False):
            one.before = flags
        original = ptx.packed([self.mutant[1]], _library()[1]) if self.mutant else None
        orders = (ctypes.c_ubyte * len(self.orders)).from_buffer(self.orders) if self.orders else None
        executed = (ctypes.c_ubyte * len(self.executed)).from_buffer(self.executed)
        launch = _Launch(
            blocks,
            threads,
            cluster,
            len(ranges),
            seed,
            seed if card is None else card,
            self.steps,
            parameters,
            memory,
            ctypes.addressof(executed),
            ctypes.addressof(self.issued),
            self.mutant[0] if self.mutant else -1,
            self.noise,
            original,
            ctypes.addressof(orders) if orders else None,
        )
        counters, error = _Counters(), ctypes.create_string_buffer(2000)
        failed = self._library.ptx_run(
            ctypes.byref(self._raw), ctypes.byref(launch), ctypes.byref(counters), error, len(error)
        )
        if failed:
            found = error.value.decode()
            if at := found.rpartition("instruction ")[2].rstrip(")"):
                found += f": {self.program.code[int(at)].text}" if at.isdigit() else ""
            raise Fault(found)
        counted: dict[str, Any] = {name: getattr(counters, name) for name in COUNTERS}
        if self.launches is not None:
            self.launches.append(dict(counted))
        return counted | {"touched": [one.touched for one in memory[: len(ranges)]]}
