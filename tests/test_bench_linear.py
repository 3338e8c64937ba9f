"""The benchmark of the loss from hidden states: its float64 oracle, its memory, its checks, its records and bars."""

from __future__ import annotations

import json
import math
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from benchmarks import bench_linear, gpu_check, harness, memory, shapes, tables
from benchmarks.bench_linear import TAU, TAUGHT, Problem
from benchmarks.loss_variants import eager_loss

pytestmark = [
    pytest.mark.slow,  # guards the benchmarks, not the package
    pytest.mark.usefixtures("one_thread"),  # the command sets the number of threads, which later tests must not meet
]

SHAPE = shapes.LinearShape(24, 8, 120, "")


@pytest.fixture(autouse=True)
def few_classes_kept(monkeypatch):
    monkeypatch.setattr(bench_linear, "K", 5)


def by_hand(loss, z, target, teacher):
    """Each loss by torch's functions on all logits."""
    value = F.cross_entropy(z, target)
    rows = int(TAUGHT[loss] * len(z))
    if loss == "ce":
        return value
    q, p = F.softmax(z[:rows] / TAU, 1), F.softmax(teacher[:rows] / TAU, 1)
    if loss == "top_k":  # five classes and one for the others
        kept = teacher[:rows].topk(5, 1).indices
        p, q = (torch.cat([x.gather(1, kept), 1 - x.gather(1, kept).sum(1, keepdim=True)], 1) for x in (p, q))
    return value + TAU**2 * F.kl_div(q.log(), p, reduction="batchmean")


@pytest.mark.parametrize("piece", [1, 1 << 30], ids=["a row at a time", "at once"])
def test_the_oracle_is_the_loss_of_all_logits(piece, monkeypatch):
    monkeypatch.setattr(bench_linear, "PIECE", piece)
    problem = Problem.of(SHAPE, torch.float64, "cpu", TAUGHT)
    found = bench_linear.exact(problem, TAUGHT)
    for loss in TAUGHT:
        hidden, weight = (part.clone().requires_grad_() for part in (problem.hidden, problem.weight))
        teacher = problem.teacher_hidden @ problem.weight.t() if loss == "hidden" else problem.teacher
        value = by_hand(loss, hidden @ weight.t(), problem.target, teacher)
        value.backward()
        off = bench_linear.errors((value.detach(), hidden.grad, weight.grad), found[loss])
        assert max(off.values()) < 1e-12, (loss, off)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_contender_is_held_against_float64(dtype):
    problem = Problem.of(SHAPE, getattr(torch, dtype), "cpu", TAUGHT)
    names = ["fused", "eager", "torch"] if hasattr(F, "linear_cross_entropy") else ["fused", "eager"]
    work, missing = bench_linear.contenders(problem, "cpu", names, list(TAUGHT))
    off, wrong = bench_linear.checked(work, bench_linear.exact(problem, TAUGHT), dtype)
    assert off.keys() == {(name, loss) for name in names for loss in bench_linear.LOSSES[name]}
    assert not missing and not wrong


WRONG = {
    "no teacher": lambda z, y, t: F.cross_entropy(z.float(), y),
    "temperature squared left out": lambda z, y, t: (eager_loss(z, y, t) + 8 * F.cross_entropy(z.float(), y)) / 9,
    "five percent": lambda z, y, t: 1.05 * eager_loss(z, y, t),
    "its gradient alone": lambda z, y, t: eager_loss(1.05 * z - 0.05 * z.detach(), y, t),
    "its value alone": lambda z, y, t: eager_loss(z, y, t) + 0.05 * eager_loss(z, y, t).detach(),
    "nan": lambda z, y, t: torch.nan * eager_loss(z, y, t),
    "raises": lambda z, y, t: torch.zeros(2, requires_grad=True)[5],
}


@pytest.mark.parametrize("name", WRONG)
def test_contenders_of_something_else_are_not_timed(name, monkeypatch):
    monkeypatch.setattr(bench_linear, "eager_loss", WRONG[name])
    problem = Problem.of(SHAPE, torch.bfloat16, "cpu", TAUGHT)
    work, _ = bench_linear.contenders(problem, "cpu", ["eager"], ["ce", "half"])
    off, wrong = bench_linear.checked(work, bench_linear.exact(problem, ["ce", "half"]), "bfloat16")
    assert [*off] == [("eager", "ce")]
    assert wrong[0].startswith("eager (half: " + ("IndexError" if name == "raises" else "computes something else"))


