"""Tables and plots say what the results files say."""

from __future__ import annotations

import json
import sys

import pytest

from benchmarks import gpu_check, plots, tables

pytestmark = pytest.mark.slow  # guards the benchmarks, not the package

WHERE = {
    "date": "2020-01-02T03:04:05+00:00", "commit": "abc", "command": "python -m somewhere", "hardware": "A machine",
    "threads": 3, "versions": {"torch": "9.9"}, "missing": ["liger (not installed)"],
}  # fmt: skip


def loss_record(variant, median, path="autograd", classes=100, rows=256, **more):
    times = {"median_us": median, "p20_us": 0.9 * median, "p80_us": 1.1 * median, "n": 12}
    shape = {"rows": rows, "classes": classes, "dtype": "float32", "kind": "wall"}
    return {"bench": "last_batch", "variant": variant, "path": path, **times, **shape, **WHERE, **more}


def written(path, records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


def test_loss_table(tmp_path):
    again = [loss_record("eager", 1.0), loss_record("eager", 300.0), loss_record("cpu", 100.0)]
    bare = [loss_record("cpu-op", 50.0, "gradient"), loss_record("eager", 299.0, "gradient")]
    text = tables.tables_of(written(tmp_path / "r.jsonl", again + bare))
    lines = text.splitlines()
    assert "| 256 x 100 | float32 | wall | eager | 300 [270, 330] | 3.00 |" in lines  # the later of two measurements
    assert "| 256 x 100 | float32 | wall | ours (C++) | 100 [90, 110] | 1.00 |" in lines
    assert "| 256 x 100 | float32 | wall | ours (C++), bare op | 50 [45, 55] | 0.50 |" in lines
    assert sum("eager" in line for line in lines) == 1
    assert "peak MB" not in text and "launches" not in text  # nobody measured them
    told = text.replace("\n", " ")
    assert "`r.jsonl`: A machine, 3 threads, torch 9.9, commit abc, 2020-01-02; n = 12." in told
    assert "`python -m somewhere`. Not there: liger (not installed)." in told


def step_record(variant, low, high):
    shape = {"model": "net", "rows": 8, "classes": 5, "size": 32, "mode": "eager", "dtype": "float32"}
    ratio = {"ratio": (low + high) / 2, "ratio_low": low, "ratio_high": high, "clock": "cpu", "base": "ce"}
    times = {"median_us": 2e4, "p20_us": 1e4, "p80_us": 3e4, "n": 30, "peak_bytes": 3_000_000, "peak_ratio": 1.0}
    return {"bench": "step", "variant": variant, **shape, **ratio, **times, **WHERE}


def test_step_table(tmp_path):
    steps = [step_record("ce", 1, 1), step_record("ce_again", 0.99, 1.01), step_record("dlb", 1.0, 1.02)]
    text = tables.tables_of(written(tmp_path / "s.jsonl", steps))
    row = "| net, 8 x 32 px, float32, eager | dlb | 20.0 [10.0, 30.0] | 1.010 [1.000, 1.020] | 3.0 | 1.0000 |"
    assert row in text
    assert "eager: at most 1.03 x the time of ce: met; at most 1.01 x its peak memory: met." in text.replace("\n", " ")


def test_the_command_prints_the_tables_of_a_file(tmp_path, capsys):
    assert tables.main([str(written(tmp_path / "r.jsonl", [loss_record("cpu", 7.0)]))]) == 0
    assert "7 [6, 8]" in capsys.readouterr().out


def test_a_damaged_results_file_is_named(tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"bench": "step"\n')
    with pytest.raises(ValueError, match=r"bad\.jsonl:1: not a JSON record"):
        tables.tables_of(tmp_path / "bad.jsonl")


def sweep(sweep, shapes):
    """Times in proportion to the logits: ours, eager four times and torch.compile twice as slow; a copy at 10 GB/s."""
    roof = {"copy_bandwidth": 1e10, "least_bytes_per_logit": 12, "sweep": sweep}
    return [
        loss_record(name, slow * rows * classes / 256, classes=classes, rows=rows, **roof)
        for name, slow in (("cpu", 1), ("eager", 4), ("compile", 2))
        for rows, classes in shapes
    ]


CLASSES = sweep("classes", [(256, 10), (256, 100), (256, 1000)])
ROWS = sweep("batch", [(8, 1000), (64, 1000)])


def test_a_figure_for_each_dtype_and_timing(tmp_path, monkeypatch, capsys):
    half = [{**record, "dtype": "bfloat16", "kind": "device_cold"} for record in CLASSES]
    results = written(tmp_path / "sweep.jsonl", [*CLASSES, *ROWS, *half])
    monkeypatch.setattr(sys, "argv", ["plots", str(results), "--out", str(tmp_path / "out")])
    assert plots.main() == 0
    names = [tmp_path / "out" / f"sweep-{end}.svg" for end in ("float32-wall", "bfloat16-device_cold")]
    assert capsys.readouterr().out.split() == [str(name) for name in names]
    first = names[0].read_bytes()
    plots.plot(results, tmp_path / "out")
    assert names[0].read_bytes() == first  # the same records give the same file


def test_plotted_values():
    figure = pytest.importorskip("matplotlib.figure")

    def lines(paint, records):
        axes = figure.Figure().subplots()
        paint(axes, records)
        return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.get_lines()}

    cost = lines(plots.cost_of_classes, CLASSES)
    # 4 us per class for 256 rows: 15.625 ns per logit; a copy at 10 GB/s takes 1.2 ns for 12 bytes.
    assert cost["eager"] == ([10, 100, 1000], pytest.approx([15.625] * 3))
    assert cost["copy of as many bytes"] == ([10, 100, 1000], pytest.approx([1.2] * 3))
    faster = lines(plots.speedup_over_classes, CLASSES)
    assert faster["torch.compile"][1] == pytest.approx([2] * 3)
    assert faster["eager"][1] == pytest.approx([4] * 3)
    assert "ours (C++)" not in faster
    assert lines(plots.time_of_rows, ROWS)["eager"][0] == [8, 64]
    with pytest.raises(ValueError, match="measured twice"):
        lines(plots.cost_of_classes, CLASSES + CLASSES)


def test_loss_time_by_hand(tmp_path):
    figure = pytest.importorskip("matplotlib.figure")
    records = [loss_record(n, t, classes=c) for c in (100, 1000) for n, t in (("cpu", 50.0 * c), ("eager", 125.0 * c))]
    path = written(
        tmp_path / "cpu-1.jsonl", [*records, loss_record("eager", 1.0, "gradient"), loss_record("cpu-op", 1)]
    )
    made = []
    keep = figure.Figure.savefig
    figure.Figure.savefig = lambda self, *a, **k: made.append(self) or keep(self, *a, **k)
    try:
        plots.loss_time(path, tmp_path / "a.svg")
    finally:
        figure.Figure.savefig = keep
    few, many = made[0].axes
    assert [t.get_text().strip() for t in few.texts] == ["12.5 ms, 2.5 x ours", "5.0 ms"]
    assert [bar.get_width() for bar in many.patches] == [125, 50] and many.get_xlabel() == "ms"
    assert [t.get_text() for t in few.get_yticklabels()] == ["eager", "ours (C++)"]
    assert list(few.get_lines()[0].get_xdata()) == pytest.approx([11.25, 13.75])  # the 20 and the 80 % quantile
    assert "n = 12, 12 calls" in made[0].get_supxlabel()


def test_the_committed_loss_time_is_that_of_the_newest_results():
    path = tables.newest("cpu-*.jsonl")
    caption = plots.loss_caption(path, plots.loss_records(path))
    stale = "docs/loss-time.svg is stale: python -m benchmarks.plots"
    assert caption in plots.LOSS_TIME.read_text(encoding="utf-8"), stale


def test_plots_need_a_sweep(tmp_path, monkeypatch, capsys):
    results = written(tmp_path / "r.jsonl", [loss_record("cpu", 1.0)])
    monkeypatch.setattr(sys, "argv", ["plots", str(results), "--out", str(tmp_path)])
    with pytest.raises(SystemExit):
        plots.main()
    assert "holds no sweep" in capsys.readouterr().err


def test_gpu_table_has_losses_steps_and_loaders():
    loader = {"what": "loader on a GPU", "name": "ResidentLoader", "missing": "no set"}
    cold = {"kind": "device_cold", "of_copy_bandwidth": 0.9, "launches": 1}
    losses = [loss_record("cuda", 9.0, **cold), loss_record("cuda", 5.0, "gradient", **cold)]
    text = "\n".join(gpu_check.table([*losses, step_record("dlb", 1.0, 1.02), loader]))
    assert "cuda  " in text and "cuda grad" in text and "90.0%" in text
    assert "step: net eager   dlb" in text and "1.0100 [1.0000, 1.0200] x ce" in text
    assert "not measured: no set" in text
