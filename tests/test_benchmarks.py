"""The benchmarks run, write what they promise, and the GPU's proof cannot be had for nothing."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from benchmarks import bench_last_batch, harness, loss_variants, shapes
from dlb_fast import _backends


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
    work, missing = loss_variants.variants(shapes.Shape(8, 5, ""), torch.float32, "cpu", names, ["autograd"])
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


def test_contenders_with_another_gradient_are_not_timed(monkeypatch):
    shape, names = shapes.Shape(8, 5, ""), ["eager", "official"]
    work, _ = loss_variants.variants(shape, torch.bfloat16, "cpu", names, ["gradient"])
    loss_variants.check_alike(work)
    monkeypatch.setattr(loss_variants, "official_loss", lambda old, new, target, teacher: 1.1 * new.float().sum())
    work, _ = loss_variants.variants(shape, torch.bfloat16, "cpu", names, ["gradient"])
    with pytest.raises(RuntimeError, match="official and eager differ"):
        loss_variants.check_alike(work)


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


class Clock:
    """Device time as the fake events below see it, in milliseconds."""

    now = 0.0


class Event:
    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = Clock.now

    def elapsed_time(self, end):
        return end.at - self.at


class Within:
    """A context that a fake stream or graph stands for."""

    def __init__(self, *args):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *problem):
        pass

    def wait_stream(self, other):
        pass

    def replay(self):
        Clock.now += 1.0


@pytest.fixture
def fake_gpu(monkeypatch):
    """CUDA's clock and capture without CUDA; `slept` collects what hides the host's launches."""
    slept = []
    fakes = {
        "Event": Event, "Stream": Within, "stream": Within, "graph": Within, "CUDAGraph": Within,
        "current_stream": Within, "synchronize": lambda: None, "_sleep": slept.append,
    }  # fmt: skip
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(harness, "GPU", "cpu")
    monkeypatch.setattr(harness, "FLUSH", 1024)
    return slept


def takes(milliseconds):
    def work():
        Clock.now += milliseconds

    return work


def test_gpu_timing_reads_the_events(fake_gpu):
    work = {("cuda", "autograd"): takes(0.25), ("eager", "autograd"): takes(2.0)}
    times = harness.all_times(work, "cuda", seconds=0.01)
    assert list(times) == ["wall", "device_cold", "device_warm", "graph", "graph_each"]
    for kind in ("device_warm", "device_cold"):
        assert times[kind]["cuda", "autograd"]["median_us"] == pytest.approx(250)
        assert times[kind]["eager", "autograd"]["median_us"] == pytest.approx(2000)
        assert times[kind]["eager", "autograd"]["n"] >= 10
    assert set(times["graph"]) == set(times["graph_each"]) == set(work)
    assert times["graph_each"]["eager", "autograd"]["median_us"] == pytest.approx(1000 / harness.IN_A_GRAPH)
    assert fake_gpu  # every timed call was queued behind a kernel


@pytest.mark.parametrize("cold", [True, False])
def test_cold_calls_follow_a_flush_and_warm_ones_a_call(fake_gpu, monkeypatch, cold):
    done = []
    monkeypatch.setattr(torch.Tensor, "zero_", lambda tensor: done.append(tensor.nbytes))
    harness.device_times({"ours": lambda: done.append("call")}, seconds=0.0, cold=cold)
    assert done[:3] == ["call"] * 3  # to warm up
    assert done[3:] == [1024 if cold else "call", "call"] * 10


def test_what_cannot_be_captured_has_no_graph_time(fake_gpu, monkeypatch):
    class Refusing(Within):
        def __exit__(self, *problem):
            raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "graph", Refusing)
    times = harness.all_times({"official": takes(1.0)}, "cuda", seconds=0.01)
    assert times["graph"] == times["graph_each"] == {}
    assert times["device_cold"]["official"]["n"] >= 10


def test_gpu_records_carry_launches_and_their_share_of_the_copy(fake_gpu, monkeypatch):
    """The GPU's path of `measure`, with contenders of known device time in place of the real ones."""
    import argparse

    work = {("cuda", "autograd"): takes(0.001), ("eager", "autograd"): takes(0.009)}
    monkeypatch.setattr(bench_last_batch, "variants", lambda *a: (work, ["liger (not installed)"]))
    monkeypatch.setattr(bench_last_batch, "check_alike", lambda work: None)
    monkeypatch.setattr(harness, "launches", lambda works: {key: 1 if key[0] == "cuda" else 12 for key in works})
    monkeypatch.setattr(bench_last_batch.memory, "peak_bytes", lambda step, device: 77)
    options = argparse.Namespace(device="cuda", variants=[], paths=["autograd"], seconds=0.01, sweep=None)
    found = bench_last_batch.measure(shapes.Shape(100, 1000, ""), "bfloat16", options, roof=1e12)
    cold = {r["variant"]: r for r in found if r["kind"] == "device_cold"}
    assert cold["cuda"]["median_us"] == pytest.approx(1.0)
    # 100 000 logits of six bytes in one microsecond are 0.6 TB/s of a roof of 1.
    assert cold["cuda"]["of_copy_bandwidth"] == pytest.approx(0.6)
    assert cold["eager"]["copy_bytes_per_logit"] == pytest.approx(90)
    assert (cold["cuda"]["launches"], cold["eager"]["launches"]) == (1, 12)
    assert cold["cuda"]["missing"] == ["liger (not installed)"]


def test_the_command_runs_a_benchmark_and_names_a_wrong_one(tmp_path, capfd, monkeypatch):
    from dlb_fast import cli

    monkeypatch.chdir(tmp_path)
    options = ["--device", "cpu", "--classes", "100", "--seconds", "0.02", "--dtypes", "float32", "--variants", "eager"]
    assert cli.main(["bench", "last_batch", *options, "--out", "here.jsonl"]) == 0
    assert (tmp_path / "here.jsonl").exists()
    assert cli.main(["bench", "nonsense"]) == 1
    assert "expected one of last_batch, loader, methods, step, got 'nonsense'" in capfd.readouterr().err
