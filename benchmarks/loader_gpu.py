"""What only a GPU can show of the loaders: steps in which the model waits for data, and copies hidden behind compute.

    python benchmarks/loader_gpu.py --out results.jsonl        (part of `make gpu-check`; under a minute, offline)

The wait of a step is read on the device: the time from the end of one step's work to the start of the next one's, which
holds the loader's own kernels (gather, cast, normalise) and whatever the device stood idle. It counts as waiting above
5 % of the step. The same network on one batch that never changes gives the wait that the host causes without a loader.
A copy is hidden while a kernel runs; kernels less than 20 us apart count as running on (launches, not waits).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from dlb_fast.data import NORMALISATION, OverlapLoader, ResidentLoader, train_transform

ENOUGH, LAUNCH_GAP_US = 0.05, 20.0
Span = tuple[float, float]


def merged(spans: Sequence[Span], gap: float = 0.0) -> list[Span]:
    """The union of time spans, those at most `gap` apart joined."""
    found: list[Span] = []
    for start, end in sorted(spans):
        if found and start <= found[-1][1] + gap:
            found[-1] = (found[-1][0], max(found[-1][1], end))
        else:
            found.append((start, end))
    return found


def hidden(copies: Sequence[Span], kernels: Sequence[Span]) -> float:
    """Share of the copies' time during which the device computes."""
    busy, total, inside = merged(kernels, LAUNCH_GAP_US), 0.0, 0.0
    for start, end in copies:
        total += end - start
        inside += sum(max(0.0, min(end, b) - max(start, a)) for a, b in busy)
    return inside / total


