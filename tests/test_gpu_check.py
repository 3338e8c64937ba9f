"""The run on a GPU, without one: what it proves, what it does when time runs out, what it needs of the machine."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from builders import PATIENCE, ROOT, python, wait_for

from benchmarks import bench_last_batch, gpu_check, gpu_report, harness, shapes

pytestmark = pytest.mark.slow  # guards the benchmarks, not the package


def written(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


CASES = {
    "all passed": ("passed", {"finished": True}, "met"),
    "one failed": ("failed", {"finished": True}, "MISSED"),
    "one failed, then killed": ("failed", {}, "MISSED"),
    "skipped only": ("skipped", {"finished": True}, "not measured: no test of cuda ran"),
    "one not collected": ("not collected", {"finished": True}, "not measured: not every file could be imported"),
    "time was over": ("passed", {"finished": False}, "not measured: the run did not come to its end"),
    "killed": ("passed", {}, "not measured: the run did not come to its end"),
}


@pytest.mark.parametrize("name", CASES)
def test_tests_pass_when_every_one_of_a_whole_run_does(name):
    outcome, end, want = CASES[name]
    tests = [("test_a[cuda-8]", outcome), ("test_b[8-triton]", "passed"), ("test_c[cpu]", "passed")]
    outcomes = [*({"test": f"f.py::{case}", "outcome": o} for case, o in tests), end]
    bar = gpu_check.test_bar(outcomes, "cuda", "")
    assert bar.verdict == want and bar.about_right
    if outcome in ("failed", "not collected"):
        assert f"1 {outcome}; f.py::test_a[cuda-8]" in bar.value
    if outcome in ("passed", "skipped"):
        assert gpu_check.test_bar(outcomes, "triton", "").verdict == ("met" if end.get("finished") else want)


def test_without_outcomes_nothing_is_measured():
    assert gpu_check.test_bar([], "cuda", "not reached").verdict == "not measured: not reached"


TESTS = """
import pytest

@pytest.mark.parametrize("impl", ["cuda", "triton"])
def test_a(impl): assert impl != "triton"
@pytest.mark.parametrize("n", range(40))
def test_b(n): pass
"""


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("seconds", ["1000", "0"])
def test_outcomes_are_written_as_they_come_and_the_run_ends_in_time(tmp_path, workers, seconds):
    if workers:
        pytest.importorskip("xdist")
    (tmp_path / "test_it.py").write_text(TESTS)
    (tmp_path / "test_absent.py").write_text("import no_such_package")
    report = tmp_path / "report.jsonl"
    command = ["-m", "pytest", "-q", "-p", "benchmarks.gpu_report", "-p", "no:cacheprovider"]
    command += ["-n", workers] if workers else []
    command += ["--continue-on-collection-errors", tmp_path]
    python(*command, cwd=tmp_path, check=False, **{gpu_report.FILE: str(report), gpu_report.SECONDS: seconds})
    found = gpu_check.parsed(gpu_check.lines_of(report))
    outcomes = {r["test"].partition("::")[2]: r["outcome"] for r in found if "test" in r}
    assert "not collected" in outcomes.values()  # and the others ran
    if seconds == "1000":
        assert (outcomes["test_a[cuda]"], outcomes["test_a[triton]"]) == ("passed", "failed") and len(outcomes) == 43
        assert found[-1]["finished"]
    else:
        assert 0 < len(outcomes) < 43 and not found[-1]["finished"]


ALONE = """
import os, time, pytest

def running(count):
    with open(os.environ["RUNNING"], "a") as file: file.write(count)
