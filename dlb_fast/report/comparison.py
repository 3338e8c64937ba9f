"""Several runs side by side: tables, curves and a Markdown page."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dlb_fast.train.config import RunConfig
from dlb_fast.train.state import write_atomically

from .runs import Run

__all__ = ["compare_table", "draw_curves", "noise_table", "paired_table", "write_noise_report", "write_report"]


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
    """Test accuracy, test NLL and training loss over images seen, and the reliability of the last evaluation.

    Curves are means over seeds with a band of one standard deviation. The reliability is that of all images of all
    seeds: accuracy over mean confidence, a point per bin, as large as the bin is full.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = (("test_top1", "test top-1"), ("test_nll", "test NLL"), ("loss", "training loss"))
    calibrated = any(run.calibration for run in runs)
    count = len(panels) + calibrated
    figure, axes = plt.subplots(1, count, figsize=(5 * count, 4), layout="constrained")
    for axis, (column, title) in zip(axes, panels, strict=not calibrated):
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
    if calibrated:
        _draw_reliability(axes[-1], runs)
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=110))
    plt.close(figure)
    return path


def _draw_reliability(axis: Any, runs: Sequence[Run]) -> None:
    axis.plot([0, 1], [0, 1], linestyle="--", color="grey", linewidth=1)
    for label, group in _groups(runs).items():
        points = pooled_reliability([run.calibration for run in group if run.calibration])
        drawn = axis.plot([x for _, x, _ in points], [y for _, _, y in points], label=label)[0]
        sizes = [120 * share for share, _, _ in points]
        axis.scatter([x for _, x, _ in points], [y for _, _, y in points], s=sizes, color=drawn.get_color())
    axis.set_title("reliability, last evaluation")
    axis.set_xlabel("mean confidence")
    axis.set_ylabel("accuracy")
    axis.grid(alpha=0.3)


def pooled_reliability(found: Sequence[Mapping[str, Sequence[float]]]) -> list[tuple[float, float, float]]:
    """(share, mean confidence, accuracy) of every bin that is not empty, over test sets of one size."""
    points = []
    for bins in zip(*(zip(c["share"], c["confidence"], c["accuracy"], strict=True) for c in found), strict=True):
        full = sum(share for share, _, _ in bins)
        if full:
            sure = sum(share * confidence for share, confidence, _ in bins) / full
            right = sum(share * accuracy for share, _, accuracy in bins) / full
            points.append((full / len(bins), sure, right))
    return points


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
