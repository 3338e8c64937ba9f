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
pytestmark = pytest.mark.slow  # guards the benchmarks, not the package

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SHORT = ["--rounds", "1", "--batches", "1", "--half", "4", "--files", "16", "--stall-steps", "4", "--loads", "1.0"]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import bench_loader

    yield bench_loader
    for name in ("bench_loader", "loader_contenders", "loader_stalls", "loader_resident"):
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


def test_the_whole_benchmark_writes_its_lines(bench: Any, tmp_path: Path) -> None:
    out = tmp_path / "loader.jsonl"
    assert bench.main([*SHORT, "--out", str(out), "--only", "ours 2 threads, uint8"]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert rows[0]["versions"]["pillow"] and rows[0]["commit"] and rows[0]["command"]
    by_kind = {row["what"] for row in rows}
    assert {"machine", "files", "pixels", "second view", "traffic", "stall", "resident", "throughput"} <= by_kind
    measured = [row for row in rows if row["what"] == "throughput" and "missing" not in row]
    assert measured[0]["over_A"]["median"] == 1.0 and measured[1]["over_B"]["median"] == 1.0
    assert all(row["views_per_s"]["median"] > 0 for row in measured)
    decodes = {row["name"]: row["decodes_per_view"] for row in rows if row["what"] == "traffic"}
    assert decodes["A"] >= 1 and 0.5 <= decodes["B"] < 0.7 and 0.5 <= decodes["ours"] < 0.7  # a few are read ahead
    stalls = [row for row in rows if row["what"] == "stall"]
    assert {row["step"] for row in stalls} == {"sleeping", "computing on one core"}
    assert {row["pace"] for row in stalls} == {"fixed", "following"}
    assert all(row["n"] == 4 and row["share_of_step_p50"] <= row["share_of_step_max"] for row in stalls)
    ratio = next(row for row in rows if row["what"] == "resident" and row["name"] == "ratio")
    assert ratio["largest_difference"] < 1e-5 and ratio["over_per_sample"]["median"] > 0


def test_an_unknown_section_is_refused(bench: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench.main(["--sections", "stall,nonsense"])
    assert "got nonsense" in capsys.readouterr().err


def test_replay_of_a_queue_by_hand(bench: Any) -> None:
    """Depth 1: batch k + 2 begins when batch k is taken; a slow batch costs what the one ahead does not cover."""
    from loader_stalls import replay

    steady = replay([2.0] * 40, 2.0, 1)
    assert steady == [0.0] * 34
    # made at 0, +1, ... while the consumer asks every 2: the slow batch 20 begins when 18 is taken and costs 8 - 4.
    waits = replay([1.0] * 20 + [8.0] + [1.0] * 19, 2.0, 1)
    assert sum(w > 0 for w in waits) == 1 and max(waits) == pytest.approx(4.0)
    assert max(replay([1.0] * 20 + [8.0] + [1.0] * 19, 2.0, 2)) == pytest.approx(2.0)  # one batch more ahead


def test_equal_work_counts_what_it_says(bench: Any, tmp_path: Path) -> None:
    import loader_contenders as lc
    from loader_stalls import equal_work

    files = lc.make_files(tmp_path, 1, size=(64, 48))
    for threads in (1, 2):
        times = equal_work(files.read(0), threads, 3, 5)
        assert len(times) == 5 and min(times) > 0


def test_full_speed_does_not_count_the_batches_that_lay_ready(bench: Any) -> None:
    """After a paced stretch the ring is full: its batches would shorten the step that is to be as long as one takes."""
    import time

    from loader_stalls import WARM, timed

    def batches(ready: int) -> Iterator[int]:
        for number in range(100):
            time.sleep(0.0 if number < ready else 0.004)
            yield number

    rest = batches(WARM)
    times = timed(rest, 5)
    assert len(times) == 5 and min(times) >= 0.004
    assert next(rest) == WARM + 5


def test_a_pace_leaves_out_what_the_threads_waited(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two threads: 4 s between deliveries, in which both waited for 1 s, are 3 s per batch; the oldest is forgotten."""
    import loader_stalls

    clock, idle = [0.0], [0.0]
    monkeypatch.setattr(loader_stalls.time, "perf_counter", lambda: clock[0])
    pace = loader_stalls.Pace(lambda: idle[0], threads=2, count=2)
    for passed, waited in ((0.0, 0.0), (9.0, 0.0), (4.0, 2.0), (4.0, 2.0)):
        clock[0], idle[0] = clock[0] + passed, idle[0] + waited
        pace.mark()
    assert pace.seconds() == pytest.approx(3.0)
