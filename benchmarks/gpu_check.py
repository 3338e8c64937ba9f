"""Everything a GPU has to show, in one command of under nine minutes; last, a table of bars: met, MISSED, not measured.

    make gpu-check PYTHON=python3 VENV=none
    python3 -m benchmarks.gpu_check --out FOLDER --budget 300        where there is no make
    python3 -m benchmarks.gpu_check --only proof loss

Needs torch, triton, numpy, pytest, setuptools, a C++ compiler and nvcc, and no network. The parts run in the order of
what is missed most, each as processes of their own with a limit, and all within a budget: a part that fails, hangs or
is not reached costs what it would have shown, and nothing else. In FOLDER (build/gpu-check) everything is written as
it comes, so that a run may be ended anywhere: <gpu>-<date>.jsonl, the results; <gpu>-<date>.md, the table, after each
part; *-tests.jsonl, the outcome of each test; gpu-check.log. What cannot be written is still in the table.

Exit status: 0, every bar is met; 1, something is wrong or broke; 2, no GPU; 3, nothing is wrong, but not every bar is
met or measured.
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
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch

from dlb_fast import _backends, _proof

from . import bench_linear, gpu_report, harness, shapes
from .harness import SEE_THE_LOG, Bar, as_markdown, judged  # noqa: F401

ROOT = Path(__file__).parent.parent
TIME_OVER, ERRORS_FOUND = 124, 9
BUDGET = 510.0  # seconds for everything
LAST = 10.0  # seconds for a process that has been killed; one that hangs in the driver may never end
SANITIZER = ("compute-sanitizer", "/usr/local/cuda/bin/compute-sanitizer")
# What the CUDA kernels must reach in bfloat16: shares of the copy bandwidth, and microseconds where launches decide.
BAR_SHARE_1000, BAR_SHARE, BAR_WALL_US, BAR_GRAPH_US = 0.85, 0.90, 15.0, 4.0
BAR_FIRST_USE, BAR_NEXT_USE = 2.0, 0.1  # seconds; a process after the first one only reads the verdict
# A file of tests with some for a GPU: marked so, or by implementation.
FOR_A_GPU = re.compile(r"mark\.gpu\b|\bON_GPU\b|^def test_\w+\([^)]*\b(?:impl|kernel|gpu)\b", re.M)


class Check:
    """Runs commands one after the other within one budget, and keeps what they show."""

    def __init__(self, budget: float, out: Path, name: str) -> None:
        self.end, self.over = time.monotonic() + budget, "the time was over"
        self.out, self.results, self.table = out, out / f"{name}.jsonl", out / f"{name}.md"
        self.begun = self.results.stat().st_size if self.results.exists() else 0  # of an earlier run
        self.codes: dict[str, int] = {}
        self.why: dict[str, str] = {}  # by part: why it shows nothing, or not all; "" where it ran to its end
        self.printed: dict[str, list[str]] = {}  # by command: its lines of JSON
        self.scratch = Path(tempfile.mkdtemp(prefix="gpu-check-"))
        self.environment = {
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")])),
            "PYTHONUNBUFFERED": "1",
            "DLB_FAST_CACHE": str(self.scratch / "cache"),  # no verdict of an earlier run
            gpu_report.LOCK: str(self.scratch / "lock"),
        }

    def left(self) -> float:
        """Seconds of the budget that are left."""
        return self.end - time.monotonic()

    def run(self, part: str, name: str, command: Sequence[str], limit: float, **environment: str) -> int:
        """Run a command of a part within its limit and the budget."""
        limit, short = min(limit, self.left()), self.left() < limit
        if limit < 5.0:
            say(f"\n== {name}: left out, {self.over}")
            self.codes[name] = TIME_OVER
            self.why[part] = self.why.get(part) or f"left out, {self.over}"
            return TIME_OVER
        say(f"\n== {name} (at most {limit:.0f} s): {' '.join(command)}")
        start, lines = time.monotonic(), self.printed.setdefault(name, [])
        code = 1
        try:
            with contextlib.ExitStack() as stack:
                log = None
                with contextlib.suppress(OSError):
                    log = stack.enter_context((self.out / "gpu-check.log").open("ab"))
                code = run_logged(command, limit, log, lines, self.environment | environment)
        except OSError as error:  # it could not be started
            say(f"{name}: {error}")
        took = f"after {time.monotonic() - start:.0f} s"
        self.codes[name] = code
        said = "" if code == 0 else f"{name}: ended with exit code {code} {took}"
        if code == TIME_OVER:
            said = f"{name}: cut {took}" + (", the time was over" if short else "")
        self.why[part] = self.why.get(part) or said
        say(f"== {name}: {said or f'done {took}'}; {self.left():.0f} s left")
        return code

    def records(self) -> list[dict[str, Any]]:
        """What this run has measured: the lines of the results file and those that were printed in its place."""
        lines = dict.fromkeys(lines_of(self.results, self.begun))
        for printed in self.printed.values():
            lines |= dict.fromkeys(printed)
        return parsed(lines)

    def tests(self, name: str) -> list[dict[str, Any]]:
        """The outcomes of a run of tests, likewise."""
        command = f"{name} tests"
        return parsed([*lines_of(self.out / f"{name}-tests.jsonl"), *self.printed.get(command, [])])


def say(text: str) -> None:
    """Print; where nobody reads, or the disk is full, go on."""
    with contextlib.suppress(OSError, ValueError):
        print(text, flush=True)


def run_logged(command: Sequence[str], limit: float, log: Any, lines: list[str], environment: dict[str, str]) -> int:
    """The exit status of a command, or 124 when its time was over: then it ends with all that it has started.

    Its output goes to the terminal and to the log, and its lines of JSON to ``lines``; whatever happens there, it is
    read to the end: a process whose output nobody reads hangs.
    """
    process = subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, **environment}, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    sinks = [log, getattr(sys.stdout, "buffer", None)]

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith(b'{"'):
                lines.append(line.decode(errors="replace").strip())
            for sink in filter(None, sinks):
                with contextlib.suppress(OSError, ValueError):
                    sink.write(line)
                    sink.flush()

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        return TIME_OVER
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)  # workers and compilers that it left behind, too
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(LAST)
        reader.join(LAST)
        if process.stdout is not None and not reader.is_alive():
            process.stdout.close()


def lines_of(path: Path, start: int = 0) -> list[str]:
    """The whole lines of a file from a byte on; none where it cannot be read."""
    try:
        with path.open("rb") as file:
            file.seek(start)
            return file.read().decode(errors="replace").splitlines()
    except OSError:
        return []


def parsed(lines: Any) -> list[dict[str, Any]]:
    """The JSON objects among lines, of which the last may have been cut in its middle."""
    found = []
    for line in lines:
        with contextlib.suppress(ValueError):
            record = json.loads(line)
            if isinstance(record, dict):
                found.append(record)
    return found


# The parts, in the order of what is missed most if the time runs out.


def build(check: Check) -> None:
    """The kernels for this machine's GPU. Where a part of it fails, the others show what there is."""
    check.run("build", "build", [sys.executable, "setup.py", "build_ext", "--inplace"], 180, DLB_FAST_BUILD="cuda")


