"""Every Python with this folder in PYTHONPATH sees a GPU: its tensors are the CPU's, its kernels the C++ ones.

For the rehearsal of `benchmarks.gpu_check`: the commands, tests and benchmarks are the real ones, what they find is
small and slow. A graph replays the operations that were dispatched while it was captured. Not pretended: torch.compile
(it returns what it is given), the profiler (one launch each), Triton but for its tests, and what only a GPU does:
clusters, streams that overlap, memory out of bounds. DLB_FAST_PRETEND says what goes wrong, as a word of `GOES_WRONG`.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from types import SimpleNamespace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

GOES_WRONG = ("", "kernel", "hang", "crash")
WISH = os.environ.get("DLB_FAST_PRETEND", "")
assert WISH in GOES_WRONG, WISH
# It is not fast: whatever waits for a process, or for the end of the tests, has more patience.
wait = subprocess.Popen.wait
subprocess.Popen.wait = lambda self, timeout=None: wait(self, timeout and 30 * timeout)  # type: ignore[method-assign]
os.environ.pop("DLB_FAST_TEST_SECONDS", None)
# What a GPU machine without a network may lack.
ABSENT = "tyro simplejpeg ruff mypy mkdocs mkdocstrings trackio wandb"
sys.modules.update(dict.fromkeys(ABSENT.split()))


def on_cpu(value: Any) -> Any:
    """A device as the CPU, if it is one of this GPU."""
    named = (isinstance(value, str) and value.partition(":")[0] == "cuda") or (
        isinstance(value, torch.device) and value.type == "cuda"
    )
    return "cpu" if named else value


class OnCpu(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.device:
            return func(*args, **kwargs)
        kwargs = {name: on_cpu(value) for name, value in kwargs.items()}
        if func in (torch.Tensor.cuda, torch.Tensor.pin_memory):
            return args[0]
        return func(*map(on_cpu, args), **kwargs)


class Generator(torch.Generator):
    def __new__(cls, device: Any = "cpu") -> Any:
        return super().__new__(cls, "cpu")


class Recorder(TorchDispatchMode):
    def __init__(self, calls: list[Any]) -> None:
        super().__init__()
        self.calls = calls

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out


class Graph:
    """What was dispatched, once more, into the same tensors."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def replay(self) -> None:
        with torch.no_grad():
            for func, args, kwargs, out in self.calls:
                again = func(*args, **kwargs)
                pairs = zip(out, again, strict=True) if isinstance(out, (tuple, list)) else ((out, again),)
                for old, new in pairs:
                    if isinstance(old, torch.Tensor) and old is not new and old.data_ptr() != new.data_ptr():
                        old.copy_(new)


@contextlib.contextmanager
def capture(graph: Graph, *given: Any, **named: Any) -> Any:
    with Recorder(graph.calls):
        yield


class Event:
    def __init__(self, *given: Any, **named: Any) -> None:
        self.time = time.perf_counter()

    def record(self, stream: Any = None) -> None:
        self.time = time.perf_counter()

    def elapsed_time(self, other: Event) -> float:
        return 1e3 * (other.time - self.time)

    def synchronize(self) -> None: ...
    def wait(self, stream: Any = None) -> None: ...


class Stream(Event):
    cuda_stream = 0
    device = torch.device("cuda", 0)

    def wait_stream(self, other: Any) -> None: ...
    def wait_event(self, event: Any) -> None: ...


STREAM = Stream()
PROPERTIES = SimpleNamespace(
    name="Pretended GPU", major=9, minor=0, total_memory=8 << 30, multi_processor_count=132, uuid="0" * 32
)


def giving(value: Any) -> Any:
    """A function that returns this, a new one each time: torch's compiler knows functions by their identity."""
    return lambda *given, **named: value


