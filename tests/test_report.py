"""Tables, pictures and pages say what the run folders hold: small folders with numbers chosen by hand."""

import dataclasses
import itertools
import json
import math
import re
import statistics
from html.parser import HTMLParser

import pytest

from dlb_fast import cli, report
from dlb_fast.presets import load_preset
from dlb_fast.report import pictures
from dlb_fast.train.config import RunConfig, override
from dlb_fast.train.log import RunLog
from dlb_fast.train.loop import Trainer
from dlb_fast.train.methods import resolve
from dlb_fast.train.run import RunFolder

BINS = {"share": [0.25, 0.0, 0.75], "accuracy": [0.5, 0.0, 1.0], "confidence": [0.25, 0.0, 0.875]}


def make_run(path, method, seed, accuracies, bins=BINS, **changes):
    folder = RunFolder(path)
    folder.create(resolve(override(load_preset("digits"), method=method, seed=seed, **changes)), "torch")
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
    return [[c.strip() for c in line.strip("|").split("|")] for line in str(table).splitlines()]


def test_compare_table_by_hand(runs):
    head, rule, dlb, ce = cells(report.compare_table(runs))
    assert [cell.endswith(":") for cell in rule] == [False] + [True] * (len(head) - 1)  # numbers to the right
    assert dlb[head.index("last ECE %")] == "10.0 ± 0.0"
    column = head.index("last top-1 %")
    spread = statistics.stdev([90, 60])
    assert dlb[column] == f"75.00 ± {spread:.2f}" and ce[column] == f"75.00 ± {statistics.stdev([80, 70]):.2f}"
    assert dlb[head.index("best top-1 %")] == f"80.00 ± {statistics.stdev([90, 70]):.2f}"
    assert dlb[head.index("images seen")] == "200" and dlb[head.index("seeds")] == "2" and dlb[0] == "dlb"


def test_paired_table_by_hand(runs):
    head, _, row = cells(report.paired_table(runs, "dlb"))
    assert row == ["dlb - ce", f"0.00 ± {statistics.stdev([10, -10]):.2f}", "1 of 2"] and "dlb is ahead" in head[2]
    assert report.paired_table(runs, "nobody") is None


def test_a_single_run_has_no_spread(runs):
    assert "±" not in str(report.compare_table(runs[:1]))


def test_only_seeds_of_one_config_are_averaged(tmp_path):
    """Another learning rate is another method, and the same seed twice is no spread over seeds."""
    makes = [("a", 0, 0.05, 0.5), ("b", 1, 0.05, 0.7), ("c", 0, 0.1, 0.9), ("d", 0, 0.2, 0.3), ("e", 0, 0.2, 0.4)]
    runs = [report.read_run(make_run(tmp_path / n, "dlb", seed, [v], lr=lr)) for n, seed, lr, v in makes]
    rows = {row[0]: row[1:3] for row in report.compare_table(runs).rows}
    assert rows.pop("dlb, lr 0.05") == ["2", f"60.00 ± {statistics.stdev([50, 70]):.2f}"]
    assert rows.pop("dlb, lr 0.1") == ["1", "90.00"]
    assert sorted(rows.values()) == [["1", "30.00"], ["1", "40.00"]]  # told apart by their folders
    assert all("dlb, lr 0.2 (" in label for label in rows)