def test_memory_counts_what_torch_does_not_allocate():
    """An earlier peak, and memory that was freed before, are not in it."""
    np.ones(64 << 20, np.uint8)
    blocks = [bytes(100_000) for _ in range(300)]  # of the heap, which keeps them
    del blocks
    assert memory.resident_peak(lambda: None) < 4 << 20
    assert 31 << 20 <= memory.resident_peak(lambda: np.ones(32 << 20, np.uint8)) < 36 << 20
    assert 29_000_000 <= memory.resident_peak(lambda: [b"x" * 100_000 for _ in range(300)]) < 36 << 20


def test_memory_says_where_it_cannot_be_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "PROCESS", tmp_path)
    (tmp_path / "status").write_text("VmHWM:\t  99999 kB\nVmRSS:\t  1000 kB\n")
    with pytest.raises(OSError, match="did not reset"):
        memory.resident_peak(lambda: None)
    (tmp_path / "status").write_text("VmHWM:\t  1000 kB\n")
    with pytest.raises(OSError, match="has no VmRSS"):
        memory.resident_peak(lambda: None)


def test_memory_of_eager_apart_is_that_of_its_logits():
    """256 x 20 000 logits are 20 MB; eager holds several of them, and the fused loss one chunk at most."""
    shape = shapes.LinearShape(256, 8, 20_000, "")
    eager, fused = (bench_linear.peak_alone((name, "half"), shape, "float32") for name in ("eager", "fused"))
    logits = 256 * 20_000 * 4
    assert isinstance(eager, int) and isinstance(fused, int), (eager, fused)
    assert 3 * logits < eager < 8 * logits and fused < 2.2 * logits
    said = bench_linear.peak_alone(("liger", "half"), shape, "float32")
    assert isinstance(said, str) and "ValueError" in said


def test_it_writes_complete_records_and_prints_the_bars(tmp_path, monkeypatch, capsys):
    out = tmp_path / "linear.jsonl"
    command = ["bench", "--device", "cpu", "--quick", "--dtypes", "float32", "--variants", "fused", "eager", "liger"]
    monkeypatch.setattr(sys, "argv", [*command, "--losses", "ce", "half", "--out", str(out)])
    monkeypatch.setattr(bench_linear, "peak_alone", lambda key, *given: 70_032_000 if key[0] == "eager" else "too old")
    bench_linear.main()
    records = {(r["variant"], r["loss"]): r for r in map(json.loads, out.read_text().splitlines())}
    pairs = {(name, loss) for name in ("fused", "eager") for loss in ("ce", "half")}
    assert records.keys() == pairs | {("products", part) for part in bench_linear.PRODUCTS}
    assert set(records["fused", "half"]["ratios"]) == {"products", "eager", "ce"}
    assert set(records["eager", "half"]["ratios"]) == {"products"}
    assert records["eager", "half"]["peak_bytes"] == 70_000_000  # without 500 x 16 float32
    assert records["fused", "half"]["no_peak"] == "too old"
    for r in records.values():
        assert r["n"] >= 2 and r["hardware"] and r["commit"] and r["features"] == 16
        assert r["missing"] == ["liger (needs a CUDA GPU)"]
    text = capsys.readouterr().out
    assert "| memory MB, half, C=500 rows=32 float32 | - | <= 64.0 | not measured: too old |" in text
    assert "| time over compile, half, C=500 rows=32 float32 | - | <= 0.90 | not measured: left out |" in text


def test_ours_that_computes_something_else_fails_the_run(monkeypatch, capsys):
    right = bench_linear.fused_linear_lb_loss
    monkeypatch.setattr(bench_linear, "fused_linear_lb_loss", lambda *given, **named: 1.1 * right(*given, **named))
    command = ["bench", "--device", "cpu", "--quick", "--dtypes", "float32", "--variants", "fused", "--losses", "ce"]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit, match=r"bench_linear: fused \(ce: computes something else: hidden is off by 0\.1"):
        bench_linear.main()


def test_ratios_are_of_the_same_round():
    times = {("products", part): harness.Times([1.0, 2.0], []) for part in bench_linear.PRODUCTS}
    times |= {("fused", "half"): harness.Times([6.0, 12.0], []), ("eager", "half"): harness.Times([12.0, 24.0], [])}
    times["fused", "ce"] = harness.Times([3.0, 6.0], [])
    found = bench_linear.ratios(("fused", "half"), times)
    assert {name: value["ratio"] for name, value in found.items()} == {"products": 2.0, "eager": 0.5, "ce": 2.0}
    assert [*bench_linear.ratios(("eager", "half"), times)] == ["products"]


WHERE = {"date": "2020-01-02T03:04:05+00:00", "commit": "abc", "command": "python -m it", "hardware": "A machine",
         "threads": 2, "versions": {"torch": "9.9"}, "missing": ["compile (no compiler)"]}  # fmt: skip