@pytest.mark.parametrize("n", range(6))
def test_beside(n): running("("); time.sleep(0.2); running(")")
@pytest.mark.alone
@pytest.mark.parametrize("n", range(2))
def test_alone(n): running("["); time.sleep(0.2); running("]")
"""


def test_nothing_runs_beside_a_test_marked_alone(tmp_path):
    pytest.importorskip("xdist")
    (tmp_path / "test_it.py").write_text(ALONE)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = alone")
    command = ["-m", "pytest", "-q", "-p", "benchmarks.gpu_report", "-p", "no:cacheprovider", "-n", "3", tmp_path]
    python(*command, cwd=tmp_path, RUNNING=str(tmp_path / "running"), **{gpu_report.LOCK: str(tmp_path / "lock")})
    marks = (tmp_path / "running").read_text()
    assert marks.count("[]") == 2 and marks.count("(") == 6
    for before in marks.split("[]")[:-1]:
        assert before.count("(") == before.count(")")


@pytest.fixture
def check(tmp_path, monkeypatch) -> gpu_check.Check:
    monkeypatch.setattr(gpu_check, "LAST", 5.0)
    return gpu_check.Check(1000.0, tmp_path, "gpu-2026-01-01")


def test_a_command_that_overruns_ends_with_what_it_started(check, tmp_path):
    code = check.run("part", "name", ["sh", "-c", "sleep 1000 & echo $!; wait"], 6.0)
    assert code == gpu_check.TIME_OVER and check.why["part"].startswith("name: cut after ")
    stat = Path(f"/proc/{int((tmp_path / 'gpu-check.log').read_text())}/stat")

    def gone():
        try:
            return stat.read_text().rpartition(")")[2].split()[0] == "Z"
        except (FileNotFoundError, ProcessLookupError):
            return True

    wait_for(gone, "the end of what the command started")


def test_how_commands_end_is_told_by_part(check, capfd):
    assert check.run("a", "one", ["sh", "-c", "echo here; echo '{\"bench\": 1}'; exit 3"], 500.0) == 3
    assert check.run("a", "two", ["true"], 500.0) == 0 and check.run("b", "three", ["true"], 500.0) == 0
    assert check.run("c", "four", ["no-such-command"], 500.0) == 1
    check.end = 0.0
    assert check.run("d", "five", ["false"], 500.0) == gpu_check.TIME_OVER
    assert check.codes == {"one": 3, "two": 0, "three": 0, "four": 1, "five": gpu_check.TIME_OVER}
    assert check.why["a"].startswith("one: ended with exit code 3") and check.why["b"] == ""
    assert "exit code 1" in check.why["c"] and check.why["d"] == "left out, the time was over"
    assert check.records() == [{"bench": 1}]
    assert (check.out / "gpu-check.log").read_text() == 'here\n{"bench": 1}\n'


def test_output_that_cannot_be_kept_is_read_to_its_end(check, monkeypatch):
    """A full disk under the log and a terminal that is gone: the command must not wait for ever for its reader."""
    (check.out / "gpu-check.log").symlink_to("/dev/full")
    with contextlib.suppress(OSError), open("/dev/full", "w") as full:  # it fails once more when it is closed
        monkeypatch.setattr(sys, "stdout", full)
        many = ["sh", "-c", "head -c 300000 /dev/zero | tr '\\0' x; echo; echo '{\"bench\": 2}'"]
        assert check.run("a", "one", many, 60.0) == 0
        monkeypatch.undo()
    assert check.records() == [{"bench": 2}]


def test_records_of_an_earlier_run_do_not_count(tmp_path):
    written(tmp_path / "name.jsonl", [{"bench": "old"}])
    check = gpu_check.Check(1.0, tmp_path, "name")
    harness.write(check.results, [{"bench": "new"}])
    with check.results.open("a") as file:
        file.write('{"cut in the mid')
    check.printed["x"] = ['{"bench": "new"}', '{"bench": "printed"}']
    assert [r["bench"] for r in check.records()] == ["new", "printed"]


def loss(classes, rows, kind, path, **numbers):
    names = {"bench": "last_batch", "variant": "cuda", "dtype": "bfloat16", "classes": classes, "rows": rows}
    return {**names, "kind": kind, "path": path, "launches": 1, "of_copy_bandwidth": 0.88, "median_us": 9.0, **numbers}


def test_the_bars_are_read_from_the_results():
    fp32 = {**loss(100, 256, "graph_each", "gradient"), "dtype": "float32"}
    found = gpu_check.loss_bars([
        loss(1000, 32768, "device_cold", "gradient"), loss(32000, 8192, "device_cold", "gradient"),
        loss(1000, 512, "wall", "gradient"), loss(1000, 512, "graph_each", "gradient"),
        loss(100, 256, "wall", "autograd", median_us=15.1), loss(100, 256, "wall", "gradient", launches=2), fp32,
        loss(1000, 512, "wall", "gradient", median_us=99.0),
        {**loss(8192, 32768, "wall", "gradient"), "variant": "eager", "missing": ["cuda (no nvcc)"]},
    ], "the reason")  # fmt: skip
    lines = {bar.what: " ".join(bar[1:4]) for bar in found}
    assert lines["of copy bandwidth, C=1000 rows=32768 gradient"] == "88.0% >= 85.0% met"
    assert lines["of copy bandwidth, C=32000 rows=8192 gradient"] == "88.0% >= 90.0% MISSED"
    assert lines["of copy bandwidth, C=8192 rows=32768 gradient"] == "- >= 90.0% not measured: cuda (no nvcc)"
    assert lines["wall us, C=1000 rows=512 gradient"] == "9.0 <= 15.0 met"  # beside eager, the first time
    assert lines["graph replay us, C=1000 rows=512 gradient"] == "9.0 <= 4.0 MISSED"
    assert lines["graph replay us, C=100 rows=256 gradient"] == "- <= 4.0 not measured: the reason"
    assert lines["wall us, C=100 rows=256 autograd"] == "15.1 <= 15.0 MISSED"
    assert lines["launches, C=100 rows=256 gradient"] == "2 <= 1 MISSED"
    assert len(found) == len(lines) == 5 + 2 * 5


def use(name: str, auto: str, seconds: float, **passed: Any) -> dict[str, Any]:
    verdicts = {key: {"passed": value, "said": f"{key} said", "seconds": 0.5} for key, value in passed.items()}
    return {"name": name, "auto": auto, "seconds": seconds, "why": "the reason", "verdicts": verdicts}


USES: dict[str, tuple[list[dict[str, Any]], list[str]]] = {
    "right and fast": ([use("first", "cuda", 1.9, cuda=True), use("next", "cuda", 0.01, cuda=True),
                        use("later", "cuda", 0.01, cuda=True, triton=True)], ["met"] * 4),
    "slow": ([use("first", "cuda", 2.1, cuda=True), use("next", "cuda", 0.2, cuda=True)],
             ["MISSED", "MISSED", "met", "not measured: doctor"]),
    "wrong": ([use("first", "torch", 0.5, cuda=False)], ["MISSED", "MISSED", "not measured: proof", "MISSED",
                                                          "not measured: doctor"]),
    "undecided": ([use("later", "torch", 0.5, cuda=None, triton=None)],
                  ["not measured: proof"] * 2 + ["not measured: cuda said", "not measured: triton said"]),
    "nothing": ([], ["not measured: proof"] * 3 + ["not measured: doctor"]),
}  # fmt: skip


@pytest.mark.parametrize("name", USES)
def test_the_bars_of_the_proof(name):
    found, want = USES[name]
    assert [bar.verdict for bar in gpu_check.proof_bars(found, lambda part: part)] == want


SANITIZED: dict[str, tuple[dict[str, int], str, str, list[str]]] = {
    "fine": ({"sanitizer tests": 0, "racecheck": 0}, "passed", '{"cases": 72, "of": 72}', ["met", "met"]),
    "errors": ({"sanitizer tests": 9, "racecheck": 9}, "failed", '{"cases": 72}', ["MISSED", "MISSED"]),
    "skipped": ({"sanitizer tests": 0, "racecheck": 0}, "skipped", '{"undecided": "no GPU"}',
                ["not measured: no test ran", "not measured: {'undecided': 'no GPU'}"]),
    "refused": ({"sanitizer tests": 255, "racecheck": 255}, "", "", ["not measured: no test ran",
                                                                     "not measured: the prover said nothing"]),
}  # fmt: skip


@pytest.mark.parametrize("name", SANITIZED)
def test_the_bars_of_the_sanitizer_need_something_that_ran(name, check):
    check.codes, outcome, said, want = SANITIZED[name]
    check.printed["racecheck"] = [said]
    if outcome:
        written(check.out / "sanitizer-tests.jsonl", [{"test": "f.py::t", "outcome": outcome}])
    assert [bar.verdict for bar in gpu_check.sanitizer_bars(check, "")] == want


def test_the_exit_status(check):
    slow, wrong = gpu_check.judged("a", "", "", False), gpu_check.judged("b", "", "", False, right=True)
    fine, gone = gpu_check.judged("c", "", "", True), gpu_check.judged("d", "", "", None, "x", right=True)
    status = [gpu_check.status(check, found) for found in ([fine], [fine, slow], [fine, gone], [slow, wrong])]
    assert status == [0, 3, 3, 1]
    check.codes = {"cut": gpu_check.TIME_OVER}
    assert gpu_check.status(check, [fine]) == 0
    check.codes["crashed"] = -11
    assert gpu_check.status(check, [fine]) == 1


def test_every_file_with_tests_for_a_gpu_is_run():
    """By its text, as the check decides; every test that a GPU adds comes from one of these names."""
    files = {path.name: path.read_text() for path in (ROOT / "tests").glob("test_*.py")}
    chosen = {name for name, text in files.items() if gpu_check.FOR_A_GPU.search(text)}
    assert {"test_gpu.py", "test_last_batch.py", "test_mix.py", "test_methods.py", "test_resident.py"} <= chosen
    assert not {"test_cli.py", "test_integrations_timm.py", "test_loader_copies.py"} & chosen
    for code in ("def test_a(impl):", "def test_a(x, kernel, y):", "@pytest.mark.gpu", "def test_a(\n    impl: str,"):
        assert gpu_check.FOR_A_GPU.search(f"x\n{code}")


def test_kernels_are_counted_between_the_marks():
    spin = "at::cuda::(anonymous namespace)::spin_kernel(long)"
    events = [(5.0, "resident_kernel"), (1.0, spin), (4.0, spin), (2.0, "add"), (3.0, "Memcpy DtoH (Device -> Pinned)")]
    assert harness.kernels_between_marks([*events, (6.0, spin), (7.0, "Memset (Device)")]) == [1, 1, 1]


def test_a_shape_that_fails_leaves_the_others(tmp_path, monkeypatch, capsys):
    measured = []

    def measure(shape, dtype_name, args, roof):
        measured.append(shape.classes)
        if shape.classes == 1000:
            raise MemoryError("too large")
        return [{"bench": "last_batch", "classes": shape.classes, "wrong": []}]

    monkeypatch.setattr(bench_last_batch, "measure", measure)
    monkeypatch.setattr(bench_last_batch, "report", lambda records: None)
    monkeypatch.setattr(harness, "copy_bandwidth", lambda device, seconds: 1e9)
    out = tmp_path / "out.jsonl"
    monkeypatch.setattr(sys, "argv", ["bench", "--device", "cpu", "--dtypes", "float32", "--out", str(out)])
    with pytest.raises(SystemExit, match="failed at 256 x 1000 float32"):
        bench_last_batch.main()
    assert measured == [shape.classes for shape in shapes.CPU]
    assert [r["classes"] for r in gpu_check.parsed(gpu_check.lines_of(out))] == [100, 21843]
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--limit", "-1"])
    bench_last_batch.main()
    assert len(measured) == 3 and "left out, -1 s are over" in capsys.readouterr().out


ABSENT = "tyro simplejpeg ruff mypy mkdocs mkdocstrings trackio wandb"


def test_what_it_imports_is_on_a_gpu_machine():
    """torch, triton, numpy and pytest: nothing of the trainer's command line, nothing else that pip brings."""
    names = ABSENT.split()
    code = f"import sys; sys.modules.update(dict.fromkeys({names!r})); "
    code += "import benchmarks.gpu_check, benchmarks.bench_last_batch, benchmarks.bench_linear, benchmarks.bench_step; "
    code += "from dlb_fast.train.loop import Trainer; from dlb_fast.train.config import TrainConfig; TrainConfig()"
    python("-c", code)


