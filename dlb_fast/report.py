"""Reports from run folders: tables and curves over several runs, and one self-contained page per run.

Every figure is read from the files of the runs; nothing is computed again.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import shlex
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from dlb_fast.train.checkpoint import write_atomically
from dlb_fast.train.config import RunConfig, load_config, to_dict

__all__ = ["Run", "compare_table", "draw_curves", "noise_table", "paired_table", "read_run", "write_noise_report"]
__all__ += ["write_page", "write_report"]


# Reading a run


@dataclass(frozen=True)
class Run:
    """One run as its folder tells it.

    Args:
        path: run folder.
        label: name of its method in tables and legends.
        config: its config.
        versions: what it ran on.
        rows: a row of numbers per evaluation.
        steps: the progress rows between evaluations.
        calibration: the reliability bins of the last evaluation, or None.
        result: what a finished run has written, empty before.
    """

    path: Path
    label: str
    config: RunConfig
    versions: dict[str, Any]
    rows: list[dict[str, float]]
    steps: list[dict[str, Any]] = field(default_factory=list)
    calibration: dict[str, list[float]] | None = None
    result: dict[str, Any] = field(default_factory=dict)

    @property
    def seed(self) -> int:
        """The run's seed."""
        return self.config.train.seed

    @property
    def peak_mib(self) -> float:
        """The largest memory of a finished run in MiB; nan where it was not measured."""
        peak = self.result.get("peak_mib")
        return math.nan if peak is None else peak

    def last(self, column: str) -> float:
        """A column at the end of the run; nan where it is missing."""
        return self.rows[-1].get(column, math.nan)

    def best(self, column: str = "test_top1") -> float:
        """The largest value of a column over all evaluations; nan where it is missing."""
        return max((row[column] for row in self.rows if column in row), default=math.nan)


def read_run(path: Path | str, label: str | None = None) -> Run:
    """Read a run folder; `label` is the name of the method by default.

    Raises:
        ValueError: no config or no finished evaluation is there, or a file is damaged; names the file.
    """
    path = Path(path)
    if not (path / "config.yaml").exists():
        raise ValueError(f"report: {path} is not a run folder (it has no config.yaml)")
    config = load_config(path / "config.yaml")
    metrics = path / "metrics.csv"
    try:
        with open(metrics, newline="", encoding="utf-8") as file:
            rows = [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]
    except FileNotFoundError:
        rows = []
    except (ValueError, TypeError) as error:
        raise ValueError(f"report: {metrics} is damaged: {error}") from error
    if not rows:
        raise ValueError(f"report: {path} has no finished evaluation yet")
    lines = _json_lines(path / "metrics.jsonl")
    bins = [line["test_calibration"] for line in lines if line.get("test_calibration")]
    bins = [c for c in bins if all(value is not None for part in c.values() for value in part)]  # null was nan
    return Run(
        path,
        label or config.loss.method,
        config,
        _json(path / "versions.json"),
        rows,
        [line for line in lines if line.get("kind") == "step"],
        bins[-1] if bins else None,
        _json(path / "result.json"),
    )


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ValueError(f"report: {path} is damaged: {error}") from error


def _json_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a JSONL file; a killed process may have left half a line at its end."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    read = []
    for number, line in enumerate(lines, 1):
        try:
            read.append(json.loads(line))
        except ValueError as error:
            if number < len(lines):
                raise ValueError(f"report: {path} is damaged in line {number}: {error}") from error
    return read


def _groups(runs: Sequence[Run]) -> dict[str, list[Run]]:
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.label, []).append(run)
    return groups


# Tables over several runs


def _spread(values: Sequence[float], scale: float = 1.0, form: str = ".2f") -> str:
    """Mean ± sample standard deviation; a single value has none, and nan is left out."""
    values = [scale * v for v in values if not math.isnan(v)]
    if not values:
        return "-"
    mean = format(statistics.fmean(values), form)
    return f"{mean} ± {format(statistics.stdev(values), form)}" if len(values) > 1 else mean


