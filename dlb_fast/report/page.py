"""One page per run: a single HTML file without scripts and without anything from elsewhere, readable in light and dark.

Every figure is read from the run's own files; every text is escaped.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from dlb_fast.train.config import to_dict
from dlb_fast.train.state import write_atomically

from . import svg
from .runs import Run

__all__ = ["render", "write_page"]

PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>$title</title>
<style>
:root { color-scheme: light dark; --text: #1c1e21; --back: #fff; --soft: #6b7280; --edge: #d9dce1; --card: #f6f7f9;
  --c0: #1f6feb; --c1: #c2410c; --c2: #15803d; --c3: #7e22ce; }
@media (prefers-color-scheme: dark) { :root { --text: #e6e8eb; --back: #14161a; --soft: #9aa2ad; --edge: #333842;
  --card: #1d2026; --c0: #6ea8fe; --c1: #fb923c; --c2: #4ade80; --c3: #c084fc; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--text); background: var(--back); max-width: 75rem;
  margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; overflow-wrap: anywhere; } h2 { font-size: 1.15rem; margin-top: 2rem; }
.note, caption { color: var(--soft); text-align: left; }
.cards { display: flex; flex-wrap: wrap; gap: .75rem; padding: 0; list-style: none; }
.cards li { background: var(--card); border: 1px solid var(--edge); border-radius: 6px; padding: .5rem .9rem; }
.cards b { display: block; font-size: 1.3rem; font-variant-numeric: tabular-nums; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(26rem, 100%), 1fr)); gap: 1rem; }
svg { width: 100%; height: auto; background: var(--card); border: 1px solid var(--edge); border-radius: 6px; }
svg text { font: 12px system-ui, sans-serif; fill: var(--text); } svg .title { font-weight: 600; }
svg .grid { stroke: var(--edge); } svg .curve { fill: none; stroke-width: 1.8; }
svg .diagonal { stroke: var(--soft); stroke-dasharray: 5 4; } svg .bar { fill: var(--c0); }
svg .cross { stroke: var(--c1); stroke-width: 1.5; fill: none; }
svg .c0 { stroke: var(--c0); fill: var(--c0); } svg .c1 { stroke: var(--c1); fill: var(--c1); }
svg .c2 { stroke: var(--c2); fill: var(--c2); } svg .c3 { stroke: var(--c3); fill: var(--c3); }
svg polyline.curve { fill: none; } svg text.legend { stroke: none; font-weight: 600; }
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
<div class="charts">
$charts
</div>
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

# column -> (heading, form); percentages are scaled
COLUMNS = {
    "step": ("step", ".0f"), "epoch": ("epoch", "g"), "lr": ("rate", ".3g"), "loss": ("loss", ".4f"),
    "ce": ("cross entropy", ".4f"), "lb": ("teacher's term", ".4f"), "train_top1": ("train top-1 %", ".2f"),
    "test_top1": ("test top-1 %", ".2f"), "test_top5": ("test top-5 %", ".2f"), "test_nll": ("test NLL", ".4f"),
    "test_ece": ("test ECE", ".4f"), "images_per_second": ("images/s", ".0f"), "data_wait": ("data wait %", ".1f"),
}  # fmt: skip
PERCENT = ("train_top1", "test_top1", "test_top5", "data_wait")


def render(run: Run) -> str:
    """The page of a run as HTML."""
    config = run.config
    name = run.path.resolve().name
    return PAGE.substitute(
        title=escape(f"{name}: {config.loss.method}, {config.model.model} on {config.data.source}"),
        about=escape(_about(run)),
        cards="\n".join(f"<li>{escape(label)}<b>{escape(value)}</b></li>" for label, value in _headline(run)),
        charts="\n".join(_charts(run)) or '<p class="note">There is no evaluation to draw.</p>',
        calibration=_calibration(run),
        metrics=_metrics(run.rows),
        config="\n".join(_pairs(group, fields) for group, fields in to_dict(config).items()),
        versions=_pairs("", {key: value for key, value in run.versions.items() if value is not None}),
        commands=escape("\n".join(_commands(run.path))),
    )


def write_page(run: Run) -> Path:
    """Write `report.html` into the run's folder; returns its path."""
    text = render(run)
    path = run.path / "report.html"
    write_atomically(path, lambda file: file.write(text.encode()))
    return path


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


def _charts(run: Run) -> list[str]:
    by_step = {row["step"]: row for row in run.steps} | {row["step"]: row for row in run.rows}
    every = [by_step[step] for step in sorted(by_step)]

    def curve(label: str, column: str, rows: Sequence[Mapping[str, Any]], scale: float = 1.0) -> svg.Series:
        known = [row for row in rows if row.get(column) is not None]
        return svg.Series(label, [row["step"] for row in known], [scale * row[column] for row in known])

    accuracy = [curve("test", "test_top1", run.rows, 100), curve("train", "train_top1", run.rows, 100)]
    terms = [curve("loss", "loss", every), curve("cross entropy", "ce", every), curve("teacher's term", "lb", every)]
    speed = [curve("images/s", "images_per_second", run.rows)]
    drawn = (
        svg.line("Top-1 accuracy, %", accuracy, "step"),
        svg.line("Training loss", terms, "step"),
        svg.line("Test NLL", [curve("test", "test_nll", run.rows)], "step"),
        svg.line("Calibration error", [curve("test", "test_ece", run.rows)], "step"),
        svg.line("Learning rate", [curve("rate", "lr", every)], "step"),
        svg.line("Images per second", speed, "step"),
        svg.line("Waiting for data, % of the time", [curve("wait", "data_wait", run.rows, 100)], "step"),
    )
    return [chart for chart in drawn if chart]


def _calibration(run: Run) -> str:
    if run.calibration is None:
        return '<p class="note">The run has stored no reliability bins.</p>'
    bins = run.calibration
    chart = svg.reliability("Reliability at the last evaluation", bins["share"], bins["accuracy"], bins["confidence"])
    return (
        f'<div class="charts">{chart}</div>\n<p class="note">A bar is the accuracy of the images whose confidence fell '
        "there, as strong as the bin is full; the cross is at their mean confidence. Below the dashed line the model "
        "is surer than it is right. The calibration error is the mean distance, weighted by the images in a bin.</p>"
    )


def _metrics(rows: Sequence[Mapping[str, float]]) -> str:
    shown = [name for name in COLUMNS if any(name in row for row in rows)]
    head = "".join(f"<th>{escape(COLUMNS[name][0])}</th>" for name in shown)

    def cell(row: Mapping[str, float], name: str) -> str:
        if name not in row:
            return "<td></td>"
        return f"<td>{format(row[name] * (100 if name in PERCENT else 1), COLUMNS[name][1])}</td>"

    body = "\n".join(f"<tr>{''.join(cell(row, name) for name in shown)}</tr>" for row in rows)
    return f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>"


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
        f"dlb-fast export {run} --format onnx                  # the model alone: safetensors, onnx, torch_export",
        f"dlb-fast report {run} OTHER_RUN                      # side by side",
    ]
