"""Tables, curves and a Markdown page from run folders; every figure is read from the runs' own files."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dlb_fast.train.config import RunConfig, load_config
from dlb_fast.train.state import write_atomically

__all__ = [
    "Run", "compare_table", "draw_curves", "noise_table", "paired_table", "read_run", "write_noise_report",
    "write_report",
]  # fmt: skip

Row = dict[str, float]


@dataclass(frozen=True)
class Run:
    """One run as its folder tells it: label of its method, seed, config, and a row per evaluation."""

    path: Path
    label: str
    config: RunConfig
    versions: dict[str, Any]
    rows: list[Row]
    peak_mib: float = math.nan

    @property
    def seed(self) -> int:
        """The run's seed."""
        return self.config.train.seed

    def last(self, column: str) -> float:
        """A column at the end of the run."""
        return self.rows[-1].get(column, math.nan)

    def best(self, column: str = "test_top1") -> float:
        """The largest value of a column over all evaluations."""
        return max(row[column] for row in self.rows)


def read_run(path: Path | str, label: str | None = None) -> Run:
    """Read a run folder.

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
    versions = path / "versions.json"
    known = json.loads(versions.read_text(encoding="utf-8")) if versions.exists() else {}
    finished = path / "result.json"
    result = json.loads(finished.read_text(encoding="utf-8")) if finished.exists() else {}
    peak = result.get("peak_mib")
    return Run(path, label or config.loss.method, config, known, rows, math.nan if peak is None else peak)


def _groups(runs: Sequence[Run]) -> dict[str, list[Run]]:
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.label, []).append(run)
    return groups


def _spread(values: Sequence[float], scale: float = 1.0, form: str = ".2f") -> str:
    """Mean and sample standard deviation; a single value has none, and what was not measured is left out."""
    values = [scale * v for v in values if not math.isnan(v)]
    if not values:
        return "-"
    mean = format(statistics.fmean(values), form)
    return f"{mean} ± {format(statistics.stdev(values), form)}" if len(values) > 1 else mean


def _table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns line up in a terminal too."""
    widths = [max(len(r[i]) for r in (head, *body)) for i in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(c.ljust(w) for c, w in zip(cells, widths, strict=True)) + " |"

    return "\n".join([line(head), "|" + "|".join("-" * (w + 2) for w in widths) + "|", *map(line, body)])


def compare_table(runs: Sequence[Run]) -> str:
    """A row per method: test accuracy at the end and at its best, likelihood, calibration, images, seconds, memory."""
    head = (
        "method", "seeds", "last top-1 %", "best top-1 %", "last NLL", "last ECE", "images seen", "steps", "seconds",
        "peak MiB",
    )  # fmt: skip
    body = []
    for label, group in _groups(runs).items():
        body.append(
            (
                label,
                str(len(group)),
                _spread([r.last("test_top1") for r in group], 100),
                _spread([r.best() for r in group], 100),
                _spread([r.last("test_nll") for r in group], form=".3f"),
                _spread([r.last("test_ece") for r in group], form=".3f"),
                "/".join(sorted({f"{r.last('images_seen'):.0f}" for r in group})),
                "/".join(sorted({f"{r.last('step'):.0f}" for r in group})),
                _spread([r.last("seconds") for r in group], form=".1f"),
                _spread([r.peak_mib for r in group], form=".0f"),
            )
        )
    return _table(head, body)


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


def draw_curves(runs: Sequence[Run], path: Path) -> Path:
    """Test accuracy, test NLL and training loss over images seen: mean over seeds, band of one standard deviation."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = (("test_top1", "test top-1"), ("test_nll", "test NLL"), ("loss", "training loss"))
    figure, axes = plt.subplots(1, len(panels), figsize=(5 * len(panels), 4), layout="constrained")
    for axis, (column, title) in zip(axes, panels, strict=True):
        for label, group in _groups(runs).items():
            length = min(len(r.rows) for r in group)
            x = [group[0].rows[i]["images_seen"] for i in range(length)]
            values = [[r.rows[i].get(column, math.nan) for r in group] for i in range(length)]
            mean = [statistics.fmean(v) for v in values]
            band = [statistics.stdev(v) if len(v) > 1 else 0.0 for v in values]
            (drawn,) = axis.plot(x, mean, label=f"{label} (n={len(group)})")
            low, high = ([m + s * b for m, b in zip(mean, band, strict=True)] for s in (-1, 1))
            axis.fill_between(x, low, high, color=drawn.get_color(), alpha=0.15, linewidth=0)
        axis.set_title(title)
        axis.set_xlabel("images seen")
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=110))
    plt.close(figure)
    return path


def _method_numbers(runs: Sequence[Run]) -> list[str]:
    """What each method ran with, as its config says."""
    lines = []
    for label, group in _groups(runs).items():
        loss = {k: v for k, v in dataclasses.asdict(group[0].config.loss).items() if v is not None}
        lines.append(f"{label}: " + ", ".join(f"{k} {v}" for k, v in loss.items() if k not in ("impl",)))
    return lines


def _caveat(config: RunConfig) -> str:
    scarce = []
    if config.data.per_class:
        scarce.append("few images")
    if config.data.label_noise:
        scarce.append("wrong labels")
    if not scarce:
        return "this says nothing about others."
    return f"{' and '.join(scarce)} favour every method that smooths targets; the gap is no promise for other settings."


def write_report(folder: Path, runs: Sequence[Run], *, title: str, command: str, against: str = "DLB") -> Path:
    """Write `curves.png` and `report.md` into a folder; returns the page's path."""
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
        *_method_numbers(runs),
    ]
    versions = ", ".join(f"{k} {v}" for k, v in first.versions.items() if v is not None)
    paired = paired_table(runs, against)
    parts = [
        f"# {title}",
        f"Command: `{command}`",
        "\n".join(f"- {line}" for line in setting),
        compare_table(runs),
        "Mean ± sample standard deviation over seeds. *last* is the end of training; *best* picks the evaluation by "
        "the test set itself and is therefore optimistic, as in the official code. All methods make the same number of "
        "optimiser steps on the same number of rows; DLB and its alpha=0 control start with one half batch less. "
        "Forwards of teachers (MrKD's copies) are not counted as images; their time is. *seconds* is the training time "
        "of one run, on a machine that may have run others beside it; *peak* is that of the process (CPU) or of the "
        "device (GPU).",
        paired,
        f"One data set, one network: {_caveat(first.config)}",
        "![curves](curves.png)",
        f"Versions: {versions}",
    ]
    text = "\n\n".join(p for p in parts if p) + "\n"
    path = folder / "report.md"
    write_atomically(path, lambda file: file.write(text.encode()))
    return path


