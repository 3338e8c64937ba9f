"""Everything a GPU has to prove, in under nine minutes: tests, compute-sanitizer where present, benchmarks, one table.

    make gpu-check PYTHON=python3 VENV=none
    make gpu-check PYTHON=python3 VENV=none GPU_CHECK="--budget 300 --copy FOLDER"

Needs torch, triton, numpy and pytest, and neither a network nor what only the trainer's command line needs. Writes
benchmarks/results/<gpu>-<date>.jsonl and build/gpu-check/: a log per stage and the outcome of each test. Every stage
has a limit and all of them a budget; what a stage has not reached when its time is over is missing, not wrong, and the
next one runs. With --copy these files go to FOLDER after each stage.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch

from . import gpu_report

ROOT = Path(__file__).parent.parent
LOGS = ROOT / "build" / "gpu-check"
TIME_OVER = 124
BUDGET = 450.0  # seconds from here on; the build before it takes about one minute on 16 cores
# What the CUDA kernels must reach in bfloat16: shares of the copy bandwidth, and microseconds where launches decide.
BAR_SHARE_1000, BAR_SHARE, BAR_WALL_US, BAR_GRAPH_US = 0.85, 0.90, 15.0, 4.0


class Stages:
    """Runs the stages one after the other within one budget, and copies what there is after each of them."""

    def __init__(self, budget: float, results: Path, copy: Path | None) -> None:
        self.end, self.results, self.copy = time.monotonic() + budget, results, copy
        self.codes: dict[str, int] = {}

    def left(self) -> float:
        """Seconds of the budget that are left."""
        return self.end - time.monotonic()

    def run(self, name: str, command: Sequence[str], limit: float, **environment: str) -> int:
        """Run a stage within its limit and the budget; its output goes to the terminal and to its log."""
        limit = min(limit, self.left())
        if limit < 5.0:
            print(f"\n== {name}: left out, the budget is spent", flush=True)
            self.codes[name] = TIME_OVER
            return TIME_OVER
        print(f"\n== {name} (at most {limit:.0f} s): {' '.join(command)}", flush=True)
        start = time.monotonic()
        self.codes[name] = code = run_logged(command, limit, LOGS / f"{name.replace(' ', '-')}.log", environment)
        print(f"== {name}: exit {code} after {time.monotonic() - start:.0f} s, {self.left():.0f} s left", flush=True)
        self.save()
        return code

    def save(self) -> None:
        """Copy the files that exist to the folder that was asked for; a full disk there stops nothing here."""
        if self.copy is not None:
            self.copy.mkdir(parents=True, exist_ok=True)
            for file in (self.results, *LOGS.glob("*-tests.jsonl")):
                with contextlib.suppress(OSError):
                    if file.exists():
                        shutil.copy2(file, self.copy)
            # One file of all logs is easier to carry away than ten.
            with contextlib.suppress(OSError), (self.copy / "gpu-check.log").open("w") as whole:
                for log in sorted(LOGS.glob("*.log"), key=lambda path: path.stat().st_mtime):
                    whole.write(f"==== {log.name}\n{log.read_text(errors='replace')}\n")


def run_logged(command: Sequence[str], limit: float, log: Path, environment: dict[str, str]) -> int:
    """The exit status of a command, or 124 when its time was over: then it ends with all that it has started."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, "PYTHONUNBUFFERED": "1", **environment}, text=True, errors="replace",
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip

        def show() -> None:
            assert process.stdout is not None
            for line in process.stdout:
                file.write(line)
                file.flush()
                print(line, end="", flush=True)

        reader = threading.Thread(target=show, daemon=True)
        reader.start()
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = TIME_OVER
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # workers and compilers that it left behind, too
        process.wait()
        reader.join(5.0)
        if process.stdout is not None and not reader.is_alive():
            process.stdout.close()
    return code


def records(path: Path) -> list[dict[str, Any]]:
    """The JSON lines of a file that may have been cut in the middle of its last line, or not exist."""
    found = []
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return found


def proven(report: Path, name: str) -> bool:
    """Whether an implementation had GPU tests, the run of them came to its end, and all of them passed."""
    outcomes, finished = [], False
    for record in records(report):
        finished = bool(record.get("finished", finished))
        case = record.get("test", "").partition("::")[2]
        if re.search(rf"[\[-]{name}[\]-]", case) and record["outcome"] != "skipped":
            outcomes.append(record["outcome"] == "passed")
    return finished and bool(outcomes) and all(outcomes)


