"""Which implementations exist here, which do not and why, and which one ``impl="auto"`` takes.

The rule of choice: the fastest implementation that works on the tensor's device *and* has been seen to be right there.
For a GPU, ``_proof`` looks at first use. A kernel that is wrong or not checked is never chosen by ``auto``; it runs
when named.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import importlib.util
import logging
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ._args import IMPLEMENTATIONS
from ._version import __version__

log = logging.getLogger("dlb_fast")

LIBRARY = Path(__file__).parent / "lib" / "libdlb_fast_ops.so"
KERNELS = LIBRARY.with_name("libdlb_fast_kernels.so")  # the CUDA kernels, without torch
CHECKED = "checked on your GPU at first use"
ABOUT = {
    "cuda": "CUDA C++, sm_75 to sm_120 and PTX",
    "triton": "Triton, for NVIDIA, AMD and Intel GPUs",
    "cpu": "C++ for AVX-512, AVX2 or any CPU, one file for torch 2.10 and newer",
    "torch": "plain PyTorch on any device: the definition",
}


class Implementation(NamedTuple):
    """One way to compute the losses: ``reason`` says why it is missing, ``state`` how it is known to be right."""

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
        if torch.version.cuda is None:
            return f"the library was built without CUDA, because torch {torch.__version__} is"
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


def card(index: int | None) -> Card:
    """The GPU that torch calls ``cuda:index``; None: the current one. Legal while a graph is captured."""
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
        built = "" if torch.version.cuda else ", which is built without CUDA; install a CUDA build of torch"
        return f"no CUDA device is visible to torch{built}"
    found = card(index)
    archs, runtime = cuda_build()
    if found.driver // 1000 < runtime // 1000:
        return (
            f"the kernels are built with CUDA {runtime // 1000}, the driver supports CUDA {as_text(found.driver)}; "
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
            f"{as_text(runtime)}, the driver compiles that of CUDA {as_text(found.driver)}; update it, or {wanted}"
        )
    return ""


def as_text(number: int) -> str:
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


def triton_missing(device_type: str) -> str:
    """Why Triton's kernels cannot run on tensors of this device type, or an empty string."""
    missing = _triton_missing()
    if not missing and device_type == "cpu" and not triton_interpreted():
        missing = "CPU tensors need Triton's interpreter: set TRITON_INTERPRET=1 before importing triton"
    return missing


def implementations() -> dict[str, Implementation]:
    """Every implementation by name, with its availability on this machine, the reason and its state."""
    no_cuda, no_cpu, no_triton = cuda_missing(), compiled_for("cpu"), _triton_missing()
    if not no_triton and not torch.cuda.is_available() and not triton_interpreted():
        no_triton = "no GPU is visible to torch (on a CPU it runs only in the interpreter: TRITON_INTERPRET=1)"
    return {
        "cuda": Implementation("cuda", not no_cuda, no_cuda, CHECKED),
        "triton": Implementation("triton", not no_triton, no_triton, CHECKED),
        "cpu": Implementation("cpu", not no_cpu, no_cpu, "tested on CPU"),
        "torch": Implementation("torch", True, "", "tested on CPU; plain PyTorch on any device"),
    }