ANSWERS = {
    "is_available": True, "device_count": 1, "current_device": 0, "get_device_name": PROPERTIES.name,
    "get_device_properties": PROPERTIES, "get_device_capability": (9, 0), "current_stream": STREAM,
    "is_current_stream_capturing": False, "mem_get_info": (1 << 33, 1 << 33), "memory_allocated": 0,
    "max_memory_allocated": 0,
}  # fmt: skip
SILENT = "set_device synchronize empty_cache _sleep reset_peak_memory_stats set_sync_debug_mode manual_seed_all"
vars(torch.cuda).update({name: giving(value) for name, value in ANSWERS.items()})
vars(torch.cuda).update({name: giving(None) for name in SILENT.split()})
vars(torch.cuda).update(Stream=Stream, Event=Event, CUDAGraph=Graph, graph=capture)
vars(torch.cuda).update(dict.fromkeys(("stream", "device"), contextlib.nullcontext))
torch.Generator = Generator  # type: ignore[misc]
torch.compile = lambda function=None, **given: function if function is not None else lambda f: f  # type: ignore
OnCpu().__enter__()

from benchmarks import harness, loss_variants, shapes  # noqa: E402
from dlb_fast import _backends, _proof, ops  # noqa: E402

_backends.card = lambda index: _backends.Card("Pretended GPU", (9, 0), 8 << 30, 132, "0" * 32, 13000)
_backends.cuda_missing = giving("")
_backends.cuda_build = giving((("90",), 13000))
_backends.KERNELS = _backends.LIBRARY  # there need not be nvcc
required = _backends.require
_backends.require = lambda impl, *given: None if impl == "cuda" else required(impl, *given)
says = '{"failed": "off by 7 times"}' if WISH == "kernel" else '{"cases": 2, "of": 2, "worst": 0.5}'
_proof.CUDA_CODE = f"print({says!r})"
_proof.TRITON_CODE = _proof.CUDA_CODE.replace("{", "{{").replace("}", "}}")

if WISH == "kernel":
    right = ops.op_for

    def wrong(impl: str, name: str) -> Any:
        op = right(impl, name)
        return lambda *given: [part * 1.001 if part.is_floating_point() else part for part in op(*given)]

    ops.op_for = wrong

usable = loss_variants.unusable
loss_variants.unusable = lambda impl, device: "it is interpreted" if impl == "triton" else usable(impl, device)
harness.FLUSH, harness.COPIED = 1 << 12, {"cuda": 1 << 20, "cpu": 1 << 20}
shapes.GPU_BANDWIDTH = tuple(shape._replace(rows=4) for shape in shapes.GPU_BANDWIDTH[:2])
shapes.GPU_LAUNCH = tuple(shape._replace(rows=8) for shape in shapes.GPU_LAUNCH)
shapes.LINEAR["cuda"] = (shapes.LinearShape(32, 16, 500, ""),)
counted = []


def launches(works: dict[Any, Any]) -> dict[Any, int]:
    """At the third shape, in the middle of a stage, a process hangs or crashes."""
    counted.append(works)
    if len(counted) == 3 and WISH == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if len(counted) == 3 and WISH == "hang":
        time.sleep(1000)
    return dict.fromkeys(works, 1)


harness.launches, harness.IN_A_GRAPH = launches, 2
all_times = harness.all_times
in_rounds = harness.in_rounds
harness.in_rounds = lambda *given, seconds, **named: in_rounds(*given, seconds=0.01, **named)
harness.all_times = lambda *given, seconds, **named: all_times(*given, seconds=0.01, **named)


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    """With `-p sitecustomize`: what is small of the tests for a GPU alone, and some of those shared with the CPU."""
    # Not where a CUDA kernel has to refuse the CPU's tensors.
    shared = [item for item in items if not re.search("test_gpu.py|test_errors.py|triton", item.nodeid)]
    kept = [*shared[::60], *(item for item in items if "test_gpu.py" in item.nodeid and SMALL.search(item.nodeid))]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


SMALL = re.compile(
    r"regime\[(cuda-\((2|256|64), 10?0?\)|triton-\(2, 1\))|(synchr|one_launch|another|two_capt)\w+\[cuda"
)