def test_a_folder_of_runs(tmp_path, capsys):
    for name, accuracy in (("a", 0.5), ("b", 0.7)):
        make_run(tmp_path / "runs" / name, name.replace("a", "ce").replace("b", "dlb"), 0, [accuracy])
    (tmp_path / "runs/notes").mkdir()
    broken = make_run(tmp_path / "runs/c", "dlb", 0, [0.5])
    (broken / "metrics.csv").write_text("step,loss\n1,abc\n")
    root = tmp_path / "runs"
    assert cli.main(["report", str(root)]) == 0
    out, err = capsys.readouterr()
    assert "left out: " in err and str(broken / "metrics.csv") in err
    assert {row[0] for row in cells("\n".join(out.splitlines()[2:4]))} == {"ce", "dlb"}
    for path in ("report.html", "report.md", "curves.png", "a/report.html", "b/report.html"):
        assert str(root / path) in out and (root / path).exists()
    Page((root / "report.html").read_text(encoding="utf-8"))
    assert cli.main(["report", str(root / "a"), str(broken)]) == 2  # asked for by name, so it is no line but an error
    assert cli.main(["report", str(tmp_path / "runs/notes")]) == 2
    assert "there is no run in" in capsys.readouterr().err


def test_the_page_of_one_run_goes_where_out_says(tmp_path):
    path = make_run(tmp_path / "run", "dlb", 0, [0.5])
    assert cli.main(["report", str(path), "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out/report.html").exists() and not (path / "report.html").exists()


def test_a_report_over_several_does_not_replace_the_page_of_one(runs, capsys):
    paths = [str(run.path) for run in runs[:2]]
    assert cli.main(["report", *paths, "--out", paths[0]]) == 2
    assert "is the folder of a run" in capsys.readouterr().err
    assert cli.main(["report", *paths]) == 0  # beside the runs
    assert (runs[0].path.parent / "report.md").exists()


def test_page_and_curves(runs, tmp_path, capsys):
    out = tmp_path / "page"
    assert cli.main(["report", *(str(r.path) for r in runs), "--out", str(out)]) == 0
    text = (out / "report.md").read_text()
    assert str(report.compare_table(runs)) in text and "dlb-fast report" in text
    assert "20 % of the training labels" in text and "![curves](curves.png)" in text
    page = Page((out / "report.html").read_text(encoding="utf-8"))
    assert page.tables[0] == [list(report.compare_table(runs).head), *report.compare_table(runs).rows]
    image = (out / "curves.png").read_bytes()
    assert image.startswith(b"\x89PNG") and len(image) > 10_000
    said = capsys.readouterr().out
    assert str(report.compare_table(runs)) in said
    for run in runs:
        assert str(run.path / "report.html") in said and run.path.name in (run.path / "report.html").read_text()


def test_curves_gain_a_panel_where_bins_are_stored(tmp_path):
    for name, bins, panels in (("with", BINS, 4), ("without", None, 3)):
        run = report.read_run(make_run(tmp_path / name, "dlb", 0, [0.5], bins))
        assert (run.calibration is None) == (bins is None)
        with pictures.style():
            assert len(pictures.curves_figure([run]).axes) == panels


def test_reliability_of_several_seeds_is_pooled():
    other = {"share": [0.75, 0.0, 0.25], "accuracy": [0.1, 0.0, 0.2], "confidence": [0.2, 0.0, 0.9]}
    low, high = report.pooled_reliability([BINS, other])
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
        (lambda p: (p / "confusion.json").write_text('{"step": 10}'), r"confusion\.json is damaged"),
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


# The page of one run


class Page(HTMLParser):
    """Checks that every element is closed in order; collects text, attributes, elements and tables."""

    def __init__(self, text):
        super().__init__()
        self.open, self.words, self.attributes, self.count, self.raw = [], [], [], {}, text
        self.tables, self.sides, self.inside = [], [], []  # rows of texts, rows of left or right; what a table is in
        self.holders = []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.count[tag] = self.count.get(tag, 0) + 1
        self.attributes += attributes
        classes = (dict(attributes).get("class") or "").split()
        if tag == "table":
            self.tables.append([])
            self.sides.append([])
            self.inside.append([name for holder in self.holders for name in holder])
        elif tag == "tr":
            self.tables[-1].append([])
            self.sides[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self.sides[-1][-1].append("left" if "text" in classes else "right")
        if tag != "meta":
            self.open.append(tag)
            self.holders.append(classes)

    def handle_startendtag(self, tag, attributes):
        assert "svg" in self.open  # HTML knows no <a/>
        self.count[tag] = self.count.get(tag, 0) + 1
        self.attributes += attributes

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"
        self.holders.pop()

    def handle_data(self, data):
        if "style" not in self.open:
            self.words.append(data)
        if {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += data

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())

    def table(self, *head):
        """The rows below the head that begins so."""
        return next(rows[1:] for rows in self.tables if rows and rows[0][: len(head)] == list(head))


def page_of(path):
    return Page(report.write_page(report.read_run(path)).read_text(encoding="utf-8"))


@pytest.fixture
def folder(tmp_path):
    return make_run(tmp_path / "run", "dlb", 3, [0.5, 0.9, 0.8125])


def test_page_tells_what_the_files_hold(folder):
    (folder / "result.json").write_text(json.dumps({"step": 30, "peak_mib": 321.4}))
    page = page_of(folder)
    for said in ("81.25 %", "90.00 %", "321 MiB", "Finished after 30 steps", "Seed 3.", "small_cnn on digits"):
        assert said in page.text, said
    assert [row[4] for row in page.table("step", "epoch")] == ["50.00", "90.00", "81.25"]  # a row per evaluation
    for group, field, value in (("optim", "momentum", "0.9"), ("data", "per_class", "20"), ("train", "seed", "3")):
        assert group in page.text and any([field, value] in rows for rows in page.tables)
    assert f"torch {json.loads((folder / 'versions.json').read_text())['torch']}" in page.text
    assert f"dlb-fast train --resume --out {folder}" in page.text
    assert page.table("confidence %")[-1] == ["66.7 - 100.0", "75.0", "100.0", "87.5"]
    drawn = {title for title in report.PANELS if title in page.text}
    assert drawn == {"Top-1 accuracy, %", "Training loss", "Test NLL", "Calibration error, %", "Learning rate"}


def test_an_unfinished_run_says_so(folder):
    assert "Not finished: this is the run at its evaluation at step 30." in page_of(folder).text
    (folder / "metrics.csv").unlink()  # killed before its first evaluation
    page = page_of(folder)
    assert "there is no evaluation yet; this is the run at step 25" in page.text and "Training loss" in page.text
    assert report.compare_table([report.read_run(folder)]).rows[0][2:] == ["-"] * 8
    make_run(folder, "dlb", 3, [0.5, 0.9, 0.8125])
    (folder / "result.json").write_text(json.dumps({"step": 20}))  # finished once, now training longer
    assert "Not finished" in page_of(folder).text


def test_page_needs_nothing_from_elsewhere(folder):
    page = page_of(folder)
    assert "default-src 'none'" in page.raw
    names = {name for name, _ in page.attributes}
    assert not names & {"src", "href", "srcset", "action", "data"} and not any(n.startswith("on") for n in names)
    assert not {"script", "link", "img", "iframe", "object", "base", "image"} & set(page.count)
    inside = [value for name, value in page.attributes if name == "xlink:href"]
    assert all(value.startswith("#") for value in inside) and set(re.findall(r"url\((.)", page.raw)) <= {"#"}
    named = {value for name, value in page.attributes if "://" in (value or "")}
    assert named == {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}  # namespaces of SVG
    assert "@import" not in page.raw and page.raw.count("://") == 2 * page.count["svg"]
    assert "prefers-color-scheme: dark" in page.raw


def test_every_text_is_escaped(tmp_path):
    evil = "</pre><script>alert('x')</script>\"&amp;"
    path = tmp_path / "<b onload=x>&run"
    make_run(path, "dlb", 0, [0.5])
    folder = RunFolder(path)
    folder.create(override(folder.read_config(), source=f"imagefolder:{evil}", model=evil), f"<i>{evil}")
    page = page_of(path)
    assert "script" not in page.count and "b" in page.count and "i" not in page.count and "<b o" not in page.raw
    assert f"imagefolder:{evil}" in page.text and "<b onload=x>&run" in page.text and f"<i>{evil}" in page.text
    assert "'" + str(path) + "'" in page.text  # commands can be pasted into a shell


def test_a_run_with_hardly_anything_makes_a_page(tmp_path):
    path = make_run(tmp_path / "run", "ce", 0, [0.5], bins=None)
    (path / "metrics.csv").write_text("step,epoch,loss\n1,0.5,\n")
    (path / "metrics.jsonl").unlink()
    (path / "versions.json").unlink()
    page = page_of(path)
    assert "stored no reliability bins" in page.text and not re.search(r"\bnan\b", page.text)
    assert page.count.get("svg", 0) == 0 and "nothing to draw yet" in page.text


def test_curves_leave_out_what_is_not_finite(folder):
    run = report.read_run(folder)
    for values in ([math.nan, 2.0, math.inf], [0.0, 0.0, 0.0], [-1e30, 0.0, 1e30]):
        rows = [{**row, "loss": value} for row, value in zip(run.rows, values, strict=True)]
        page = Page(report.render(dataclasses.replace(run, rows=rows, steps=[])))
        assert "Training loss" in page.text and not re.search(r"\bnan\b", page.raw)


def test_the_same_run_makes_the_same_page(folder):
    run = report.read_run(folder)
    assert report.render(run) == report.render(run)


def test_bins_of_a_model_that_answers_nan_are_left_out(tmp_path):
    nan = {"share": [0.5, 0.5], "accuracy": [0.5, math.nan], "confidence": [0.5, math.nan]}
    assert "stored no reliability bins" in page_of(make_run(tmp_path / "run", "dlb", 0, [0.5], bins=nan)).text


def test_training_leaves_a_page_and_its_failure_is_no_failure_of_the_run(tmp_path, monkeypatch, capsys):
    flags = ["train", "--data", "synthetic:40,2,8", "--batch-size", "20", "--per-class", "None", "--epochs", "2"]
    flags += ["--label-noise", "0", "--log-every", "1"]
    assert cli.main([*flags, "--out", str(tmp_path / "a")]) == 0
    page = Page((tmp_path / "a/report.html").read_text())
    assert page.count["svg"] == len(report.PANELS) + 1 and all(title in page.text for title in report.PANELS)
    counts = json.loads((tmp_path / "a/confusion.json").read_text())
    result = json.loads((tmp_path / "a/result.json").read_text())
    assert counts["step"] == result["step"] and json.loads(counts["classes"]) == ["class_0", "class_1"]
    right = sum(n for target, predicted, n in counts["pairs"] if target == predicted)
    assert sum(n for *_, n in counts["pairs"]) == result["test_count"]
    assert right / result["test_count"] == result["test_top1"] and "test_confusion" not in result
    assert [row[0] for row in page.table("class", "images")] == ["class_0", "class_1"]
    assert f"page: {tmp_path}/a/report.html" in capsys.readouterr().err
    monkeypatch.setattr(report, "write_page", lambda run: 1 / 0)
    assert cli.main([*flags, "--out", str(tmp_path / "b")]) == 0
    assert "its page could not be written" in capsys.readouterr().err
    assert (tmp_path / "b/result.json").exists()


def test_a_start_removes_the_page_of_an_earlier_state(folder):
    """A resumed or new run that ends before its own page is written must not be shown by the older one."""
    page_of(folder)
    run = RunFolder(folder)
    run.create(run.read_config(), "torch")
    assert not (folder / "report.html").exists()
    RunLog(folder, quiet=True).confusion({"step": 30, "classes": None, "pairs": [[0, 0, 1]]})
    run.clear()
    assert not (folder / "confusion.json").exists()


def test_a_run_stopped_before_its_first_evaluation_has_its_own_page(tmp_path, monkeypatch):
    def stop(self):
        self.stop.signal = 15  # SIGTERM
        return original(self)

    original = Trainer.optimizer_step
    monkeypatch.setattr(Trainer, "optimizer_step", stop)
    flags = ["train", "--data", "synthetic:40,2,8", "--batch-size", "20", "--epochs", "2", "--quiet"]
    assert cli.main([*flags, "--out", str(tmp_path / "a")]) == 0
    assert "there is no evaluation yet" in Page((tmp_path / "a/report.html").read_text()).text


# Alignment, width and fonts


def test_a_column_has_one_alignment_and_numbers_stand_right(folder):
    page = page_of(counted(folder, ["cat", "dog"], [[0, 0, 4], [0, 1, 1], [1, 1, 5]]))
    for rows, sides in zip(page.tables, page.sides, strict=True):
        for cells_, aligned in zip(zip(*rows, strict=True), zip(*sides, strict=True), strict=True):
            if "" in cells_[:1]:  # the corner of the matrix
                continue
            assert len(set(aligned)) == 1, cells_
            number = re.compile(r"[-\d.,]+( - [\d.]+)?%?")
            heads = ("step", "epoch", "images", "times", "confidence %", "loss", "accuracy %")
            assert cells_[0] not in heads or aligned[0] == "right", cells_
            assert aligned[0] == "left" or all(number.fullmatch(c) or not c for c in cells_[1:]), cells_
    decimals = [{len(c.partition(".")[2]) for c in column} for column in zip(*page.table("step"), strict=True)]
    assert all(len(found) == 1 for found in decimals)


def test_numbers_of_a_column_have_as_many_decimals():
    rows = [
        {"step": 9.0, "epoch": 0.5, "lr": 0.05},
        {"step": 1000.0, "epoch": 12.0, "lr": 0.00827},
        {"step": 1e6, "lr": 0},
    ]
    table = report.evaluations_table(rows)
    assert list(zip(*table.rows, strict=True)) == [
        ("9", "1,000", "1,000,000"),
        ("0.50", "12.00", "-"),
        ("0.05000", "0.00827", "0.00000"),
    ]
    assert report.evaluations_table([{"lr": 3e-5, "epoch": 2.0}]).rows == [("2", "0.00003000")]


def test_nothing_is_wider_than_the_page(folder):
    """Every table lies in something that scrolls or shrinks, every picture fills the width that there is."""
    names = ["a very long name of a class " * 20, "b" * 300]
    page = page_of(counted(folder, names, [[0, 1, 5], [1, 1, 5]]))
    assert all({"scroll", "groups", "figures"} & set(inside) for inside in page.inside)
    style = page.raw[page.raw.index("<style>") : page.raw.index("</style>")]
    for rule in ("svg { display: block; width: 100%;", "overflow-wrap: anywhere", ".scroll { overflow-x: auto"):
        assert rule in style, rule


def test_a_page_has_one_font_family_and_figures_of_one_width(folder):
    page = page_of(folder)
    style = page.raw[page.raw.index("<style>") : page.raw.index("</style>")]
    assert re.findall(r"font(?:-family)?:[^;]*sans-serif|monospace|serif;", style) == [
        'font: 15px/1.5 "Helvetica Neue", Arial, "Liberation Sans", sans-serif'
    ]
    assert "svg text { font-family: inherit !important; }" in style and "font-variant-numeric: tabular-nums" in style
    assert not {"pre", "code", "kbd", "samp", "tt"} & set(page.count)
    assert pictures.INK not in page.raw and "currentColor" in page.raw  # readable in dark mode


# Classes


def counted(folder, names, pairs):
    RunLog(folder, quiet=True).confusion({"step": 30, "classes": json.dumps(names), "pairs": pairs})
    return folder


def test_classes_by_hand(folder):
    """Three classes of 10, 5 and no test images. b is predicted 6 times, 3 of them right."""
    pairs = [[0, 0, 7], [0, 1, 3], [1, 1, 3], [1, 0, 1], [1, 2, 1]]
    page = page_of(counted(folder, ["a", "b", "c"], pairs))
    assert page.table("class", "images", "accuracy %", "precision %") == [
        ["a", "10", "70.0", "87.5", "b", "3"],
        ["b", "5", "60.0", "50.0", "a", "1"],
        ["c", "0", "-", "0.0", "", "0"],
    ]
    assert "3 classes, 15 test images, last evaluation. Without a test image: c." in page.text
    assert page.table("", "a", "b", "c") == [["a", "7", "3", ""], ["b", "1", "3", "1"], ["c", "", "", ""]]
    shades = [value for name, value in page.attributes if name == "style" and "--shade" in value]
    assert shades[:2] == ["--shade: 84%", "--shade: 55%"]  # roots of 0.7 and 0.3


def test_of_many_classes_the_worst_are_listed(folder):
    """1000 classes: class i of 50 images loses i // 20 of them to the next class; 999 loses all to 0; 3 has none."""
    names = [f"n{i:04d}" for i in range(1000)]
    names[998], names[997] = "", "<script>&amp;"
    lost = {i: i // 20 for i in range(1000)} | {999: 50}
    pairs = [[i, i, 50 - lost[i]] for i in range(1000) if lost[i] < 50 and i != 3]
    pairs += [[i, (i + 1) % 1000, lost[i]] for i in range(1000) if lost[i]]
    page = page_of(counted(folder, names, pairs))
    worst = page.table("class", "images")
    assert len(worst) == 20 and worst[0] == ["n0999", "50", "0.0", "0.0", "n0000", "50"]
    assert worst[1][:3] == ["n0980", "50", "2.0"]
    assert [row[0] for row in worst[18:]] == ["<script>&amp;", "class 998"] and "script" not in page.count
    confused = page.table("class", "taken for")
    assert len(confused) == 20 and confused[0] == ["n0999", "n0000", "50", "100.0"]
    assert confused[1] == ["n0980", "n0981", "49", "98.0"]
    assert "1,000 classes, 49,950 test images, last evaluation. Without a test image: n0003." in page.text
    assert "matrix" not in [value for name, value in page.attributes if name == "class"]


def test_counts_of_another_evaluation_are_not_shown(folder):
    """A resume goes back behind the file; an older run has none."""
    said = "The run has recorded no counts per class at its last evaluation."
    assert said in page_of(folder).text
    RunLog(folder, quiet=True).confusion({"step": 40, "classes": None, "pairs": [[0, 0, 1]]})
    assert said in page_of(folder).text
    RunLog(folder, quiet=True).confusion({"step": 30, "classes": "no, list", "pairs": [[0, 1, 2]]})
    assert page_of(folder).table("class", "images")[0][:3] == ["class 0", "2", "0.0"]


def test_names_that_are_no_text_and_no_formula(tmp_path):
    """Bytes of a file name that are no UTF-8, a formula of TeX, a leading underscore, a bar, a line's end."""
    odd = "_run $\\frac{$ | \udcff\n日本"
    runs = [report.read_run(make_run(tmp_path / n, "dlb", s, [v]), odd) for n, s, v in (("a", 0, 0.5), ("b", 1, 0.6))]
    path = report.write_report(tmp_path / "out", runs, title=odd, command=odd)
    assert len({line.count(" | ") for line in str(report.compare_table(runs)).splitlines()[::2]}) == 1
    assert "\\udcff" in path.read_text(encoding="utf-8")
    page = Page((tmp_path / "out/report.html").read_text(encoding="utf-8"))
    assert "_run $\\frac{$ |" in page.tables[0][1][0] and "日本 (n=2)" in page.text  # in the legend too


# Configuration


def test_configuration_shows_first_what_differs(folder):
    run = RunFolder(folder)
    assert page_of(folder).table("setting", "here", "the preset digits") == [["seed", "3", "0"]]
    run.create(override(run.read_config(), seed=0, lr=0.5), "torch")
    page = page_of(folder)
    assert page.table("setting", "here", "the preset digits") == [["lr", "0.5", "0.05"]]
    folded = page.raw[page.raw.index("<details>") :]
    assert "<summary>All settings</summary>" in folded and "momentum" in folded
    assert "momentum" not in page.raw[: page.raw.index("<details>")]
    run.create(resolve(RunConfig()), "torch")
    assert "Every setting is that of the trainer's defaults." in page_of(folder).text


# What can be read in a picture


def boxes(texts):
    return [text.get_window_extent() for text in texts if text.get_text() and text.get_visible()]


def apart(boxes, gap=2):
    return all(
        a.x1 + gap < b.x0 or b.x1 + gap < a.x0 or a.y1 < b.y0 or b.y1 < a.y0
        for a, b in itertools.combinations(boxes, 2)
    )


def legible(figure):
    """No tick's number touches another, and no legend covers a title or leaves the figure."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure).draw()
    for axes in figure.axes:
        ticks = axes.get_xticklabels() + axes.get_yticklabels()
        low, high = axes.get_xlim()
        inside = [t for t in ticks[: len(axes.get_xticklabels())] if low <= t.get_position()[0] <= high]
        assert 2 <= len(inside) <= 9 and apart(boxes(inside), gap=8), [t.get_text() for t in inside]
        if axes.get_legend():
            texts = [axes._left_title, *axes.get_legend().get_texts()]
            assert apart(boxes(texts)) and axes.get_legend().get_window_extent().x1 <= figure.bbox.x1
    for legend in figure.legends:
        box = legend.get_window_extent()
        assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 and apart(boxes(legend.get_texts()), 0)
        assert all(not box.overlaps(axes.get_tightbbox()) for axes in figure.axes)


def long_run(tmp_path, per_epoch, epochs):
    run = report.read_run(make_run(tmp_path / "long", "dlb", 0, [0.5] * epochs))
    for row in (*run.rows, *run.steps):
        row.update(step=row["step"] * per_epoch // 250, images_seen=row["images_seen"] // 100 * per_epoch)
    return run


@pytest.mark.parametrize(("per_epoch", "epochs"), [(500_000, 40), (1_281_167, 1), (1000, 3)])
def test_numbers_and_legends_do_not_run_into_each_other(per_epoch, epochs, tmp_path):
    run = long_run(tmp_path, per_epoch, epochs)
    with pictures.style():
        legible(pictures.curves_figure([run]))
        for title in ("Top-1 accuracy, %", "Training loss", "Test NLL"):
            if figure := pictures.panel(run, title):
                legible(figure)


def test_accuracy_is_drawn_in_per_cent(folder):
    with pictures.style():
        (axis,) = pictures.panel(report.read_run(folder), "Top-1 accuracy, %").axes
        curves = pictures.curves_figure([report.read_run(folder)]).axes
    assert list(axis.get_lines()[0].get_ydata()) == [50, 90, 81.25] == list(curves[0].get_lines()[0].get_ydata())
    assert curves[0].get_title("left") == "test top-1, %" and curves[3].get_ylabel() == "accuracy, %"


def test_fourteen_methods_differ_in_grey_and_have_a_legend(tmp_path):
    one = long_run(tmp_path, 500_000, 2)
    runs = [dataclasses.replace(one, label=f"method number {i}") for i in range(14)]
    with pictures.style():
        for figure in (pictures.curves_figure(runs), pictures.noise_figure({0.0: runs, 0.4: runs})):
            lines = [line for line in figure.axes[0].get_lines() if line.get_linestyle() != "None"]
            assert len({(line.get_linestyle(), line.get_marker()) for line in lines}) == 14
            legible(figure)
            assert len(figure.legends[0].get_texts()) == 14