# The whole script from end to end, on a GPU that is pretended in every process.

PRETENDED = ROOT / "tests" / "pretended_gpu"
TOOL = """#!/bin/sh
while [ $# -gt 0 ]; do
  case $1 in
    --tool | --report-api-errors | --error-exitcode) shift 2 ;;
    *) exec "$@" ;;
  esac
done
"""


@pytest.fixture
def pretended(tmp_path) -> Callable[..., subprocess.Popen[str]]:
    """Start the check; each of its processes runs where `sitecustomize` pretends the GPU."""
    tool = tmp_path / "bin" / "compute-sanitizer"
    tool.parent.mkdir()
    tool.write_text(TOOL)
    tool.chmod(0o755)

    def start(*parts: str, wrong: str = "") -> subprocess.Popen[str]:
        environment = {
            **os.environ, "PYTHONPATH": f"{PRETENDED}{os.pathsep}{ROOT}", "PYTEST_ADDOPTS": "-p sitecustomize",
            "PATH": f"{tool.parent}{os.pathsep}{os.environ['PATH']}", "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1",
            "DLB_FAST_PRETEND": wrong, "DLB_FAST_PROOF": "", "DLB_FAST_BACKEND": "auto",
        }  # fmt: skip
        command = [sys.executable, "-m", "benchmarks.gpu_check", "--out", str(tmp_path / "out")]
        command += ["--budget", str(10 * PATIENCE)]
        pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen([*command, "--only", *parts], cwd=tmp_path, env=environment, **pipes)

    return start