def _table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns line up in a terminal too."""
    widths = [max(len(row[i]) for row in (head, *body)) for i in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(c.ljust(w) for c, w in zip(cells, widths, strict=True)) + " |"

    return "\n".join([line(head), "|" + "|".join("-" * (w + 2) for w in widths) + "|", *map(line, body)])


def compare_table(runs: Sequence[Run]) -> str:
    """A row per method: test accuracy at the end and at its best, likelihood, calibration, images, seconds, memory."""

    def row(label: str, group: list[Run]) -> dict[str, str]:
        return {
            "method": label,
            "seeds": str(len(group)),
            "last top-1 %": _spread([r.last("test_top1") for r in group], 100),
            "best top-1 %": _spread([r.best() for r in group], 100),
            "last NLL": _spread([r.last("test_nll") for r in group], form=".3f"),
            "last ECE": _spread([r.last("test_ece") for r in group], form=".3f"),
            "images seen": "/".join(sorted({f"{r.last('images_seen'):.0f}" for r in group})),
            "steps": "/".join(sorted({f"{r.last('step'):.0f}" for r in group})),
            "seconds": _spread([r.last("seconds") for r in group], form=".1f"),
            "peak MiB": _spread([r.peak_mib for r in group], form=".0f"),
        }

    rows = [row(label, group) for label, group in _groups(runs).items()]
    return _table(list(rows[0]), [list(r.values()) for r in rows])


def paired_table(runs: Sequence[Run], against: str) -> str:
    """Differences of last test accuracy to one method, seed by seed; empty when no seed is shared."""
    groups = _groups(runs)
    base = {r.seed: r for r in groups.get(against, [])}
    body = []
    for label, group in groups.items():
        gains = [base[r.seed].last("test_top1") - r.last("test_top1") for r in group if r.seed in base]
        if label != against and gains:
            wins = f"{sum(g > 0 for g in gains)} of {len(gains)}"
            body.append((f"{against} - {label}", _spread(gains, 100), wins))
    return _table(("difference of last top-1", "points", f"seeds where {against} is ahead"), body) if body else ""


def noise_table(found: Mapping[float, Sequence[Run]]) -> str:
    """A row per method, a column per share of wrong training labels: test accuracy at the end of training."""
    groups = {share: _groups(runs) for share, runs in found.items()}
    head = ["last top-1 %, mean ± standard deviation", "seeds", *(f"{100 * share:g} % wrong" for share in found)]
    body = []
    for label in next(iter(groups.values())):
        tried = [groups[share].get(label, []) for share in found]
        seeds = "/".join(sorted({str(len(runs)) for runs in tried}))
        body.append([label, seeds, *(_spread([r.last("test_top1") for r in runs], 100) for runs in tried)])
    return _table(head, body)


# Pictures over several runs


def _figure(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Any, Any]:
    """A figure of so many inches and its axes (rows, columns), which leave room for titles and labels.

    The margins are fixed: a layout engine draws every text twice and doubles the time of a page.
    """
    from matplotlib.figure import Figure  # without pyplot: no backend is chosen and no figure stays in memory

    figure = Figure(figsize=(width, height))
    left, right, bottom, top = 0.75, 0.15, 0.55, 0.4  # inches around each axis
    axis_width, axis_height = width / columns - left - right, height / rows - bottom - top
    room = {
        "left": left / width,
        "right": 1 - right / width,
        "bottom": bottom / height,
        "top": 1 - top / height,
        "wspace": (left + right) / axis_width,
        "hspace": (bottom + top) / axis_height,
    }
    return figure, figure.subplots(rows, columns, squeeze=False, gridspec_kw=room)


def _save_png(figure: Any, path: Path) -> Path:
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=110))
    return path


def draw_curves(runs: Sequence[Run], path: Path) -> Path:
    """Test accuracy, test NLL and training loss over images seen, and the reliability of the last evaluation.

    Curves are means over seeds with a band of one standard deviation. The reliability is that of all images of all
    seeds: accuracy over mean confidence, a point per bin, whose area is the share of the images in it.
    """
    panels = (("test_top1", "test top-1"), ("test_nll", "test NLL"), ("loss", "training loss"))
    calibrated = any(run.calibration for run in runs)
    count = len(panels) + calibrated
    figure, grid = _figure(5 * count, 4, columns=count)
    axes = grid[0]
    for axis, (column, title) in zip(axes, panels, strict=not calibrated):
        for label, group in _groups(runs).items():
            length = min(len(r.rows) for r in group)
            x = [group[0].rows[i]["images_seen"] for i in range(length)]
            values = [[r.rows[i].get(column, math.nan) for r in group] for i in range(length)]
            mean = [statistics.fmean(v) for v in values]
            band = [statistics.stdev(v) if len(v) > 1 else 0.0 for v in values]
            marker = "o" if length == 1 else None  # a line of one point is invisible
            (drawn,) = axis.plot(x, mean, marker=marker, label=f"{label} (n={len(group)})")
            low, high = ([m + s * b for m, b in zip(mean, band, strict=True)] for s in (-1, 1))
            axis.fill_between(x, low, high, color=drawn.get_color(), alpha=0.15, linewidth=0)
        axis.set(title=title, xlabel="images seen")
    axes[0].legend(fontsize=8)
    if calibrated:
        axis = axes[-1]
        axis.plot([0, 1], [0, 1], linestyle="--", color="grey", linewidth=1)
        for label, group in _groups(runs).items():
            points = pooled_reliability([run.calibration for run in group if run.calibration])
            x, y = [x for _, x, _ in points], [y for _, _, y in points]
            (drawn,) = axis.plot(x, y, label=label)
            axis.scatter(x, y, s=[120 * share for share, _, _ in points], color=drawn.get_color())
        axis.set(title="reliability, last evaluation", xlabel="mean confidence", ylabel="accuracy")
    for axis in axes:
        axis.grid(alpha=0.3)
    return _save_png(figure, path)


def pooled_reliability(found: Sequence[Mapping[str, Sequence[float]]]) -> list[tuple[float, float, float]]:
    """(share, mean confidence, accuracy) of every bin that is not empty, over test sets of one size."""
    points = []
    for bins in zip(*(zip(c["share"], c["confidence"], c["accuracy"], strict=True) for c in found), strict=True):
        full = sum(share for share, _, _ in bins)
        if full:
            confidence = sum(share * confidence for share, confidence, _ in bins) / full
            accuracy = sum(share * accuracy for share, _, accuracy in bins) / full
            points.append((full / len(bins), confidence, accuracy))
    return points


# Pages over several runs

EXPLANATION = """\
Mean ± sample standard deviation over seeds. *last* is the end of training; *best* picks the evaluation by the test set
itself and is therefore optimistic, as in the official code. All methods make the same number of optimiser steps on the
same number of rows; DLB and its alpha=0 control start with one half batch less. Forwards of teachers (MrKD's copies)
are not counted as images; their time is. *seconds* is the training time of one run, on a machine that may have run
others beside it; *peak* is that of the process (CPU) or of the device (GPU)."""


def _write_markdown(path: Path, parts: Sequence[str]) -> Path:
    text = "\n\n".join(part for part in parts if part) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))
    return path


def _numbers(runs: Sequence[Run]) -> list[str]:
    """A line per method: the numbers of its loss."""
    lines = []
    for label, group in _groups(runs).items():
        loss = dataclasses.asdict(group[0].config.loss)
        lines.append(f"{label}: " + ", ".join(f"{k} {v}" for k, v in loss.items() if v is not None and k != "impl"))
    return lines


def _versions(run: Run) -> str:
    return "Versions: " + ", ".join(f"{k} {v}" for k, v in run.versions.items() if v is not None)


def _caveat(config: RunConfig) -> str:
    scarce = ["few images"] * bool(config.data.per_class) + ["wrong labels"] * bool(config.data.label_noise)
    if not scarce:
        return "this says nothing about others."
    return f"{' and '.join(scarce)} favour every method that smooths targets; the gap is no promise for other settings."


def write_report(folder: Path, runs: Sequence[Run], *, title: str, command: str, against: str = "DLB") -> Path:
    """Write `curves.png` and `report.md` into a folder; returns the path of the page."""
    draw_curves(runs, folder / "curves.png")
    first = runs[0]
    data, train = first.config.data, first.config.train
    setting = [
        f"data `{data.source}`"
        + (f", {data.per_class} training images per class" if data.per_class else "")
        + (f", {100 * data.label_noise:g} % of the training labels wrong" if data.label_noise else ""),
        f"{first.last('test_count'):.0f} test images (never noisy)",
        f"model `{first.config.model.model}`",
        f"{data.batch_size} rows per step, forward `{train.forward}`",
        *_numbers(runs),
    ]
    return _write_markdown(
        folder / "report.md",
        [
            f"# {title}",
            f"Command: `{command}`",
            "\n".join(f"- {line}" for line in setting),
            compare_table(runs),
            EXPLANATION,
            paired_table(runs, against),
            f"One data set, one network: {_caveat(first.config)}",
            "![curves](curves.png)",
            _versions(first),
        ],
    )


def write_noise_report(root: Path, found: Mapping[float, Sequence[Run]], *, title: str, command: str) -> Path:
    """Write `noise.png` and `report.md` over comparisons at several shares of wrong labels; returns the page's path."""
    figure, [[axis]] = _figure(7, 5)
    shares = list(found)
    for label in _groups(found[shares[0]]):
        scores = [[100 * r.last("test_top1") for r in _groups(found[s]).get(label, [])] for s in shares]
        spread = [statistics.stdev(v) if len(v) > 1 else 0.0 for v in scores]
        axis.errorbar([100 * s for s in shares], [statistics.fmean(v) for v in scores], spread, label=label, capsize=2)
    axis.set(xlabel="wrong training labels, %", ylabel="test top-1 at the end, %")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7)
    _save_png(figure, root / "noise.png")
    parts = [f"# {title}", f"Command: `{command}`", noise_table(found)]
    for share, runs in found.items():
        parts += [f"## {100 * share:g} % wrong labels", compare_table(runs), paired_table(runs, "DLB")]
    first = found[shares[0]]
    note = "One small data set and one small network: no promise for others. Test labels are never wrong."
    numbers = "\n".join(f"- {line}" for line in _numbers(first))
    parts += ["## What ran", numbers, note, "![accuracy over noise](noise.png)", _versions(first[0])]
    return _write_markdown(root / "report.md", parts)