def table(path: Path) -> None:
    """Per shape, dtype and variant: device time, its share of the copy bandwidth, graph replay, wall time, launches."""
    if not path.exists():
        print("no results were written")
        return
    rows: dict[tuple[int, int, str, str], dict[str, float]] = {}
    loader, steps = [], []
    for r in records(path):
        if r.get("what") == "loader on a GPU":
            loader.append(r)
            continue
        if r["bench"] == "step":
            steps.append(r)
            continue
        name = r["variant"] if r["path"] == "autograd" else f"{r['variant']} grad"
        cell = rows.setdefault((r["classes"], r["rows"], r["dtype"], name), {})
        cell[r["kind"]] = r["median_us"]
        cell["launches"] = r.get("launches", 0)
        if r["kind"] == "device_cold":
            cell["share"] = r["of_copy_bandwidth"]
    heads = ("device us", "of copy", "graph us", "wall us", "launches")
    print(f"{'C':>7} {'rows':>6} {'dtype':>9} {'variant':<16}" + "".join(f"{head:>10}" for head in heads))
    for (classes, count, dtype, variant), cell in sorted(rows.items()):
        numbers = [cell.get(kind) for kind in ("device_cold", "share", "graph_each", "wall", "launches")]
        forms = (".1f", ".1%", ".1f", ".1f", ".0f")
        shown = ["-" if n is None else format(n, form) for n, form in zip(numbers, forms, strict=True)]
        print(f"{classes:>7} {count:>6} {dtype:>9} {variant:<16}" + "".join(f"{cell:>10}" for cell in shown))
    for r in steps:
        ratio = f"{r['ratio']:.4f} [{r['ratio_low']:.4f}, {r['ratio_high']:.4f}] x {r['base']}"
        what = f"{r['model']} {r['mode']:<8}{r['variant']:<10}"
        print(f"step: {what}{r['median_us'] / 1e3:9.2f} ms, {ratio}, peak {r['peak_ratio']:.4f} x")
    for r in loader:
        print(loader_line(r))


def loader_line(r: dict[str, Any]) -> str:
    """One result of `loader_gpu.py`: its waits, its copies, or why there is none."""
    if "missing" in r:
        told = f"not measured: {r['missing']}"
    elif "hidden" in r:
        told = f"{r['hidden']:.1%} of {r['copy_ms']:.1f} ms"
    elif "share_of_steps_waiting" in r:
        told = f"{r['share_of_steps_waiting']:.1%} of {r['n']} steps wait (p99 {r['wait_over_step_p99']:.1%} of a step)"
    else:
        told = str(r.get("hardware", ""))
    return f"loader: {r['name']:<36} {told}"


def bars(path: Path) -> list[str]:
    """What our CUDA kernels must reach in bfloat16, each met or missed by the last record of its kind."""
    shapes = {(100, 256): "host", (1000, 512): "host", (1000, 32768): "share"}
    lines = []
    last = {(r["classes"], r["rows"], r["path"], r["kind"]): r for r in records(path) if ours(r)}
    for (classes, rows, way, kind), r in sorted(last.items()):
        small = shapes.get((classes, rows)) == "host"
        name = f"C={classes} rows={rows} {way}"
        if not small and kind == "device_cold" and way == "gradient":
            bar, share = BAR_SHARE_1000 if classes == 1000 else BAR_SHARE, r["of_copy_bandwidth"]
            lines.append(f"{name}: {share:.1%} of the copy bandwidth (bar {bar:.0%}): {verdict(share >= bar)}")
        if small and kind in ("wall", "graph_each"):
            bar, time_us = BAR_WALL_US if kind == "wall" else BAR_GRAPH_US, r["median_us"]
            lines.append(f"{name}: {kind} {time_us:.1f} us (bar {bar:.0f}): {verdict(time_us <= bar)}")
        if small and kind == "wall" and way == "gradient" and "launches" in r:
            lines.append(f"{name}: {r['launches']} launches (bar 1): {verdict(r['launches'] == 1)}")
    return lines


def ours(r: dict[str, Any]) -> bool:
    """Whether a record is one of the CUDA kernels in bfloat16."""
    return r.get("bench") == "last_batch" and r["variant"] == "cuda" and r["dtype"] == "bfloat16"


def verdict(good: bool) -> str:
    """met or missed."""
    return "met" if good else "MISSED"


