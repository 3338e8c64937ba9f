"""The run on a GPU, without one: what it proves, what it does when time runs out, what it needs of the machine."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from builders import python, wait_for

from benchmarks import bench_last_batch, gpu_check, gpu_report, harness, shapes


def written(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


CASES = {
    "all passed": ("passed", {"finished": True}, True),
    "one failed": ("failed", {"finished": True}, False),
    "skipped only": ("skipped", {"finished": True}, False),
    "time was over": ("passed", {"finished": False}, False),
    "killed": ("passed", {}, False),
}


@pytest.mark.parametrize("name", CASES)
def test_proof_needs_every_test_of_a_whole_run(tmp_path, name):
    outcome, end, want = CASES[name]
    tests = [
        ("test_a[cuda-8]", outcome),
        ("test_first_calls[cuda-in a capture]", outcome),
        ("test_b[8-triton]", "passed"),
        ("test_c[cpu]", "failed"),
    ]
    report = written(tmp_path / "t.jsonl", [*({"test": f"f.py::{t}", "outcome": o} for t, o in tests), end])
    report.write_text(report.read_text() + '{"test": "cut in the mid')
    assert gpu_check.proven(report, "cuda") == want
    assert gpu_check.proven(report, "triton") == bool(end.get("finished"))


def test_no_report_proves_nothing(tmp_path):
    assert not gpu_check.proven(tmp_path / "missing.jsonl", "cuda")


TESTS = """
import pytest

pytestmark = pytest.mark.slow  # guards the benchmarks, not the package
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
    found = gpu_check.records(report)
    outcomes = {r["test"].partition("::")[2]: r["outcome"] for r in found if "test" in r}
    assert "not collected" in outcomes.values()  # and the others ran
    if seconds == "1000":
        assert (outcomes["test_a[cuda]"], outcomes["test_a[triton]"]) == ("passed", "failed") and len(outcomes) == 43
        assert found[-1]["finished"]
        assert (gpu_check.proven(report, "cuda"), gpu_check.proven(report, "triton")) == (True, False)
    else:
        assert 0 < len(outcomes) < 43 and not found[-1]["finished"] and not gpu_check.proven(report, "cuda")


def test_a_command_that_overruns_ends_with_what_it_started(tmp_path):
    log = tmp_path / "log"
    assert gpu_check.run_logged(["sh", "-c", "sleep 1000 & echo $!; wait"], 3.0, log, {}) == gpu_check.TIME_OVER
    stat = Path(f"/proc/{int(log.read_text())}/stat")

    def gone():
        try:
            return stat.read_text().rpartition(")")[2].split()[0] == "Z"
        except (FileNotFoundError, ProcessLookupError):
            return True

    wait_for(gone, "the end of what the command started")


def test_stages_keep_to_the_budget_and_copy_what_there_is(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_check, "LOGS", tmp_path / "logs")
    results = written(tmp_path / "results.jsonl", [{"a": 1}])
    stages = gpu_check.Stages(1000.0, results, tmp_path / "copy")
    assert stages.run("one", ["sh", "-c", "echo here; exit 3"], 500.0) == 3
    assert "==== one.log\nhere\n" in (tmp_path / "copy" / "gpu-check.log").read_text()
    assert {path.name for path in (tmp_path / "copy").iterdir()} == {"gpu-check.log", "results.jsonl"}
    assert "here" in capsys.readouterr().out
    monkeypatch.setattr(stages, "left", lambda: 1.0)
    assert stages.run("last", ["false"], 500.0) == gpu_check.TIME_OVER
    assert stages.codes == {"one": 3, "last": gpu_check.TIME_OVER}


def loss(classes, rows, kind, path, **numbers):
    names = {"bench": "last_batch", "variant": "cuda", "dtype": "bfloat16", "classes": classes, "rows": rows}
    return {**names, "kind": kind, "path": path, "launches": 1, "of_copy_bandwidth": 0.88, "median_us": 9.0, **numbers}


def test_the_bars_are_read_from_the_results(tmp_path):
    lines = gpu_check.bars(written(tmp_path / "r.jsonl", [
        loss(1000, 32768, "device_cold", "gradient"), loss(32000, 8192, "device_cold", "gradient"),
        loss(1000, 512, "wall", "gradient"), loss(1000, 512, "graph_each", "gradient"),
        loss(100, 256, "wall", "autograd", median_us=15.1), loss(100, 256, "wall", "gradient", launches=2),
        loss(100, 256, "device_cold", "gradient"), {**loss(100, 256, "wall", "gradient"), "dtype": "float32"},
    ]))  # fmt: skip
    text = "\n".join(lines)
    assert "C=1000 rows=32768 gradient: 88.0% of the copy bandwidth (bar 85%): met" in text
    assert "C=32000 rows=8192 gradient: 88.0% of the copy bandwidth (bar 90%): MISSED" in text
    assert "C=1000 rows=512 gradient: wall 9.0 us (bar 15): met" in text
    assert "C=1000 rows=512 gradient: graph_each 9.0 us (bar 4): MISSED" in text
    assert "C=100 rows=256 autograd: wall 15.1 us (bar 15): MISSED" in text
    assert "C=100 rows=256 gradient: 2 launches (bar 1): MISSED" in text
    assert len(lines) == 8


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
        return [{"bench": "last_batch", "classes": shape.classes}]

    monkeypatch.setattr(bench_last_batch, "measure", measure)
    monkeypatch.setattr(bench_last_batch, "report", lambda records: None)
    monkeypatch.setattr(harness, "copy_bandwidth", lambda device, seconds: 1e9)
    out = tmp_path / "out.jsonl"
    monkeypatch.setattr(sys, "argv", ["bench", "--device", "cpu", "--dtypes", "float32", "--out", str(out)])
    with pytest.raises(SystemExit, match="failed at 256 x 1000 float32"):
        bench_last_batch.main()
    assert measured == [shape.classes for shape in shapes.CPU]
    assert [r["classes"] for r in gpu_check.records(out)] == [100, 21843]
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--limit", "-1"])
    bench_last_batch.main()
    assert len(measured) == 3 and "left out, -1 s are over" in capsys.readouterr().out


ABSENT = "tyro simplejpeg ruff mypy mkdocs mkdocstrings trackio wandb"


def test_what_it_imports_is_on_a_gpu_machine():
    """torch, triton, numpy and pytest: nothing of the trainer's command line, nothing else that pip brings."""
    names = ABSENT.split()
    code = f"import sys; sys.modules.update(dict.fromkeys({names!r})); "
    code += "import benchmarks.gpu_check, benchmarks.bench_last_batch, benchmarks.bench_step; "
    code += "from dlb_fast.train.loop import Trainer; from dlb_fast.train.config import TrainConfig; TrainConfig()"
    python("-c", code)