def record(variant, loss, dtype="bfloat16", error=1e-3, **more):
    times = {"median_us": 2e4, "p20_us": 1e4, "p80_us": 3e4, "n": 12}
    off = dict.fromkeys(("loss", "hidden", "weight"), error)
    sizes = {"rows": 1024, "features": 256, "classes": 50257, "dtype": dtype}
    ratios = {name: {"ratio": value} for name, value in more.pop("ratios", {"products": 1.5}).items()}
    return {"bench": "linear", "kind": "wall", "variant": variant, "loss": loss, **times, **sizes, "errors": off,
            "ratios": ratios, **WHERE, **more}  # fmt: skip


RECORDS = [
    record("fused", "half", ratios={"products": 1.3, "eager": 0.75, "ce": 1.2}, peak_bytes=64_000_001),
    record("fused", "full", error=1.1e-3, ratios={"products": 1.31, "eager": 0.76}, peak_bytes=64_000_000),
    record("eager", "half", error=2e-3), record("eager", "full", peak_bytes=700_000_000),
    record("fused", "ce", error=5e-8), record("eager", "ce", error=1e-9),
    record("fused", "top_k", ratios={"products": 1.1, "ce": 1.1}),
]  # fmt: skip


def test_the_bars_are_read_from_the_records():
    found = bench_linear.bars(RECORDS, "cpu", shapes.LINEAR["cpu"], ["bfloat16", "float32"], "the reason")
    bars = {bar.what: " ".join(bar[1:4]) for bar in found}
    assert len(bars) == len(found) == 2 * (2 * 4 + 3 + 1)
    where = "C=50257 rows=1024 bfloat16"
    assert bars[f"memory MB, half, {where}"] == "64.0 <= 64.0 MISSED"
    assert bars[f"memory MB, full, {where}"] == "64.0 <= 64.0 met"
    assert bars[f"time over eager, half, {where}"] == "0.75 <= 0.75 met"
    assert bars[f"time over eager, full, {where}"] == "0.76 <= 0.75 MISSED"
    assert bars[f"time over compile, half, {where}"] == "- <= 0.90 not measured: compile (no compiler)"
    assert bars[f"time over the products, half, {where}"] == "1.30 <= 1.30 met"
    assert bars[f"time over the products, full, {where}"] == "1.31 <= 1.30 MISSED"
    assert bars[f"error of weight over eager's, {where}"] == "1.10 <= 1.00 MISSED"  # the largest of all losses
    assert bars[f"time of top_k over ce, {where}"] == "1.10 <= 1.10 met"
    assert bars["time over the products, half, C=50257 rows=1024 float32"] == "- <= 1.20 not measured: the reason"
    (only,) = [bar for bar in bench_linear.bars(RECORDS[-3:], "cpu", shapes.LINEAR["cpu"], ["bfloat16"])
               if bar.what.startswith("error of loss")]  # fmt: skip
    assert only.verdict == "met" and math.isclose(float(only.value), 0.84, abs_tol=0.01)  # eager's luck is no bar


def test_gpu_check_has_its_bars_and_lines(tmp_path):
    check = gpu_check.Check(1.0, tmp_path, "name")
    check.why["linear"] = "the reason"
    (shape,) = shapes.LINEAR["cuda"]
    sizes = {"rows": shape.rows, "features": shape.features, "classes": shape.classes, "missing": []}
    fused = {**RECORDS[1], **sizes, "peak_bytes": 10**9}
    harness.write(check.results, [fused, {**record("products", "forward"), "part": True}])
    bars = {bar.what: " ".join(bar[1:4]) for bar in gpu_check.bars(check) if f"C={shape.classes}" in bar.what}
    # Two chunks of 256 MiB, and both gradients in bfloat16.
    assert bars[f"memory MB, full, C={shape.classes} rows={shape.rows} bfloat16"] == "1000.0 <= 1654.7 met"
    assert bars[f"time over liger, ce, C={shape.classes} rows={shape.rows} bfloat16"].endswith("the reason")
    assert "1.31 x products  peak 1000.0 MB  errors: loss 1.1e-03" in "\n".join(gpu_check.table(check.records()))


def test_the_table(tmp_path):
    path = tmp_path / "linear-cpu-1.jsonl"
    parts = [{**record("products", part), "part": True} for part in bench_linear.PRODUCTS]
    path.write_text("".join(json.dumps(r) + "\n" for r in [*RECORDS, *parts]))
    text = tables.tables_of(path)
    assert "B=1024, D=256, C=50257, bfloat16; the bare products: forward 20 [10, 30] ms, hidden 20" in text
    assert "| logits, all rows | eager | 20 [10, 30] | 1.50 | 1.32 | 700 | 1.0e-03 | 1.0e-03 |" in text.splitlines()
    assert "Not there: compile (no compiler)." in text.replace("\n", " ")