def rows(text: str) -> dict[str, list[str]]:
    """The last table of a text: what, and its value, bar and verdict."""
    lines = [line.strip("| ").split(" | ") for line in text.rpartition("| --- |")[2].splitlines() if "|" in line]
    return {what: cells for what, *cells in lines}


CPU_OP = gpu_check._backends.LIBRARY.exists()


@pytest.mark.skipif(not CPU_OP, reason="the pretended kernels are the CPU's")
def test_rehearsal_of_everything(pretended, tmp_path):
    """All but the build, with the real commands, tests and benchmarks."""
    process = pretended("proof", "tests", "loss", "sanitizer", "triton", "linear", "others")
    text, _ = process.communicate(timeout=2 * PATIENCE)
    found = rows(text)
    assert process.returncode in (0, 3), text[-9000:]
    assert found["build"][2] == "not measured: not asked for"
    assert found["impl=auto, first process"][0].startswith("cuda, ") and "0.50" in found["proof of cuda"][0]
    right = ["proof of cuda", "proof of triton", "GPU tests, cuda", "GPU tests, triton"]
    right += ["compute-sanitizer memcheck", "compute-sanitizer racecheck"]
    assert [found[name][2] for name in right] == ["met"] * len(right), text[-9000:]
    slow = [name for name in found if name not in right and name != "build" and "auto" not in name]
    late = f"not measured: {gpu_check.SEE_THE_LOG}"  # what a busy machine does not come to
    liger = found["time over liger, ce, C=500 rows=32 bfloat16"][2]
    assert liger.startswith(("not measured: liger (", late))
    assert len(slow) == 8 + 11 and {found[name][2] for name in slow} <= {"met", "MISSED", late, liger}
    assert found["error of weight over eager's, C=500 rows=32 bfloat16"][2] in ("met", late)
    assert found["launches, C=100 rows=8 gradient"][2] == "met"
    (table,) = (tmp_path / "out").glob("*.md")
    assert rows(table.read_text()) == found
    assert "liger (" in text and "ce-quack (" in text  # and why they were not measured
    assert {path.suffix for path in (tmp_path / "out").iterdir()} == {".md", ".jsonl", ".log"}


