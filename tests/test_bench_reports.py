"""Tables and plots say what the results files say, and the regression check compares only what can be compared."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import gpu_check, plots, tables
from benchmarks.regress import __main__ as regress

ROOT = Path(__file__).parent.parent
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


def test_readme_tables_are_those_of_the_results():
    text = (ROOT / "benchmarks" / "README.md").read_text()
    assert tables.between_markers(text, tables.generated()) == text, "run python -m benchmarks.tables --write"


def test_loss_table(tmp_path):
    again = [loss_record("eager", 1.0), loss_record("eager", 300.0), loss_record("cpu", 100.0)]
    bare = [loss_record("cpu-op", 50.0, "gradient"), loss_record("eager", 299.0, "gradient")]
    text = tables.generated([written(tmp_path / "r.jsonl", again + bare)])
    lines = text.splitlines()
    assert "| 256 x 100 | float32 | wall | eager | 300 [270, 330] | 3.00 |" in lines  # the later of two measurements
    assert "| 256 x 100 | float32 | wall | ours (C++) | 100 [90, 110] | 1.00 |" in lines
    assert "| 256 x 100 | float32 | wall | ours (C++), bare op | 50 [45, 55] | 0.50 |" in lines
    assert sum("eager" in line for line in lines) == 1
    assert "peak MB" not in text and "launches" not in text  # nobody measured them
    assert "`r.jsonl`: A machine, 3 threads, torch 9.9, commit abc, 2020-01-02; n = 12." in text
    assert "`python -m somewhere`. Not there: liger (not installed)." in text


def step_record(variant, low, high):
    shape = {"model": "net", "rows": 8, "classes": 5, "size": 32, "mode": "eager", "dtype": "float32"}
    ratio = {"ratio": (low + high) / 2, "ratio_low": low, "ratio_high": high, "clock": "cpu", "base": "ce"}
    times = {"median_us": 2e4, "p20_us": 1e4, "p80_us": 3e4, "n": 30, "peak_bytes": 3_000_000, "peak_ratio": 1.0}
    return {"bench": "step", "variant": variant, **shape, **ratio, **times, **WHERE}


def test_step_table(tmp_path):
    steps = [step_record("ce", 1, 1), step_record("ce_again", 0.99, 1.01), step_record("dlb", 1.0, 1.02)]
    text = tables.generated([written(tmp_path / "s.jsonl", steps)])
    row = "| net, 8 rows of 32 px, float32, eager | dlb | 20.0 [10.0, 30.0] | 1.0100 [1.0000, 1.0200] | 3.0 | 1.0000 |"
    assert row in text
    assert "eager: at most 1.03 x the time of ce: met; at most 1.01 x its peak memory: met." in text


def test_tables_go_between_markers(tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{tables.BEGIN}\nold\n{tables.END}\nafter\n")
    results = written(tmp_path / "r.jsonl", [loss_record("cpu", 7.0)])
    monkeypatch.setattr(sys, "argv", ["tables", str(results), "--write", str(page)])
    assert tables.main() == 0
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith(f"{tables.END}\nafter\n")
    assert "7 [6, 8]" in text and "old" not in text
    with pytest.raises(ValueError, match="expected the lines"):
        tables.between_markers("no markers", "x")


def test_a_damaged_results_file_is_named(tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"bench": "step"\n')
    with pytest.raises(ValueError, match=r"bad\.jsonl:1: not a JSON record"):
        tables.generated([tmp_path / "bad.jsonl"])


def sweep(gpu=False):
    kind = {"kind": "device_cold", "launches": 1} if gpu else {}
    bytes_ = {"copy_bandwidth": 1e10, "least_bytes_per_logit": 12}
    names = [("cuda" if gpu else "cpu", "autograd", 1), ("eager", "autograd", 4), ("compile", "autograd", 2)]
    over = [
        loss_record(name, slow * classes, path, classes, sweep="classes", **bytes_, **kind)
        for name, path, slow in names
        for classes in (10, 100, 1000)
    ]
    batch = [loss_record(n, s * rows, p, 1000, rows, sweep="batch", **bytes_) for n, p, s in names for rows in (8, 64)]
    return over + batch


@pytest.mark.parametrize("gpu", [False, True])
def test_plots(tmp_path, monkeypatch, capsys, gpu):
    results = written(tmp_path / "sweep.jsonl", sweep(gpu))
    monkeypatch.setattr(sys, "argv", ["plots", str(results), "--out", str(tmp_path / "out")])
    assert plots.main() == 0
    kind = "device_cold" if gpu else "wall"
    names = [f"sweep-{name}-float32-{k}.svg" for name, k in (("cost", kind), ("speedup", kind), ("batch", "wall"))]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(names)
    assert capsys.readouterr().out.splitlines() == [str(tmp_path / "out" / name) for name in names]
    first = (tmp_path / "out" / names[0]).read_bytes()
    assert len(first) < 100_000
    plots.plot([results], tmp_path / "out")
    assert (tmp_path / "out" / names[0]).read_bytes() == first  # the same records give the same file


def lines_of(paint, records, gpu):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots()
    paint(axes, records, gpu)
    found = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.get_lines()}
    plt.close(figure)
    return found


def test_plotted_values():
    over = [r for r in sweep() if r["sweep"] == "classes"]
    cost = lines_of(plots.cost_of_classes, over, False)
    # 4 us per class for 256 rows: 15.625 ns per logit; a copy at 10 GB/s takes 1.2 ns for 12 bytes.
    assert cost["eager"] == ([10, 100, 1000], pytest.approx([15.625] * 3))
    assert cost["copy of as many bytes"] == ([10, 100, 1000], pytest.approx([1.2] * 3))
    on_gpu = lines_of(plots.cost_of_classes, over, True)
    assert on_gpu["copy of as many bytes"][1] == pytest.approx([10] * 3)  # the roof, GB/s
    assert on_gpu["ours (C++)"][1] == pytest.approx([12 * 256 * 1e-3] * 3)
    faster = lines_of(plots.speedup_over_classes, over, False)
    assert faster["torch.compile"][1] == pytest.approx([2] * 3)
    assert faster["eager"][1] == pytest.approx([4] * 3)
    assert "ours (C++)" not in faster
    with pytest.raises(ValueError, match="measured twice"):
        plots.curves(over + over, "classes")


def test_plots_need_a_sweep(tmp_path, monkeypatch, capsys):
    results = written(tmp_path / "r.jsonl", [loss_record("cpu", 1.0)])
    monkeypatch.setattr(sys, "argv", ["plots", str(results), "--out", str(tmp_path)])
    with pytest.raises(SystemExit):
        plots.main()
    assert "holds no sweep" in capsys.readouterr().err


def test_gpu_table_has_losses_steps_and_loaders(tmp_path, capsys):
    loader = {"what": "loader on a GPU", "name": "ResidentLoader", "missing": "no set"}
    cold = {"kind": "device_cold", "of_copy_bandwidth": 0.9, "launches": 1}
    losses = [loss_record("cuda", 9.0, **cold), loss_record("cuda", 5.0, "gradient", **cold)]
    gpu_check.table(written(tmp_path / "g.jsonl", [*losses, step_record("dlb", 1.0, 1.02), loader]))
    text = capsys.readouterr().out
    assert "cuda  " in text and "cuda grad" in text and "90.0%" in text
    assert "step: net eager   dlb" in text and "1.0100 [1.0000, 1.0200] x ce" in text
    assert "not measured: no set" in text


def times(median, least=None):
    return {"median": median, "min": median if least is None else least}


def test_regression_needs_median_and_fastest_round():
    old = {"a": times(1e-4), "gone": times(1.0)}
    assert regress.slower({"a": times(1.2e-4)}, old, 0.25) == []
    assert regress.slower({"a": times(1.4e-4, 1e-4)}, old, 0.25) == []  # noise: the fastest round is as fast as ever
    assert regress.slower({"a": times(1.3e-4), "new": times(9.0)}, old, 0.25) == ["a: 1.30 x, 100.0 us became 130.0 us"]


def test_regression_refuses_another_machine_and_no_baseline(tmp_path, capsys, monkeypatch):
    here = regress.here()
    assert regress.refusal(here, here) is None
    old = tmp_path / "old.json"
    old.write_text(json.dumps({**here, "hardware": "Another machine", "torch": "1.0", "benchmarks": {}}))
    assert regress.main(["--baseline", str(old)]) == 2
    error = capsys.readouterr().err
    assert "hardware: Another machine there" in error and "torch: 1.0 there" in error and "--save" in error
    monkeypatch.setattr(regress, "RESULTS", tmp_path / "nowhere")
    assert regress.main([]) == 2
    assert "there is no baseline" in capsys.readouterr().err


def test_regression_benchmarks_run():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--benchmark-disable"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    for name in [name for name in env if name.startswith("PYTEST_XDIST")]:
        del env[name]
    done = subprocess.run([*command, "benchmarks/regress"], cwd=ROOT, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stdout
    assert "passed" in done.stdout
