"""The GPU section of the loader's benchmark: its arithmetic by hand, its loops on a CPU, and no GPU at all."""

from __future__ import annotations

import builtins
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu_check

pytestmark = pytest.mark.slow  # guards the benchmarks, not the package


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    import loader_gpu

    yield loader_gpu
    sys.modules.pop("loader_gpu", None)


def test_hidden_counts_what_lies_under_kernels(bench: Any) -> None:
    kernels = [(0.0, 100.0), (110.0, 200.0), (300.0, 400.0)]  # the first two are one stretch: a launch gap of 10 us
    assert bench.hidden([(50.0, 150.0)], kernels) == 1.0
    assert bench.hidden([(150.0, 250.0)], kernels) == 0.5
    assert bench.hidden([(210.0, 290.0), (300.0, 320.0)], kernels) == pytest.approx(0.2)
    assert bench.merged([(5, 6), (0, 2), (1, 3)]) == [(0, 3), (5, 6)]


def test_waits_are_the_time_between_steps(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten units of work each; the third and fourth measured step come late by 2 and by 0.4."""
    training = bench.Training(torch.nn.Linear(1, 1), torch.device("cpu"))
    clock, late = [0.0], iter([0, 0, 0, 0, 2.0, 0.4, 0, 0])
    monkeypatch.setattr(training.marks, "now", lambda: clock[0])
    monkeypatch.setattr(training.marks, "between", lambda a, b: b - a)

    def step(images: Any, targets: Any) -> None:
        clock[0] += 10.0

    def batches() -> Iterator[Any]:
        for wait in late:
            clock[0] += wait
            yield bench.SimpleNamespace(images=None, targets=None)

    monkeypatch.setattr(training, "step", step)
    found = training.waits(batches(), 2, 6)
    assert found["n"] == 6 and found["step_ms"] == 10.0
    assert found["share_of_steps_waiting"] == pytest.approx(1 / 6)  # 0.4 is below 5 %
    assert found["wait_over_step_max"] == 0.2 and found["wait_over_step_p50"] == 0.0


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_without_a_gpu_it_says_so(bench: Any, tmp_path: Path) -> None:
    out = tmp_path / "gpu.jsonl"
    assert bench.main(["--out", str(out)]) == 0
    (row,) = [json.loads(line) for line in out.read_text().splitlines()]
    assert row["missing"] == "no CUDA GPU is visible to torch"


def test_all_of_it_runs_on_a_cpu(bench: Any, tmp_path: Path) -> None:
    pytest.importorskip("PIL")
    out = tmp_path / "cpu.jsonl"
    assert bench.main(["--device", "cpu", "--steps", "4", "--out", str(out)]) == 0
    rows = {row["name"]: row for row in map(json.loads, out.read_text().splitlines())}
    assert rows["ResidentLoader"]["n"] == 8 and rows["OverlapLoader, JPEG"]["n"] == 4
    assert rows["copies to the device behind kernels"]["missing"] == "nothing is copied on a CPU"
    shown = "\n".join(gpu_check.table([*rows.values()]))
    assert "ResidentLoader" in shown and "nothing is copied on a CPU" in shown


def test_without_pillow_the_jpegs_are_reported_missing(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "PIL":
            raise ImportError("no Pillow here")
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    (row,) = bench.jpeg_rows(torch.device("cpu"), torch.nn.Linear(1, 1), 8, 4, 32, 8)
    assert "no Pillow here" in row["missing"]