# The page of one run

PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>$title</title>
<style>
:root { color-scheme: light dark; --text: #1c1e21; --back: #fff; --soft: #6b7280; --edge: #d9dce1; --card: #f6f7f9; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e6e8eb; --back: #14161a; --soft: #9aa2ad; --edge: #333842; --card: #1d2026; }
}
body { font: 15px/1.5 system-ui, sans-serif; color: var(--text); background: var(--back); max-width: 75rem;
  margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; overflow-wrap: anywhere; } h2 { font-size: 1.15rem; margin-top: 2rem; }
.note, caption { color: var(--soft); text-align: left; }
.cards { display: flex; flex-wrap: wrap; gap: .75rem; padding: 0; list-style: none; }
.cards li { background: var(--card); border: 1px solid var(--edge); border-radius: 6px; padding: .5rem .9rem; }
.cards b { display: block; font-size: 1.3rem; font-variant-numeric: tabular-nums; }
svg { max-width: 100%; height: auto; background: #fff; border: 1px solid var(--edge); border-radius: 6px; }
.scroll { overflow: auto; max-height: 30rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; } td, th { padding: .2rem .7rem;
  border-bottom: 1px solid var(--edge); text-align: right; white-space: nowrap; }
th { position: sticky; top: 0; background: var(--back); }
table.pairs td, table.pairs th { text-align: left; white-space: normal; overflow-wrap: anywhere; }
table.pairs th { font-weight: 400; color: var(--soft); }
.groups { display: flex; flex-wrap: wrap; gap: 1rem 2.5rem; }
pre { background: var(--card); border: 1px solid var(--edge); border-radius: 6px; padding: .7rem; overflow: auto; }
</style>
</head>
<body>
<h1>$title</h1>
<p class="note">$about</p>
<ul class="cards">
$cards
</ul>
<h2>Curves</h2>
$curves
<h2>Calibration</h2>
$calibration
<h2>Evaluations</h2>
<div class="scroll">
$metrics
</div>
<h2>Configuration</h2>
<div class="groups">
$config
</div>
<h2>Made with</h2>
$versions
<h2>Go on</h2>
<pre>$commands</pre>
</body>
</html>
""")

# column -> (heading, format, factor)
COLUMNS = {
    "step": ("step", ".0f", 1),
    "epoch": ("epoch", "g", 1),
    "lr": ("learning rate", ".3g", 1),
    "loss": ("loss", ".4f", 1),
    "ce": ("cross entropy", ".4f", 1),
    "lb": ("teacher's term", ".4f", 1),
    "train_top1": ("train top-1 %", ".2f", 100),
    "test_top1": ("test top-1 %", ".2f", 100),
    "test_top5": ("test top-5 %", ".2f", 100),
    "test_nll": ("test NLL", ".4f", 1),
    "test_ece": ("test ECE", ".4f", 1),
    "images_per_second": ("images/s", ".0f", 1),
    "data_wait": ("data wait %", ".1f", 100),
}
# title -> columns of one panel
PANELS = {
    "Top-1 accuracy, %": ("test_top1", "train_top1"),
    "Training loss": ("loss", "ce", "lb"),
    "Test NLL": ("test_nll",),
    "Calibration error": ("test_ece",),
    "Learning rate": ("lr",),
    "Images per second": ("images_per_second",),
    "Waiting for data, % of the time": ("data_wait",),
}


def write_page(run: Run) -> Path:
    """Write `report.html` into the run's folder: one file that loads nothing; returns its path."""
    text = render(run)
    path = run.path / "report.html"
    write_atomically(path, lambda file: file.write(text.encode()))
    return path


def render(run: Run) -> str:
    """The page of a run as HTML; every text is escaped."""
    config = run.config
    name = run.path.resolve().name
    return PAGE.substitute(
        title=escape(f"{name}: {config.loss.method}, {config.model.model} on {config.data.source}"),
        about=escape(_about(run)),
        cards="\n".join(f"<li>{escape(label)}<b>{escape(value)}</b></li>" for label, value in _headline(run)),
        curves=_curves(run) or '<p class="note">There is no evaluation to draw.</p>',
        calibration=_calibration(run),
        metrics=_metrics(run.rows),
        config="\n".join(_pairs(group, fields) for group, fields in to_dict(config).items()),
        versions=_pairs("", {key: value for key, value in run.versions.items() if value is not None}),
        commands=escape("\n".join(_commands(run.path))),
    )


def _about(run: Run) -> str:
    step = f"{run.last('step'):.0f}"
    if run.result.get("step") != run.last("step"):  # it may have finished once and be training longer now
        return f"Not finished: this is the run at its evaluation at step {step}."
    return f"Finished after {step} steps, {run.last('images_seen'):,.0f} images through the network. Seed {run.seed}."


def _headline(run: Run) -> list[tuple[str, str]]:
    cards: list[tuple[str, float, str]] = [
        ("test top-1", 100 * run.last("test_top1"), "{:.2f} %"),
        ("best (chosen by the test set)", 100 * run.best(), "{:.2f} %"),
        ("test top-5", 100 * run.last("test_top5"), "{:.2f} %"),
        ("test NLL", run.last("test_nll"), "{:.4f}"),
        ("calibration error", run.last("test_ece"), "{:.4f}"),
        ("test images", run.last("test_count"), "{:,.0f}"),
        ("training seconds", run.last("seconds"), "{:,.1f}"),
        ("images per second", run.last("images_per_second"), "{:,.0f}"),
        ("waiting for data", 100 * run.last("data_wait"), "{:.1f} %"),
        ("peak memory", run.peak_mib, "{:,.0f} MiB"),
    ]
    return [(label, form.format(value)) for label, value, form in cards if not math.isnan(value)]


def _svg(figure: Any, label: str) -> str:
    """The figure as an inline SVG element; the same numbers give the same text."""
    import matplotlib

    file = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": label}):
        figure.savefig(file, format="svg", metadata=nothing)
    text = file.getvalue()
    return text[text.index("<svg") :].replace("<svg", f'<svg role="img" aria-label="{escape(label)}"', 1)


def _curves(run: Run) -> str:
    """A picture with a panel per group of columns that the run has measured; empty when it has measured none."""
    by_step = {row["step"]: row for row in run.steps} | {row["step"]: row for row in run.rows}
    panels: dict[str, list[tuple[str, list[float], list[float]]]] = {}
    for title, columns in PANELS.items():
        curves = []
        for name in columns:
            heading, _, factor = COLUMNS[name]
            points = {s: by_step[s].get(name) for s in sorted(by_step)}
            finite = {s: factor * v for s, v in points.items() if v is not None and math.isfinite(v)}
            if finite:
                curves.append((heading, list(finite), list(finite.values())))
        if curves:
            panels[title] = curves
    if not panels:
        return ""
    rows = math.ceil(len(panels) / 2)
    figure, grid = _figure(11, 2.8 * rows, rows, 2)
    axes = grid.flat
    for axis, (title, curves) in zip(axes, panels.items(), strict=False):
        for heading, x, y in curves:
            axis.plot(x, y, label=heading, marker="." if len(x) <= 120 else "")
        if len(curves) > 1:
            axis.legend(fontsize=8)
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
    if len(panels) % 2:
        axes[len(panels)].set_axis_off()
    return _svg(figure, "Curves of the run")


def _calibration(run: Run) -> str:
    """The reliability diagram of the last evaluation, and its bins as a table."""
    if run.calibration is None:
        return '<p class="note">The run has stored no reliability bins.</p>'
    shares, most = run.calibration["share"], max(run.calibration["share"])
    figure, [[axis]] = _figure(5.5, 3.6)
    axis.plot([0, 1], [0, 1], linestyle="--", color="grey", linewidth=1)
    rows = []
    for index, (share, accuracy, confidence) in enumerate(
        zip(shares, run.calibration["accuracy"], run.calibration["confidence"], strict=True)
    ):
        if not share:
            continue
        low, width = index / len(shares), 1 / len(shares)
        axis.bar(low, accuracy, 0.95 * width, align="edge", color="tab:blue", alpha=0.25 + 0.75 * share / most)
        axis.plot([confidence], [accuracy], marker="+", color="tab:orange")
        rows.append((f"{low:.3f} - {low + width:.3f}", f"{100 * share:.1f}", f"{accuracy:.3f}", f"{confidence:.3f}"))
    axis.set(title="Reliability, last evaluation", xlabel="confidence", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1))
    axis.grid(alpha=0.3)
    return (
        f"{_svg(figure, 'Reliability diagram')}\n"
        '<p class="note">A bar is the accuracy of the images in a bin of confidence, darker where there are more; the '
        "cross is at their mean confidence. Below the dashed line the model is surer than it is right. The "
        "calibration error is the mean distance to that line, weighted by the images in a bin.</p>\n"
        + _html_table(("confidence", "images %", "accuracy", "mean confidence"), rows)
    )


