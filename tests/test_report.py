"""Tables, pictures and pages say what the run folders hold: small folders with numbers chosen by hand."""

import dataclasses
import json
import math
import re
import statistics
from html.parser import HTMLParser

import pytest

from dlb_fast import cli, report
from dlb_fast.presets import load_preset
from dlb_fast.train.config import override
from dlb_fast.train.log import RunLog
from dlb_fast.train.run import RunFolder

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


# The page of one run


class Page(HTMLParser):
    """Checks that every element is closed in order; collects text, attributes and elements."""

    def __init__(self, text):
        super().__init__()
        self.open, self.words, self.attributes, self.count, self.raw = [], [], [], {}, text
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.count[tag] = self.count.get(tag, 0) + 1
        self.attributes += attributes
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        assert "svg" in self.open  # HTML knows no <a/>
        self.count[tag] = self.count.get(tag, 0) + 1
        self.attributes += attributes

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


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
    assert page.text.count("50.00") == 1 and "0.3333" in page.text  # a row per evaluation
    for group, field, value in (("optim", "momentum", "0.9"), ("data", "per_class", "20"), ("train", "seed", "3")):
        assert group in page.text and f"{field} {value}" in page.text
    assert f"torch {json.loads((folder / 'versions.json').read_text())['torch']}" in page.text
    assert f"dlb-fast train --resume --out {folder}" in page.text
    assert "0.667 - 1.000 75.0 1.000 0.875" in page.text  # a bin: confidence, images %, accuracy, mean confidence
    drawn = {title for title in report.PANELS if title in page.text}
    assert drawn == {"Top-1 accuracy, %", "Training loss", "Test NLL", "Calibration error", "Learning rate"}


def test_an_unfinished_run_says_so(folder):
    assert "Not finished: this is the run at its evaluation at step 30." in page_of(folder).text
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
    assert "@import" not in page.raw and page.raw.count("://") == 4
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
    assert page.count.get("svg", 0) == 0 and "no evaluation to draw" in page.text


def test_curves_leave_out_what_is_not_finite(folder):
    run = report.read_run(folder)
    for values in ([math.nan, 2.0, math.inf], [0.0, 0.0, 0.0], [-1e30, 0.0, 1e30]):
        rows = [{**row, "loss": value} for row, value in zip(run.rows, values, strict=True)]
        page = Page(report.render(dataclasses.replace(run, rows=rows, steps=[])))
        assert "Training loss" in page.text


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
    assert page.count["svg"] == 2 and all(title in page.text for title in report.PANELS)
    assert f"page: {tmp_path}/a/report.html" in capsys.readouterr().err
    monkeypatch.setattr(report, "write_page", lambda run: 1 / 0)
    assert cli.main([*flags, "--out", str(tmp_path / "b")]) == 0
    assert "its page could not be written" in capsys.readouterr().err
    assert (tmp_path / "b/result.json").exists()
