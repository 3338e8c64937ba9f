"""The page of a run: true to the run's files, self-contained, well-formed and safe against its own contents."""

import json
import math
import re
from html.parser import HTMLParser

import pytest
from test_report import BINS, make_run

from dlb_fast import cli, report
from dlb_fast.report import svg
from dlb_fast.train.config import override
from dlb_fast.train.run_folder import RunFolder


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
        assert "svg" in self.open  # HTML itself knows no <a/>
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
    assert page.count["rect"] == 2 and "75.0 % of the images: accuracy 1.000, mean confidence 0.875" in page.text
    assert page.count["polyline"] == 5  # accuracy, NLL, calibration error, loss, rate: what this run has measured


def test_an_unfinished_run_says_so(folder):
    assert "Not finished: this is the run at its evaluation at step 30." in page_of(folder).text
    (folder / "result.json").write_text(json.dumps({"step": 20}))  # finished once, now training longer
    assert "Not finished" in page_of(folder).text


def test_page_needs_nothing_from_elsewhere(folder):
    page = page_of(folder)
    assert "default-src 'none'" in page.raw
    names = {name for name, _ in page.attributes}
    assert not names & {"src", "href", "srcset", "action", "data"} and not any(n.startswith("on") for n in names)
    assert not {"script", "link", "img", "iframe", "object", "base"} & set(page.count)
    assert "url(" not in page.raw and "@import" not in page.raw and "://" not in page.raw
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


def test_bins_of_a_model_that_answers_nan_are_left_out(tmp_path):
    nan = {"share": [0.5, 0.5], "accuracy": [0.5, math.nan], "confidence": [0.5, math.nan]}
    assert "stored no reliability bins" in page_of(make_run(tmp_path / "run", "dlb", 0, [0.5], bins=nan)).text


def test_training_leaves_a_page_and_its_failure_is_no_failure_of_the_run(tmp_path, monkeypatch, capsys):
    flags = ["train", "--data", "synthetic:40,2,8", "--batch-size", "20", "--per-class", "None", "--epochs", "2"]
    flags += ["--label-noise", "0", "--log-every", "1"]
    assert cli.main([*flags, "--out", str(tmp_path / "a")]) == 0
    page = Page((tmp_path / "a/report.html").read_text())
    assert (
        page.count["svg"] == 8
        and page.count["rect"] >= 1
        and f"page: {tmp_path}/a/report.html" in capsys.readouterr().err
    )
    monkeypatch.setattr(report, "write_page", lambda run: 1 / 0)
    assert cli.main([*flags, "--out", str(tmp_path / "b")]) == 0
    assert "its page could not be written" in capsys.readouterr().err
    assert (tmp_path / "b/result.json").exists()


# --- charts


def test_ticks_are_round_and_inside():
    assert svg.ticks(0.0, 1.0) == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert svg.ticks(20.1, 90.5) == [40.0, 60.0, 80.0]
    assert svg.ticks(1e-7, 9e-7)[0] >= 1e-7 and len(svg.ticks(-3.0, 1e9)) in (5, 6)
    assert svg.ticks(5.0, 5.0) == [5.0]


def coordinates(chart, index):
    text = re.search(rf'class="curve c{index}" points="([^"]*)"', chart).group(1)
    return [tuple(map(float, pair.split(","))) for pair in text.split()]


def test_a_line_goes_where_its_numbers_are():
    chart = svg.line("t", [svg.Series("a", [0, 5, 10], [0, 1, 4]), svg.Series("b", [0, 10], [4, 2])], "x")
    (x0, y0), (x1, y1), (x2, y2) = coordinates(chart, 0)
    assert (x0, y0) == (svg.LEFT, svg.HEIGHT - svg.BOTTOM) and (x2, y2) == (svg.WIDTH - svg.RIGHT, svg.TOP)
    assert x1 == (x0 + x2) / 2 and y1 == pytest.approx(y0 + (y2 - y0) / 4, abs=0.1)
    assert coordinates(chart, 1) == [(x0, y2), (x2, (y0 + y2) / 2)]


def test_lines_survive_what_training_writes():
    assert svg.line("t", [svg.Series("a", [1.0], [math.nan]), svg.Series("b", [], [])], "x") == ""
    for values in ([3.0], [2.0, 2.0, 2.0], [0.0, 0.0], [1.0, math.inf, 2.0], [-1e30, 1e30]):
        chart = svg.line("t", [svg.Series("a", range(len(values)), values)], "x")
        assert "nan" not in chart and "inf" not in chart and "<polyline" in chart
        assert all(0 <= y <= svg.HEIGHT for _, y in coordinates(chart, 0))
    long = svg.Series("a", range(100_001), range(100_001)).points()
    assert len(long) <= svg.MOST_POINTS and long[-1] == (100_000, 100_000) and long[0][0] < 300


def test_reliability_leaves_empty_bins_out_and_names_the_rest():
    chart = svg.reliability("t", **BINS)
    assert chart.count('class="bar"') == 2 and "25.0 % of the images: accuracy 0.500" in chart
    assert svg.reliability("t", [0.0], [0.0], [0.0]).count("rect") == 0
