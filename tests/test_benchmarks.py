"""The benchmark of the loss runs, writes complete records and refuses wrong contenders and arguments."""

from __future__ import annotations

import json
import sys

import pytest
import torch
import torch.nn.functional as F

from benchmarks import bench_last_batch, harness, loss_variants, shapes
from benchmarks.loss_variants import PATHS
from dlb_fast import _backends

pytestmark = pytest.mark.slow  # guards the benchmarks, not the package


def test_loss_benchmark_writes_complete_records(tmp_path, monkeypatch, capsys):
    out = tmp_path / "results.jsonl"
    arguments = ["bench", "--device", "cpu", "--classes", "100", "--seconds", "0.05", "--dtypes", "float32"]
    monkeypatch.setattr(sys, "argv", [*arguments, "--variants", "eager", "official", "cpu", "--out", str(out)])
    bench_last_batch.main()
    records = [json.loads(line) for line in out.read_text().splitlines()]
    found = {(r["variant"], r["path"]) for r in records}
    public = {(name, path) for name in ("eager", "official", "cpu") for path in ("autograd", "gradient")}
    if _backends.implementations()["cpu"].available:
        assert found == public | {("cpu-op", "gradient")}
    else:
        assert found == {key for key in public if key[0] != "cpu"}
    peak = {r["variant"]: r["peak_bytes"] for r in records if r["path"] == "autograd"}
    assert peak.get("cpu", 0) < peak["eager"]
    for r in records:
        assert r["least_bytes_per_logit"] == 12
        moved = r["copy_bandwidth"] * r["median_us"] * 1e-6
        assert r["copy_bytes_per_logit"] == pytest.approx(moved / 25600)
        assert r["of_copy_bandwidth"] == pytest.approx(12 / r["copy_bytes_per_logit"])
        assert r["p20_us"] <= r["median_us"] <= r["p80_us"]
        assert r["n"] >= 10
        assert r["hardware"] and r["commit"] and r["versions"]["torch"]
    assert "x ours" in capsys.readouterr().out


def test_minimal_bytes():
    # 4 rows of 10 in bfloat16: 80 B logits + 80 B gradient + 40 B teacher read + 40 B teacher written.
    assert bench_last_batch.minimal_bytes(shapes.Shape(4, 10, ""), torch.bfloat16) == 240


def test_what_cannot_run_is_missing_with_its_reason():
    names = ["compile-ro", "liger", "cuda"]
    work, missing, _ = loss_variants.variants(shapes.Shape(8, 5, ""), torch.float32, "cpu", names, ["autograd"])
    assert work == {}
    assert [text.split(" (")[0] for text in missing] == names
    assert all("GPU" in text for text in missing)


def test_nothing_to_time_is_said(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["bench", "--device", "cpu", "--variants", "liger", "--seconds", "0.01"])
    with pytest.raises(SystemExit, match=r"nothing to time; missing: liger \(needs a CUDA GPU\)"):
        bench_last_batch.main()


def test_classes_that_are_not_measured_are_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench", "--device", "cpu", "--classes", "5"])
    with pytest.raises(SystemExit):
        bench_last_batch.main()
    assert "--classes: expected some of [100, 1000, 21843], got [5]" in capsys.readouterr().err


LB, CE = ["eager", "official", "cpu"], ["ce-eager", "ce-cpu"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "classes"), [(256, 10), (64, 1000), (2, 5)])
def test_every_contender_is_held_against_float64(rows, classes, dtype):
    work, missing, problem = loss_variants.variants(shapes.Shape(rows, classes, ""), dtype, "cpu", LB + CE, PATHS)
    found, wrong = loss_variants.right(work, problem)
    assert found.keys() == work.keys() and not wrong and not missing
    assert {name for name, _ in found} == {*LB, *CE, "cpu-op"}


