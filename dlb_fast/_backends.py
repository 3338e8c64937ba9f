"""Which implementations exist here, which do not and why, and which one ``impl="auto"`` takes.

The rule of choice: the fastest implementation that works on the tensor's device *and* has been seen to work on such a
device. A kernel that has not yet passed ``make gpu-check`` on a GPU is never chosen by ``auto``; it runs when named.
"""

from __future__ import annotations

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
UNPROVEN = "not yet run on a GPU"
ABOUT = {
    "cuda": "CUDA C++, sm_80, sm_90, sm_100 and PTX",
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


def implementations() -> dict[str, Implementation]:
    """Every implementation by name, with its availability on this machine, the reason and its state."""
    proof = gpu_proof()
    no_cuda = compiled_for("cuda")
    if not no_cuda and not torch.cuda.is_available():
        no_cuda = "no CUDA device is visible to torch"
    no_triton = _triton_missing()
    if not no_triton and not torch.cuda.is_available() and not triton_interpreted():
        no_triton = "no GPU is visible to torch (on a CPU it runs only in the interpreter: TRITON_INTERPRET=1)"
    no_cpu = compiled_for("cpu")
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


def require(impl: str, device_type: str, op: str) -> None:
    """Raise unless the named implementation runs on tensors of this device type."""
    if impl == "torch":
        return
    hint = "; run `dlb-fast doctor` for the state of every implementation"
    if impl in ("cpu", "cuda"):
        if device_type != impl:
            raise ValueError(f"{op}: impl={impl!r} needs tensors on a {impl} device, got {device_type}{hint}")
        missing = compiled_for(impl)
    else:
        missing = _triton_missing()
        if not missing and device_type == "cpu" and not triton_interpreted():
            missing = "CPU tensors need Triton's interpreter: set TRITON_INTERPRET=1 before importing triton"
    if missing:
        raise RuntimeError(f"{op}: impl={impl!r} is not available: {missing}{hint}")


# Kept by `pick`, which is asked once per loss: torch's own look-up takes longer than a small kernel.
_PICKED: dict[tuple[str, str], str] = {}


def pick(impl: str, device_type: str, op: str = "dlb_fast") -> str:
    """The implementation to run for ``impl`` on this device type; raises where a named one cannot run."""
    choice = _PICKED.get((impl, device_type))
    if choice is not None:
        return choice
    wished = os.environ.get("DLB_FAST_BACKEND", "auto") if impl == "auto" else impl
    if wished not in ("auto", *IMPLEMENTATIONS):
        name = "DLB_FAST_BACKEND" if impl == "auto" else "impl"
        raise ValueError(f"{op}: {name} must be 'auto' or one of {', '.join(IMPLEMENTATIONS)}, got {wished!r}")
    if wished != "auto":
        require(wished, device_type, op)
        choice, why = wished, "named"
    elif device_type == "cpu":
        missing = compiled_for("cpu")
        choice, why = ("torch", missing) if missing else ("cpu", "compiled C++")
    else:
        known = implementations() if device_type == "cuda" else {}
        usable = [name for name in ("cuda", "triton") if known and known[name].available]
        proven = [name for name in usable if known[name].state != UNPROVEN]
        if proven:
            choice, why = proven[0], f"proven on {known[proven[0]].state}"
        else:
            why = f"{' and '.join(usable)} can be named but are {UNPROVEN}" if usable else "no other works here"
            choice = "torch"
    if impl == "auto":
        log.info('dlb_fast: impl="auto" runs %r on %s (%s)', choice, device_type, why)
    _PICKED[impl, device_type] = choice
    return choice


def forget_picks() -> None:
    """Decide anew at the next call; for tests that change what is available."""
    _PICKED.clear()


# torch.compiler.assume_constant_result does just this, but imports the whole compiler (a second) to do it.
pick._dynamo_marked_constant = True  # type: ignore[attr-defined]