def state_table() -> str:
    """The README's table of implementations in Markdown: what each is and how it is known to be right."""
    states = {
        "cuda": f"{CHECKED}; CI runs its PTX on the CPU",
        "triton": f"{CHECKED}; CI runs it in Triton's interpreter, and its PTX on the CPU",
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
    once made stays for the rest of the process. Legal while a graph is captured: a check runs in a child process.
    """
    key = (impl, device, beyond_cuda)
    choice = _PICKED.get(key)
    if choice is not None:
        return choice
    other = _PICKED.get((impl, device, not beyond_cuda))  # what is told once is not told twice
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
        choice, why, wrong = proven(device, beyond_cuda)
        for problem in () if other else wrong:
            log.warning('dlb_fast: %s; impl="auto" runs %r on %s', problem, choice, device)
    else:
        choice, why = "torch", "no other works here"
    if impl == "auto" and choice != other:
        log.info('dlb_fast: impl="auto" runs %r on %s (%s)', choice, device, why)
    _PICKED[key] = choice
    return choice


def proven(device: torch.device, beyond_cuda: bool = False, check: bool = True) -> tuple[str, str, list[str]]:
    """The fastest implementation that is proven on a GPU, why it is the one, and what is wrong with others.

    What has no verdict yet is checked, with ``check``; Triton, which has to compile, only where CUDA cannot run or is
    wrong.
    """
    from . import _proof

    wished = _proof.setting()
    if wished == "never":
        return "torch", "DLB_FAST_PROOF=never", []
    reasons: list[str] = []
    wrong: list[str] = []
    for name, missing in (("cuda", cuda_missing(device.index)), ("triton", triton_missing(device.type))):
        if name == "cuda" and beyond_cuda and not missing:
            missing, check = "the kernels refuse float64 and more than 2^24 rows or classes", False
        if missing:
            reasons.append(f"{name}: {missing}")
        elif wished == "trust":
            return name, "not checked: DLB_FAST_PROOF=trust", wrong
        else:
            model, found = card(device.index).name, verdict(name, device.index, check, again=wished == "again")
            if found.passed:
                return name, f"{model}, {found}", wrong
            reasons.append(f"{name}: {found}")
            if found.passed is False:
                wrong.append(f"the {name} kernels are wrong on {model}: {found} (DLB_FAST_PROOF=again checks anew)")
            elif check:
                wrong.append(f"the {name} kernels could not be checked: {found} (`dlb-fast doctor --prove` does it)")
                break
    return "torch", "; ".join(reasons), wrong


def verdict(name: str, index: int | None, check: bool, again: bool = False) -> Any:
    """The verdict on "cuda" or "triton" on ``cuda:index``; without ``check`` only one that is known."""
    from . import _proof

    found = card(index)
    uuid = found.uuid.removeprefix("GPU-").replace("-", "")
    versions = (__version__, torch.__version__, torch.version.hip, found.driver, _driver(), found[:4])
    if name == "cuda":
        key = _proof.key_of(name, _digest(KERNELS), *versions)
        command = [sys.executable, "-S", "-I", "-c", _proof.CUDA_CODE, str(KERNELS), uuid]
    else:
        kernels = [_digest(path) for path in sorted((Path(__file__).parent / "kernels").glob("*.py"))]
        settings = sorted(item for item in os.environ.items() if item[0].startswith("TRITON_"))
        spec = importlib.util.find_spec("triton")
        compiler = _digest(Path(spec.origin)) if spec is not None and spec.origin else ""  # its version stands there
        key = _proof.key_of(name, kernels, compiler, settings, *versions)
        command = [sys.executable, "-c", _proof.TRITON_CODE.format(path=sys.path, uuid=found.uuid)]
    old = _proof.known(key)
    if not check or (old is not None and not again):
        return old or _proof.Verdict(None, "not checked here yet; `dlb-fast doctor --prove` does it")
    if name == "triton":
        log.info("dlb_fast: checking Triton's kernels on %s, which compiles them once: about half a minute", found.name)
    return _proof.verdict(name, key, command, uuid, again)


@functools.cache
def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@functools.cache
def _driver() -> str:
    """The version of the GPU's driver, as the kernel tells it; that of CUDA's API does not change with every one."""
    for path in ("/proc/driver/nvidia/version", "/sys/module/amdgpu/version"):
        with contextlib.suppress(OSError):
            return Path(path).read_text()
    return ""


def forget_picks() -> None:
    """Decide anew at the next call; for tests that change what is available."""
    _PICKED.clear()


# torch.compiler.assume_constant_result does just this, but imports the whole compiler (a second) to do it.
pick._dynamo_marked_constant = True  # type: ignore[attr-defined]