@pytest.mark.skipif(not CPU_OP, reason="the pretended kernels are the CPU's")
def test_rehearsal_of_wrong_kernels(pretended):
    process = pretended("proof", "tests", wrong="kernel")
    text, _ = process.communicate(timeout=2 * PATIENCE)
    found = rows(text)
    assert process.returncode == 1
    assert found["impl=auto, first process"][2] == found["proof of cuda"][2] == found["GPU tests, cuda"][2] == "MISSED"
    assert "[cuda" in found["GPU tests, cuda"][0] and " failed, " in found["GPU tests, cuda"][0]
    assert "off by 7 times" in found["proof of cuda"][0]


@pytest.mark.skipif(not CPU_OP, reason="the pretended kernels are the CPU's")
def test_rehearsal_of_a_crash_and_of_files_that_cannot_be_written(pretended, tmp_path):
    name = tmp_path / "out" / f"pretended-gpu-{gpu_check.date.today().isoformat()}"
    name.with_suffix(".jsonl").mkdir(parents=True)  # cannot be opened, as a new file on a full disk
    name.with_suffix(".md").symlink_to("/dev/full")
    process = pretended("loss", wrong="crash")
    text, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1
    check_kept(rows(text), "not measured: loss: ended with exit code -11")


@pytest.mark.skipif(not CPU_OP, reason="the pretended kernels are the CPU's")
def test_rehearsal_of_a_hang_and_of_an_end_from_outside(pretended, tmp_path):
    process = pretended("loss", "steps", wrong="hang")
    lines = lambda: [line for path in (tmp_path / "out").glob("*.jsonl") for line in gpu_check.lines_of(path)]  # noqa: E731
    wait_for(lambda: any('"classes": 1000' in line for line in lines()), "the second shape", process)
    process.send_signal(signal.SIGTERM)
    text, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 3
    found = rows(text)
    check_kept(found, "not measured: interrupted")
    (table,) = (tmp_path / "out").glob("*.md")
    assert rows(table.read_text()) == found
    assert "== steps: left out, interrupted" in text


def check_kept(found: dict[str, list[str]], otherwise: str) -> None:
    """Two shapes were measured before the end, and every other line says why there is none."""
    kept = {what for what, cells in found.items() if not cells[2].startswith("not measured")}
    assert kept == {
        *(f"launches, C={classes} rows=8 gradient" for classes in (100, 1000)),
        *(f"{what}, C={classes} rows=8 {path}" for what in ("wall us", "graph replay us") for classes in (100, 1000)
          for path in ("gradient", "autograd")),
    }  # fmt: skip
    assert all(found[f"of copy bandwidth, C={c} rows=4 gradient"][2].startswith(otherwise) for c in (1000, 8192))
    assert found["GPU tests, cuda"][2] == "not measured: not asked for"
