"""The benchmarks run, write what they promise, and the GPU's proof cannot be had for nothing."""

from __future__ import annotations

import json
import sys

import pytest

from benchmarks import bench_last_batch, gpu_check, shapes
from dlb_fast import _backends


def test_loss_benchmark_writes_complete_records(tmp_path, monkeypatch, capsys):
    out = tmp_path / "results.jsonl"
    arguments = ["bench", "--device", "cpu", "--classes", "100", "--seconds", "0.05", "--dtypes", "float32"]
    monkeypatch.setattr(sys, "argv", [*arguments, "--variants", "eager", "official", "cpu", "--out", str(out)])
    bench_last_batch.main()
    records = [json.loads(line) for line in out.read_text().splitlines()]
    variants = {r["variant"] for r in records}
    assert {"eager", "official"} <= variants
    assert ("cpu" in variants) == _backends.implementations()["cpu"].available
    for r in records:
        assert r["p20_us"] <= r["median_us"] <= r["p80_us"]
        assert r["n"] >= 10
        assert r["hardware"] and r["commit"] and r["versions"]["torch"]
    assert "x ours" in capsys.readouterr().out


def test_minimal_bytes():
    import torch

    # 4 rows of 10 in bfloat16: 80 B logits + 80 B gradient + 40 B teacher read + 40 B teacher written.
    assert bench_last_batch.minimal_bytes(shapes.Shape(4, 10, ""), torch.bfloat16) == 240


CASES = {
    "all passed": ("", {"cuda": True, "triton": True}),
    "one failed": ("<failure/>", {"cuda": False, "triton": True}),
    "skipped only": ("<skipped/>", {"cuda": False, "triton": True}),
    "error": ("<error/>", {"cuda": False, "triton": True}),
}


@pytest.mark.parametrize("name", CASES)
def test_proof_needs_every_test(tmp_path, monkeypatch, name):
    inside, want = CASES[name]
    report = tmp_path / "tests.xml"
    report.write_text(
        f'<testsuite><testcase name="test_a[cuda-8]">{inside}</testcase><testcase name="test_b[8-triton]"/>'
        '<testcase name="test_c[cpu]"><failure/></testcase></testsuite>'
    )
    assert gpu_check.proven(report) == want
    monkeypatch.setattr(gpu_check, "PROOF", tmp_path / "proof.txt")
    gpu_check.record(want, "Some GPU")
    proof = (tmp_path / "proof.txt").read_text()
    assert ("cuda: tested on Some GPU" in proof) == want["cuda"]
    assert "triton: tested on Some GPU" in proof
    gpu_check.record({"cuda": False, "triton": False}, "Some GPU")
    assert not (tmp_path / "proof.txt").exists()


def test_no_report_proves_nothing(tmp_path):
    assert gpu_check.proven(tmp_path / "missing.xml") == {"cuda": False, "triton": False}


def test_the_command_runs_a_benchmark_and_names_a_wrong_one(tmp_path, capfd, monkeypatch):
    from dlb_fast import cli

    monkeypatch.chdir(tmp_path)
    options = ["--device", "cpu", "--classes", "100", "--seconds", "0.02", "--dtypes", "float32", "--variants", "eager"]
    assert cli.main(["bench", "last_batch", *options, "--out", "here.jsonl"]) == 0
    assert (tmp_path / "here.jsonl").exists()
    assert cli.main(["bench", "nonsense"]) == 1
    assert "expected one of last_batch, loader, methods, step, got 'nonsense'" in capfd.readouterr().err