def noise_table(found: Mapping[float, Sequence[Run]]) -> str:
    """A row per method, a column per share of wrong training labels: test accuracy at the end of training."""
    groups = {share: _groups(runs) for share, runs in found.items()}
    labels = list(next(iter(groups.values())))
    head = ["last top-1 %, mean ± standard deviation", "seeds", *(f"{100 * share:g} % wrong" for share in found)]
    body = []
    for label in labels:
        tried = [groups[share].get(label, []) for share in found]
        seeds = "/".join(sorted({str(len(runs)) for runs in tried}))
        body.append([label, seeds, *(_spread([r.last("test_top1") for r in runs], 100) for runs in tried)])
    return _table(head, body)


def write_noise_report(root: Path, found: Mapping[float, Sequence[Run]], *, title: str, command: str) -> Path:
    """Write `noise.png` and `report.md` over comparisons at several shares of wrong labels; returns the page's path."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 5), layout="constrained")
    shares = list(found)
    for label in _groups(found[shares[0]]):
        scores = [[100 * r.last("test_top1") for r in _groups(found[s]).get(label, [])] for s in shares]
        spread = [statistics.stdev(v) if len(v) > 1 else 0.0 for v in scores]
        axis.errorbar([100 * s for s in shares], [statistics.fmean(v) for v in scores], spread, label=label, capsize=2)
    axis.set_xlabel("wrong training labels, %")
    axis.set_ylabel("test top-1 at the end, %")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7)
    write_atomically(root / "noise.png", lambda file: figure.savefig(file, format="png", dpi=110))
    plt.close(figure)
    parts = [f"# {title}", f"Command: `{command}`", noise_table(found)]
    for share, runs in found.items():
        parts += [f"## {100 * share:g} % wrong labels", compare_table(runs), paired_table(runs, "DLB")]
    first = found[shares[0]][0]
    versions = ", ".join(f"{k} {v}" for k, v in first.versions.items() if v is not None)
    numbers = "\n".join(f"- {line}" for line in _method_numbers(found[shares[0]]))
    note = "One small data set and one small network: no promise for others. Test labels are never wrong."
    parts += ["## What ran", numbers, note, "![accuracy over noise](noise.png)", f"Versions: {versions}"]
    path = root / "report.md"
    text = "\n\n".join(part for part in parts if part) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))
    return path