def _metrics(rows: Sequence[Mapping[str, float]]) -> str:
    shown = {name: column for name, column in COLUMNS.items() if any(name in row for row in rows)}
    body = [[format(f * row[n], form) if n in row else "" for n, (_, form, f) in shown.items()] for row in rows]
    return _html_table([heading for heading, _, _ in shown.values()], body)


def _html_table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    def cells(row: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in row) + "</tr>"

    rows = "\n".join(cells(row, "td") for row in body)
    return f"<table>\n<thead>{cells(head, 'th')}</thead>\n<tbody>\n{rows}\n</tbody>\n</table>"


def _pairs(caption: str, fields: Mapping[str, Any]) -> str:
    rows = "\n".join(f"<tr><th>{escape(str(k))}</th><td>{escape(_plain(v))}</td></tr>" for k, v in fields.items())
    above = f"<caption>{escape(caption)}</caption>" if caption else ""
    return f'<table class="pairs">{above}\n{rows}\n</table>'


def _plain(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "-"
    return "-" if value is None else str(value)


def _commands(path: Path) -> list[str]:
    run = shlex.quote(str(path))
    return [
        f"dlb-fast train --resume --out {run}                  # go on, or train longer with --epochs N",
        f"dlb-fast eval {run} --weights best                   # the scores again, or on other data with --data",
        f"dlb-fast report {run} OTHER_RUN                      # side by side",
    ]
