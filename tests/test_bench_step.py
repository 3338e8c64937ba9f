"""What a step costs: the variants do the same work, and the method can tell one percent and says when it cannot."""

from __future__ import annotations

import dataclasses
import json
import sys

import pytest
import torch

from benchmarks import bench_step, harness, memory, step_variants
from benchmarks.step_variants import EagerLastBatchLoss, Rig, Setting, build, two_views
from benchmarks.tables import verdicts
from dlb_fast import LastBatchLoss
from dlb_fast.data import Batch
from dlb_fast.train.loop import training_loss

SMALL = Setting("small_cnn", rows=8, classes=5, size=8, device="cpu", mode="eager", bf16=False)


pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]  # guards the benchmarks, not the package


def test_eager_loss_is_ours():
    generator = torch.Generator().manual_seed(3)
    eager, ours = EagerLastBatchLoss(4, 5, "cpu"), LastBatchLoss(5, capacity=4, temperature=3.0)
    target = torch.randint(0, 5, (8,), generator=generator)
    for step in range(3):
        logits = 3 * torch.randn(8, 5, generator=generator)
        if step == 0:
            ours(logits[4:], target[4:])
            eager(logits, target)
        else:
            torch.testing.assert_close(eager(logits, target), ours(logits, target))


def test_official_loop_is_two_pass():
    """Its second loss is our `two_pass` forward's, after the same first step, large enough for the teacher to count."""
    official = build("official", SMALL, Rig(SMALL, lr=1.0))
    first, second = official()[0], official()[0]
    rig, criterion = Rig(SMALL, lr=1.0), LastBatchLoss(5, capacity=4, temperature=3.0)
    views, labels = two_views(SMALL)
    batches = [
        Batch(views[:, 0].contiguous(), labels, torch.arange(4), 0, 0, 0),
        Batch(torch.cat((views[:, 1], views[:, 0])), labels.repeat(2), torch.arange(4).repeat(2), 4, 0, 1),
    ]
    losses = []
    for batch in batches:
        loss = training_loss(rig.model, criterion, batch, forward="two_pass")
        rig.optimizer.zero_grad()
        loss.backward()
        rig.optimizer.step()
        losses.append(loss.item())
    assert [first, second] == pytest.approx(losses, rel=1e-4)


def test_the_joint_batch_is_both_views_of_the_same_samples():
    """All variants see the rows that the official loop sees, the repeated half first; every row is taught."""
    seen = []
    original = step_variants.training_loss

    def spy(network, criterion, batch, **options):
        seen.append((batch, criterion))
        return original(network, criterion, batch, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step_variants, "training_loss", spy)
        build("dlb", SMALL, Rig(SMALL))()
    (batch, criterion), (views, labels) = seen[-1], two_views(SMALL)
    assert torch.equal(batch.old, views[:, 1])
    assert torch.equal(batch.new, views[:, 0])
    assert torch.equal(batch.targets, labels.repeat(2))
    assert criterion.parts.lb > 0
    assert criterion.buffer.mismatched == 0


def test_compile_mode_compiles_the_network(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda model: compiled.append(model) or model)
    names = ["ce", "dlb", "official"]
    bench_step.measure(dataclasses.replace(SMALL, mode="compile"), names, seconds=0.02)
    assert len(compiled) == len(names) + 1  # once for each peak, once for all times


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["bench_step", "--device", "cpu", *arguments])
    bench_step.main()


def test_command_writes_complete_records(tmp_path, monkeypatch):
    out = tmp_path / "steps.jsonl"
    shape = ["--models", "small_cnn", "--rows", "8", "--classes", "5", "--size", "8"]
    run(monkeypatch, *shape, "--seconds", "0.1", "--out", str(out))
    records = {r["variant"]: r for r in map(json.loads, out.read_text().splitlines())}
    assert list(records) == list(step_variants.VARIANTS)
    for r in records.values():
        assert r["p20_us"] <= r["median_us"] <= r["p80_us"]
        assert r["ratio_low"] <= r["ratio"] <= r["ratio_high"]
        assert r["n"] >= 10 and r["commit"] and r["hardware"] and r["threads"] == 1 and r["clock"] == "cpu"
    assert records["ce"]["ratio"] == records["ce"]["peak_ratio"] == 1
    # What DLB holds beside CE: four rows of five logits and their ids.
    assert 0 < records["dlb"]["peak_bytes"] - records["ce"]["peak_bytes"] < 2000


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [(["--rows", "7"], "--rows must be even"), (["--modes", "graph"], "invalid choice: 'graph'")],
)
def test_wrong_arguments(monkeypatch, capsys, arguments, reason):
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, *arguments)
    assert stopped.value.code == 2
    assert reason in capsys.readouterr().err


def test_after_the_limit_nothing_is_started(tmp_path, monkeypatch, capsys):
    run(monkeypatch, "--models", "small_cnn", "--limit", "0", "--out", str(tmp_path / "none.jsonl"))
    assert "small_cnn, eager: left out, 0 s are over" in capsys.readouterr().out
    assert not (tmp_path / "none.jsonl").exists()


def test_paired_ratios_see_one_percent_through_what_slows_whole_rounds():
    generator = torch.Generator().manual_seed(0)
    rounds = 1000 * (1 + torch.rand(60, generator=generator))  # a round may take twice as long as another
    noise = 1 + 0.01 * torch.randn(2, 60, generator=generator)
    found = harness.paired((1.02 * rounds * noise[0]).tolist(), (rounds * noise[1]).tolist())
    assert 1.01 < found["ratio_low"] < 1.02 < found["ratio_high"] < 1.03
    same = harness.paired([5.0] * 10, [5.0] * 10)
    assert same == {"ratio": 1.0, "ratio_low": 1.0, "ratio_high": 1.0}


def records(dlb, control, peak=1.0):
    shape = {"model": "m", "rows": 8, "size": 8, "mode": "eager", "dtype": "float32", "command": "c", "date": "d"}
    made = {"ce_again": control, "dlb": dlb}
    found = [
        {"variant": name, "ratio_low": low, "ratio_high": high, "peak_ratio": peak, **shape}
        for name, (low, high) in made.items()
        if low
    ]
    return verdicts(found[-1], found)


def test_verdicts():
    quiet = (0.99, 1.01)
    assert "ce: met; " in records((0.98, 1.03), quiet)
    assert "ce: missed; " in records((1.04, 1.06), quiet)
    assert "ce: undecided; " in records((1.00, 1.06), quiet)
    assert "ce: undecided; " in records((0.98, 1.01), (0.9, 1.0))  # the control strays: so may the verdict
    assert "ce: undecided; " in records((0.98, 1.01), (None, None))  # no control at all
    assert "memory: met" in records((0.98, 1.01), quiet, peak=1.01)
    assert "memory: missed" in records((0.98, 1.01), quiet, peak=1.011)


MEGABYTE = 1 << 20


def test_peak_bytes_on_the_cpu():
    def work():
        first, second = torch.empty(MEGABYTE, dtype=torch.uint8), torch.empty(MEGABYTE, dtype=torch.uint8)
        del first
        return second, torch.empty(MEGABYTE // 2, dtype=torch.uint8)  # two megabytes at most live at a time

    assert memory.peak_bytes(work, "cpu") == 2 * MEGABYTE


def test_peak_of_counts_what_the_work_keeps():
    def build():
        kept = [torch.empty(MEGABYTE, dtype=torch.uint8)]
        return lambda: kept.append(torch.empty(MEGABYTE, dtype=torch.uint8))

    assert memory.peak_of(build, "cpu", calls=3) == 4 * MEGABYTE
