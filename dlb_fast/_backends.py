"""Which implementations exist here, which do not and why, and which one ``impl="auto"`` takes.

The rule of choice: the fastest implementation that works on the tensor's device *and* has been seen to work on such a
device. A kernel that has not yet passed ``make gpu-check`` on a GPU is never chosen by ``auto``; it runs when named.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import logging
import os
from pathlib import Path
from typing import NamedTuple

import torch

from ._args import IMPLEMENTATIONS

log = logging.getLogger("dlb_fast")

LIBRARY = Path(__file__).parent / "lib" / "libdlb_fast_ops.so"
KERNELS = LIBRARY.with_name("libdlb_fast_kernels.so")  # the CUDA kernels, without torch
UNPROVEN = "not yet run on a GPU"
ABOUT = {
    "cuda": "CUDA C++, sm_75 to sm_120 and PTX",
    "triton": "Triton, for NVIDIA, AMD and Intel GPUs",
    "cpu": "C++ for AVX-512, AVX2 or any CPU, one file for torch 2.10 and newer",
    "torch": "plain PyTorch on any device: the definition",
}


class Implementation(NamedTuple):
    """One way to compute the losses: ``reason`` says why it is missing, ``state`` what it has been proven on."""

    name: str
    available: bool
    reason: str
    state: str


@functools.cache
def load_library() -> str:
    """Load the compiled ops once; an empty string when they are there, else the reason why they are not."""
    if not LIBRARY.exists():
        return (
            "the compiled library was not built (no C++ compiler at install time, or DLB_FAST_BUILD=none); "
            "reinstall with: DLB_FAST_BUILD=require pip install --no-build-isolation -e ."
        )
    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:  # the library of another platform, or a torch older than 2.10
        return f"{LIBRARY.name} could not be loaded into torch {torch.__version__}: {error}"
    torch.library.register_fake("dlb_fast::resized_crops_", lambda *args: None)
    return ""


def compiled_for(device: str) -> str:
    """Why the compiled op has no kernel for ``device`` ("cpu" or "cuda"), or an empty string."""
    missing = load_library()
    if missing:
        return missing
    key = {"cpu": "CPU", "cuda": "CUDA"}[device]
    if not torch._C._dispatch_has_kernel_for_dispatch_key("dlb_fast::last_batch", key):
        return "the library was built without nvcc; install the CUDA toolkit and reinstall"
    return ""


class Card(NamedTuple):
    """What is asked about a GPU: its name, compute capability and size, and the CUDA version of its driver (13000)."""

    name: str
    capability: tuple[int, int]
    memory: int
    processors: int
    uuid: str
    driver: int


def card(index: int) -> Card:
    """The GPU that torch calls ``cuda:index``. Legal while a graph is captured."""
    found = torch.cuda.get_device_properties(index)
    driver = 0 if torch.version.hip else torch._C._cuda_getDriverVersion()  # type: ignore[attr-defined, unused-ignore]
    capability = (found.major, found.minor)
    return Card(
        found.name, capability, found.total_memory, found.multi_processor_count, str(getattr(found, "uuid", "")), driver
    )


@functools.cache
def cuda_build() -> tuple[tuple[str, ...], int]:
    """The compute capabilities the CUDA kernels are compiled for ("90", "100+ptx"), and their runtime's version."""
    told = ctypes.CDLL(str(KERNELS)).dlb_fast_cuda_build
    told.restype = ctypes.c_char_p
    archs, version = told().decode().split()
    return tuple(archs.split(",")), int(version)


def cuda_missing(index: int | None = None) -> str:
    """Why the CUDA kernels cannot start on ``cuda:index`` (None: the current device), or an empty string."""
    missing = compiled_for("cuda")
    if missing:
        return missing
    if torch.version.hip is not None:
        return "torch is built for ROCm, where CUDA kernels do not run; use impl='triton'"
    if not torch.cuda.is_available():
        return "no CUDA device is visible to torch"
    found = card(torch.cuda.current_device() if index is None else index)
    archs, runtime = cuda_build()
    if found.driver // 1000 < runtime // 1000:
        return (
            f"the kernels are built with CUDA {runtime // 1000}, the driver supports CUDA {_version(found.driver)}; "
            f"update the driver, or rebuild with CUDA_HOME at a toolkit of CUDA {found.driver // 1000}"
        )
    major, minor = found.capability
    code = [divmod(int(arch.removesuffix("+ptx")), 10) for arch in archs]
    if any(built[0] == major and built[1] <= minor for built in code):
        return ""
    wanted = f"rebuild with DLB_FAST_CUDA_ARCHS={major}{minor}"
    ptx = [built for built, arch in zip(code, archs, strict=True) if arch.endswith("+ptx")]
    if not any(built <= (major, minor) for built in ptx):
        return f"{found.name} has compute capability {major}.{minor}, the kernels have {','.join(archs)}; {wanted}"
    if found.driver < runtime:
        return (
            f"{found.name} has compute capability {major}.{minor} and needs the kernels' PTX of CUDA "
            f"{_version(runtime)}, the driver compiles that of CUDA {_version(found.driver)}; update it, or {wanted}"
        )
    return ""


def _version(number: int) -> str:
    """12040 as "12.4"."""
    return f"{number // 1000}.{number % 1000 // 10}"


