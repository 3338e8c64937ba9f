"""The loader's benchmark compares like with like: every contender makes the same crops of the same samples."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("PIL")
BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SHORT = ["--rounds", "1", "--batches", "1", "--half", "4", "--files", "16", "--stall-steps", "3"]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import bench_loader

    yield bench_loader
    for name in ("bench_loader", "loader_contenders"):
        sys.modules.pop(name, None)


def test_contenders_make_the_same_views(bench: Any, tmp_path: Path) -> None:
    import loader_contenders as lc

    files = lc.make_files(tmp_path, 16, size=(120, 90))
    runs = {
        "A": (lc.naive(files, 4, 0), 1),
        "B": (lc.published(files, 4, 0), 0),  # begins with the first batch that has two halves
        "ours": (lc.ours(files, 4, 2, torch.float32), 1),
        "B8": (lc.published(files, 4, 0, floats=False), 0),
        "ours8": (lc.ours(files, 4, 2, torch.uint8), 1),
    }
    batches: dict[str, list[torch.Tensor]] = {}
    for name, (iterator, skip) in runs.items():
        for _ in range(skip):
            next(iterator)
        batches[name] = [torch.cat(list(next(iterator))).float() for _ in range(6)]  # two epochs' worth
        iterator.close()
    for mine, a, b in zip(batches["ours"], batches["A"], batches["B"], strict=True):
        assert torch.equal(a, b)
        assert (mine - a).abs().mean() < 0.05 / 255 / 0.224  # a twentieth of a grey level
    for mine, theirs in zip(batches["ours8"], batches["B8"], strict=True):
        assert (mine - theirs).abs().mean() < 0.05 and (mine - theirs).abs().max() <= 1


@pytest.mark.slow
def test_the_whole_benchmark_writes_its_lines(bench: Any, tmp_path: Path) -> None:
    out = tmp_path / "loader.jsonl"
    assert bench.main([*SHORT, "--out", str(out), "--only", "ours 2 threads, uint8"]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    by_kind = {row["what"] for row in rows}
    assert {"machine", "files", "pixels", "second view", "stall", "throughput"} <= by_kind
    measured = [row for row in rows if row["what"] == "throughput" and "missing" not in row]
    assert measured[0]["over_A"]["median"] == 1.0 and measured[1]["over_B"]["median"] == 1.0
    assert all(row["views_per_s"]["median"] > 0 for row in measured)
    stall = next(row for row in rows if row["what"] == "stall")
    assert 0.5 <= stall["reads_per_view"] < 0.8  # one read, two views (a few are read ahead)
