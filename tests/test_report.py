"""Tables and pages say what the run folders hold: small folders with numbers chosen by hand."""

import statistics

import pytest

from dlb_fast import cli, report
from dlb_fast.presets import load_preset
from dlb_fast.report import comparison
from dlb_fast.train.config import override
from dlb_fast.train.log import RunLog
from dlb_fast.train.run_folder import RunFolder

BINS = {"share": [0.25, 0.0, 0.75], "accuracy": [0.5, 0.0, 1.0], "confidence": [0.25, 0.0, 0.875]}


def make_run(path, method, seed, accuracies, bins=BINS):
    folder = RunFolder(path)
    folder.create(override(load_preset("digits"), method=method, seed=seed), "torch")
    log = RunLog(folder.path, quiet=True)
    for number, accuracy in enumerate(accuracies, 1):
        row = {"step": 10 * number, "epoch": float(number), "images_seen": 100 * number, "lr": 0.1, "loss": 1 / number}
        log.progress(row | {"step": row["step"] - 5})
        scores = {"test_top1": accuracy, "test_nll": 0.5, "test_ece": 0.1, "test_count": 50}
        log.result({**row, **scores, **({"test_calibration": bins} if bins else {})})
    return folder.path


@pytest.fixture
def runs(tmp_path):
    made = {("dlb", 0): [0.5, 0.9], ("dlb", 1): [0.7, 0.6], ("ce", 0): [0.4, 0.8], ("ce", 1): [0.5, 0.7]}
    paths = [make_run(tmp_path / f"{m}{s}", m, s, values) for (m, s), values in made.items()]
    return [report.read_run(p) for p in paths]


def cells(table):
    return [[c.strip() for c in line.strip("|").split("|")] for line in table.splitlines()]


def test_compare_table_by_hand(runs):
    head, _, dlb, ce = cells(report.compare_table(runs))
    column = head.index("last top-1 %")
    spread = statistics.stdev([90, 60])
    assert dlb[column] == f"75.00 ± {spread:.2f}" and ce[column] == f"75.00 ± {statistics.stdev([80, 70]):.2f}"
    assert dlb[head.index("best top-1 %")] == f"80.00 ± {statistics.stdev([90, 70]):.2f}"
    assert dlb[head.index("images seen")] == "200" and dlb[head.index("seeds")] == "2" and dlb[0] == "dlb"


def test_paired_table_by_hand(runs):
    head, _, row = cells(report.paired_table(runs, "dlb"))
    assert row == ["dlb - ce", f"0.00 ± {statistics.stdev([10, -10]):.2f}", "1 of 2"] and "dlb is ahead" in head[2]
    assert report.paired_table(runs, "nobody") == ""


def test_a_single_run_has_no_spread(runs):
    assert "±" not in report.compare_table(runs[:1])


def test_page_and_curves(runs, tmp_path, capsys):
    out = tmp_path / "page"
    assert cli.main(["report", *(str(r.path) for r in runs), "--out", str(out)]) == 0
    text = (out / "report.md").read_text()
    assert report.compare_table(runs) in text and "dlb-fast report" in text and "20 % of the training labels" in text
    image = (out / "curves.png").read_bytes()
    assert image.startswith(b"\x89PNG") and len(image) > 10_000
    said = capsys.readouterr().out
    assert report.compare_table(runs) in said
    for run in runs:
        assert str(run.path / "report.html") in said and run.path.name in (run.path / "report.html").read_text()


def test_curves_gain_a_panel_where_bins_are_stored(tmp_path):
    from PIL import Image

    widths = []
    for name, bins in (("with", BINS), ("without", None)):
        run = report.read_run(make_run(tmp_path / name, "dlb", 0, [0.5], bins))
        assert (run.calibration is None) == (bins is None)
        with Image.open(report.draw_curves([run], tmp_path / f"{name}.png")) as image:
            widths.append(image.width)
    assert widths[0] == pytest.approx(widths[1] * 4 / 3, rel=0.01)


def test_reliability_of_several_seeds_is_pooled():
    other = {"share": [0.75, 0.0, 0.25], "accuracy": [0.1, 0.0, 0.2], "confidence": [0.2, 0.0, 0.9]}
    low, high = comparison.pooled_reliability([BINS, other])
    assert low == pytest.approx((0.5, (0.25 * 0.25 + 0.75 * 0.2) / 1.0, (0.25 * 0.5 + 0.75 * 0.1) / 1.0))
    assert high == pytest.approx((0.5, 0.75 * 0.875 + 0.25 * 0.9, 0.75 + 0.25 * 0.2))


def test_a_row_cut_in_half_by_a_kill_is_left_out(tmp_path):
    path = make_run(tmp_path / "run", "dlb", 0, [0.5, 0.6])
    with open(path / "metrics.jsonl", "a") as file:
        file.write('{"kind": "step", "st')
    assert [row["step"] for row in report.read_run(path).steps] == [5, 15]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda p: (p / "config.yaml").unlink(), "is not a run folder"),
        (lambda p: (p / "metrics.csv").unlink(), "no finished evaluation"),
        (lambda p: (p / "metrics.csv").write_text("step,loss\n1,abc\n"), r"metrics\.csv is damaged"),
        (lambda p: (p / "metrics.jsonl").write_text("{\n{}\n"), r"metrics\.jsonl is damaged in line 1"),
        (lambda p: (p / "versions.json").write_text("{"), r"versions\.json is damaged"),
    ],
)
def test_broken_folders_are_named(spoil, message, tmp_path):
    path = make_run(tmp_path / "run", "dlb", 0, [0.5])
    spoil(path)
    with pytest.raises(ValueError, match=message):
        report.read_run(path)