def triton_interpreted() -> bool:
    """Whether Triton kernels run through its interpreter (TRITON_INTERPRET=1), and so on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@functools.cache
def _triton_missing() -> str:
    try:
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed; pip install triton"
    except (ImportError, ValueError) as error:
        return f"triton cannot be imported: {error}"
    return ""


def gpu_proof() -> dict[str, str]:
    """Implementation -> GPU on which ``make gpu-check`` has passed, as recorded with the package."""
    record = Path(__file__).parent / "proven_on_gpu.txt"
    if not record.exists():
        return {}
    lines = [line.split(":", 1) for line in record.read_text().splitlines() if ":" in line]
    return {name.strip(): where.strip() for name, where in lines}


def triton_missing(device_type: str) -> str:
    """Why Triton's kernels cannot run on tensors of this device type, or an empty string."""
    missing = _triton_missing()
    if not missing and device_type == "cpu" and not triton_interpreted():
        missing = "CPU tensors need Triton's interpreter: set TRITON_INTERPRET=1 before importing triton"
    return missing


def implementations() -> dict[str, Implementation]:
    """Every implementation by name, with its availability on this machine, the reason and its state."""
    proof = gpu_proof()
    no_cuda, no_cpu, no_triton = cuda_missing(), compiled_for("cpu"), _triton_missing()
    if not no_triton and not torch.cuda.is_available() and not triton_interpreted():
        no_triton = "no GPU is visible to torch (on a CPU it runs only in the interpreter: TRITON_INTERPRET=1)"
    return {
        "cuda": Implementation("cuda", not no_cuda, no_cuda, proof.get("cuda", UNPROVEN)),
        "triton": Implementation("triton", not no_triton, no_triton, proof.get("triton", UNPROVEN)),
        "cpu": Implementation("cpu", not no_cpu, no_cpu, "tested on CPU"),
        "torch": Implementation("torch", True, "", "tested on CPU; plain PyTorch on any device"),
    }


def state_table() -> str:
    """The README's table of implementations in Markdown: what each is and what it has been proven on."""
    proof = gpu_proof()
    states = {
        "cuda": proof.get("cuda", f"{UNPROVEN}; CI runs it in an emulator"),
        "triton": proof.get("triton", f"{UNPROVEN}; CI runs it in Triton's interpreter"),
        "cpu": "tested in CI",
        "torch": "tested in CI",
    }
    rows = [f"| `{name}` | {ABOUT[name]} | {states[name]} |" for name in IMPLEMENTATIONS]
    return "\n".join(["| `impl=` | what it is | state |", "| --- | --- | --- |", *rows])


def require(impl: str, device: torch.device, op: str) -> None:
    """Raise unless the named implementation runs on tensors of this device."""
    if impl == "torch":
        return
    hint = "; run `dlb-fast doctor` for the state of every implementation"
    if impl in ("cpu", "cuda"):
        if device.type != impl:
            raise ValueError(f"{op}: impl={impl!r} needs tensors on a {impl} device, got {device.type}{hint}")
        missing = compiled_for("cpu") if impl == "cpu" else cuda_missing(device.index)
    else:
        missing = triton_missing(device.type)
    if missing:
        raise RuntimeError(f"{op}: impl={impl!r} is not available: {missing}{hint}")


# Kept by `pick`, which is asked once per loss: torch's own look-up takes longer than a small kernel.
_PICKED: dict[tuple[str, torch.device, bool], str] = {}


def pick(impl: str, device: torch.device, beyond_cuda: bool = False, op: str = "dlb_fast") -> str:
    """The implementation to run for ``impl`` on this device; raises where a named one cannot run.

    ``beyond_cuda`` says that the CUDA kernels refuse such a call (float64, sizes): "auto" then takes the next. A choice
    once made stays for the rest of the process.
    """
    key = (impl, device, beyond_cuda)
    choice = _PICKED.get(key)
    if choice is not None:
        return choice
    wished = os.environ.get("DLB_FAST_BACKEND", "auto") if impl == "auto" else impl
    if wished not in ("auto", *IMPLEMENTATIONS):
        name = "DLB_FAST_BACKEND" if impl == "auto" else "impl"
        raise ValueError(f"{op}: {name} must be 'auto' or one of {', '.join(IMPLEMENTATIONS)}, got {wished!r}")
    if wished != "auto":
        require(wished, device, op)
        choice, why = wished, "named"
    elif device.type == "cpu":
        missing = compiled_for("cpu")
        choice, why = ("torch", missing) if missing else ("cpu", "compiled C++")
    elif device.type == "cuda":
        choice, why = _proven(device, beyond_cuda)
    else:
        choice, why = "torch", "no other works here"
    if impl == "auto" and (impl, device, not beyond_cuda) not in _PICKED:
        log.info('dlb_fast: impl="auto" runs %r on %s (%s)', choice, device, why)
    _PICKED[key] = choice
    return choice


def _proven(device: torch.device, beyond_cuda: bool) -> tuple[str, str]:
    """The fastest implementation that is proven on a GPU, and why it is the one."""
    missing = {"cuda": cuda_missing(device.index), "triton": triton_missing(device.type)}
    if beyond_cuda:
        missing["cuda"] = "the CUDA kernels refuse such a call"
    known = gpu_proof()
    usable = [name for name, reason in missing.items() if not reason]
    for name in usable:
        if name in known:
            return name, f"proven on {known[name]}"
    return "torch", f"{' and '.join(usable)} can be named but are {UNPROVEN}" if usable else "no other works here"


def forget_picks() -> None:
    """Decide anew at the next call; for tests that change what is available."""
    _PICKED.clear()


# torch.compiler.assume_constant_result does just this, but imports the whole compiler (a second) to do it.
pick._dynamo_marked_constant = True  # type: ignore[attr-defined]