def proof(check: Check) -> None:
    """What `auto` takes: the first process of a machine, and the next."""
    for name in ("first", "next"):
        check.run("proof", f"{name} use", use(check, name), 75)


def cuda_tests(check: Check) -> None:
    """All GPU tests but Triton's."""
    run_tests(check, "tests", "cuda", 150)


def loss(check: Check) -> None:
    """The CUDA kernels beside eager PyTorch: in a process without other kernels, which could break its context."""
    plain = ["--seconds", "0.5", "--limit", "90", "--variants", "cuda", "eager", "official"]
    check.run("loss", "loss", [*bench(check), *plain], 120)


def sanitizer(check: Check) -> None:
    """Addresses, by tests whose tensors are allocations of their own; then races in shared memory, by the prover."""
    tool = next(filter(None, map(shutil.which, SANITIZER)), None)
    if tool is None:
        check.why["sanitizer"] = "compute-sanitizer is not on this machine"
        return
    checked = [tool, "--report-api-errors", "no", "--error-exitcode", str(ERRORS_FOUND)]
    only = ["tests/test_gpu.py", "-k", "every_regime and cuda and float32 and (100 or 1000 or 32000)"]
    # Inside one of the caching allocator's blocks nothing is out of bounds.
    pytest = [*pytest_command(), *only]
    run_pytest(check, "sanitizer", "sanitizer", [*checked, *pytest], 60, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    prover = [sys.executable, "-S", "-I", "-c", _proof.CUDA_CODE, str(_backends.KERNELS), ""]
    check.run("sanitizer", "racecheck", [checked[0], "--tool", "racecheck", *checked[1:], *prover], 40)


def triton(check: Check) -> None:
    """Both proofs anew by the command that users have, then Triton's tests."""
    check.run("doctor", "doctor --prove", [sys.executable, "-m", "dlb_fast", "doctor", "--prove"], 90)
    check.run("doctor", "verdicts", use(check, "later"), 30)
    run_tests(check, "triton", "triton", 120)


def others(check: Check) -> None:
    """What else there is: libraries, where they are installed; then what torch compiles, which takes it a while."""
    short = [*bench(check), "--seconds", "0.4", "--dtypes", "bfloat16", "--classes", "1000", "32000", "--limit"]
    libraries = ["cuda", "triton", "liger", "ce-cuda", "ce-eager", "ce-liger", "ce-quack"]
    check.run("others", "libraries", [*short, "30", "--variants", *libraries], 50)
    check.run("others", "compiled", [*short, "30", "--variants", "cuda", "compile", "compile-ro", "ce-compile"], 60)


def steps(check: Check) -> None:
    """Whole training steps."""
    step = [sys.executable, "-m", "benchmarks.bench_step", "--device", "cuda", "--seconds", "3", "--limit", "30"]
    check.run("steps", "steps", [*step, "--modes", "eager", "--out", str(check.results)], 60)


def linear(check: Check) -> None:
    """The loss from hidden states at a language model's size."""
    short = ["--device", "cuda", "--dtypes", "bfloat16", "--seconds", "5", "--rounds", "3", "--out", str(check.results)]
    check.run("linear", "linear", [sys.executable, "-m", "benchmarks.bench_linear", *short], 75)


def loader(check: Check) -> None:
    """Steps that wait for data."""
    script = [sys.executable, "benchmarks/loader_gpu.py", "--steps", "50", "--out", str(check.results)]
    check.run("loader", "loader", script, 50)


PARTS: dict[str, Callable[[Check], None]] = {
    "build": build, "proof": proof, "tests": cuda_tests, "loss": loss, "sanitizer": sanitizer, "triton": triton,
    "linear": linear, "others": others, "steps": steps, "loader": loader,
}  # fmt: skip


def use(check: Check, name: str) -> list[str]:
    return [sys.executable, "-m", "benchmarks.first_use", "--name", name, "--out", str(check.results)]


def bench(check: Check) -> list[str]:
    return [sys.executable, "-m", "benchmarks.bench_last_batch", "--device", "cuda", "--out", str(check.results)]


def pytest_command() -> list[str]:
    # A warning of this machine's packages is no fault of a kernel.
    plain = ["-q", "-m", "gpu", "-p", "no:cacheprovider", "-p", "benchmarks.gpu_report", "-W", "default"]
    return [sys.executable, "-m", "pytest", *plain, "--continue-on-collection-errors"]


def run_pytest(check: Check, part: str, name: str, command: list[str], limit: float, **environment: str) -> None:
    """Run pytest so that each outcome is written as it comes and the run ends itself in time, with its summary."""
    report = check.out / f"{name}-tests.jsonl"
    with contextlib.suppress(OSError):
        report.unlink(missing_ok=True)
    limit = min(limit, check.left())
    asked = {gpu_report.FILE: str(report), gpu_report.SECONDS: str(max(0.0, limit - 20.0))}
    check.run(part, f"{name} tests", command, limit, **asked, **environment)


def run_tests(check: Check, part: str, name: str, limit: float) -> None:
    """Run the GPU tests of one implementation (and, with cuda, of all that has none)."""
    files = [path for path in sorted((ROOT / "tests").glob("test_*.py")) if FOR_A_GPU.search(path.read_text("utf-8"))]
    command = [*pytest_command(), "-k", "triton" if name == "triton" else "not triton"]
    workers = min(12, (os.cpu_count() or 1) - 2)
    if workers > 1 and importlib.util.find_spec("xdist") is not None:
        command += ["-n", str(workers), "--dist", "worksteal"]
    run_pytest(check, part, name, [*command, *(str(path.relative_to(ROOT)) for path in files)], limit)


# What it says at the end.


def table(records: list[dict[str, Any]]) -> list[str]:
    """Per shape, dtype and variant: device time, its share of the copy bandwidth, graph replay, wall time, launches."""
    rows: dict[tuple[int, int, str, str], dict[str, float]] = {}
    loaders, stepped = [], []
    missing: dict[str, None] = {}
    for r in records:
        if r.get("what") == "loader on a GPU":
            loaders.append(r)
        elif r.get("bench") == "step":
            stepped.append(r)
        elif r.get("bench") == "last_batch":
            name = r["variant"] if r["path"] == "autograd" else f"{r['variant']} grad"
            cell = rows.setdefault((r["classes"], r["rows"], r["dtype"], name), {})
            cell[r["kind"]] = r["median_us"]
            cell["launches"] = r.get("launches", 0)
            if r["kind"] == "device_cold":
                cell["share"] = r["of_copy_bandwidth"]
            missing |= dict.fromkeys(r.get("missing", ()))
    heads = ("device us", "of copy", "graph us", "wall us", "launches")
    lines = [f"{'C':>7} {'rows':>6} {'dtype':>9} {'variant':<20}" + "".join(f"{head:>10}" for head in heads)]
    for (classes, count, dtype, variant), cell in sorted(rows.items()):
        numbers = [cell.get(kind) for kind in ("device_cold", "share", "graph_each", "wall", "launches")]
        forms = (".1f", ".1%", ".1f", ".1f", ".0f")
        shown = ["-" if n is None else format(n, form) for n, form in zip(numbers, forms, strict=True)]
        lines.append(f"{classes:>7} {count:>6} {dtype:>9} {variant:<20}" + "".join(f"{cell:>10}" for cell in shown))
    lines += [f"not measured: {text}" for text in missing]
    for r in stepped:
        ratio = f"{r['ratio']:.4f} [{r['ratio_low']:.4f}, {r['ratio_high']:.4f}] x {r['base']}"
        what = f"{r['model']} {r['mode']:<8}{r['variant']:<10}"
        lines.append(f"step: {what}{r['median_us'] / 1e3:9.2f} ms, {ratio}, peak {r['peak_ratio']:.4f} x")
    return [*lines, *bench_linear.lines(records), *map(loader_line, loaders)]


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


def bars(check: Check) -> list[Bar]:
    """Everything that is asked of a GPU."""
    records, why = check.records(), lambda part: check.why.get(part, "not reached")
    built = check.codes.get("build")
    return [
        judged("build", "", "no error", None if built in (None, TIME_OVER) else built == 0, why("build"), right=True),
        *proof_bars([r for r in records if r.get("bench") == "first use"], why),
        test_bar(check.tests("cuda"), "cuda", why("tests")),
        test_bar(check.tests("triton"), "triton", why("triton")),
        *sanitizer_bars(check, why("sanitizer")),
        *loss_bars([r for r in records if r.get("bench") == "last_batch"], why("loss")),
        *bench_linear.bars(records, "cuda", shapes.LINEAR["cuda"], ["bfloat16"], why("linear")),
    ]


def proof_bars(found: list[dict[str, Any]], why: Callable[[str], str]) -> list[Bar]:
    """The choice of `auto`, the time it takes, and the verdicts."""
    named, lines = {r["name"]: r for r in found}, []
    for which, limit in (("first", BAR_FIRST_USE), ("next", BAR_NEXT_USE)):
        r, name, bar = named.get(which), f"impl=auto, {which} process", f"cuda or triton, <= {limit:g} s"
        if r is None:
            lines.append(judged(name, "-", bar, None, why("proof")))
            continue
        fast = r["auto"] in ("cuda", "triton")
        lines.append(judged(name, f"{r['auto']}, {r['seconds']:.3f} s", bar, fast and r["seconds"] <= limit))
        if not fast:
            lines.append(judged(f"impl=auto, {which} process", r["why"], "a kernel that is right", False, right=True))
    for name in ("cuda", "triton"):
        verdicts = [r["verdicts"][name] for r in found if name in r["verdicts"]]
        known = [v for v in verdicts if v["passed"] is not None]
        value = f"{known[-1]['said']}, {known[-1]['seconds']:.2f} s" if known else "-"
        reason = verdicts[-1]["said"] if verdicts else why("doctor" if name == "triton" else "proof")
        met = known[-1]["passed"] if known else None
        lines.append(judged(f"proof of {name}", value, "passes", met, reason, right=True))
    return lines


def test_bar(outcomes: list[dict[str, Any]], name: str, why: str) -> Bar:
    """Whether there were tests of an implementation, the run came to its end, and every test passed."""
    count = dict.fromkeys(("passed", "failed", "skipped", "not collected"), 0)
    finished, ours, broken = False, 0, []
    for r in outcomes:
        finished = bool(r.get("finished", finished))
        if "test" in r:
            count[r["outcome"]] += 1
            case = r["test"].partition("::")[2]
            ours += r["outcome"] == "passed" and re.search(rf"[\[-]{name}[\]-]", case) is not None
            broken += [r["test"]] if r["outcome"] in ("failed", "not collected") else []
    value = ", ".join(f"{number} {outcome}" for outcome, number in count.items() if number) or "-"
    value += "".join(f"; {test}" for test in broken[:3])
    met = None if not finished or count["not collected"] or not ours else True
    if not finished:
        why = why or "the run did not come to its end"
    elif count["not collected"]:
        why = "not every file could be imported"
    else:
        why = f"no test of {name} ran"
    return judged(f"GPU tests, {name}", value, "all pass", False if count["failed"] else met, why, right=True)


def sanitizer_bars(check: Check, why: str) -> list[Bar]:
    """No bad access in tests that ran, no race in a proof that passed."""
    code, outcomes = check.codes.get("sanitizer tests"), check.tests("sanitizer")
    passed = sum(r.get("outcome") == "passed" for r in outcomes)
    met = False if code == ERRORS_FOUND else True if code == 0 and passed else None
    lines = [judged("compute-sanitizer memcheck", f"{passed} tests", "no error", met, why or "no test ran", right=True)]
    code, verdicts = check.codes.get("racecheck"), parsed(check.printed.get("racecheck", []))
    cases = int(verdicts[-1].get("cases", 0)) if verdicts else 0
    met = False if code == ERRORS_FOUND else True if code == 0 and cases else None
    why = why or (verdicts and str(verdicts[-1])) or "the prover said nothing"
    return [*lines, judged("compute-sanitizer racecheck", f"{cases} cases", "no error", met, why, right=True)]


def loss_bars(records: list[dict[str, Any]], why: str) -> list[Bar]:
    """What our CUDA kernels must reach in bfloat16, each by the first record of its kind: eager ran beside it."""
    first: dict[tuple[Any, ...], dict[str, Any]] = {}
    missing: dict[tuple[int, int], str] = {}
    for r in records:
        if r["dtype"] == "bfloat16":
            first.setdefault((r["variant"], r["classes"], r["rows"], r["path"], r["kind"]), r)
            gone = [text for text in r.get("missing", ()) if text.startswith("cuda (")]
            missing[r["classes"], r["rows"]] = gone[0] if gone else ""

    def line(shape: shapes.Shape, path: str, kind: str, field: str, what: str, form: str, bar: Any, least: bool) -> Bar:
        r = first.get(("cuda", shape.classes, shape.rows, path, kind))
        name = f"{what}, C={shape.classes} rows={shape.rows} {path}"
        told = f"{'>=' if least else '<='} {format(bar, form)}"
        reason = missing.get((shape.classes, shape.rows)) or why
        if r is None or field not in r:
            return judged(name, "-", told, None, reason)
        return judged(name, format(r[field], form), told, r[field] >= bar if least else r[field] <= bar)

    lines = []
    for shape in shapes.GPU_BANDWIDTH:
        share = BAR_SHARE_1000 if shape.classes == 1000 else BAR_SHARE
        lines.append(
            line(shape, "gradient", "device_cold", "of_copy_bandwidth", "of copy bandwidth", ".1%", share, True)
        )
    for shape in shapes.GPU_LAUNCH:
        lines.append(line(shape, "gradient", "wall", "launches", "launches", ".0f", 1, False))
        for path in ("gradient", "autograd"):
            lines.append(line(shape, path, "wall", "median_us", "wall us", ".1f", BAR_WALL_US, False))
            lines.append(line(shape, path, "graph_each", "median_us", "graph replay us", ".1f", BAR_GRAPH_US, False))
    return lines


def status(check: Check, found: list[Bar]) -> int:
    """0, 1 or 3, as above. A command that was cut for time is no fault, one that broke is."""
    broke = [name for name, code in check.codes.items() if code not in (0, TIME_OVER)]
    if broke or any(bar.about_right and bar.verdict == "MISSED" for bar in found):
        return 1
    return 0 if all(bar.verdict == "met" for bar in found) else 3


def stop(*_: object) -> None:
    """SIGTERM is what Ctrl-C is: the command that runs ends, and the table comes."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise KeyboardInterrupt


def main(argv: Sequence[str] | None = None) -> int:
    """Run the parts, write and print what they show; the exit status is told above."""
    parser = argparse.ArgumentParser("gpu_check", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--budget", type=float, default=BUDGET, help=f"seconds for all parts (default: {BUDGET:.0f})")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu-check", help="folder of everything it writes")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=", ".join(PARTS))
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("gpu-check: no CUDA GPU is visible to torch; nothing was checked")
        return 2
    signal.signal(signal.SIGTERM, stop)
    gpu = torch.cuda.get_device_name()
    slug = re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
    out = options.out.resolve()
    with contextlib.suppress(OSError):
        out.mkdir(parents=True, exist_ok=True)
        (out / "gpu-check.log").unlink(missing_ok=True)
    check = Check(options.budget, out, f"{slug}-{date.today().isoformat()}")
    facts = harness.environment("cuda")
    title = f"{gpu}, torch {torch.__version__}, Triton {facts['versions']['triton']}, {facts['date']}, commit "
    title += facts["commit"]
    check.why |= {part: "not asked for" for part in PARTS if part not in options.only}
    for part, run in PARTS.items():
        if part not in options.only:
            continue
        try:
            run(check)
        except KeyboardInterrupt:
            check.end, check.over = time.monotonic(), "interrupted"
            check.why[part] = check.why.get(part) or check.over
            say(f"\n== interrupted in {part}")
        with contextlib.suppress(OSError):
            check.table.write_text(as_markdown(title, bars(check)))
    check.why.setdefault("doctor", check.why.get("triton", ""))
    found = bars(check)
    text = as_markdown(title, found)
    with contextlib.suppress(OSError):
        check.table.write_text(text)
    shutil.rmtree(check.scratch, ignore_errors=True)
    for line in ["", *table(check.records()), "", text, f"in {out}"]:
        say(line)
    return status(check, found)


if __name__ == "__main__":
    sys.exit(main())
