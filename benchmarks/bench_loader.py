"""Views per second of the overlap loader against the naive sampler and the published scheme, on the same pixels.

    python benchmarks/bench_loader.py --out results.jsonl

One process, rounds interleaved in shuffled order, medians and quartiles. "per core" divides by the CPU seconds of this
process and its workers. JPEGs are made from scikit-learn's photographs in a temporary folder; after the first pass
they lie in the page cache for everybody. Nothing here uses a GPU: the copy to a device is counted in bytes by
arithmetic, not timed (`loader_gpu.py` does that). B8, our loader and the others hand over uint8 (the device normalises)
unless named float32. `others` is the CPU time per second that processes other than the contender's took meanwhile.
That threads, descriptors and memory do not grow over 200 epochs is a test: `tests/test_overlap_loader_lifecycle.py`.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.metadata
import json
import multiprocessing
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from loader_contenders import (
    SEED,
    SIZE,
    Contender,
    Files,
    Halves,
    contenders,
    make_files,
    naive,
    ours,
    pil_open,
    pil_view,
    published,
    running,
)
from loader_resident import compare as compare_resident
from loader_stalls import machine_busy, stalls

from dlb_fast.data import ImageDecoder, ViewRng, train_transform

JPEG = (".jpg", ".jpeg")
_TICKS = os.sysconf("SC_CLK_TCK")
SECTIONS = ("pixels", "stall", "resident", "throughput", "ordinary")


def cpu_seconds() -> float:
    """CPU time of this process and its living workers."""
    total = time.process_time()
    for child in multiprocessing.active_children():
        try:
            fields = Path(f"/proc/{child.pid}/stat").read_text().rsplit(")", 1)[1].split()
            total += (int(fields[11]) + int(fields[12])) / _TICKS
        except OSError:
            continue
    return total


def resident_mb() -> float:
    """Resident memory of this process and its workers, MB (pages they share are counted for each)."""
    pids = ["self", *(str(c.pid) for c in multiprocessing.active_children())]
    pages = 0
    for pid in pids:
        try:
            pages += int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        except OSError:
            continue
    return pages * resource.getpagesize() / 1e6


def measure(contender: Contender, files: Files, half: int, batches: int, warm: int = 5) -> dict[str, float]:
    """One round of one contender: `batches` batches after `warm` ones."""
    gc.collect()
    begun = time.perf_counter()
    with running(contender, files, half) as iterator:
        next(iterator)
        first = time.perf_counter() - begun
        for _ in range(warm):
            next(iterator)
        wall, cpu, busy, views = time.perf_counter(), cpu_seconds(), machine_busy(), 0
        for _ in range(batches):
            views += sum(map(len, next(iterator)))
        wall, cpu, busy = time.perf_counter() - wall, cpu_seconds() - cpu, machine_busy() - busy
        memory = resident_mb()
    return {
        "views_per_s": views / wall,
        "views_per_cpu_s": views / cpu,
        "first_batch_s": first,
        "resident_mb": memory,
        "others": (busy - cpu) / wall,
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else [values[0]] * 3
    return {"median": round(middle, 4), "q25": round(low, 4), "q75": round(high, 4)}


def compare(files: Files, half: int, rounds: int, batches: int, only: str) -> list[dict[str, Any]]:
    """All contenders, interleaved; ratios are taken round by round against anchors A and B of that round."""
    rows: list[dict[str, Any]] = []
    able = []
    for contender in contenders():
        reason = contender.missing()
        if reason:
            rows.append({"what": "throughput", "name": contender.name, "missing": reason})
        elif not only or any(part in contender.name for part in ("A ", "B ", *only.split(","))):
            able.append(contender)
    results: dict[str, list[dict[str, float]]] = {c.name: [] for c in able}
    order = random.Random(0)
    for number in range(rounds):
        for contender in order.sample(able, len(able)):
            results[contender.name].append(measure(contender, files, half, batches))
        print(f"round {number + 1} of {rounds}", file=sys.stderr)
    a, b = able[0].name, able[1].name
    for name, measured in results.items():
        row: dict[str, Any] = {"what": "throughput", "name": name, "rounds": rounds, "batches": batches}
        for key in measured[0]:
            row[key] = spread([m[key] for m in measured])
        for anchor, label in ((a, "over_A"), (b, "over_B")):
            for key, suffix in (("views_per_s", ""), ("views_per_cpu_s", "_per_core")):
                pairs = zip(measured, results[anchor], strict=True)
                row[label + suffix] = spread([mine[key] / theirs[key] for mine, theirs in pairs])
        rows.append(row)
    return rows


def ordinary(files: Files, half: int, rounds: int, batches: int) -> list[dict[str, Any]]:
    """The ordinary loader (mean/std, float32, two threads) against uint8 and against the published scheme with Pillow.

    The consumer takes batches as fast as they come, before and during the timed ones, so what was made ahead is used up
    when the clock starts. Ratios are taken round by round.
    """
    makers = {
        "published two views, DataLoader 2 workers, Pillow, float32": lambda f, h: published(f, h, 2),
        "ours 2 threads, uint8": lambda f, h: ours(f, h, 2, torch.uint8),
        "ours 2 threads, mean/std, float32": lambda f, h: ours(f, h, 2, torch.float32),
    }
    contenders = [Contender(name, make) for name, make in makers.items()]
    rounds_of: dict[str, list[dict[str, float]]] = {name: [] for name in makers}
    order = random.Random(0)
    for number in range(rounds):
        for contender in order.sample(contenders, len(contenders)):
            rounds_of[contender.name].append(measure(contender, files, half, batches, warm=8))
        print(f"round {number + 1} of {rounds}", file=sys.stderr)
    scheme, pixels, floats = rounds_of.values()
    keys = ("views_per_s", "views_per_cpu_s", "others")
    rows: list[dict[str, Any]] = [
        {"what": "ordinary", "name": name, **{key: spread([one[key] for one in found]) for key in keys}}
        for name, found in rounds_of.items()
    ]
    for label, mine, theirs in (
        ("float32 / uint8", floats, pixels),
        ("float32 / published", floats, scheme),
        ("uint8 / published", pixels, scheme),
    ):
        row: dict[str, Any] = {"what": "ordinary", "name": label, "rounds": rounds}
        for key, name in (("views_per_s", "ratio"), ("views_per_cpu_s", "ratio_per_core")):
            row[name] = spread([a[key] / b[key] for a, b in zip(mine, theirs, strict=True)])
        rows.append(row)
    return rows


def second_view(files: Files, rounds: int, count: int = 24) -> dict[str, Any]:
    """Time of one decode with two views over one decode with one, on one thread."""
    decode, transform = ImageDecoder(), train_transform("imagenet", SIZE)
    own = torch.get_num_threads()
    torch.set_num_threads(1)
    ratios = []
    for _ in range(rounds + 1):
        taken = {}
        for views in (1, 2):
            started = time.process_time()
            for i in range(count):
                image = torch.from_numpy(decode(files.read(i % len(files)))).permute(2, 0, 1)
                for use in range(views):
                    transform(image, ViewRng(SEED, 0, i, use))
            taken[views] = time.process_time() - started
        ratios.append(taken[2] / taken[1])
    torch.set_num_threads(own)
    return {"what": "second view", "pair_over_single": spread(ratios[1:]), "decoder": decode.name}


def pixels(files: Files, count: int = 16) -> dict[str, Any]:
    """How far the loader's views are from Pillow's, in grey levels of 255."""
    decode, transform = ImageDecoder(), train_transform("imagenet", SIZE)
    differences = []
    for i in range(min(count, len(files))):
        data = files.read(i)
        image = torch.from_numpy(decode(data)).permute(2, 0, 1)
        for use in (0, 1):
            mine = transform(image, ViewRng(SEED, 0, i, use)).float()
            theirs = pil_view(pil_open(data), ViewRng(SEED, 0, i, use), floats=False).float()
            differences.append((mine - theirs).abs())
    stacked = torch.stack(differences)
    return {"what": "pixels", "mean_difference": round(stacked.mean().item(), 5), "max": stacked.max().item()}


class Counting(Files):
    """Files that count what is read from them."""

    def __init__(self, files: Files) -> None:
        self.paths, self.targets, self.reads, self.bytes = files.paths, files.targets, 0, 0

    def read(self, index: int) -> bytes:
        data = super().read(index)
        self.reads, self.bytes = self.reads + 1, self.bytes + len(data)
        return data


def traffic(files: Files, half: int) -> list[dict[str, Any]]:
    """Reads, decodes and bytes per view of A, B and ours, counted over whole epochs; each read is decoded once."""
    rows = []
    makers: dict[str, Callable[[Files], Iterator[Halves]]] = {
        "A": lambda f: naive(f, half, 0),
        "B": lambda f: published(f, half, 0),
        "ours": lambda f: ours(f, half, 2, torch.uint8),
    }
    pixels = ImageDecoder()(files.read(0)).nbytes
    for name, make in makers.items():
        counted, views = Counting(files), 0
        iterator = make(counted)
        for _ in range(2 * (len(files) // half)):
            views += sum(map(len, next(iterator)))
        iterator.close()  # type: ignore[attr-defined]
        rows.append({
            "what": "traffic", "name": name, "views": views, "decodes_per_view": round(counted.reads / views, 3),
            "bytes_read_per_view": round(counted.bytes / views),
            "bytes_decoded_per_view": round(counted.reads * pixels / views),
        })  # fmt: skip
    return rows


def copied(half: int) -> dict[str, Any]:
    """Bytes to the device in one step: arithmetic from the shapes, nothing is timed."""
    view = 3 * SIZE * SIZE
    return {
        "what": "bytes to the device per step (arithmetic)",
        "ours": 2 * half * view,
        "published": 4 * half * view * 4,  # both two-view stacks, float32
    }


def versions() -> dict[str, str]:
    """Of what decodes and of the other loaders, where they are installed."""
    found = {}
    for name in ("pillow", "simplejpeg", "torchvision", "opencv-python-headless", "torchdata", "spdl", "timm"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def machine() -> dict[str, Any]:
    here = Path(__file__).resolve().parent
    git = ["git", "-C", str(here)]
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    dirty = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True).stdout.strip()
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":", 1)[1].strip() for line in lines if "model name" in line), platform.processor())
    return {
        "what": "machine",
        "commit": commit + ("+changes" if dirty else ""),
        "command": " ".join(["benchmarks/bench_loader.py", *sys.argv[1:]]),
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "load_before": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "decoder": ImageDecoder().name,
        "priority": os.getpriority(os.PRIO_PROCESS, 0),
        "versions": versions(),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run and print; with --out, write one JSON object per line."""
    parser = argparse.ArgumentParser("bench_loader", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", help="JSON lines file to write")
    parser.add_argument("--append", action="store_true", help="add to the file instead of replacing it")
    parser.add_argument("--sections", default=",".join(SECTIONS), help="some of the default, comma separated")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, default=8, help="timed batches per contender and round")
    parser.add_argument("--half", type=int, default=32, help="new samples per batch")
    parser.add_argument("--files", type=int, default=256, help="JPEGs to make, without --images")
    parser.add_argument("--images", help="folder of JPEGs to use instead of made ones (any depth)")
    parser.add_argument("--stall-steps", type=int, default=40, help="steps per load and round")
    parser.add_argument("--loads", default="1.0,1.05,1.1", help="step lengths, in times a batch takes to make")
    parser.add_argument("--only", default="", help="names (parts, comma separated) to run beside anchors A and B")
    options = parser.parse_args(argv)
    sections = options.sections.split(",")
    if unknown := set(sections) - set(SECTIONS):
        parser.error(f"--sections: expected some of {','.join(SECTIONS)}, got {','.join(sorted(unknown))}")
    rows = [machine()]
    with tempfile.TemporaryDirectory() as folder:
        if options.images:
            files = Files(sorted(path for path in Path(options.images).rglob("*") if path.suffix.lower() in JPEG))
        else:
            files = make_files(Path(folder), options.files)
        mean = statistics.fmean(len(files.read(i)) for i in range(len(files)))
        rows.append({"what": "files", "count": len(files), "mean_bytes": round(mean)})
        if "pixels" in sections:
            rows += [pixels(files), second_view(files, options.rounds), copied(options.half)]
            rows += traffic(files, options.half)
        if "stall" in sections:
            loads = [float(load) for load in options.loads.split(",")]
            rows += stalls(files, options.half, options.rounds, options.stall_steps, loads)
        if "resident" in sections:
            rows += compare_resident(options.rounds, cpu_seconds)
        if "ordinary" in sections:
            rows += ordinary(files, options.half, options.rounds, options.batches)
        if "throughput" in sections:
            rows += compare(files, options.half, options.rounds, options.batches, options.only)
    for row in rows:
        print(json.dumps(row))
    if options.out:
        with Path(options.out).open("a" if options.append else "w") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
