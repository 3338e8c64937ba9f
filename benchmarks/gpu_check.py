"""Everything a GPU has to prove, in under ten minutes: tests, compute-sanitizer where present, benchmarks, one table.

    make gpu-check PYTHON=python3 VENV=none

Writes benchmarks/results/<gpu>-<date>.jsonl. When every GPU test of an implementation has passed, it is entered in
dlb_fast/proven_on_gpu.txt, which `impl="auto"`, the doctor and the README's table read.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree
from datetime import date
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent
PROOF = ROOT / "dlb_fast" / "proven_on_gpu.txt"


def run(title: str, command: list[str], limit: float) -> int:
    """Run a step within its time; its output goes to the terminal."""
    print(f"\n== {title}: {' '.join(command)}", flush=True)
    start = time.perf_counter()
    try:
        code = subprocess.run(command, cwd=ROOT, timeout=limit).returncode
    except subprocess.TimeoutExpired:
        code = 124
    print(f"== {title}: exit {code} after {time.perf_counter() - start:.0f} s", flush=True)
    return code


def proven(report: Path) -> dict[str, bool]:
    """Implementation -> whether it had GPU tests and all of them passed."""
    passed: dict[str, list[bool]] = {"cuda": [], "triton": []}
    if report.exists():
        for case in xml.etree.ElementTree.parse(report).iter("testcase"):
            for name in passed:
                if re.search(rf"[\[-]{name}[\]-]", case.get("name", "")) and case.find("skipped") is None:
                    passed[name].append(case.find("failure") is None and case.find("error") is None)
    return {name: bool(results) and all(results) for name, results in passed.items()}


def record(verdict: dict[str, bool], gpu: str) -> None:
    """Rewrite the proof: what passed is entered, what failed is struck out."""
    where = f"tested on {gpu}, torch {torch.__version__}, {date.today().isoformat()}"
    lines = [f"{name}: {where}" for name, good in verdict.items() if good]
    PROOF.write_text("\n".join(lines) + "\n") if lines else PROOF.unlink(missing_ok=True)


def table(path: Path) -> None:
    """Per shape, dtype and variant: device time, its share of the copy bandwidth, graph replay, wall time, launches."""
    if not path.exists():
        print("no results were written")
        return
    rows: dict[tuple[int, int, str, str], dict[str, float]] = {}
    loader, steps = [], []
    for line in path.read_text().splitlines():
        r = json.loads(line)
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
        numbers = [cell.get("device_cold"), cell.get("share"), cell.get("graph"), cell.get("wall"), cell["launches"]]
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


def main() -> int:
    if not torch.cuda.is_available():
        print("gpu-check: no CUDA GPU is visible to torch; nothing was checked")
        return 2
    gpu = torch.cuda.get_device_name()
    slug = re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
    results = ROOT / "benchmarks" / "results" / f"{slug}-{date.today().isoformat()}.jsonl"
    report = ROOT / "build" / "gpu-tests.xml"
    report.parent.mkdir(exist_ok=True)
    report.unlink(missing_ok=True)
    python = sys.executable
    pytest = [python, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
    tests = run("GPU tests", [*pytest, f"--junitxml={report}"], 190)
    verdict = proven(report)
    record(verdict, gpu)
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if sanitizer:
        only = ["tests/test_gpu.py", "-k", "every_regime and float32 and (100 or 1000 or 32000)"]
        clean = run("compute-sanitizer", [sanitizer, "--error-exitcode", "9", *pytest, *only], 70)
    else:
        clean = 0
        print("compute-sanitizer is not on this machine: left out")
    bench = [python, "-m", "benchmarks.bench_last_batch", "--device", "cuda", "--seconds", "0.7", "--out", str(results)]
    benches = run("benchmarks of the loss", bench, 170)
    # It writes after each model and mode: what time does not allow is missing, not wrong.
    steps = [python, "-m", "benchmarks.bench_step", "--device", "cuda", "--seconds", "3", "--limit", "30"]
    stepped = run("benchmarks of whole steps", [*steps, "--out", str(results)], 55)
    loader = run("loader", [python, "benchmarks/loader_gpu.py", "--out", str(results)], 55)
    print(f"\n{gpu}, torch {torch.__version__}; results in {results.relative_to(ROOT)}")
    table(results)
    for name, good in verdict.items():
        print(f"{name}: {'every GPU test passed' if good else 'NOT proven: see the failures above'}")
    return max(tests != 0, clean != 0, benches != 0, stepped not in (0, 124), loader != 0)


if __name__ == "__main__":
    sys.exit(main())