def test_stage(stages: Stages, name: str, limit: float) -> bool:
    """Run the GPU tests of one implementation (and, with cuda, of all that has none); whether it is proven."""
    report = LOGS / f"{name}-tests.jsonl"
    report.unlink(missing_ok=True)
    limit = min(limit, stages.left())
    # A warning of this machine's packages is no fault of a kernel; a test file that needs an absent one is none either.
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
    command += ["-p", "benchmarks.gpu_report", "-W", "default", "--continue-on-collection-errors"]
    command += ["-k", "triton" if name == "triton" else "not triton"]
    workers = min(12, (os.cpu_count() or 1) - 2)
    if workers > 1 and importlib.util.find_spec("xdist") is not None:
        command += ["-n", str(workers), "--dist", "worksteal"]
    # The run ends itself, with its summary, a while before it would be ended.
    asked = {gpu_report.FILE: str(report), gpu_report.SECONDS: str(limit - 20.0)}
    stages.run(f"{name} tests", command, limit, **asked)
    return proven(report, name)


def main(argv: Sequence[str] | None = None) -> int:
    """Run all stages; 0 when the tests passed and every benchmark ran or was cut by time."""
    parser = argparse.ArgumentParser("gpu_check", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--budget", type=float, default=BUDGET, help=f"seconds for all stages (default: {BUDGET:.0f})")
    parser.add_argument("--copy", type=Path, help="folder that gets results and logs after each stage")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("gpu-check: no CUDA GPU is visible to torch; nothing was checked")
        return 2
    gpu = torch.cuda.get_device_name()
    slug = re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
    results = ROOT / "benchmarks" / "results" / f"{slug}-{date.today().isoformat()}.jsonl"
    for old in LOGS.glob("*"):  # of an earlier run on the same machine
        old.unlink()
    stages, proof = Stages(options.budget, results, options.copy), {"cuda": False, "triton": False}
    bench = [sys.executable, "-m", "benchmarks.bench_last_batch", "--device", "cuda", "--out", str(results)]

    # In the order of what is missed most if the time runs out.
    proof["cuda"] = test_stage(stages, "cuda", 150)
    plain = ["--seconds", "0.5", "--limit", "90", "--variants", "cuda", "triton", "eager", "official"]
    stages.run("loss", [*bench, *plain], 130)
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if sanitizer:
        only = ["tests/test_gpu.py", "-k", "every_regime and cuda and float32 and (100 or 1000 or 32000)"]
        pytest = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "-W", "default", *only]
        # Each tensor an allocation of its own: inside one of the caching allocator's blocks nothing is out of bounds.
        checked = [sanitizer, "--report-api-errors", "no", "--error-exitcode", "9", *pytest]
        stages.run("compute-sanitizer", checked, 60, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    else:
        print("compute-sanitizer is not on this machine: left out")
    proof["triton"] = test_stage(stages, "triton", 130)
    # These write after each shape or model: what time does not allow is missing.
    step = [sys.executable, "-m", "benchmarks.bench_step", "--device", "cuda", "--seconds", "3", "--limit", "30"]
    stages.run("steps", [*step, "--modes", "eager", "--out", str(results)], 60)
    loader = [sys.executable, "benchmarks/loader_gpu.py", "--steps", "50", "--out", str(results)]
    stages.run("loader", loader, 50)
    compiled = ["--variants", "cuda", "compile", "compile-ro", "liger", "--classes", "100", "1000", "32000"]
    stages.run("compiled loss", [*bench, "--seconds", "0.4", "--limit", "40", *compiled, "--dtypes", "bfloat16"], 60)

    print(f"\n{gpu}, torch {torch.__version__}; results in {results.relative_to(ROOT)}, logs in build/gpu-check")
    table(results)
    print("\n".join(["", *bars(results)]))
    for name, good in proof.items():
        print(f"{name}: {'every GPU test passed' if good else f'NOT proven: see build/gpu-check/{name}-tests.jsonl'}")
    cut = [name for name, code in stages.codes.items() if code == TIME_OVER]
    if cut:
        print(f"cut or left out for time: {', '.join(cut)}")
    stages.save()
    may_be_cut = ("compute-sanitizer", "steps", "loader", "compiled loss")
    failed = [n for n, code in stages.codes.items() if code and not (code == TIME_OVER and n in may_be_cut)]
    return int(bool(failed) or not all(proof.values()))


if __name__ == "__main__":
    sys.exit(main())