eager = loss_variants.eager_loss
WRONG = {
    "no teacher": lambda z, y, t: F.cross_entropy(z.float(), y),
    "temperature squared left out": lambda z, y, t: (
        (eager(z, y, t) - F.cross_entropy(z, y)) / 9 + F.cross_entropy(z, y)
    ),
    "mean over all elements": lambda z, y, t: F.cross_entropy(z, y) + (eager(z, y, t) - F.cross_entropy(z, y)) / 1000,
    "five percent": lambda z, y, t: 1.05 * eager(z, y, t),
    "nan": lambda z, y, t: torch.nan * eager(z, y, t),
    "raises": lambda z, y, t: torch.zeros(2, requires_grad=True)[5],
}


@pytest.mark.parametrize("name", WRONG)
def test_contenders_with_another_gradient_are_not_timed(name, monkeypatch):
    monkeypatch.setattr(loss_variants, "eager_loss", WRONG[name])
    given = shapes.Shape(64, 1000, ""), torch.bfloat16, "cpu", ["eager", "official"], ["gradient"]
    work, _, problem = loss_variants.variants(*given)
    found, wrong = loss_variants.right(work, problem)
    assert [*found] == [("official", "gradient")]
    (said,) = wrong
    assert said.startswith("eager (gradient: " + ("IndexError" if name == "raises" else "computes something else"))


def test_a_wrong_kernel_of_ours_fails_the_run_and_a_wrong_competitor_does_not(tmp_path, monkeypatch, capsys):
    times = {"median_us": 1.0}
    monkeypatch.setattr(harness, "all_times", lambda work, *a, **k: {"wall": {key: times for key in work}})
    monkeypatch.setattr(bench_last_batch.memory, "peak_bytes", lambda *given: 0)
    monkeypatch.setattr(bench_last_batch, "report", lambda records: None)
    monkeypatch.setattr(harness, "copy_bandwidth", lambda *given: 1e9)
    out = tmp_path / "r.jsonl"
    command = ["bench", "--device", "cpu", "--classes", "100", "--dtypes", "float32", "--out", str(out), "--variants"]
    monkeypatch.setattr(sys, "argv", [*command, "eager", "official", "cpu"])
    monkeypatch.setattr(loss_variants, "official_loss", lambda old, new, target, teacher: new.sum())
    bench_last_batch.main()
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert {r["variant"] for r in records} == {"eager", "cpu", "cpu-op"}
    assert all("official (autograd: computes something else" in r["missing"][0] for r in records)
    original = loss_variants.dlb_step
    monkeypatch.setattr(loss_variants, "dlb_step", lambda *given, **o: [2 * part for part in original(*given, **o)])
    with pytest.raises(SystemExit, match="failed at 256 x 100 float32"):
        bench_last_batch.main()


@pytest.mark.parametrize("sweep", shapes.SWEEPS)
def test_sweeps(tmp_path, monkeypatch, sweep):
    out = tmp_path / "sweep.jsonl"
    monkeypatch.setitem(shapes.SWEEPS, sweep, shapes.SWEEPS[sweep][:2])
    arguments = ["bench", "--device", "cpu", "--sweep", sweep, "--variants", "eager", "--seconds", "0.01"]
    monkeypatch.setattr(sys, "argv", [*arguments, "--paths", "autograd", "--out", str(out)])
    bench_last_batch.main()
    records = [json.loads(line) for line in out.read_text().splitlines()]
    want = [(shape.rows, shape.classes) for shape in shapes.SWEEPS[sweep]]
    assert [(r["rows"], r["classes"]) for r in records] == want
    assert {(r["sweep"], r["dtype"]) for r in records} == {(sweep, "float32")}


def test_the_command_runs_a_benchmark_and_names_a_wrong_one(tmp_path, capfd, monkeypatch):
    from dlb_fast import cli

    monkeypatch.chdir(tmp_path)
    options = ["--device", "cpu", "--classes", "100", "--seconds", "0.02", "--dtypes", "float32", "--variants", "eager"]
    assert cli.main(["bench", "last_batch", *options, "--out", "here.jsonl"]) == 0
    assert (tmp_path / "here.jsonl").exists()
    assert cli.main(["bench", "nonsense"]) == 2
    assert "expected one of last_batch, loader, methods, step, got 'nonsense'" in capfd.readouterr().err