class Marks:
    """Times on the device's clock, or on the host's for a CPU."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"

    def now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, first: Any, second: Any) -> float:
        """Milliseconds."""
        return first.elapsed_time(second) if self._cuda else 1e3 * (second - first)

    def wait(self) -> None:
        if self._cuda:
            torch.cuda.synchronize()


class Training:
    """A network, trained on whatever batches come, in bfloat16 on a GPU."""

    def __init__(self, network: torch.nn.Module, device: torch.device) -> None:
        self.device, self.marks = device, Marks(device)
        self.network = network.to(device, memory_format=torch.channels_last)
        self.optimizer = torch.optim.SGD(self.network.parameters(), lr=1e-3, momentum=0.9)

    def step(self, images: torch.Tensor, targets: torch.Tensor) -> None:
        with torch.autocast(self.device.type, torch.bfloat16):
            loss = F.cross_entropy(self.network(images), targets)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def waits(self, batches: Iterator[Any], warm: int, steps: int) -> dict[str, Any]:
        """Wait and work of `steps` steps after `warm` ones."""
        marks: list[tuple[Any, Any]] = []
        for _ in range(warm + steps):
            batch = next(batches)
            begun = self.marks.now()
            self.step(batch.images, batch.targets)
            marks.append((begun, self.marks.now()))
        self.marks.wait()
        marks = marks[warm - 1 :]
        work = statistics.median(self.marks.between(begun, ended) for begun, ended in marks)
        waits = sorted(self.marks.between(marks[i][1], marks[i + 1][0]) / work for i in range(steps))
        return {
            "n": steps, "step_ms": round(work, 3), "share_of_steps_waiting": sum(w > ENOUGH for w in waits) / steps,
            "wait_over_step_p50": round(statistics.median(waits), 5),
            "wait_over_step_p99": round(waits[min(steps - 1, int(0.99 * steps))], 5),
            "wait_over_step_max": round(waits[-1], 5),
        }  # fmt: skip

    def copies_hidden(self, batches: Iterator[Any], steps: int) -> dict[str, Any]:
        """Share of the host-to-device copies' time behind kernels, from the profiler's device records."""
        if self.device.type != "cuda":
            return {"missing": "nothing is copied on a CPU"}
        from torch.profiler import ProfilerActivity, profile

        self.marks.wait()
        with profile(activities=[ProfilerActivity.CUDA]) as record:
            for _ in range(steps):
                batch = next(batches)
                self.step(batch.images, batch.targets)
            self.marks.wait()
        copies, kernels = [], []
        for event in record.events():
            if event.device_type != torch.autograd.DeviceType.CUDA:
                continue
            span = (event.time_range.start, event.time_range.end)
            name = event.name.lower()
            if "memcpy htod" in name:
                copies.append(span)
            elif not name.startswith(("memcpy", "memset")):
                kernels.append(span)
        last = max((end for _, end in kernels), default=0.0)
        copies = [(start, end) for start, end in copies if end <= last]  # those for steps that are not taken here
        if not copies:
            return {"missing": "the profiler recorded no copies (its device tracing needs CUPTI)"}
        total = sum(end - start for start, end in copies)
        return {"n": steps, "copies": len(copies), "copy_ms": round(total / 1e3, 3), "hidden": hidden(copies, kernels)}


def epochs(loader: Any) -> Iterator[Any]:
    while True:
        yield from loader


def still(batch: Any) -> Iterator[Any]:
    while True:
        yield batch


def jpegs(folder: Path, count: int, size: tuple[int, int] = (500, 375)) -> Any:
    """JPEG files of smooth random fields with some noise, of a photograph's size (about 50 KB); needs Pillow."""
    from PIL import Image

    rng, paths = np.random.default_rng(0), []
    for i in range(count):
        field = Image.fromarray(rng.integers(0, 256, (size[1] // 12, size[0] // 12, 3), dtype=np.uint8))
        pixels = np.asarray(field.resize(size, Image.Resampling.BICUBIC), np.int16)
        pixels = (pixels + rng.integers(-9, 10, pixels.shape, dtype=np.int16)).clip(0, 255).astype(np.uint8)
        paths.append(str(folder / f"{i:05}.jpg"))
        Image.fromarray(pixels).save(paths[-1], "JPEG", quality=90, subsampling=2)
    return _Files(paths)


class _Files:
    def __init__(self, paths: list[str]) -> None:
        self.paths, self.targets = paths, [i % 1000 for i in range(len(paths))]

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, index: int) -> str:
        return self.paths[index]


def resident_rows(device: torch.device, network: torch.nn.Module, batch: int, steps: int) -> list[dict[str, Any]]:
    """A set of CIFAR's shape in the device's memory."""
    mean, std = NORMALISATION["cifar10"]
    images = torch.randint(0, 256, (50_000 if steps > 50 else 500, 3, 32, 32), dtype=torch.uint8)
    data = SimpleNamespace(images=images, targets=torch.arange(len(images)) % 10)
    loader = ResidentLoader(data, batch, transform=train_transform("small", 32), device=device, mean=mean, std=std)
    training, batches = Training(network, device), epochs(loader)
    fixed = training.waits(still(next(batches)), steps // 4 + 1, steps // 2)
    common = {"what": "loader on a GPU", "batch_size": batch, "network": type(network).__name__}
    return [
        common | {"name": "one batch, no loader (32 pixels)"} | fixed,
        common | {"name": "ResidentLoader"} | training.waits(batches, steps // 4 + 1, steps),
    ]


def jpeg_rows(
    device: torch.device, network: torch.nn.Module, batch: int, steps: int, size: int, count: int
) -> list[dict[str, Any]]:
    """JPEG files through `OverlapLoader`, or the reason why not."""
    common = {"what": "loader on a GPU", "batch_size": batch, "network": type(network).__name__}
    try:
        import PIL  # noqa: F401
    except ImportError as error:
        return [common | {"name": "OverlapLoader, JPEG", "missing": f"no JPEG files can be made here: {error}"}]
    mean, std = NORMALISATION["imagenet"]
    with tempfile.TemporaryDirectory() as folder:
        files = jpegs(Path(folder), count)
        transform = train_transform("imagenet", size)
        with OverlapLoader(files, batch, transform=transform, device=device, mean=mean, std=std) as loader:
            training, batches = Training(network, device), epochs(loader)
            next(batches)
            fixed = training.waits(still(next(batches)), steps // 4 + 1, steps // 4 + 1)
            found = training.waits(batches, steps // 4 + 1, steps)
            profiled = training.copies_hidden(batches, min(steps, 12))
            started, views = time.perf_counter(), 0
            for _ in range(steps // 2):
                views += len(next(batches).images)
            training.marks.wait()
            speed = views / (time.perf_counter() - started)
            common = common | {"threads": loader.num_threads}
    return [
        common | {"name": f"one batch, no loader ({size} pixels)"} | fixed,
        common | {"name": "OverlapLoader, JPEG", "views_per_s_alone": round(speed)} | found,
        common | {"name": "copies to the device behind kernels"} | profiled,
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Run and print; without a GPU one line that says so."""
    parser = argparse.ArgumentParser("loader_gpu", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", help="JSON lines file to append to")
    parser.add_argument("--device", default="cuda", help="cpu runs the same code for a test of it: no figures")
    parser.add_argument("--steps", type=int, default=100)
    options = parser.parse_args(argv)
    device = torch.device(options.device)
    makers: list[Callable[[], list[dict[str, Any]]]] = []
    rows: list[dict[str, Any]] = [{
        "what": "loader on a GPU", "name": "machine", "command": " ".join(["benchmarks/loader_gpu.py", *sys.argv[1:]]),
        "hardware": torch.cuda.get_device_name() if device.type == "cuda" and torch.cuda.is_available() else "cpu",
        "cores": os.cpu_count(), "python": platform.python_version(), "torch": torch.__version__,
    }]  # fmt: skip
    if device.type == "cuda" and not torch.cuda.is_available():
        rows[0]["missing"] = "no CUDA GPU is visible to torch"
    else:
        from dlb_fast.train.models import create_model

        torch.backends.cudnn.benchmark = True
        small, steps = device.type == "cpu", options.steps
        makers = [
            lambda: resident_rows(
                device, create_model("small_cnn" if small else "resnet18", 10), 16 if small else 512, 2 * steps
            ),
            lambda: jpeg_rows(
                device, create_model("small_cnn" if small else "resnet50", 1000), 8 if small else 256, steps,
                32 if small else 224, 32 if small else 768,
            ),
        ]  # fmt: skip

    def show(rows: list[dict[str, Any]]) -> None:
        """Printed and written at once: what comes later may be cut."""
        for row in rows:
            print(json.dumps(row), flush=True)
        if options.out:
            with Path(options.out).open("a") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)

    show(rows)
    for make in makers:
        show(make())
    return 0


if __name__ == "__main__":
    sys.exit(main())
